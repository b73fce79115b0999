"""Songs made of arithmetic, whose parts are therefore known: for the demo and the tests.

A voice with vibrato sings vowels over chords, bass and drums, in stereo. `write_dsd100` writes
such songs the way DSD100 is distributed. Everything random comes from the one `rng`: same seed,
same song.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

PARTS = ("bass", "drums", "other", "vocals")  # DSD100's sources
PEAK = 0.8  # of the mixture, full scale 1
VOCALS_DB = (-3.0, 0.0)  # range of the vocals' level against all the rest
BALANCE_DB = {"bass": -4.0, "drums": -5.0, "other": 0.0}  # chords loudest: they are the hard part

SCALE = np.array((0, 2, 4, 5, 7, 9, 11))  # major [semitones]
PENTATONIC = np.array((0, 2, 4, 7, 9))  # of the melody: it fits every chord of the scale
PROGRESSIONS = ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (1, 4, 0, 5), (5, 1, 2, 5))  # degrees
RHYTHMS = ((1, 1, 1, 1, 1, 2), (1, 0.5, 0.5, 1, 1, 3), (0.5, 0.5, 1, 0.5, 0.5, 1, 0.5, 0.5, 2))
PATTERNS = {  # of a bar: (beat, length, which of the chord's notes: 3 is the octave of the lowest)
    "held": [[(0, 4, 0), (0, 4, 1), (0, 4, 2)]],
    "moving": [
        [(beat + 0.03 * i, 1.4, i) for beat in (0, 1.5, 2.5) for i in range(4)],
        [(i / 2, 1, note) for i, note in enumerate((0, 1, 2, 3, 2, 1, 2, 1))],
    ],
    "bass": [[(0, 4, 0)], [(0, 1.5, 0), (1.5, 0.5, 0), (2, 2, 0)], [(0, 2, 0), (2, 2, 3)]],
}
BEATS = (  # sixteenths of one bar
    {"kick": "x.......x.x.....", "snare": "....x.......x...", "hats": "x.x.x.x.x.x.x.x."},
    {"kick": "x...x...x...x...", "snare": "....x.......x...", "hats": "..x...x...x...x."},
    {"kick": "x..x......x.....", "snare": "....x..x....x...", "hats": "xxx.xxx.xxx.xxx."},
)

VOWELS = {  # resonances of a man's vocal tract [Hz]; the first three from [1], the others typical
    "a": (730, 1090, 2440, 3300, 4300),
    "e": (530, 1840, 2480, 3400, 4400),
    "i": (270, 2290, 3010, 3500, 4500),
    "o": (570, 840, 2410, 3200, 4200),
    "u": (300, 870, 2240, 3200, 4200),
}
BANDWIDTHS = np.array((80, 100, 140, 200, 280))[:, None]  # of the resonances [Hz]
VOICES = ((52, 1.05), (57, 1.14), (62, 1.19))  # lowest note, size of the resonances
DARKNESS, BREATH = 1.8, 0.04  # exponent of the voice's roll-off; noise relative to it
Sounds = Iterator[tuple[float, float, np.ndarray]]  # beat of the song, place from -1 to 1, samples


class Sheet(NamedTuple):
    """The music before anybody plays it; pitches are MIDI notes."""

    rng: np.random.Generator
    beat: float  # [s]
    tonic: int
    chords: list[np.ndarray]  # semitones above the tonic, the root first, of every bar
    sample_rate: int


def synthesize_song(
    rng: np.random.Generator, seconds: float, sample_rate: int
) -> dict[str, np.ndarray]:
    """Make one song of 4000 Hz or more: its `PARTS`, each (2, n_samples), float32.

    Their sum peaks at 0.8. The vocals are 3 to 0 dB below all others: the SI-SDR of the mixture.

    References
    ----------
    .. [1] Peterson and Barney, "Control methods used in a study of the vowels", JASA 24, 1952.
    """
    beat, degrees = 60 / rng.uniform(76, 126), rng.choice(PROGRESSIONS)
    bars = range(int(np.ceil(seconds / (4 * beat))))
    chords = [SCALE[(degrees[bar % 4] + np.array((0, 2, 4))) % 7] for bar in bars]
    sheet = Sheet(rng, beat, int(rng.integers(55, 67)), chords, sample_rate)
    parts = {}
    for name, player in zip(PARTS, (_bass, _drums, _chords, _vocals), strict=True):
        dry = np.zeros((2, round(seconds * sample_rate)))
        for start, place, sound in player(sheet):
            here = dry[:, round(start * beat * sample_rate) :][:, : len(sound)]
            angle = (place + 1) * np.pi / 4  # power stays the same from left to right
            here += np.outer((np.cos(angle), np.sin(angle)), sound[: here.shape[1]])
        parts[name] = _level(dry)
    for name, level_db in BALANCE_DB.items():
        parts[name] *= 10 ** ((level_db + rng.uniform(-1.5, 1.5)) / 20)
    rest = parts["bass"] + parts["drums"] + parts["other"]
    parts["vocals"] *= 10 ** (rng.uniform(*VOCALS_DB) / 20) * np.sqrt(np.mean(rest**2))
    scale = PEAK / np.abs(rest + parts["vocals"]).max()
    return {name: (wav * scale).astype(np.float32) for name, wav in parts.items()}


def write_dsd100(
    root: Path, n_train: int, n_test: int, seconds: float, sample_rate: int, seed: int
) -> None:
    """Write songs as DSD100 is distributed, at most 50 to train and to test; all of `seconds`.

    They do not depend on how many there are. `root`, a new folder, appears when it is complete.
    """
    import soundfile

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        tree = Path(unfinished) / root.name
        songs = [("Dev", 51 + i) for i in range(n_train)] + [("Test", 1 + i) for i in range(n_test)]
        for split, number in songs:
            rng = np.random.default_rng([seed, number])
            parts = synthesize_song(rng, seconds, sample_rate)
            # Rounded first, so that the mixture on disk is the exact sum of the sources on disk.
            whole = {name: np.round(wav * 32767).astype(np.int16) for name, wav in parts.items()}
            song = f"{split}/{number:03d} - Song {number}"
            files = {f"Sources/{song}/{name}.wav": wav for name, wav in whole.items()}
            files[f"Mixtures/{song}/mixture.wav"] = sum(whole.values())
            for name, wav in files.items():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(tree / name, wav.T, sample_rate, subtype="PCM_16")
        os.replace(tree, root)


def sing(sheet: Sheet, tract: float, pitch: float, seconds: float, vowel: str) -> np.ndarray:
    """Sing one note, (n_samples,) with an RMS of about 1; `tract` scales the resonances."""
    rng, sample_rate = sheet.rng, sheet.sample_rate
    resonances = tract * np.array(VOWELS[vowel])[:, None]  # [Hz]

    def mouth(f: np.ndarray) -> np.ndarray:
        return (1 / abs(1 + 2j * (f - resonances) / BANDWIDTHS)).sum(0)

    def voice(f: np.ndarray) -> np.ndarray:
        return mouth(f) * (1 + f / 600) ** -DARKNESS

    t = np.arange(round(seconds * sample_rate)) / sample_rate
    # A singer slides into the note, and lands on it before vibrato sets in.
    vibrato = rng.uniform(0.3, 0.7) * np.sin(2 * np.pi * rng.uniform(4.8, 6.2) * t)
    bend = np.clip(t / 0.3, 0, 1) * vibrato + rng.normal() * np.exp(-t / 0.04)
    wav = _filtered(_harmonics(pitch + bend, np.ones(999), sample_rate), voice, sample_rate)
    # The noise misses the harmonics' roll-off: breath is what one hears at the top.
    wav += BREATH * _filtered(rng.standard_normal(len(t)), mouth, sample_rate)
    return wav * np.sin(np.pi * np.linspace(0.2, 0.9, len(t))) * _ends(t, 0.03)


def _vocals(sheet: Sheet) -> Sounds:
    """Sing phrases of two bars that end early, so that the singer can breathe."""
    rng = sheet.rng
    lowest, tract = VOICES[rng.integers(len(VOICES))]
    tract *= rng.uniform(0.96, 1.04)
    notes = np.add.outer(12 * np.arange(10), PENTATONIC + sheet.tonic % 12).ravel()
    notes, step, place = notes[notes >= lowest], 3, rng.uniform(-0.1, 0.1)
    for bar in range(0, len(sheet.chords), 2):
        beat = 4 * bar
        for length in RHYTHMS[rng.integers(len(RHYTHMS))]:
            step = int(np.clip(step + rng.integers(-2, 3), 0, 7))
            vowel = str(rng.choice(list(VOWELS)))
            sound = sing(sheet, tract, notes[step], length * sheet.beat, vowel)
            yield beat, place, rng.uniform(0.65, 1) * sound
            beat += length


def _bass(sheet: Sheet) -> Sounds:
    return _play(sheet, "bass", 28, attack=0.008, decay=1.2, width=0.0)  # from the lowest E up


def _chords(sheet: Sheet) -> Sounds:
    """Play the harmony with a soft held layer and a moving one."""
    lowest = int(sheet.rng.integers(48, 56))
    yield from _play(sheet, "held", lowest, attack=0.25, decay=9.0, width=0.8)
    yield from _play(sheet, "moving", lowest, attack=0.005, decay=0.5, width=0.8)


def _play(
    sheet: Sheet, style: str, lowest: int, attack: float, decay: float, width: float
) -> Sounds:
    """Play chords, note by note, which rise and fall in so many seconds."""
    rng, k = sheet.rng, np.arange(1, 21)
    loudness, darkness = rng.uniform(0.5, 1.0), rng.uniform(1.2, 2.0)
    weights = k**-darkness * np.where(k % 2, 1, rng.uniform(0.1, 1))  # a clarinet's even ones: 0.1
    pattern = PATTERNS[style][rng.integers(len(PATTERNS[style]))]
    for bar, chord in enumerate(sheet.chords):
        low = (sheet.tonic + chord - lowest) % 12 + lowest
        for beat, length, which in pattern:
            pitch = [*low, low[0] + 12][which]
            t = np.arange(round(length * sheet.beat * sheet.sample_rate)) / sheet.sample_rate
            wav = _harmonics(np.full(len(t), pitch), weights, sheet.sample_rate)
            wav *= np.clip(t / attack, 0, 1) * np.exp(-t / decay) * _ends(t, 0.04)
            yield 4 * bar + beat, width * np.sin(pitch), loudness * rng.uniform(0.7, 1) * wav


def _drums(sheet: Sheet) -> Sounds:
    rng = sheet.rng
    t = np.arange(round(0.35 * sheet.sample_rate)) / sheet.sample_rate
    low, skin = rng.uniform(42, 55), rng.uniform(170, 220)
    falling = low * t + 0.09 * low * (1 - np.exp(-t / 0.03))  # cycles: from 4 low down to low
    noise = rng.standard_normal(len(t))
    rattle, sizzle = (_filtered(noise, lambda f, n=n: f**n, sheet.sample_rate) for n in (1, 2))
    snare = np.sin(2 * np.pi * skin * t) * np.exp(-t / 0.07) + rattle * np.exp(-t / 0.09)
    kit = {
        "kick": np.sin(2 * np.pi * falling) * np.exp(-t / rng.uniform(0.08, 0.15)),
        "snare": 0.5 * snare,
        "hats": 0.25 * sizzle * np.exp(-t / rng.uniform(0.02, 0.06)),
    }
    pattern, place = BEATS[rng.integers(len(BEATS))], rng.uniform(-0.5, 0.5)
    for bar in range(len(sheet.chords)):
        for drum, steps in pattern.items():
            for step in (i for i, mark in enumerate(steps) if mark == "x"):
                sound = rng.uniform(0.7, 1) * kit[drum] * _ends(t, 0.001)
                yield 4 * bar + step / 4, place * (drum == "hats"), sound


def _harmonics(pitch: np.ndarray, weights: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sum the weighted harmonics of a MIDI pitch, (n_samples,), that the sample rate can hold."""
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    first = np.exp(2j * np.pi / sample_rate * np.cumsum(f0))
    wav, harmonic = np.zeros(len(f0)), np.ones(len(f0))
    for k, weight in enumerate(weights[: int(0.48 * sample_rate / f0.max())], 1):
        harmonic = harmonic * first
        # Quadratic phases: harmonics that all start together make a wave of spikes.
        wav += (weight * np.exp(1j * k * k) * harmonic).real
    return wav


def _filtered(wav: np.ndarray, gain: Callable, sample_rate: int) -> np.ndarray:
    """Give a sound the spectrum ``gain(frequency)`` and an RMS of 1."""
    spectrum = np.fft.rfft(wav) * gain(np.fft.rfftfreq(len(wav), 1 / sample_rate))
    return _level(np.fft.irfft(spectrum, len(wav)))


def _level(wav: np.ndarray) -> np.ndarray:
    """Bring a sound to an RMS of 1."""
    return wav / np.sqrt(np.mean(wav**2))


def _ends(t: np.ndarray, seconds: float) -> np.ndarray:
    """Fade in and out, so that nothing clicks; `t` are the times of samples [s]."""
    return np.clip(np.minimum(t, t[-1] - t) / seconds, 0, 1)
