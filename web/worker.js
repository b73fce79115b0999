/** The page's second thread: the network, the song that is open, its pictures and its files. */
import createKissFft from "./ort/kissfft.js";
import { LiveStream } from "./live.js";
import { Network, Song, appliedLevels } from "./separator.js";
import { wavBlob } from "./wav.js";

const COLUMNS = 1200, ROWS = 140, LOW_HZ = 62.5, OCTAVES = 7; // of the pictures
const SPECTROGRAM_DB = [-85, -10]; // black and white, re a full-scale sine

const networks = {}; // by name: promises
let song, picture, levels;
let turn; // of the song that is open: what belongs to an earlier one stops
let waiting = []; // pieces that the mask does not reach yet

const nextTask = () => new Promise(resolve => setTimeout(resolve));

function load(name, mayUseGpu = false) {
  networks[name] ??= fetch(`${name}.onnx`).then(async answer => {
    if (!answer.ok) throw new Error(`the network ${name} is not there (make web exports it)`);
    const bytes = new Uint8Array(await answer.arrayBuffer());
    return (mayUseGpu && await loadOnGpu(bytes)) || loadOn("wasm", bytes);
  }).catch(error => {
    delete networks[name]; // the next song tries again
    throw error;
  });
  return networks[name];
}

async function loadForSongs(name) {
  const network = await load(name, true), { facts, provider } = network;
  postMessage({ type: "facts", name, facts, provider });
  return network;
}

async function loadOn(provider, bytes) {
  const ort = await import(`./ort/ort.${provider}.min.mjs`);
  ort.env.wasm.numThreads = 1; // more need headers that plain hosts do not send
  ort.env.logLevel = "error";
  return Network.load(ort, await createKissFft(), bytes, provider);
}

/** The network on a GPU that computes it; null without one. */
async function loadOnGpu(bytes) {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    if (!adapter || adapter.info.isFallbackAdapter) return null; // a CPU that plays one
    return await loadOn("webgpu", bytes);
  } catch {
    return null;
  }
}

const answers = {
  load: ({ name }) => loadForSongs(name),

  async open({ turn: mine, name, wav, rate, changed }) {
    turn = mine;
    waiting = [];
    song = picture = null;
    if (changed) levels = appliedLevels(changed);
    const network = await loadForSongs(name);
    if (mine !== turn) return;
    levels ??= appliedLevels(network.facts.mask_settings);
    const opened = await Song.open(network, rate, wav, wav[0].length);
    if (mine !== turn) return;
    song = opened;
    picture = newPicture(song);
    song.onFrame = (frame, energies) => keepColumn(picture, frame, energies);
    while (song.nColumns < song.nFrames) {
      await song.analyse(song.blockFrames);
      if (mine !== turn) return;
      waiting = waiting.filter(request => !send(request));
      draw(picture);
      postMessage({ type: "progress", turn, share: song.nColumns / song.nFrames });
      await nextTask();
      if (mine !== turn) return;
    }
  },

  adjust({ changed }) {
    levels = appliedLevels(changed);
    if (!picture) return;
    picture.nDrawn = 0;
    draw(picture);
  },

  piece(request) {
    if (!send(request)) waiting.push(request);
  },

  async stem({ name, isVocals }) {
    const mine = turn, chosen = levels, { wav, nSamples, grid } = song, blob = wavBlob(wav, nSamples, grid.rate);
    for (let start = 0; start < nSamples; start += grid.rate) {
      const n = Math.min(grid.rate, nSamples - start);
      blob.add(start, song.render(start, n, chosen), isVocals);
      await nextTask();
      if (mine !== turn) return;
    }
    postMessage({ type: "stem", turn, name, blob: blob.finish() });
  },

  async live({ id, name, rate, nChannels, changed, port }) {
    if (changed) levels = appliedLevels(changed);
    const network = await load(name);
    levels ??= appliedLevels(network.facts.mask_settings);
    const stream = await LiveStream.open(network, rate, nChannels);
    port.onmessage = async ({ data }) => {
      const vocals = await stream.push(data, levels);
      if (vocals) port.postMessage(vocals, vocals.map(channel => channel.buffer));
    };
    postMessage({ type: "live", id, delay: stream.delay });
  },
};

