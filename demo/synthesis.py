"""Songs made of arithmetic, whose parts are therefore known: for the demo and the tests.

A key, a tempo and a chord progression are drawn; a source-filter voice sings syllables over
chords, bass and drums, in stereo and in one room. `write_dsd100` writes such songs the way DSD100
is distributed. Everything random comes from the one `rng`: same seed, same song.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hparams import InputError

PARTS = ("bass", "drums", "other", "vocals")  # DSD100's sources
PEAK = 0.8  # of the mixture, full scale 1
VOCALS_DB = (-3.0, 0.0)  # range of the vocals' level against all the rest
BALANCE_DB = {"bass": -4.0, "drums": -5.0, "other": 0.0}  # chords loudest: they are the hard part
ROOM = {"bass": 0.0, "drums": 0.15, "other": 0.3, "vocals": 0.3}  # reverberation, dry sound is 1

# --- Harmony and rhythm ---------------------------------------------------------------------------
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # [semitones]
PROGRESSIONS = {  # scale degrees counted from 0, one chord a bar
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (5, 3, 0, 4), (0, 3, 5, 4), (0, 2, 3, 4), (1, 4, 0, 5)),
    "minor": ((0, 5, 2, 6), (0, 3, 5, 6), (0, 6, 5, 6), (0, 3, 6, 2), (5, 6, 0, 0)),
}
RHYTHMS = (  # one bar of melody: lengths of notes [beats]
    (1, 1, 1, 1),
    (1, 0.5, 0.5, 1, 1),
    (0.5, 0.5, 1, 0.5, 0.5, 1),
    (1.5, 0.5, 1, 1),
)
CADENCES = ((1, 2), (0.5, 0.5, 2), (1, 1, 1), (3,))  # every second bar; then a breath
BEATS = (  # sixteenths of one bar
    {"kick": "x.......x.x.....", "snare": "....x.......x...", "hats": "x.x.x.x.x.x.x.x."},
    {"kick": "x...x...x...x...", "snare": "....x.......x...", "hats": "..x...x...x...x."},
    {"kick": "x..x......x.....", "snare": "....x..x....x...", "hats": "xxx.xxx.xxx.xxx."},
)
BASS_LINES = (  # (beat, length [beats], semitones above the chord's root)
    ((0, 4, 0),),
    ((0, 1.5, 0), (1.5, 0.5, 0), (2, 2, 0)),
    ((0, 1, 0), (1, 1, 0), (2, 1, 7), (3, 1, 12)),
)
CHORDS = {  # (beat, length [beats], which of the chord's notes: 3 is the octave of the lowest)
    "held": tuple((0, 4, i) for i in range(3)),
    "struck": tuple((beat + 0.03 * i, 1.4, i) for beat in (0, 1.5, 2.5) for i in range(4)),
    "arpeggio": tuple((i / 2, 1, tone) for i, tone in enumerate((0, 1, 2, 3, 2, 1, 2, 1))),
}

# --- Sounds ---------------------------------------------------------------------------------------
FRAME_SECONDS = 0.005  # pitch, loudness and vowel of the voice are set this often
VOWELS = {  # resonances of a man's vocal tract [Hz]; the first three from [1], the others typical
    "a": (730, 1090, 2440, 3300, 4300),
    "e": (530, 1840, 2480, 3400, 4400),
    "i": (270, 2290, 3010, 3500, 4500),
    "o": (570, 840, 2410, 3200, 4200),
    "u": (300, 870, 2240, 3200, 4200),
}
BANDWIDTHS = (80.0, 100.0, 140.0, 200.0, 280.0)  # of the resonances [Hz]
RESONANCES = (1.0, -1.0, 1.0, -0.9, 0.7)  # strengths; alternating signs leave no hole between two
CONSONANTS = {  # noise before a vowel: centre [Hz], width [octaves], length [s], amplitude
    "s": (6500, 0.45, 0.11, 0.054),
    "sh": (3200, 0.55, 0.11, 0.063),
    "f": (5000, 1.40, 0.09, 0.03),
    "h": (1500, 1.00, 0.07, 0.05),
    "t": (4500, 0.80, 0.03, 0.08),
    "k": (2000, 0.60, 0.03, 0.1),
    "": (1000, 1.00, 0.0, 0.0),  # none: the voice slides into the next note
}
TIMBRES = {  # exponent of the harmonics' roll-off, weight of the even ones, attack, decay [s]
    "held": ((1.3, 1.0, 0.25, 9.0), (1.8, 0.3, 0.05, 9.0), (1.0, 0.8, 0.4, 9.0)),
    "struck": ((1.2, 1.0, 0.004, 0.6), (2.0, 0.6, 0.006, 1.0)),
    "arpeggio": ((1.4, 0.9, 0.004, 0.35), (1.2, 0.1, 0.004, 0.5)),
    "bass": ((1.5, 0.8, 0.008, 1.2),),
}
Timbre = tuple[float, float, float, float]


class Sheet(NamedTuple):
    """The music before anybody plays it."""

    beat: float  # [s]
    tonic: int  # MIDI note
    scale: tuple[int, ...]  # semitones above the tonic
    chords: tuple[int, ...]  # scale degree of each bar, repeated for ever
    n_bars: int

    def pitch(self, degree: int) -> int:
        """Return the MIDI note of a scale degree; 7 is the octave."""
        octave, step = divmod(degree, 7)
        return self.tonic + 12 * octave + self.scale[step]

    def chord(self, bar: int) -> tuple[int, int, int]:
        """Return the scale degrees of a bar's triad, the root first."""
        root = self.chords[bar % len(self.chords)]
        return root, root + 2, root + 4


