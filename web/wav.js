/** Stems as wav files that add up to the song exactly, and the sample rate of any sound file. */

/** Start a wav of nSamples per channel: 16 bits where the song has no more, else 24. */
export function wavBlob(wav, nSamples, rate) {
  const is16 = wav.every(channel => channel.every(x => Number.isInteger(x * 32768) && x < 1));
  const bytes = is16 ? 2 : 3, nChannels = wav.length, size = nSamples * nChannels * bytes;
  const most = 2 ** (8 * bytes - 1) - 1, full = most + 1;
  const parts = [header(size, nChannels, rate, bytes)];
  const code = x => Math.min(most, Math.max(-full, Math.round(x * full)));
  return {
    /** Take the next vocals, (n_channels, n); the file is theirs, or what they leave. */
    add(start, vocals, isVocals) {
      const n = vocals[0].length, part = new Uint8Array(n * nChannels * bytes);
      for (let i = 0, at = 0; i < n; i++)
        for (let c = 0; c < nChannels; c++) {
          const mixture = code(wav[c][start + i]);
          const least = Math.max(-full, mixture - most), top = Math.min(most, mixture + full);
          const voice = Math.min(top, Math.max(least, code(vocals[c][i]))); // so the rest fits, too
          const value = isVocals ? voice : mixture - voice;
          for (let b = 0; b < bytes; b++) part[at++] = value >> (8 * b);
        }
      parts.push(part);
    },
    finish: () => new Blob(parts, { type: "audio/wav" }),
  };
}

function header(size, nChannels, rate, bytes) {
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  const numbers = [[4, 36 + size], [16, 16], [24, rate], [28, rate * nChannels * bytes], [40, size]];
  text(0, "RIFF");
  text(8, "WAVEfmt ");
  text(36, "data");
  for (const [at, value] of numbers) view.setUint32(at, value, true);
  const shorts = [[20, 1], [22, nChannels], [32, nChannels * bytes], [34, 8 * bytes]];
  for (const [at, value] of shorts) view.setUint16(at, value, true);
  return view.buffer;
}

/**
 * Browsers stretch positive samples of 16 bits by 32768 / 32767: undo it, in place, where all
 * samples are such, so that the song is the file's.
 */
export function restore16(wav) {
  const isCode = x => Math.abs(x - Math.round(x)) < 0.004; // float32 knows no better
  const is16 = wav.every(channel => channel.every(x => isCode(x * (x > 0 ? 32767 : 32768))));
  if (!is16) return;
  for (const channel of wav)
    channel.forEach((x, i) => { if (x > 0) channel[i] = Math.round(x * 32767) / 32768; });
}

/** Read the number of channels of a wav; null of anything else. */
export function wavChannels(bytes) {
  const text = new TextDecoder("latin1").decode(bytes.subarray(0, 1 << 16)), at = text.indexOf("fmt ");
  return text.startsWith("RIFF") && at > 0 ? bytes[at + 10] + 256 * bytes[at + 11] : null;
}

/** Read the sample rate [Hz] from a file; null where it is not known. */
export function sampleRate(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const text = new TextDecoder("latin1").decode(bytes.subarray(0, 1 << 16));
  const at = word => text.indexOf(word);
  if (text.startsWith("RIFF") && at("fmt ") > 0) return view.getUint32(at("fmt ") + 12, true);
  if (text.startsWith("fLaC")) return view.getUint32(18) >>> 12;
  if (text.startsWith("OggS") && at("OpusHead") > 0) return 48000;
  if (text.startsWith("OggS") && at("\x01vorbis") > 0) return view.getUint32(at("\x01vorbis") + 12, true);
  if (text.slice(4, 8) === "ftyp") { // its header may be at the end, as ffmpeg leaves it
    const from = at("mp4a") > 0 ? 0 : Math.max(0, bytes.length - 2 ** 22);
    const tail = new TextDecoder("latin1").decode(bytes.subarray(from, from + 2 ** 22));
    const found = tail.indexOf("mp4a");
    return found > 0 ? view.getUint16(from + found + 28) : null;
  }
  if (text.startsWith("\x1aE\xdf\xa3")) return 48000; // webm: that of Opus
  return mpegRate(bytes);
}

/** The rate of MPEG's layer III, behind a tag and zeros; null of anything else. */
function mpegRate(bytes) {
  const isTagged = bytes[0] === 0x49 && bytes[1] === 0x44 && bytes[2] === 0x33; // ID3
  let at = isTagged ? 10 + bytes.slice(6, 10).reduce((size, b) => size * 128 + b, 0) : 0;
  while (bytes[at] === 0) at++;
  if (bytes[at] !== 0xff || (bytes[at + 1] & 0xe6) !== 0xe2) return null;
  const version = (bytes[at + 1] >> 3) & 3, index = (bytes[at + 2] >> 2) & 3;
  return version !== 1 && index !== 3 ? [44100, 48000, 32000][index] / { 3: 1, 2: 2, 0: 4 }[version] : null;
}
