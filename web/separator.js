/**
 * From samples to vocals, as separation.py and audio.py do it: STFT, features, network, mask,
 * inverse. A Song holds samples and masks; songs from files and live sound go the same way.
 */
import { Fft } from "./fft.js";

const QUIET_DB = -35, MUSIC_DB = -20, LOUD_DB = 0, MOST_GAIN_DB = 60; // as in audio.py
const BLOCK_FRAMES = 32; // a call of the network: between two looks at what a page asks for
const RELEASE_DB = 2; // a second, at which a loud passage is forgotten

/** Choose window and hop [samples] at a sample rate [Hz], as audio.grid_at does. */
export function gridAt(rate, hp) {
  const exact = (hp.hop_length * rate) / hp.sample_rate, hops = [];
  for (let hop = Math.ceil(exact * 0.99); hop <= Math.floor(exact * 1.01); hop++) hops.push(hop);
  if (!hops.length) hops.push(Math.max(1, Math.round(exact)));
  const key = hop => [Math.max(7, largestPrime(hop)), Math.abs(hop - exact)];
  hops.sort((a, b) => key(a)[0] - key(b)[0] || key(a)[1] - key(b)[1]);
  const hop = hops[0], nFft = hop * Math.floor(hp.n_fft / hp.hop_length);
  return { rate, hop, nFft, nBins: nFft / 2 + 1 };
}

function largestPrime(number) {
  let largest = 1;
  for (let factor = 2; number > 1; factor++)
    for (; number % factor === 0; number /= factor) largest = factor;
  return largest;
}

/** Read what tools.export wrote beside the graph: the metadata of an ONNX file (field 14). */
export function readFacts(bytes) {
  const facts = {};
  for (const [field, value] of protobufFields(bytes)) {
    if (field !== 14) continue;
    const [name, text] = [...protobufFields(value)].map(([, part]) => new TextDecoder().decode(part));
    facts[name] = JSON.parse(text);
  }
  return facts;
}

/** Yield number and bytes of the length-delimited fields of a protobuf message. */
function* protobufFields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (; bytes[at] > 127; scale *= 128) value += (bytes[at++] & 127) * scale;
    return value + bytes[at++] * scale;
  };
  while (at < bytes.length) {
    const tag = varint(), kind = tag & 7;
    const size = kind === 1 ? 8 : kind === 5 ? 4 : varint(); // kind 0 is a number, and read by that
    if (kind === 0) continue;
    if (kind === 2) yield [tag >> 3, bytes.subarray(at, at + size)];
    at += size;
  }
}

/** A trained network in onnxruntime, and the facts that came with it. */
export class Network {
  /** @param kiss KISS FFT, loaded */
  static async load(ort, kiss, bytes, provider = "wasm") {
    const network = new Network();
    Object.assign(network, { ort, kiss, provider, ffts: {} }); // by size
    network.previous = Promise.resolve();
    network.facts = readFacts(bytes);
    const options = { graphOptimizationLevel: "all", executionProviders: [provider] };
    network.session = await ort.InferenceSession.create(bytes, options);
    const { hparams, curve_db: curve } = network.facts;
    network.hp = hparams;
    network.weights = Float64Array.from(curve, db => 10 ** (db / 10)); // of energies
    network.slope = (-5 * hparams.mixture_power) / hparams.min_level_db;
    network.offsets = Float64Array.from(curve, db => 1 - db / hparams.min_level_db);
    await network.silence(1); // what is wrong with it is told before a song is there
    return network;
  }

  /** The memory of all layers after silence without end, of n masks. */
  async silence(n) {
    this.quiet ??= await this.#quiet();
    const past = {};
    for (const [name, { dims, data }] of Object.entries(this.quiet)) {
      past[name] = this.#tensor([n, ...dims.slice(1)]);
      for (let i = 0; i < n; i++) past[name].data.set(data, i * data.length);
    }
    return past;
  }