class Singer(NamedTuple):
    """What stays the same while somebody sings."""

    lowest: int  # MIDI note; the melody stays within 17 semitones above
    tract: float  # resonances relative to a man's: 1.17 is typical for women
    vibrato_hz: float
    vibrato_depth: float  # [semitones]
    breath: float  # noise relative to the voice, per hertz
    darkness: float  # exponent of the harmonics' roll-off


class Note(NamedTuple):
    """One sung syllable."""

    start: float  # of the vowel; the consonant comes before [s]
    seconds: float
    pitch: int  # MIDI note
    loudness: float  # 0..1
    consonant: str
    vowel: str


def synthesize_song(
    rng: np.random.Generator, seconds: float, sample_rate: int
) -> dict[str, np.ndarray]:
    """Make one song and its parts.

    Parameters
    ----------
    rng : np.random.Generator
        Decides the music, the singer and the instruments.
    seconds : float > 0
    sample_rate : int
        [Hz], 4000 or more.

    Returns
    -------
    dict of str to np.ndarray, shape=(2, n_samples), float32
        ``bass``, ``drums``, ``other`` and ``vocals``; their sum peaks at 0.8. The vocals are 3 to
        0 dB below the sum of the others, which is also the SI-SDR of the mixture.

    References
    ----------
    .. [1] Peterson and Barney, "Control methods used in a study of the vowels", JASA 24, 1952.
    .. [2] Klatt, "Software for a cascade/parallel formant synthesizer", JASA 67, 1980.
    """
    n_samples = round(seconds * sample_rate)
    mode, beat = str(rng.choice(list(SCALES))), 60 / rng.uniform(76, 126)
    chords = PROGRESSIONS[mode][rng.integers(len(PROGRESSIONS[mode]))]
    n_bars = int(np.ceil(seconds / (4 * beat)))
    sheet = Sheet(beat, int(rng.integers(55, 67)), SCALES[mode], chords, n_bars)
    lowest, tract = ((43, 0.97), (48, 1.02), (55, 1.14), (60, 1.19))[rng.integers(4)]
    singer = Singer(
        lowest=lowest,
        tract=tract * rng.uniform(0.96, 1.04),
        vibrato_hz=rng.uniform(4.8, 6.2),
        vibrato_depth=rng.uniform(0.25, 0.6),
        breath=rng.uniform(0.3, 1.0),
        darkness=rng.uniform(1.5, 2.1),
    )
    voice = sing(rng, _melody(rng, sheet, singer), singer, n_samples, sample_rate)
    parts = {
        "bass": _play_bass(rng, sheet, n_samples, sample_rate),
        "drums": _play_drums(rng, sheet, n_samples, sample_rate),
        "other": _play_chords(rng, sheet, n_samples, sample_rate),
        "vocals": np.outer(_pan(rng.uniform(-0.1, 0.1)), voice),
    }
    decay = rng.uniform(0.12, 0.3)  # of the room, to 1/e [s]
    t = np.arange(round(3 * decay * sample_rate)) / sample_rate
    room = rng.standard_normal((2, len(t))) * np.exp(-t / decay) * (t > 0.012)
    room /= np.sqrt(np.mean((room**2).sum(1)))
    return _mix(rng, {name: _reverberate(wav, ROOM[name] * room) for name, wav in parts.items()})


