"""The listening page: one HTML file in which a song is heard and seen, with no network.

The page holds vocals and accompaniment as MP3, which every phone plays; the mixture is both at
once. Its pictures have some `COLUMNS` columns whatever the song's length, and fixed scales:
nothing is normalised, so that two pages can be compared. page.html is the template.
"""

from __future__ import annotations

import base64
import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path
from string import Template

import numpy as np
import soundfile
from PIL import Image  # pillow comes with tensorboard

import cli
from sound.reading import AudioInfo, SampleFormat, to_float
from sound.writing import MPEG_RATES, Separated

MAX_SECONDS = 600  # a browser decodes all of it, to 0.7 MB a second of stereo
COLUMNS = 1200  # of every picture, at most, unless a header promised too little [pixels]
ROWS, LOW_HZ, OCTAVES = 160, 62.5, 8  # of the spectrograms: 62.5 Hz to 16 kHz [pixels]
# Where some octaves lie, from the top.
HERTZ = '<i style="top:75%">250 Hz</i><i style="top:50%">1 kHz</i><i style="top:25%">4 kHz</i>'
SPECTROGRAM_DB = (-85.0, -10.0)  # black and white of the spectrograms, re a full-scale sine
WINDOW = 0.093  # of a spectrum [s]: the lowest octave needs them
N_WINDOWS = 3  # spread over each column of a spectrogram
# From dark to bright, in steps that look alike.
HEAT = ((4, 5, 20), (70, 22, 95), (165, 45, 95), (240, 110, 50), (252, 235, 160))

# Of what LAME offers, V4: at most 150 kbit/s for noise, so that 4 minutes stay below 15 MB.
MPEG = {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.4}


