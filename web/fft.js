/** The complex FFT of any size of KISS FFT, a module that comes from npm. */
export class Fft {
  /** @param {number} n size */
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