def write_dsd100(
    root: Path, n_train: int, n_test: int, seconds: float, sample_rate: int, seed: int
) -> None:
    """Write songs as DSD100 is distributed; they do not depend on how many there are.

    ``Mixtures/Dev/051 - …/mixture.wav``, ``Sources/Dev/051 - …/vocals.wav`` and so on; Dev is for
    training, Test for testing, at most 50 songs each, all of `seconds`. The folder `root` appears
    only when it is complete; InputError if it exists.
    """
    import soundfile

    if root.exists():
        raise InputError(f"{root}: exists already (remove it, or choose another folder)")
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


# --- The voice ------------------------------------------------------------------------------------


def sing(
    rng: np.random.Generator, notes: list[Note], singer: Singer, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Sing a melody: pulses of the vocal cords and noise, shaped by the vocal tract [2].

    The notes come in the order of time and do not overlap. Returns (n_samples,), float32, silent
    where nothing is sung, at an arbitrary level.
    """
    import torch

    hop = round(sample_rate * FRAME_SECONDS)
    n_frames = n_samples // hop + 1  # frame i is centred on sample i * hop
    times = np.arange(n_frames) * (hop / sample_rate)
    frequencies = np.fft.rfftfreq(4 * hop, 1 / sample_rate)[:, None]
    pitch, loudness, resonances, hiss = _curves(rng, notes, singer, times, frequencies)
    tract = np.zeros((len(frequencies), n_frames), complex)
    for centre, bandwidth, strength in zip(resonances, BANDWIDTHS, RESONANCES, strict=True):
        tract += strength / (1 + 2j * (frequencies - centre) / bandwidth)
    # The roll-off at the first resonance, which carries the vowel, undone: all are equally loud.
    tract *= loudness * (1 + resonances[0] / 600) ** singer.darkness
    rolloff = (1 + frequencies / 600) ** -singer.darkness
    # Both sources have the same power per hertz at every pitch and sample rate. The noise misses
    # the harmonics' roll-off, so that breath is what one hears at the top, as in real voices.
    f0 = np.interp(np.arange(n_samples), np.arange(n_frames) * hop, 440 * 2 ** ((pitch - 69) / 12))
    sources = np.stack([_pulses(f0, sample_rate) * np.sqrt(f0), rng.standard_normal(n_samples)])
    sources[1] *= np.sqrt(sample_rate / 4)
    shape = {"n_fft": 4 * hop, "hop_length": hop, "window": torch.hann_window(4 * hop).double()}
    padded = torch.nn.functional.pad(torch.from_numpy(sources), (0, 4 * hop))
    spec = torch.stft(padded, **shape, pad_mode="constant", return_complex=True)
    filters = np.stack([rolloff * tract, 0.02 * singer.breath * tract + hiss])
    spec[..., :n_frames] *= torch.from_numpy(filters)
    spec[..., n_frames:] = 0
    return torch.istft(spec.sum(0), **shape, length=n_samples).float().numpy()


def _melody(rng: np.random.Generator, sheet: Sheet, singer: Singer) -> list[Note]:
    """Make phrases of two bars, the second of them ending early so that the singer can breathe."""
    opening = RHYTHMS[rng.integers(len(RHYTHMS))]  # comes back, so that the song is *a* song
    intro = int(sheet.n_bars >= 8)
    lowest = next(degree for degree in range(-14, 14) if sheet.pitch(degree) >= singer.lowest)
    degree, notes = lowest + 4, []
    for bar in range(intro, sheet.n_bars):
        if (bar - intro) % 2 == 1:
            rhythm = CADENCES[rng.integers(len(CADENCES))]
        else:
            rhythm = opening if rng.random() < 0.6 else RHYTHMS[rng.integers(len(RHYTHMS))]
        beat = 0.0
        for length in rhythm:
            degree = int(np.clip(degree + rng.choice((-2, -1, -1, 0, 1, 1, 2)), lowest, lowest + 9))
            if beat % 2 == 0:  # strong beats agree with the chord
                tones = [tone + 7 * octave for octave in range(-4, 4) for tone in sheet.chord(bar)]
                degree = min(tones, key=lambda tone: abs(tone - degree))
            note = Note(
                start=(4 * bar + beat) * sheet.beat + rng.uniform(0, 0.02),
                seconds=length * sheet.beat - 0.02,
                pitch=sheet.pitch(degree),
                loudness=rng.uniform(0.65, 1.0),
                consonant=str(rng.choice(list(CONSONANTS))),
                vowel=str(rng.choice(list(VOWELS))),
            )
            notes.append(note)
            beat += length
    return notes


def _curves(
    rng: np.random.Generator,
    notes: list[Note],
    singer: Singer,
    times: np.ndarray,
    bins: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return for every frame: MIDI pitch, loudness, resonances [Hz] and, for every bin, noise."""
    n_frames = len(times)
    pitch = np.full(n_frames, float(notes[0].pitch) if notes else 60.0)
    loudness, depth = np.zeros(n_frames), np.zeros(n_frames)
    resonances = np.tile(np.array(VOWELS["a"], float)[:, None], n_frames)
    hiss = np.zeros((len(bins), n_frames))
    for note in notes:
        centre, width, length, level = CONSONANTS[note.consonant]
        edges = (note.start - length, note.start, note.start + note.seconds)
        onset, start, end = np.searchsorted(times, edges)
        pitch[onset:] = note.pitch
        resonances[:, start:] = np.array(VOWELS[note.vowel])[:, None]
        # Every note swells and gives way; what has no consonant is tied to the note before.
        loudness[start:end] = note.loudness * np.sin(np.linspace(0.25, 0.85, end - start) * np.pi)
        # A singer lands on the note first: vibrato starts after 0.2 s and is full after 0.6 s.
        depth[start:end] = np.clip((times[start:end] - note.start - 0.2) / 0.4, 0, 1)
        band = np.exp(-0.5 * (np.log2(np.maximum(bins, 1) / centre) / width) ** 2)
        rise_and_fall = np.sin(np.pi * (np.arange(start - onset) + 0.5) / max(start - onset, 1))
        # A wide band would be louder than a narrow one of the same height.
        hiss[:, onset:start] = level * note.loudness / np.sqrt(width) * band * rise_and_fall
    turns = np.cumsum(singer.vibrato_hz * (1 + 0.05 * _wander(rng, n_frames, 1.0))) * FRAME_SECONDS
    vibrato = singer.vibrato_depth * _smooth(depth, 0.1) * np.sin(2 * np.pi * turns)
    pitch = _smooth(pitch, 0.09) + vibrato + 0.08 * _wander(rng, n_frames, 0.5)
    loudness = _smooth(loudness, 0.05) * (1 + 0.06 * _wander(rng, n_frames, 0.05))
    smooth = np.stack([_smooth(curve, 0.08) for curve in resonances])
    return pitch, loudness, smooth * singer.tract, hiss


def _pulses(f0: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sum all harmonics below Nyquist, each with amplitude 1, in closed form.

    The Dirichlet kernel is ``1/2 + sum(cos(k x) for k in 1..n) = sin((n + 1/2) x) / 2 sin(x/2)``.
    """
    phase = (np.cumsum(f0 * (2 * np.pi / sample_rate)) + np.pi) % (2 * np.pi) - np.pi
    phase[np.abs(phase) < 1e-6] = 1e-6  # there the kernel is n + 1/2, to rounding
    n_harmonics = 0.48 * sample_rate / f0
    whole = np.floor(n_harmonics)
    kernel = np.sin((whole + 0.5) * phase) / (2 * np.sin(phase / 2)) - 0.5
    # The harmonic that is crossing the top fades in: a whole one would click in every glide.
    return kernel + (n_harmonics - whole) * np.cos((whole + 1) * phase)


def _smooth(curve: np.ndarray, seconds: float) -> np.ndarray:
    """Average a curve of one value per frame over a Hann window of this length."""
    half = max(1, round(seconds / FRAME_SECONDS / 2))
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(np.pad(curve, half, mode="edge"), window / window.sum(), "valid")


def _wander(rng: np.random.Generator, n_frames: int, seconds: float) -> np.ndarray:
    """Return random drift with standard deviation 1 that changes within some `seconds`."""
    curve = _smooth(rng.standard_normal(n_frames), seconds)
    return curve / max(curve.std(), 1e-9)


# --- The band -------------------------------------------------------------------------------------


def _play_bass(
    rng: np.random.Generator, sheet: Sheet, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Play the chords' roots, shape=(2, n_samples)."""
    line = BASS_LINES[rng.integers(len(BASS_LINES))]
    track = np.zeros((2, n_samples), np.float32)
    for bar in range(sheet.n_bars):
        root = (sheet.pitch(sheet.chord(bar)[0]) - 4) % 12 + 28  # from the lowest E of a bass up
        for beat, length, above in line:
            seconds = length * sheet.beat * 0.95
            tone = _tone(root + above, seconds, TIMBRES["bass"][0], sample_rate, cents=0)
            _add(track, rng.uniform(0.8, 1) * tone, (4 * bar + beat) * sheet.beat, sample_rate)
    return track


def _play_chords(
    rng: np.random.Generator, sheet: Sheet, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Play the harmony with a soft held layer and a moving one, shape=(2, n_samples)."""
    track = np.zeros((2, n_samples), np.float32)
    lowest, moving = int(rng.integers(52, 60)), ("struck", "arpeggio")[rng.integers(2)]
    for style, loudness in (("held", rng.uniform(0.3, 0.8)), (moving, rng.uniform(0.6, 1.2))):
        timbre = TIMBRES[style][rng.integers(len(TIMBRES[style]))]
        for bar in range(sheet.n_bars):
            low = sorted((sheet.pitch(tone) - lowest) % 12 + lowest for tone in sheet.chord(bar))
            for beat, length, which in CHORDS[style]:
                pitch = [*low, low[0] + 12][which]
                tone = _tone(pitch, length * sheet.beat, timbre, sample_rate, cents=4)
                gain = loudness * rng.uniform(0.7, 1) * _pan(0.8 * np.sin(pitch))[:, None]
                start = (4 * bar + beat) * sheet.beat + rng.uniform(0, 0.01)
                _add(track, gain * tone, start, sample_rate)
    return track


def _play_drums(
    rng: np.random.Generator, sheet: Sheet, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Play a beat, shape=(2, n_samples)."""
    t = np.arange(round(0.35 * sample_rate)) / sample_rate
    fade = np.clip((0.35 - t) / 0.05, 0, 1) * np.clip(t / 0.001, 0, 1)
    low, skin = rng.uniform(42, 55), rng.uniform(170, 220)
    falling = low * t + 3 * low * 0.03 * (1 - np.exp(-t / 0.03))  # cycles: from 4 low down to low
    # A second difference lifts noise by 12 dB an octave, which is what cymbals and wires are.
    sizzle = np.diff(rng.standard_normal(len(t) + 2), 2) / np.sqrt(6)
    rattle = np.diff(rng.standard_normal(len(t) + 1)) / np.sqrt(2)
    snare = np.sin(2 * np.pi * skin * t) * np.exp(-t / 0.07) + rattle * np.exp(-t / 0.09)
    kit = {
        "kick": np.sin(2 * np.pi * falling) * np.exp(-t / rng.uniform(0.08, 0.15)) * fade,
        "snare": 0.5 * snare * fade,
        "hats": 0.25 * sizzle * np.exp(-t / rng.uniform(0.02, 0.06)) * fade,
    }
    pattern, track = BEATS[rng.integers(len(BEATS))], np.zeros((2, n_samples), np.float32)
    pans = {"kick": 0.0, "snare": 0.0, "hats": rng.uniform(-0.5, 0.5)}
    swing = rng.uniform(0, 0.12)  # every second sixteenth comes late by this part of one
    for bar in range(sheet.n_bars):
        for drum, steps in pattern.items():
            for step in (i for i, mark in enumerate(steps) if mark == "x"):
                start = (4 * bar + (step + swing * (step % 2)) / 4) * sheet.beat
                hit = rng.uniform(0.7, 1) * kit[drum]
                _add(track, np.outer(_pan(pans[drum]), hit), start, sample_rate)
    return track


@functools.lru_cache(maxsize=64)  # the same few are played over and over
def _tone(pitch: int, seconds: float, timbre: Timbre, sample_rate: int, cents: float) -> np.ndarray:
    """Play one note, shape=(2, n_samples): left and right `cents` apart, darker as it decays."""
    rolloff, even, attack, decay = timbre
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    frequency = 440 * 2 ** ((pitch - 69) / 12)
    apart = 2 ** (np.array([[-0.5], [0.5]]) * cents / 1200)
    first = np.exp((2j * np.pi * frequency * apart - 1 / (8 * decay)) * t)  # higher ones fade first
    wav, harmonic = np.zeros((2, len(t))), np.ones((2, len(t)), complex)
    for k in range(1, int(np.clip(0.45 * sample_rate / frequency, 1, 20)) + 1):
        harmonic *= first
        # Quadratic phases: harmonics that all start together make a wave of spikes.
        wav += ((k**-rolloff if k % 2 else even * k**-rolloff) * np.exp(1j * k * k) * harmonic).real
    envelope = np.clip(t / attack, 0, 1) * np.exp(-t / decay) * np.clip((seconds - t) / 0.04, 0, 1)
    return wav * envelope


def _reverberate(wav: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Add a room's answer to the sum of both channels, shape=(2, n_samples)."""
    size = 2 ** int(np.ceil(np.log2(wav.shape[1] + room.shape[1])))
    sent = np.fft.rfft(wav.mean(0), size) * np.fft.rfft(room, size)
    return wav + np.fft.irfft(sent, size)[:, : wav.shape[1]]


def _mix(rng: np.random.Generator, parts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Set the levels of the parts and scale the peak of their sum."""

    def gain(level_db: float, wav: np.ndarray) -> float:
        rms = np.sqrt(np.mean(np.square(wav))) if wav.any() else 1.0
        return 10 ** (level_db / 20) / rms

    parts = {
        name: wav * gain(BALANCE_DB.get(name, 0) + rng.uniform(-1.5, 1.5), wav)
        for name, wav in parts.items()
    }
    rest = parts["bass"] + parts["drums"] + parts["other"]
    parts["vocals"] *= gain(rng.uniform(*VOCALS_DB), parts["vocals"]) / gain(0.0, rest)
    peak = np.abs(rest + parts["vocals"]).max(initial=0)
    scale = PEAK / peak if peak > 0 else 1.0
    return {name: (wav * scale).astype(np.float32) for name, wav in parts.items()}


def _pan(position: float) -> np.ndarray:
    """Return the gains of left and right, shape=(2,); position -1..1, power stays the same."""
    angle = (position + 1) * np.pi / 4
    return np.array([np.cos(angle), np.sin(angle)])


def _add(track: np.ndarray, sound: np.ndarray, seconds: float, sample_rate: int) -> None:
    """Add a sound to a track from a time on; what does not fit is cut off."""
    place = track[:, round(seconds * sample_rate) :][:, : sound.shape[1]]
    place += sound[:, : place.shape[1]]
