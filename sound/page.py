"""The listening page: one HTML file in which a song is heard and seen, with no network.

The page holds vocals and accompaniment as MP3, which every phone plays; the mixture is both at
once. Its pictures have at most `COLUMNS` columns whatever the song's length, and fixed scales:
nothing is normalised, so that two pages can be compared. A page is gathered block by block, and
does not depend on the blocks.
"""

from __future__ import annotations

import base64
import io
from concurrent.futures import Future, ThreadPoolExecutor
from html import escape
from string import Template
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from PIL import Image  # pillow comes with tensorboard

import audio
from sound.writing import MPEG_RATES

MAX_SECONDS = 600  # a browser decodes all of it, to 0.7 MB a second of stereo
COLUMNS = 1200  # of every picture, at most [pixels]
ROWS, LOW_HZ, OCTAVES = 160, 62.5, 8  # of spectrograms and mask: 62.5 Hz to 16 kHz [pixels]
SPECTROGRAM_DB = (-85.0, -10.0)  # black and white of the spectrograms, re a full-scale sine
VOICE_DB = (-60.0, -10.0)  # bottom and top of the voice's strip, re full scale
N_WINDOWS = 3  # spread over each column of a spectrogram
# Colours from dark to bright, in steps that look alike.
HEAT = ((4, 5, 20), (70, 22, 95), (165, 45, 95), (240, 110, 50), (252, 235, 160))
UNIT = 1 << 16  # samples that are encoded at a time; bounds the memory, changes nothing

# Of what LAME offers, V4: at most 150 kbit/s for noise, so that 4 minutes stay below 15 MB.
MPEG = {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "VARIABLE"}
COMPRESSION = 0.4


