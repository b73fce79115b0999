/** Live sound in the worker: samples come in packets, and vocals leave `delay` samples later. */
import { Song } from "./separator.js";

const KEPT_HOPS = 64; // of samples and masks, before what is old is forgotten
const PACKET = 256 + 128; // samples on the way here, and on the way back
const SPARE = 0.026; // seconds; devices may ask for 10 ms at once
const WARM_MS = 2000; // until the browser has compiled again what is used most

export class LiveStream {
  /** Start, after some silence through another stream: code that is used often gets quick. */
  static async open(network, rate, nChannels) {
    const warm = await LiveStream.#start(network, rate, nChannels);
    const silence = Array.from({ length: nChannels }, () => new Float32Array(warm.song.grid.hop));
    const end = performance.now() + WARM_MS;
    while (performance.now() < end) await warm.push(silence, new Float32Array(256));
    return LiveStream.#start(network, rate, nChannels);
  }

  static async #start(network, rate, nChannels) {
    const stream = new LiveStream();
    const wav = Array.from({ length: nChannels }, () => new Float32Array(0));
    const song = (stream.song = await Song.open(network, rate, wav, 0));
    const { hop, nFft } = song.grid, step = network.hp.mask_frames;
    song.nFrames = Infinity;
    song.reserve(2 * KEPT_HOPS);
    song.wav = wav.map(() => new Float32Array(2 * KEPT_HOPS * hop + nFft));
    stream.nSent = 0; // samples of vocals
    // As Stream.delay, and what the way here and back takes: a packet, and time for the network.
    stream.delay = nFft + (network.hp.lookahead + step - 1) * hop + PACKET + Math.ceil(SPARE * rate);
    stream.turn = Promise.resolve();
    return stream;
  }

  /** Take samples, (n_channels, n); resolve to the vocals that they finish, or null. */
  push(samples, levels) {
    this.turn = this.turn.then(() => this.#push(samples, levels)); // one after the other
    return this.turn;
  }

  async #push(samples, levels) {
    const { song } = this, { hop, nFft } = song.grid, step = song.hp.mask_frames;
    const at = song.nSamples - song.dropped * hop;
    song.wav.forEach((channel, c) => channel.set(samples[c], at));
    song.nSamples += samples[0].length;
    const nWhole = Math.floor((song.nSamples - nFft / 2) / hop) + 1; // frames that are all there
    while (song.nAnalysed + step <= nWhole) await song.analyse(step);
    const n = song.nReady - this.nSent;
    if (n <= 0) return null;
    const vocals = song.render(this.nSent, n, levels);
    this.nSent += n;
    this.#forget();
    return vocals;
  }

  /** Drop what no later frame needs: those whose windows reach what is still to be sent. */
  #forget() {
    const { song } = this, { hop, nFft } = song.grid, nBins = song.hp.n_bins;
    if (song.nSamples < (song.dropped + 2 * KEPT_HOPS - 8) * hop) return;
    const n = song.nColumns - (2 * nFft) / hop - song.dropped; // frames
    for (const channel of song.wav) channel.copyWithin(0, n * hop);
    for (const mask of song.masks) mask.copyWithin(0, n * nBins);
    song.dropped += n;
  }
}