  async #quiet() {
    const { hp } = this, past = {};
    for (const { name, shape } of this.session.inputMetadata.slice(1))
      past[name] = this.#tensor([1, ...shape.slice(1)]);
    const n = Math.ceil(hp.stft_frames / hp.mask_frames) * hp.mask_frames;
    await this.columns(new Float32Array(hp.n_bins * n), [1, 1, hp.n_bins, n], past);
    return past;
  }

  #tensor(shape, numbers = new Float32Array(shape.reduce((a, b) => a * b, 1))) {
    return new this.ort.Tensor("float32", numbers, shape);
  }

  /** Map n_columns new frames of features, (n, 1, n_bins, n_columns), to masks in [0, 1]. */
  async columns(features, shape, past) {
    const x = this.#tensor(shape, features);
    const call = this.previous.then(() => this.session.run({ features: x, ...past }));
    this.previous = call.catch(() => {}); // a session takes one call at a time
    const results = await call;
    for (const name of Object.keys(past)) past[name] = results[name.replace("past", "next")];
    return results.mask.data;
  }
}

/** What is applied for each of the 256 levels of a mask, as audio.vocals_mask. */
export function appliedLevels(settings) {
  return Float32Array.from({ length: 256 }, (_, level) => {
    const mask = level / 255;
    if (settings.mask_at_eval) return mask > settings.eval_mask_threshold ? 1 : 0;
    return mask < settings.noise_gate ? 0 : mask ** settings.mask_sharpness;
  });
}

/** A recording, its masks as far as they are known, and what they make of it. */
export class Song {
  /** @param wav channels that hold nSamples; a live song starts with none and grows */
  static async open(network, rate, wav, nSamples) {
    const song = new Song();
    const { hp } = network, grid = gridAt(rate, hp);
    Object.assign(song, { network, hp, grid, wav, nSamples });
    const n = wav.length;
    song.isMidSide = n === 2; // a mask for each of them, more channels have their own
    song.nFrames = 1 + Math.floor(nSamples / grid.hop);
    song.past = await network.silence(n);
    song.blockFrames = BLOCK_FRAMES - (BLOCK_FRAMES % hp.mask_frames);
    song.nAnalysed = 0; // frames that the network has seen
    song.nColumns = 0; // frames of which the mask is known
    song.dropped = 0; // frames of a live song that are forgotten
    song.peakDb = -Infinity;
    song.fft = network.ffts[grid.nFft] ??= new Fft(network.kiss, grid.nFft);
    const angles = Float64Array.from({ length: grid.nFft }, (_, i) => (2 * Math.PI * i) / grid.nFft);
    song.window = angles.map(angle => (1 - Math.cos(angle)) / 2); // Hann, periodic
    song.re = new Float64Array(grid.nFft);
    song.im = new Float64Array(grid.nFft);
    song.onFrame = null; // (frame, energies of all channels) while they are analysed
    song.reserve(song.nFrames);
    return song;
  }

  /** Make room for the masks of so many frames. */
  reserve(nFrames) {
    this.masks = this.wav.map(() => new Uint8Array(nFrames * this.hp.n_bins));
  }

