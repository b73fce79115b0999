/**
 * Live sound in the audio thread: what comes in goes to the worker, and `delay` samples later the
 * answer is played. Where it is late the dry sound, as old, fades in within a quantum: never a click.
 */
const PACKET = 256; // samples to the worker
const QUANTUM = 128;
const REPORT = 16; // late quanta between two reports
const GLIDE = 0.003; // of the way to a new gain, a sample

class LiveProcessor extends AudioWorkletProcessor {
  constructor({ processorOptions: { nChannels, delay } }) {
    super();
    const size = 2 ** Math.ceil(Math.log2(delay + 16384));
    const rings = () => Array.from({ length: nChannels }, () => new Float32Array(size));
    Object.assign(this, { nChannels, delay, dry: rings(), wet: rings(), last: size - 1 });
    this.nIn = this.nWet = this.nLate = 0; // samples in, samples answered, quanta without one
    this.share = 0; // of the wet sound, 0 to 1
    this.gains = [1, 1]; // of voice and backing
    this.targets = [1, 1];
    this.packet = this.newPacket();
    this.port.onmessage = ({ data }) => {
      if (data.gains) this.targets = data.gains;
      if (data.worker) this.listen(data.worker);
      if (data.stop) this.isOver = true;
    };
  }

  newPacket() {
    return Array.from({ length: this.nChannels }, () => new Float32Array(PACKET));
  }

  listen(worker) {
    this.worker = worker;
    worker.onmessage = ({ data }) => {
      data.forEach((channel, c) =>
        channel.forEach((x, i) => { this.wet[c][(this.nWet + i) & this.last] = x; }));
      this.nWet += data[0].length;
    };
  }

  process([input], [output]) {
    if (!this.worker) return !this.isOver; // what it would not get must not be counted, either
    this.take(input);
    const start = this.nIn - QUANTUM - this.delay; // of what is played now
    const isThere = this.nWet >= start + QUANTUM, goesOn = this.nWet >= start + 2 * QUANTUM;
    const from = isThere ? this.share : 0, to = isThere && goesOn ? 1 : 0;
    if (to === 0 && this.nLate++ % REPORT === 0) this.port.postMessage({ nLate: this.nLate });
    for (let i = 0; i < QUANTUM; i++) {
      const at = (start + i) & this.last, share = from + ((to - from) * (i + 1)) / QUANTUM;
      for (const g of [0, 1]) this.gains[g] += GLIDE * (this.targets[g] - this.gains[g]);
      for (const [c, samples] of output.entries()) {
        const dry = this.dry[c % this.nChannels][at], wet = this.wet[c % this.nChannels][at];
        const mixed = this.gains[0] * wet + this.gains[1] * (dry - wet);
        samples[i] = dry + share * (mixed - dry);
      }
    }
    this.share = to;
    return !this.isOver;
  }

  /** Keep a quantum of the input and send what makes a packet; no input is silence. */
  take(input) {
    const offset = this.nIn % PACKET;
    for (let c = 0; c < this.nChannels; c++) {
      const samples = input[c] ?? input[0];
      for (let i = 0; i < QUANTUM; i++) {
        const x = samples ? samples[i] : 0;
        this.dry[c][(this.nIn + i) & this.last] = x;
        this.packet[c][offset + i] = x;
      }
    }
    this.nIn += QUANTUM;
    if (this.nIn % PACKET) return;
    this.worker.postMessage(this.packet, this.packet.map(channel => channel.buffer));
    this.packet = this.newPacket();
  }
}

registerProcessor("live-processor", LiveProcessor);
