/** node separate.mjs model.onnx samples.f32 rate channels out: masks and vocals, as the page makes them. */
import fs from "node:fs";
import * as ort from "../../web/node_modules/onnxruntime-web/dist/ort.node.min.mjs";
import { Network, Song, appliedLevels } from "../../web/separator.js";

const [model, input, rate, nChannels, out] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const bytes = fs.readFileSync(input), samples = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
const nSamples = samples.length / nChannels;
const wav = Array.from({ length: +nChannels }, (_, c) => samples.subarray(c * nSamples, (c + 1) * nSamples));
const network = await Network.load(ort, fs.readFileSync(model));
const song = await Song.open(network, +rate, wav, nSamples);
const began = performance.now();
while (song.nColumns < song.nFrames) await song.analyse(32);
const analysed = performance.now();
const levels = appliedLevels(network.facts.mask_settings);
const parts = [];
for (let start = 0; start < nSamples; start += 50_000)
  parts.push(song.render(start, Math.min(50_000, nSamples - start), levels));
const rendered = performance.now();
fs.writeFileSync(`${out}.mask`, Buffer.concat(song.masks));
fs.writeFileSync(`${out}.vocals`, Buffer.concat(
  wav.flatMap((_, c) => parts.map(part => Buffer.from(part[c].buffer)))));
console.log(JSON.stringify({ network: analysed - began, render: rendered - analysed }));
