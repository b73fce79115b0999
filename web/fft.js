/** A complex FFT of any size, fast where all prime factors are small, as window sizes here are. */
export class Fft {
  /** @param {number} n size */
  constructor(n) {
    this.n = n;
    this.factors = factorize(n);
    this.cos = Float64Array.from({ length: n }, (_, i) => Math.cos((2 * Math.PI * i) / n));
    this.sin = Float64Array.from({ length: n }, (_, i) => -Math.sin((2 * Math.PI * i) / n));
    this.spare = [new Float64Array(n), new Float64Array(n)];
    this.terms = new Float64Array(2 * Math.max(...this.factors));
  }

  /** Transform (re, im), both Float64Array of n, in place; swap them, before, for n times the inverse. */
  transform(re, im) {
    let [x, y] = [[re, im], this.spare];
    let done = 1; // product of the factors so far: Stockham's order needs no reversal
    for (const radix of this.factors) {
      if (radix === 4) this.#pass4(x, y, done);
      else this.#pass(x, y, done, radix);
      [x, y] = [y, x];
      done *= radix;
    }
    if (x[0] !== re) {
      re.set(x[0]);
      im.set(x[1]);
    }
  }

  /** Four transforms of size `done`, n / 4 apart, become one of four times the size. */
  #pass4([xr, xi], [yr, yi], done) {
    const { n, cos, sin } = this, quarter = n / 4, step = quarter / done;
    for (let k = 0; k < done; k++) {
      const t1 = k * step, t2 = 2 * t1, t3 = 3 * t1;
      const c1 = cos[t1], s1 = sin[t1], c2 = cos[t2], s2 = sin[t2], c3 = cos[t3], s3 = sin[t3];
      for (let j = 0; j < step; j++) {
        const a = k * step + j, b = a + quarter, c = b + quarter, d = c + quarter;
        const from = 4 * k * step + j;
        const i0r = xr[from], i0i = xi[from];
        const p = xr[from + step], q = xi[from + step];
        const r = xr[from + 2 * step], s = xi[from + 2 * step];
        const u = xr[from + 3 * step], v = xi[from + 3 * step];
        const i1r = p * c1 - q * s1, i1i = p * s1 + q * c1;
        const i2r = r * c2 - s * s2, i2i = r * s2 + s * c2;
        const i3r = u * c3 - v * s3, i3i = u * s3 + v * c3;
        const er = i0r + i2r, ei = i0i + i2i, fr = i0r - i2r, fi = i0i - i2i;
        const gr = i1r + i3r, gi = i1i + i3i, hr = i1r - i3r, hi = i1i - i3i;
        yr[a] = er + gr; yi[a] = ei + gi;
        yr[b] = fr + hi; yi[b] = fi - hr;
        yr[c] = er - gr; yi[c] = ei - gi;
        yr[d] = fr - hi; yi[d] = fi + hr;
      }
    }
  }

  /** The same for any radix, by the definition of the transform. */
  #pass([xr, xi], [yr, yi], done, radix) {
    const { n, cos, sin, terms } = this, part = n / radix, step = part / done;
    for (let k = 0; k < done; k++)
      for (let j = 0; j < step; j++) {
        for (let m = 0; m < radix; m++) {
          const from = (radix * k + m) * step + j, turn = m * k * step;
          terms[2 * m] = xr[from] * cos[turn] - xi[from] * sin[turn];
          terms[2 * m + 1] = xr[from] * sin[turn] + xi[from] * cos[turn];
        }
        for (let p = 0; p < radix; p++) {
          let re = 0, im = 0;
          for (let m = 0; m < radix; m++) {
            const turn = ((m * p) % radix) * part;
            re += terms[2 * m] * cos[turn] - terms[2 * m + 1] * sin[turn];
            im += terms[2 * m] * sin[turn] + terms[2 * m + 1] * cos[turn];
          }
          yr[p * part + k * step + j] = re;
          yi[p * part + k * step + j] = im;
        }
      }
  }
}

/** Split into fours first, then primes. */
function factorize(n) {
  const factors = [];
  for (const factor of [4, 2]) for (; n % factor === 0; n /= factor) factors.push(factor);
  for (let factor = 3; n > 1; factor += 2) for (; n % factor === 0; n /= factor) factors.push(factor);
  return factors.length ? factors : [1];
}
