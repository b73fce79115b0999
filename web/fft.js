/** The complex FFT of any size of KISS FFT, which comes from npm. */
import createKissFft from "./node_modules/@echogarden/kissfft-wasm/kissfft.js";

let kiss;
const plans = {}; // by size

export class Fft {
  /** @param {number} n size */
  static async ofSize(n) {
    kiss ??= createKissFft();
    const loaded = await kiss;
    return (plans[n] ??= new Fft(loaded, n));
  }

  constructor(kiss, n) {
    Object.assign(this, { kiss, n, plan: kiss._kiss_fft_alloc(n, 0, 0, 0) });
    [this.from, this.to] = [kiss._malloc(8 * n), kiss._malloc(8 * n)];
  }

  /** Transform (re, im), both of n numbers, in place; swap them, before, for n times the inverse. */
  transform(re, im) {
    const { kiss, n, plan, from, to } = this, numbers = kiss.HEAPF32;
    for (let i = 0, at = from / 4; i < n; i++) {
      numbers[at++] = re[i];
      numbers[at++] = im[i];
    }
    kiss._kiss_fft(plan, from, to);
    for (let i = 0, at = to / 4; i < n; i++) {
      re[i] = numbers[at++];
      im[i] = numbers[at++];
    }
  }
}