onmessage = async ({ data }) => {
  try {
    await answers[data.type](data);
  } catch (error) {
    postMessage({ type: "error", text: error.message, isLive: data.type === "live" });
  }
};

/** Answer a request for vocals and accompaniment, (n_channels, n) each, if the mask is there. */
function send({ id, start, n }) {
  if (!song || song.nReady < Math.min(start + n, song.nSamples)) return false;
  const size = Math.min(n, song.nSamples - start);
  const vocals = song.render(start, size, levels);
  const accompaniment = vocals.map((channel, c) =>
    channel.map((sample, i) => song.wav[c][start + i] - sample));
  const buffers = [...vocals, ...accompaniment].map(channel => channel.buffer);
  postMessage({ type: "piece", id, tracks: [vocals, accompaniment] }, buffers);
  return true;
}

/** What is kept of a song to draw it: one frame's energies for every column. */
function newPicture({ nFrames, wav, hp }) {
  const nColumns = Math.min(COLUMNS, nFrames), size = nColumns * hp.n_bins;
  const energies = wav.map(() => new Float32Array(size));
  return { nColumns, energies, nDrawn: 0, frameOf: c => Math.floor((c * nFrames) / nColumns) };
}

function keepColumn({ nColumns, energies, frameOf }, frame, seen) {
  const column = Math.ceil((frame * nColumns) / song.nFrames);
  if (column >= nColumns || frameOf(column) !== frame) return;
  energies.forEach((energy, m) => energy.set(seen[m], column * song.hp.n_bins));
}

/** Send the columns that are new, four pictures of (n, ROWS) levels 0 to 255. */
function draw(picture) {
  const first = picture.nDrawn;
  let n = 0;
  while (first + n < picture.nColumns && picture.frameOf(first + n) < song.nColumns) n++;
  if (!n) return;
  const levelsOf = Array.from({ length: 4 }, () => new Uint8Array(n * ROWS));
  for (let column = 0; column < n; column++) drawColumn(picture, first + column, levelsOf, column);
  picture.nDrawn += n;
  postMessage({ type: "picture", turn, first, nColumns: picture.nColumns, rows: ROWS, levels: levelsOf });
}

function drawColumn({ energies, frameOf }, column, pictures, at) {
  const { n_bins: nBins, sample_rate: rate, n_fft: nFft } = song.hp;
  const [low, high] = SPECTROGRAM_DB, energyAt = column * nBins, maskAt = frameOf(column) * nBins;
  for (let row = 0; row < ROWS; row++) {
    const edge = r => ((LOW_HZ * 2 ** ((r * OCTAVES) / ROWS)) * nFft) / rate + 0.5;
    const from = Math.floor(edge(row)), to = Math.max(from + 1, Math.floor(edge(row + 1)));
    let mixture = 0, vocals = 0, accompaniment = 0;
    for (const [m, energy] of energies.entries())
      for (let k = from; k < Math.min(to, nBins); k++) {
        const share = levels[song.masks[m][maskAt + k]], e = energy[energyAt + k];
        mixture += e;
        vocals += share ** 2 * e;
        accompaniment += (1 - share) ** 2 * e;
      }
    const scaled = e => (10 * Math.log10(Math.max(e, 1e-20)) - low) / (high - low);
    const values = [scaled(mixture), Math.sqrt(vocals / Math.max(mixture, 1e-12)),
      scaled(vocals), scaled(accompaniment)];
    for (const [p, value] of values.entries())
      pictures[p][at * ROWS + row] = 255 * Math.min(1, Math.max(0, value));
  }
}