  /** Transform two channels at once, as real and imaginary part; what is outside is silence. */
  #transform(frame, pair) {
    const { re, im, window, fft, wav } = this, { hop, nFft } = this.grid;
    const start = (frame - this.dropped) * hop - nFft / 2;
    const first = wav[2 * pair], second = wav[2 * pair + 1], size = this.nSamples - this.dropped * hop;
    for (let i = 0; i < nFft; i++) {
      const at = start + i, isInside = at >= 0 && at < size;
      const a = isInside ? first[at] : 0, b = isInside && second ? second[at] : 0;
      re[i] = window[i] * (this.isMidSide ? (a + b) / 2 : a);
      im[i] = window[i] * (this.isMidSide ? (a - b) / 2 : b);
    }
    fft.transform(re, im);
  }

  /** Split bin k of the transform into the energies of the pair, a full-scale sine being 1. */
  #energies(k) {
    const { re, im } = this, { nFft } = this.grid, mirror = (nFft - k) % nFft;
    const scale = (2 / nFft) ** 2; // the window's 4 / nFft, and the halves below
    const ar = re[k] + re[mirror], ai = im[k] - im[mirror];
    const br = im[k] + im[mirror], bi = re[mirror] - re[k];
    return [(ar * ar + ai * ai) * scale, (br * br + bi * bi) * scale];
  }

  /** Return the energies of a frame that the network sees, (n_channels, n_bins). */
  #seen(frame) {
    const nBins = this.hp.n_bins, nKnown = Math.min(nBins, this.grid.nBins);
    const energies = this.wav.map(() => new Float64Array(nBins));
    if (frame >= this.nFrames) return energies; // after the song there is silence
    for (let pair = 0; 2 * pair < this.wav.length; pair++) {
      this.#transform(frame, pair);
      const [first, second] = [energies[2 * pair], energies[2 * pair + 1]];
      for (let k = 0; k < nKnown; k++) {
        const [a, b] = this.#energies(k);
        first[k] = a;
        if (second) second[k] = b;
      }
    }
    return energies;
  }

  /** The gain of energies that moves a far too soft or loud recording to where music is. */
  #gain(energies, frame) {
    const { weights, hp } = this.network;
    const loudest = Math.max(...energies.map(e => e.reduce((sum, x, k) => sum + x * weights[k], 0)));
    const levelDb = 10 * Math.log10(Math.max(loudest / 3, 1e-20));
    const forgottenDb = frame * ((RELEASE_DB * hp.hop_length) / hp.sample_rate);
    this.peakDb = Math.max(this.peakDb, levelDb + forgottenDb);
    const recordingDb = this.peakDb - forgottenDb;
    const louderDb = Math.min(2 * (QUIET_DB - recordingDb), MUSIC_DB - recordingDb);
    const gainDb = Math.min(MOST_GAIN_DB, Math.max(0, louderDb)) + Math.min(0, LOUD_DB - recordingDb);
    return 10 ** (gainDb / 10);
  }

  /** Show the network n further frames; the mask is then known `lookahead` frames less far. */
  async analyse(n) {
    const { network, hp } = this, nBins = hp.n_bins;
    const features = new Float32Array(this.masks.length * nBins * n);
    for (let i = 0; i < n; i++) {
      const frame = this.nAnalysed + i, energies = this.#seen(frame);
      if (frame < this.nFrames) this.onFrame?.(frame, energies);
      const gain = this.#gain(energies, frame);
      for (const [m, energy] of energies.entries())
        for (let k = 0; k < nBins; k++) {
          const level = Math.log10(Math.max(energy[k] * gain, 1e-20)) * network.slope;
          features[(m * nBins + k) * n + i] = Math.min(1, Math.max(0, level + network.offsets[k]));
        }
    }
    const columns = await network.columns(features, [this.masks.length, 1, nBins, n], this.past);
    for (const [m, mask] of this.masks.entries())
      for (let i = 0; i < n; i++)
        this.#keep(mask, this.nAnalysed + i - hp.lookahead, columns, m * nBins * n + i, n);
    this.nAnalysed += n;
    this.nColumns = Math.min(this.nFrames, Math.max(0, this.nAnalysed - hp.lookahead));
  }

  /** Store a column of n, whose first bin is at `first`, in 256 levels as that of a frame. */
  #keep(mask, frame, columns, first, n) {
    if (frame < this.dropped || frame >= this.nFrames) return;
    const nBins = this.hp.n_bins, at = (frame - this.dropped) * nBins;
    for (let k = 0; k < nBins; k++) mask[at + k] = Math.round(255 * columns[first + k * n]);
  }

  /** Samples from the start that can be rendered: the masks of all their frames are known. */
  get nReady() {
    if (this.nColumns >= this.nFrames) return this.nSamples;
    return Math.max(0, this.nColumns * this.grid.hop - this.grid.nFft / 2);
  }

  /** Return the vocals of samples start … start + n of all channels, with `appliedLevels`. */
  render(start, n, levels) {
    const { hop, nFft } = this.grid, { window } = this;
    const vocals = this.wav.map(() => new Float32Array(n)), envelope = new Float64Array(n);
    const sums = this.wav.map(() => new Float64Array(n));
    const first = Math.max(0, Math.floor((start - nFft / 2) / hop) + 1);
    const last = Math.min(this.nColumns - 1, Math.ceil((start + n + nFft / 2) / hop) - 1);
    for (let frame = first; frame <= last; frame++) {
      const offset = frame * hop - nFft / 2 - start;
      const from = Math.max(0, -offset), to = Math.min(nFft, n - offset);
      for (let i = from; i < to; i++) envelope[offset + i] += window[i] ** 2;
      for (let pair = 0; 2 * pair < this.wav.length; pair++) {
        this.#masked(frame, pair, levels);
        const [a, b] = [sums[2 * pair], sums[2 * pair + 1]];
        for (let i = from; i < to; i++) {
          a[offset + i] += window[i] * this.re[i];
          if (b) b[offset + i] += window[i] * this.im[i];
        }
      }
    }
    for (const [c, sum] of sums.entries())
      for (let i = 0; i < n; i++) vocals[c][i] = sum[i] / (nFft * Math.max(0.1, envelope[i]));
    if (this.isMidSide) toLeftRight(vocals);
    return vocals;
  }

  /** Leave in (im, re) nFft times the masked frames of two channels, as real and imaginary part. */
  #masked(frame, pair, levels) {
    const { re, im, fft } = this, { nFft, nBins } = this.grid;
    this.#transform(frame, pair);
    const at = (frame - this.dropped) * this.hp.n_bins, nKnown = this.hp.n_bins;
    const maskA = this.masks[2 * pair], maskB = this.masks[2 * pair + 1] ?? maskA;
    const [shareA, shareB] = this.#shares(maskA, maskB, at, levels);
    for (let k = 0; k < nBins; k++) {
      const a = k < nKnown ? levels[maskA[at + k]] : shareA;
      const b = k < nKnown ? levels[maskB[at + k]] : shareB;
      const mirror = (nFft - k) % nFft;
      const ar = (re[k] + re[mirror]) * a, ai = (im[k] - im[mirror]) * a;
      const br = (im[k] + im[mirror]) * b, bi = (re[mirror] - re[k]) * b;
      re[k] = (ar - bi) / 2;
      im[k] = (ai + br) / 2;
      re[mirror] = (ar + bi) / 2;
      im[mirror] = (br - ai) / 2;
    }
    fft.transform(im, re); // the inverse: real and imaginary part change places
  }

  /** The voice's share of the energy in the mask's top sixteenth, of both channels of a pair. */
  #shares(maskA, maskB, at, levels) {
    const nKnown = this.hp.n_bins, sums = [0, 0, 0, 0];
    for (let k = nKnown - (nKnown >> 4); k < Math.min(nKnown, this.grid.nBins); k++) {
      const [a, b] = this.#energies(k);
      sums[0] += levels[maskA[at + k]] * a;
      sums[1] += a;
      sums[2] += levels[maskB[at + k]] * b;
      sums[3] += b;
    }
    return [sums[0] / Math.max(sums[1], 1e-20), sums[2] / Math.max(sums[3], 1e-20)];
  }
}

/** Turn mid and side into left and right, in place. */
function toLeftRight([left, right]) {
  for (let i = 0; i < left.length; i++) {
    const mid = left[i], side = right[i];
    left[i] = mid + side;
    right[i] = mid - side;
  }
}