class PageWriter(contextlib.AbstractContextManager):
    """Write a song's page; it appears at the end of the ``with`` block, whole or not at all.

    `info` is of the song, `sample_format` of the codes that `write` gets; `settings` are shown as
    they are. Memory grows with the song by its compressed audio alone: 36 kB a second at most.
    """

    def __init__(
        self, path: Path, info: AudioInfo, sample_format: SampleFormat, settings: dict[str, str]
    ) -> None:
        self._path, self._info, self._settings = path, info, settings
        self._sample_format = sample_format
        rate, self._n_added, self._n_total = info.sample_rate, 0, 0
        self._n_samples = MAX_SECONDS * rate  # at most: what a header promises may be a guess
        # A column shows its own samples, and the spectra of no less than one window around them.
        self._width = width = max(rate // 100, -(-min(info.n_samples, self._n_samples) // COLUMNS))
        self._n_columns = -(-self._n_samples // width)
        self._window = max(2, round(WINDOW * rate))
        self._span = max(width, self._window)
        before = (self._span - width) // 2
        self._own = slice(before, before + width)
        self._waiting = np.zeros((2, info.n_channels, before), np.float32)  # to be drawn
        # Where the rows of a picture begin and end, in bins of which bin 0 is 0 … 1.
        edges_hz = LOW_HZ * 2 ** (np.arange(ROWS + 1) * (OCTAVES / ROWS))
        self._edges = edges_hz * self._window / rate + 0.5
        # Of each column: energies (3, ROWS); lowest and highest sample of mixture and of vocals.
        self._rows: list[np.ndarray] = []
        self._extremes: list[list[float]] = []
        self._tracks = [_Mp3(rate, info.n_channels) for _ in range(2)]

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with contextlib.closing(self._tracks[0]), contextlib.closing(self._tracks[1]):
            if kind is None:
                self._finish()

    def write(self, part: Separated) -> None:
        """Take the next samples; what lies beyond the part that is shown is ignored."""
        self._n_total += part.vocals.shape[1]
        if n := min(part.vocals.shape[1], self._n_samples - self._n_added):
            self._n_added += n
            mixture, vocals = (to_float(x[:, :n], self._sample_format) for x in part[:2])
            for track, wav in zip(self._tracks, (vocals, mixture - vocals), strict=True):
                track.write(wav)
            self._draw(np.stack([mixture, vocals]))

    def _draw(self, samples: np.ndarray) -> None:
        """Draw the columns of which all samples, (2, n_channels, n), are there."""
        waiting = np.concatenate([self._waiting, samples], -1)
        n_ready = max(0, (waiting.shape[-1] - self._span) // self._width + 1)
        n_ready = min(n_ready, self._n_columns - len(self._rows))
        for start in range(0, n_ready * self._width, self._width):
            self._draw_column(waiting[..., start : start + self._span])
        self._waiting = waiting[..., n_ready * self._width :].copy()

    def _draw_column(self, samples: np.ndarray) -> None:
        """Measure one column, (2, n_channels, span)."""
        hop = max(1, (self._span - self._window) // (N_WINDOWS - 1))
        frames = np.lib.stride_tricks.sliding_window_view(samples, self._window, -1)[..., ::hop, :]
        window = (1 - np.cos(2 * np.pi * np.arange(self._window) / self._window)) / 2
        # Each (n_channels, n_windows, n_bins): what cancels in the mean of channels is seen, too.
        mixture, vocals = np.fft.rfft(frames * window) * (4 / self._window)
        specs = np.stack([mixture, vocals, mixture - vocals])
        energy = (specs.real**2 + specs.imag**2).mean((1, 2))
        below = np.cumsum(np.pad(energy, ((0, 0), (1, 0))), -1)  # energy below each bin
        rows = [np.diff(np.interp(self._edges, np.arange(below.shape[1]), one)) for one in below]
        # Where a row is wider than a bin it shows its whole energy: pink noise is level.
        self._rows.append((rows / np.minimum(1, np.diff(self._edges))).astype("f4"))
        mixture, vocals = samples[..., self._own]
        self._extremes.append([mixture.min(), mixture.max(), vocals.min(), vocals.max()])

    def _finish(self) -> None:
        """Draw the last columns and write the page."""
        self._n_samples = max(1, self._n_added)
        self._n_columns = -(-self._n_samples // self._width)
        self._draw(np.zeros((2, self._info.n_channels, self._span + self._width), np.float32))
        page = self._page().encode()
        cli.replace_atomically(self._path, lambda file: file.write(page))

    def _page(self) -> str:
        """Fill the template."""
        info, n_samples, rate = self._info, self._n_samples, self._info.sample_rate
        n, known = info.n_channels, {1: "mono", 2: "stereo"}
        layout = known.get(n, f"{n} channels as mono")
        facts = [_clock(self._n_total / rate), f"{rate / 1000:g} kHz", layout]
        if n_samples < self._n_total:
            facts.append(f"the first {_clock(n_samples / rate)} are shown here")
        settings = [f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in self._settings.items()]
        rows = np.stack(self._rows, -1)  # (3, ROWS, n_columns)
        mask = np.sqrt(np.minimum(1, rows[1] / np.maximum(rows[0], 1e-12)))
        low_db, high_db = SPECTROGRAM_DB
        levels = (10 * np.log10(np.maximum(rows, 1e-20)) - low_db) / (high_db - low_db)
        mixture, vocals, accompaniment = map(_png, levels.clip(0, 1))
        low, high, voice_low, voice_high = np.array(self._extremes).T
        shown = self._n_columns * self._width / rate
        sounds = [base64.b64encode(track.finish()).decode() for track in self._tracks]
        web = Path(__file__).parents[1] / "web"  # the browser's separator looks and plays alike
        return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
            style=(web / "style.css").read_text(encoding="utf-8"),
            player=(web / "player.js").read_text(encoding="utf-8"),
            title=_text(info.tags.get("title") or info.path.stem),
            facts=" · ".join(facts),
            seconds=f"{n_samples / rate:.6f}",
            shown_seconds=f"{shown:.6f}",
            rate=self._tracks[0].sample_rate,
            columns=self._n_columns,
            mixture_wave=_area(-high, -low),
            vocals_wave=_area(-voice_high, -voice_low),
            mixture=mixture,
            vocals=vocals,
            accompaniment=accompaniment,
            mask=_png(mask),
            hertz=HERTZ,
            ticks=_ticks(shown),
            range=f"−{-low_db:g} to −{-high_db:g} dB",
            settings="".join(settings),
            vocals_audio=sounds[0],
            accompaniment_audio=sounds[1],
        )


class _Mp3:
    """One track that is being encoded: at an MPEG rate, in one channel or two."""

    def __init__(self, sample_rate: int, n_channels: int) -> None:
        rates = [rate for rate in MPEG_RATES if rate >= sample_rate]
        self.sample_rate = rates[0] if rates else MPEG_RATES[-1]
        self._n_channels = n_channels if n_channels <= 2 else 1
        self._bytes, form = io.BytesIO(), (self.sample_rate, self._n_channels)
        self._sound = soundfile.SoundFile(self._bytes, "w", *form, **MPEG)
        # In the main thread Ctrl-C would be lost where LAME writes into memory.
        self._thread, self._jobs, self._resampler = ThreadPoolExecutor(1), [], None
        if self.sample_rate != sample_rate:
            import soxr  # comes with librosa; its streams do not depend on the blocks

            self._resampler = soxr.ResampleStream(sample_rate, *form)

    def write(self, wav: np.ndarray, is_last: bool = False) -> None:
        """Have the next samples encoded, (n_channels, n)."""
        self._jobs.append(self._thread.submit(self._encode, wav, is_last))
        while len(self._jobs) > (0 if is_last else 3):
            self._jobs.pop(0).result()

    def _encode(self, wav: np.ndarray, is_last: bool) -> None:
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
        """Close the encoder: later, libsndfile would write to a file that Python has closed."""
        self._thread.shutdown(cancel_futures=True)
        self._sound.close()


def _png(values: np.ndarray) -> str:
    """Colour a picture in [0, 1], low rows at the bottom; base64."""
    image = Image.fromarray((values[::-1] * 255).round().astype(np.uint8))
    stops, levels = np.linspace(0, 1, len(HEAT)), np.linspace(0, 1, 256)
    colours = [np.interp(levels, stops, channel) for channel in zip(*HEAT, strict=True)]
    image.putpalette(np.stack(colours, -1).astype(np.uint8).ravel().tolist())
    file = io.BytesIO()
    image.save(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _area(upper: np.ndarray, lower: np.ndarray) -> str:
    """Return the path of an area between two curves with a value per column, in thousandths."""
    curves = [*upper, upper[-1]], [*lower, lower[-1]]
    there, back = ([f"{i} {1000 * y:.0f}" for i, y in enumerate(curve)] for curve in curves)
    return f"M{'L'.join(there)}L{'L'.join(back[::-1])}Z"


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