class Report:
    """Gather what a song's page shows, block by block; close it by leaving the ``with`` block.

    Memory does not grow with the song, but for its compressed audio: 36 kB a second at most, and
    no more than `MAX_SECONDS` of it.

    Parameters
    ----------
    title : str
        Any text; a file name that cannot be decoded, too.
    grid : audio.Grid
        Of the song and of its mask.
    n_channels, n_samples : int
        Of the whole song; `n_samples` is 1 or more.
    settings : dict of str
        Shown as they are, in this order.
    """

    def __init__(
        self,
        title: str,
        grid: audio.Grid,
        n_channels: int,
        n_samples: int,
        settings: dict[str, str],
    ) -> None:
        self._title, self._grid, self._n_channels = title, grid, n_channels
        self._settings, self._song_samples = settings, n_samples
        self._n_samples = min(n_samples, MAX_SECONDS * grid.sample_rate)
        self._tracks = [_Mp3(grid.sample_rate, n_channels) for _ in range(2)]
        self._pool = ThreadPoolExecutor(2)
        self._encoding: list[Future] = []
        self._n_added, self._waiting, self._n_waiting = 0, [np.zeros((2, n_channels, 0), "f4")], 0

        # A column shows its own samples, no fewer than make a column of the mask, and the spectrum
        # of no less than one window around them.
        self._width = width = max(grid.hop_length, -(-self._n_samples // COLUMNS))
        self._n_columns = -(-self._n_samples // width)
        self._window = 2 * grid.n_fft  # 93 ms: the lowest octave needs them
        self._span = max(width, self._window)
        before = (self._span - width) // 2
        self._unseen = np.zeros((2, n_channels, before), "f4")
        self._own = slice(before, before + width)
        self._edges = _row_edges(grid.sample_rate / self._window)
        # Of each column: energies (3, ROWS); lowest and highest sample of mixture and of vocals;
        # mean square of the vocals.
        self._rows: list[np.ndarray] = []
        self._extremes: list[list[float]] = []
        self._voice: list[float] = []

    def add(self, mixture: np.ndarray, vocals: np.ndarray) -> None:
        """Take the next samples; the accompaniment is what the vocals leave of the mixture.

        Parameters
        ----------
        mixture, vocals : np.ndarray, shape=(n_channels, n)
            Full scale 1. What lies beyond the part that is shown is ignored.
        """
        assert mixture.shape == vocals.shape, "mixture and vocals come in step"
        assert len(mixture) == self._n_channels, "(n_channels, n)"
        n = min(mixture.shape[1], self._n_samples - self._n_added)
        if not n:
            return
        self._n_added += n
        self._n_waiting += n
        self._waiting.append(np.stack([mixture[:, :n], vocals[:, :n]], dtype="f4"))
        if self._n_waiting >= UNIT:
            self._work(self._n_waiting // UNIT * UNIT)

    def write(self, file: BinaryIO) -> None:
        """Write the page, the last thing to do; what is missing of the song is silence."""
        n_missing = self._n_samples - self._n_added
        for start in range(0, n_missing, UNIT):
            silence = np.zeros((self._n_channels, min(UNIT, n_missing - start)), "f4")
            self.add(silence, silence)
        self._work(self._n_waiting)
        self._draw(np.zeros((2, self._n_channels, self._span), "f4"))
        self._wait()
        file.write(self._page([track.finish() for track in self._tracks]).encode())

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for track in self._tracks:
            track.close()

    def _work(self, n: int) -> None:
        """Encode and draw the first `n` of the samples that wait, unit by unit."""
        samples = np.concatenate(self._waiting, -1)
        for start in range(0, n, UNIT):
            unit = samples[..., start : min(start + UNIT, n)]
            self._wait()
            mixture, vocals = unit
            # While LAME works, the caller may go on with the song: it holds no Python lock.
            self._encoding = [
                self._pool.submit(track.write, signal)
                for track, signal in zip(self._tracks, (vocals, mixture - vocals), strict=True)
            ]
            self._draw(unit)
        self._waiting, self._n_waiting = [samples[..., n:].copy()], self._n_waiting - n

    def _wait(self) -> None:
        for future in self._encoding:
            future.result()

    def _draw(self, samples: np.ndarray) -> None:
        """Draw the columns of which all samples are there."""
        samples = np.concatenate([self._unseen, samples], -1)
        n_ready = max(0, (samples.shape[-1] - self._span) // self._width + 1)
        n_ready = min(n_ready, self._n_columns - len(self._rows))
        for start in range(0, n_ready * self._width, self._width):
            self._draw_column(samples[..., start : start + self._span])
        self._unseen = samples[..., n_ready * self._width :].copy()

    def _draw_column(self, samples: np.ndarray) -> None:
        """Measure one column, (2, n_channels, span)."""
        hop = max(1, (self._span - self._window) // (N_WINDOWS - 1))
        grid = audio.Grid(self._grid.sample_rate, self._window, hop)
        mono = torch.from_numpy(samples.mean(1))  # what the network sees
        mixture, vocals = audio.frames_to_spec(mono, grid).numpy()  # (n_bins, n_windows)
        specs = np.stack([mixture, vocals, mixture - vocals])
        energy = (specs.real**2 + specs.imag**2).mean(-1, dtype=float)
        # Where a row is wider than a bin it shows its whole energy: pink noise is level.
        rows = _to_rows(energy, self._edges) * np.maximum(1, np.diff(self._edges))
        self._rows.append(rows.astype("f4"))
        mixture, vocals = samples[..., self._own]
        self._extremes.append([f(x) for x in (mixture, vocals) for f in (np.min, np.max)])
        self._voice.append(float(np.square(vocals, dtype=float).mean()))

    def _page(self, tracks: list[bytes]) -> str:
        """Fill the template."""
        n_samples, rate = self._n_samples, self._grid.sample_rate
        facts = [_clock(self._song_samples / rate), f"{rate / 1000:g} kHz", self._layout()]
        if n_samples < self._song_samples:
            facts.append(f"the first {_clock(n_samples / rate)} are shown here")
        settings = [f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in self._settings.items()]
        mixture, vocals, accompaniment = map(_png, self._levels())
        low, high, voice_low, voice_high = np.array(self._extremes).T
        voice = _scale_db(np.array(self._voice), *VOICE_DB)
        seconds = n_samples / rate
        return Template(PAGE).substitute(
            title=_text(self._title),
            facts=" · ".join(facts),
            seconds=f"{seconds:.6f}",
            shown_seconds=f"{self._n_columns * self._width / rate:.6f}",
            rate=self._tracks[0].sample_rate,
            columns=self._n_columns,
            mixture_wave=_area(-high, -low),
            vocals_wave=_area(-voice_high, -voice_low),
            voice=_area(1 - voice, np.ones_like(voice)),
            mixture=mixture,
            vocals=vocals,
            accompaniment=accompaniment,
            mask=_png(self._mask()),
            hertz=_hertz_labels(),
            ticks=_ticks(self._n_columns * self._width / rate),
            range=f"{SPECTROGRAM_DB[0]:g} to {SPECTROGRAM_DB[1]:g} dB".replace("-", "−"),
            settings="".join(settings),
            vocals_audio=base64.b64encode(tracks[0]).decode(),
            accompaniment_audio=base64.b64encode(tracks[1]).decode(),
        )

    def _layout(self) -> str:
        names = {1: "mono", 2: "stereo"}
        return names.get(self._n_channels, f"{self._n_channels} channels, heard as mono")

    def _levels(self) -> np.ndarray:
        """Return mixture, vocals and accompaniment, each (ROWS, n_columns) in [0, 1]."""
        return _scale_db(np.stack(self._rows, -1), *SPECTROGRAM_DB)

    def _mask(self) -> np.ndarray:
        """Return the share of the vocals, (ROWS, n_columns) in [0, 1]; 0 where all is silent."""
        mixture, vocals, _ = np.stack(self._rows, -1)
        return np.sqrt(np.minimum(1, vocals / np.maximum(mixture, 1e-12)))


class _Mp3:
    """One track that is being encoded: at an MPEG rate, in one channel or two."""

    def __init__(self, sample_rate: int, n_channels: int) -> None:
        self.sample_rate = next(
            (rate for rate in MPEG_RATES if rate >= sample_rate), MPEG_RATES[-1]
        )
        self._n_channels = n_channels if n_channels <= 2 else 1
        self._bytes = io.BytesIO()
        self._sound = soundfile.SoundFile(
            self._bytes,
            "w",
            self.sample_rate,
            self._n_channels,
            compression_level=COMPRESSION,
            **MPEG,
        )
        self._resampler = None
        if self.sample_rate != sample_rate:
            import soxr  # comes with librosa; its streams do not depend on the blocks

            self._resampler = soxr.ResampleStream(sample_rate, self.sample_rate, self._n_channels)

    def write(self, wav: np.ndarray, is_last: bool = False) -> None:
        """Encode the next samples, (n_channels, n)."""
        samples = wav.T if len(wav) == self._n_channels else wav.mean(0)[:, None]
        samples = np.ascontiguousarray(samples)
        if self._resampler is not None:
            samples = self._resampler.resample_chunk(samples, last=is_last)
        self._sound.write(samples)

    def finish(self) -> bytes:
        """Return the whole file."""
        self.write(np.zeros((self._n_channels, 0), "f4"), is_last=True)
        self.close()
        return self._bytes.getvalue()

    def close(self) -> None:
        """Give the encoder back; libsndfile would write to a file that Python has closed before."""
        self._sound.close()


def _row_edges(bin_hz: float) -> np.ndarray:
    """Return where the rows of a picture begin and end, in bins of which bin 0 is 0 … 1."""
    return LOW_HZ * 2 ** (np.arange(ROWS + 1) * (OCTAVES / ROWS)) / bin_hz + 0.5


def _to_rows(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Average (…, n_bins) over the rows of a picture, (…, ROWS); 0 above the last bin."""
    n_bins = values.shape[-1]
    total = np.zeros((*values.shape[:-1], n_bins + 1))
    np.cumsum(values, -1, out=total[..., 1:])
    inside = np.minimum(edges, n_bins)
    below = np.minimum(inside.astype(int), n_bins - 1)
    at_edges = total[..., below] + (inside - below) * values[..., below]
    return np.diff(at_edges) / np.diff(edges)


def _scale_db(energy: np.ndarray, low_db: float, high_db: float) -> np.ndarray:
    """Place levels between 0, `low_db` or less, and 1, `high_db` or more."""
    level_db = 10 * np.log10(np.maximum(energy, 1e-20))
    return np.clip((level_db - low_db) / (high_db - low_db), 0, 1)


def _png(values: np.ndarray) -> str:
    """Colour a picture in [0, 1], low rows at the bottom; base64."""
    image = Image.fromarray((values[::-1] * 255).round().astype(np.uint8))
    stops = np.linspace(0, 255, len(HEAT))
    palette = [np.interp(np.arange(256), stops, channel) for channel in zip(*HEAT, strict=True)]
    image.putpalette(np.stack(palette, -1).astype(np.uint8).ravel().tolist())
    file = io.BytesIO()
    image.save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _area(upper: np.ndarray, lower: np.ndarray) -> str:
    """Return the path of an area between two curves with a value per column, in thousandths."""
    there = [f"{i} {1000 * y:.0f}" for i, y in enumerate(upper)]
    back = [f"{i} {1000 * y:.0f}" for i, y in enumerate(lower)]
    there.append(f"{len(upper)} {1000 * upper[-1]:.0f}")
    back.append(f"{len(lower)} {1000 * lower[-1]:.0f}")
    return f"M{'L'.join(there)}L{'L'.join(back[::-1])}Z"


def _hertz_labels() -> str:
    """Name some octaves on the left of a spectrogram."""
    names = {250: "250 Hz", 1000: "1 kHz", 4000: "4 kHz"}
    tops = {name: 100 * (1 - np.log2(hz / LOW_HZ) / OCTAVES) for hz, name in names.items()}
    return "".join(f'<i style="top:{top:.1f}%">{name}</i>' for name, top in tops.items())


def _ticks(seconds: float) -> str:
    """Write round times below the pictures, few enough for a phone."""
    step = next((step for step in (1, 2, 5, 10, 15, 30, 60, 120) if seconds <= 6 * step), 120)
    times = range(0, int(seconds - 0.1 * step) + 1, step)  # none that would stick out at the end
    places = ((100 * time / seconds, _clock(time)) for time in times)
    return "".join(f'<span style="left:{place:.2f}%">{name}</span>' for place, name in places)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _text(text: str) -> str:
    """Make any text safe to stand in the page; bytes that a file name hides become "?"."""
    return escape(text.encode("utf-8", "replace").decode())


# Filled by string.Template: a dollar sign is always a placeholder.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #22201c; --faint: #6f6a62;
  --line: #e3dfd7; --accent: #c2410c; --wave: #b9b3a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14130f; --ink: #ece8e0; --faint: #9b958a;
  --line: #2e2b25; --accent: #fb8b4b; --wave: #575249; } }
* { box-sizing: border-box; margin: 0; }
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 72rem; margin: auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -.02em;
  overflow-wrap: anywhere; }
header p, footer, dt, figcaption { color: var(--faint); }
#player { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .6rem 1.2rem;
  align-items: center; padding: .9rem 0; margin: .8rem 0 .4rem; background: var(--paper);
  border-bottom: 1px solid var(--line); }
#play { width: 3.2rem; height: 3.2rem; border: 0; border-radius: 50%; padding: 0; cursor: pointer;
  background: var(--accent); color: var(--paper); }
#play svg { display: block; width: 1.4rem; margin: auto; fill: currentColor; }
#play .pause, #play.playing .start { display: none; }
#play.playing .pause { display: block; }
#play:disabled { opacity: .4; cursor: default; }
fieldset { border: 1px solid var(--line); border-radius: 2rem; padding: .2rem; display: flex; }
legend { position: absolute; clip-path: inset(50%); }
label { position: relative; padding: .45rem 1rem; border-radius: 2rem; cursor: pointer; }
label input { position: absolute; opacity: 0; }
label:has(:checked) { background: var(--ink); color: var(--paper); }
label:has(:focus-visible), button:focus-visible { outline: 3px solid var(--accent);
  outline-offset: 2px; }
#time { font-variant-numeric: tabular-nums; margin-left: auto; }
#seek { flex-basis: 100%; min-width: 0; height: 1.2rem; accent-color: var(--accent); }
#pictures { position: relative; cursor: crosshair; touch-action: pan-y; user-select: none;
  -webkit-user-select: none; }
#playhead { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; margin-left: -1px;
  background: var(--accent); box-shadow: 0 0 0 1px var(--paper); pointer-events: none; }
figcaption { position: relative; z-index: 1; display: flex; justify-content: space-between;
  gap: 1rem; font-size: .85rem; padding: .9rem 0 .25rem; }
figcaption b { color: var(--ink); font-weight: 600; }
.heard figcaption b { color: var(--accent); }
.view { position: relative; height: clamp(6rem, 14vw, 10rem); border-radius: 4px;
  overflow: hidden; }
.view img, .view svg { position: absolute; bottom: 0; width: 100%; height: 100%; }
.view i { position: absolute; left: .5rem; transform: translateY(-50%); font-style: normal;
  font-size: .7rem; color: #fff; opacity: .75; text-shadow: 0 0 3px #000, 0 0 3px #000;
  pointer-events: none; }
.view.low { height: clamp(5rem, 9vw, 7rem); }
.wave { fill: var(--wave); }
.voice { fill: var(--accent); }
.strip { height: 2rem; border-radius: 0; border-bottom: 1px solid var(--line); }
#ticks { position: relative; height: 1.6rem; font-size: .75rem; color: var(--faint);
  font-variant-numeric: tabular-nums; pointer-events: none; }
#ticks span { position: absolute; padding: .2rem 0 0 .3rem; border-left: 1px solid var(--line); }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem;
  font-size: .9rem; }
dd { overflow-wrap: anywhere; }
footer { margin-top: 2.5rem; font-size: .85rem; }
kbd { font: inherit; border: 1px solid var(--line); border-radius: 4px; padding: 0 .35em; }
@media (max-width: 40rem) {
  body { padding-top: 1.2rem; }
  #player { gap: .5rem .8rem; }
  fieldset { order: 1; flex: 1 0 100%; }
  label { flex: auto; text-align: center; padding: .45rem .3rem; font-size: .95rem; }
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  .keys { display: none; }
}
</style>
</head>
<body>
<header><h1>$title</h1><p>$facts</p></header>
<main>
<section id="player" aria-label="Player">
<button id="play" type="button" aria-label="Play" disabled>
<svg class="start" viewBox="0 0 24 24" aria-hidden="true"><path d="M7 4v16l13-8z"/></svg>
<svg class="pause" viewBox="0 0 24 24" aria-hidden="true"><path d="M6 4h4v16H6zm8 0h4v16h-4z"/>
</svg>
</button>
<fieldset><legend>Listen to</legend>
<label><input type="radio" name="track" value="mixture" checked>Mixture</label>
<label><input type="radio" name="track" value="vocals">Vocals</label>
<label><input type="radio" name="track" value="accompaniment">Accompaniment</label>
</fieldset>
<span id="time">Decoding …</span>
<input id="seek" type="range" min="0" max="$seconds" step="any" value="0" aria-label="Position">
</section>
<section id="pictures" aria-label="Pictures of the song; click to listen from there">
<figure><figcaption><b>Waveform</b><span>vocals over mixture</span></figcaption>
<div class="view low"><svg viewBox="0 -1000 $columns 2000" preserveAspectRatio="none" role="img" \
aria-label="Waveform of the vocals over that of the mixture">
<path class="wave" d="$mixture_wave"/><path class="voice" d="$vocals_wave"/></svg></div></figure>
<figure><figcaption><b>Where the voice is</b><span>level of the vocals</span></figcaption>
<div class="view strip"><svg viewBox="0 0 $columns 1000" preserveAspectRatio="none" role="img" \
aria-label="Level of the vocals"><path class="voice" d="$voice"/></svg></div></figure>
<figure data-track="mixture"><figcaption><b>Mixture</b><span>$range</span></figcaption>
<div class="view"><img alt="Spectrogram of the mixture" src="data:image/png;base64,$mixture">
$hertz</div></figure>
<figure><figcaption><b>Mask</b><span>bright is voice</span></figcaption>
<div class="view"><img alt="The mask" src="data:image/png;base64,$mask">$hertz</div></figure>
<figure data-track="vocals"><figcaption><b>Vocals</b><span>$range</span></figcaption>
<div class="view"><img alt="Spectrogram of the vocals" src="data:image/png;base64,$vocals">
$hertz</div></figure>
<figure data-track="accompaniment"><figcaption><b>Accompaniment</b><span>$range</span></figcaption>
<div class="view"><img alt="Spectrogram of the accompaniment" \
src="data:image/png;base64,$accompaniment">$hertz</div></figure>
<div id="ticks" aria-hidden="true">$ticks</div>
<div id="playhead"></div>
</section>
<section><h2>Settings</h2><dl>$settings</dl></section>
</main>
<footer><p class="keys"><kbd>Space</kbd> plays and pauses, <kbd>←</kbd> <kbd>→</kbd> move by
5 seconds, <kbd>1</kbd> <kbd>2</kbd> <kbd>3</kbd> choose what is heard.</p>
<p>The sound on this page is compressed; the separated files are not.</p></footer>
<script type="text/plain" id="vocals">$vocals_audio</script>
<script type="text/plain" id="accompaniment">$accompaniment_audio</script>
<script>
"use strict";
const SECONDS = $seconds, SHOWN = $shown_seconds, RATE = $rate;
const GAINS = { mixture: [1, 1], vocals: [1, 0], accompaniment: [0, 1] };  // of the two tracks
const byId = id => document.getElementById(id);
const play = byId("play"), seek = byId("seek"), pictures = byId("pictures");
const radios = [...document.querySelectorAll("input[name=track]")];
let buffers, context, gains;
let sources = [];  // of the two tracks, while they play
let began = 0;  // the context's time at which second 0 of the song was, or would have been
let offset = 0;  // where playing starts or has started [s]

function decode(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), c => c.charCodeAt(0));
  byId(id).remove();
  // This context may decode before anybody has touched the page; at its rate nothing is resampled.
  return new OfflineAudioContext(2, 1, RATE).decodeAudioData(bytes.buffer);
}

function position() {
  if (!sources.length) return offset;
  const heard = context.currentTime - began - (context.outputLatency || 0);
  return Math.min(SECONDS, Math.max(offset, heard));
}

function start() {
  if (!context) {
    if (navigator.audioSession) navigator.audioSession.type = "playback";  // heard on a mute phone
    context = new AudioContext({ sampleRate: RATE });
    gains = buffers.map(() => context.createGain());
    gains.forEach(gain => gain.connect(context.destination));
    choose();
  }
  context.resume();
  if (offset >= SECONDS) offset = 0;
  const now = context.currentTime;
  began = now - offset;
  sources = buffers.map((buffer, i) => {
    const source = context.createBufferSource(), fade = context.createGain();
    source.buffer = buffer;
    source.fade = fade.gain;  // 10 ms in and out, so that nothing clicks
    source.fade.setValueAtTime(0, now);
    source.fade.linearRampToValueAtTime(1, now + 0.01);
    source.connect(fade).connect(gains[i]);
    source.start(now, offset);
    return source;
  });
  follow();
}

function stop() {
  offset = position();
  for (const source of sources) {
    source.fade.setTargetAtTime(0, context.currentTime, 0.003);
    source.stop(context.currentTime + 0.03);
  }
  sources = [];
  show();
}

function toggle() {
  if (play.disabled) return;
  if (sources.length) stop(); else start();
}

function goTo(seconds) {
  const wasPlaying = sources.length > 0;
  if (wasPlaying) stop();
  offset = Math.min(SECONDS, Math.max(0, seconds));
  if (wasPlaying) start();
  show();
}

function choose() {
  const track = radios.find(radio => radio.checked).value;
  for (const figure of document.querySelectorAll("figure"))
    figure.classList.toggle("heard", figure.dataset.track === track);
  if (!context) return;
  for (const [i, { gain }] of gains.entries())
    gain.setTargetAtTime(GAINS[track][i], context.currentTime, 0.01);  // soft, too
}

function clock(seconds) {
  return Math.floor(seconds / 60) + ":" + String(Math.floor(seconds % 60)).padStart(2, "0");
}

function show() {
  const now = position(), text = clock(now) + " / " + clock(SECONDS);
  byId("playhead").style.left = 100 * now / SHOWN + "%";
  seek.value = now;
  play.classList.toggle("playing", sources.length > 0);
  if (byId("time").textContent !== text) {
    byId("time").textContent = text;
    seek.setAttribute("aria-valuetext", clock(now) + " of " + clock(SECONDS));
  }
  play.setAttribute("aria-label", sources.length ? "Pause" : "Play");
}

function follow() {
  if (!sources.length) return;
  if (position() >= SECONDS) stop();
  show();
  requestAnimationFrame(follow);
}

// A tap or click seeks; so does a drag, once it is one: a finger may only want to scroll.
let from = null, isDrag = false;
function point(event) {
  const box = pictures.getBoundingClientRect();
  goTo((event.clientX - box.left) / box.width * SHOWN);
}
pictures.onpointerdown = event => { from = event.clientX; isDrag = false; };
pictures.onpointermove = event => {
  if (from === null) return;
  if (!isDrag && Math.abs(event.clientX - from) < 8) return;
  if (!isDrag) pictures.setPointerCapture(event.pointerId);
  isDrag = true;
  point(event);
};
pictures.onpointerup = pictures.onpointercancel = () => { from = null; };
pictures.onclick = event => { if (!isDrag) point(event); };

play.onclick = toggle;
seek.oninput = () => goTo(+seek.value);
radios.forEach(radio => { radio.onchange = choose; });
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isRadio = event.target.name === "track", step = { ArrowLeft: -5, ArrowRight: 5 }[event.key];
  if (event.key === " " && event.target !== play) toggle();
  else if (step && !isRadio) goTo(position() + step);
  else if ("123".includes(event.key)) { radios[event.key - 1].checked = true; choose(); }
  else return;
  event.preventDefault();
};

Promise.all(["vocals", "accompaniment"].map(decode)).then(
  tracks => { buffers = tracks; play.disabled = false; show(); },
  () => { byId("time").textContent = "This browser cannot decode the sound."; });
choose();
</script>
</body>
</html>
"""
