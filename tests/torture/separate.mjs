/** node separate.mjs model.onnx samples.f32 rate channels out [live]: what the page makes of them. */
import fs from "node:fs";
import * as ort from "../../web/node_modules/onnxruntime-web/dist/ort.node.min.mjs";
import createKissFft from "../../web/node_modules/@echogarden/kissfft-wasm/kissfft.js";
import { LiveStream } from "../../web/live.js";
import { Network, Song, appliedLevels } from "../../web/separator.js";

const [model, input, rate, nChannels, out, mode] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
ort.env.logLevel = "error";
const bytes = fs.readFileSync(input), samples = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.length / 4);
const nSamples = samples.length / nChannels;
const wav = Array.from({ length: +nChannels }, (_, c) => samples.subarray(c * nSamples, (c + 1) * nSamples));
const network = await Network.load(ort, await createKissFft(), fs.readFileSync(model));
const levels = appliedLevels(network.facts.mask_settings);
const seconds = () => process.cpuUsage().user / 1e6; // of this process: others do not count
const write = (name, wav) => fs.writeFileSync(`${out}.${name}`, Buffer.concat(
  wav.map((_, c) => c).flatMap(c => parts.map(part => Buffer.from(part[c].buffer)))));
const parts = [];

async function asLive() {
  const stream = await LiveStream.open(network, +rate, +nChannels);
  const began = seconds();
  for (let start = 0; start < nSamples; start += 256) {
    const part = await stream.push(wav.map(channel => channel.slice(start, start + 256)), levels);
    if (part) parts.push(part);
  }
  return { live: seconds() - began, delay: stream.delay };
}

async function asSong() {
  const song = await Song.open(network, +rate, wav, nSamples);
  const began = seconds();
  while (song.nColumns < song.nFrames) await song.analyse(song.blockFrames);
  const analysed = seconds();
  for (let start = 0; start < nSamples; start += 50_000)
    parts.push(song.render(start, Math.min(50_000, nSamples - start), levels));
  fs.writeFileSync(`${out}.mask`, Buffer.concat(song.masks));
  return { network: analysed - began, render: seconds() - analysed };
}

console.log(JSON.stringify(await (mode === "live" ? asLive() : asSong())));
write("vocals", wav);
