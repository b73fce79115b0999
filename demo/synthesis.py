"""Songs made of arithmetic, whose parts are therefore known: for the demo and the tests.

A key, a tempo and a chord progression are drawn; a source-filter voice sings syllables over
chords, bass and drums, in stereo and in one room. `write_dsd100` writes such songs the way DSD100
is distributed. Everything random comes from the one `rng`: same seed, same song.
"""

from __future__ import annotations

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

# --- Harmony and rhythm --------------------------------------------------------------------------
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
    (0.5, 0.5, 0.5, 0.5, 1, 1),
    (1.5, 0.5, 2),
)
CADENCES = ((1, 2), (0.5, 0.5, 2), (2, 1), (1, 1, 1), (3,))  # last bar of a phrase; then a breath
BEATS = (  # sixteenths of one bar
    {"kick": "x.......x.x.....", "snare": "....x.......x...", "hats": "x.x.x.x.x.x.x.x."},
    {"kick": "x...x...x...x...", "snare": "....x.......x...", "hats": "..x...x...x...x."},
    {"kick": "x..x......x.....", "snare": "....x..x....x...", "hats": "xxx.xxx.xxx.xxx."},
    {"kick": "x.....x.x.......", "snare": "........x.......", "hats": "x...x...x...x..x"},
)
BASS_LINES = (  # (beat, length [beats], semitones above the chord's root)
    ((0, 4, 0),),
    ((0, 1.5, 0), (1.5, 0.5, 0), (2, 2, 0)),
    ((0, 1, 0), (1, 1, 0), (2, 1, 7), (3, 1, 12)),
    tuple((i / 2, 0.5, 12 * (i % 4 == 3)) for i in range(8)),
)

# --- The voice -----------------------------------------------------------------------------------
FRAME_SECONDS = 0.005  # pitch, loudness and vowel are set this often
VOWELS = {  # resonances of a man's vocal tract [Hz]; the first three from [1], the others typical
    "a": (730, 1090, 2440, 3300, 4300),
    "e": (530, 1840, 2480, 3400, 4400),
    "i": (270, 2290, 3010, 3500, 4500),
    "o": (570, 840, 2410, 3200, 4200),
    "u": (300, 870, 2240, 3200, 4200),
    "nasal": (250, 1000, 2200, 3000, 4000),
}
BANDWIDTHS = (80.0, 100.0, 140.0, 200.0, 280.0)  # of the resonances [Hz]
RESONANCES = (1.0, -1.0, 1.0, -0.9, 0.7)  # strengths; alternating signs leave no hole between two


class Singer(NamedTuple):
    """What stays the same while somebody sings."""

    lowest: int  # MIDI note; the melody stays within 17 semitones above
    tract: float  # resonances relative to a man's: 1.17 is typical for women
    vibrato_hz: float
    vibrato_depth: float  # [semitones]
    breath: float  # noise relative to the voice, per hertz
    darkness: float  # exponent of the harmonics' roll-off


class Consonant(NamedTuple):
    """The sound before a vowel: silence while the lips or the tongue close, then noise."""

    centre: float  # of the noise band [Hz]
    width: float  # of the noise band [octaves]
    closure: float  # [s]
    seconds: float  # of noise [s]
    noise: float  # amplitude
    voicing: float  # loudness of the voice meanwhile, 0..1


CONSONANTS = {
    "s": Consonant(6500, 0.45, 0.0, 0.11, 0.054, 0.0),
    "sh": Consonant(3200, 0.55, 0.0, 0.11, 0.063, 0.0),
    "z": Consonant(6000, 0.45, 0.0, 0.08, 0.035, 0.35),
    "f": Consonant(5000, 1.40, 0.0, 0.09, 0.03, 0.0),
    "h": Consonant(1500, 1.00, 0.0, 0.07, 0.05, 0.0),
    "t": Consonant(4500, 0.80, 0.04, 0.03, 0.08, 0.0),
    "k": Consonant(2000, 0.60, 0.04, 0.03, 0.1, 0.0),
    "nasal": Consonant(1000, 1.00, 0.0, 0.07, 0.0, 0.4),
    "": Consonant(1000, 1.00, 0.0, 0.0, 0.0, 1.0),  # none: the voice slides into the next note
}


class Note(NamedTuple):
    """One sung syllable."""

    start: float  # of the vowel; the consonant comes before [s]
    seconds: float
    pitch: int  # MIDI note
    loudness: float  # 0..1
    consonant: str
    vowel: str


# --- The instruments -----------------------------------------------------------------------------
CYCLE = 16384  # samples in the table of one period: so many need no interpolation (-79 dB)


class Timbre(NamedTuple):
    """How an instrument sounds; harmonic k has amplitude k ** -rolloff."""

    rolloff: float
    even: float  # weight of the even harmonics, 0..1
    attack: float  # [s]
    decay: float  # to 1/e [s]


CHORD_TIMBRES = {  # by the way they are played
    "held": (Timbre(1.3, 1.0, 0.25, 9.0), Timbre(1.8, 0.3, 0.05, 9.0), Timbre(1.0, 0.8, 0.4, 9.0)),
    "struck": (Timbre(1.2, 1.0, 0.004, 0.6), Timbre(2.0, 0.6, 0.006, 1.0)),
    "arpeggio": (Timbre(1.4, 0.9, 0.004, 0.35), Timbre(1.2, 0.1, 0.004, 0.5)),
}
BASS = Timbre(1.5, 0.8, 0.008, 1.2)


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


def synthesize_song(
    rng: np.random.Generator, seconds: float, sample_rate: int
) -> dict[str, np.ndarray]:
    """Make one song and its parts.

    Parameters
    ----------
    rng : np.random.Generator
        Decides the music, the singer and the instruments.
    seconds : float > 0
        Memory and time grow with it: some 30 times real time, 10 MB a second at 44.1 kHz.
    sample_rate : int
        [Hz], 8000 or more.

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
    sheet, singer = _draw_sheet(rng, seconds), _draw_singer(rng)
    voice = sing(rng, _melody(rng, sheet, singer), singer, n_samples, sample_rate)
    parts = {
        "bass": _play_bass(rng, sheet, n_samples, sample_rate),
        "drums": _play_drums(rng, sheet, n_samples, sample_rate),
        "other": _play_chords(rng, sheet, n_samples, sample_rate),
        "vocals": np.outer(_pan(rng.uniform(-0.1, 0.1)), voice),
    }
    room = _draw_room(rng, sample_rate)
    parts = {name: _reverberate(wav, room, ROOM[name]) for name, wav in parts.items()}
    return _mix(rng, parts, sample_rate)


def write_dsd100(
    root: Path, n_train: int, n_test: int, seconds: float, sample_rate: int, seed: int
) -> None:
    """Write songs as DSD100 is distributed; they do not depend on how many there are.

    Parameters
    ----------
    root : Path
        Folder to make: ``Mixtures/Dev/051 - …/mixture.wav``, ``Sources/Dev/051 - …/vocals.wav``
        and so on; Dev is for training, Test for testing. It appears only when it is complete.
    n_train, n_test : int
        Number of songs, at most 50 each.
    seconds : float
        Length of every song [s].
    sample_rate : int
        [Hz]; DSD100 has 44100.
    seed : int

    Raises
    ------
    InputError
        If `root` exists.
    """
    if root.exists():
        raise InputError(f"{root}: exists already (remove it, or choose another folder)")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as unfinished:
        tree = Path(unfinished) / root.name
        for split, first, n_songs in (("Dev", 51, n_train), ("Test", 1, n_test)):
            for number in range(first, first + n_songs):
                rng = np.random.default_rng([seed, number])
                song = f"{split}/{number:03d} - {_title(number)}"
                _write_song(tree, song, synthesize_song(rng, seconds, sample_rate), sample_rate)
        os.replace(tree, root)


def sing(
    rng: np.random.Generator,
    notes: list[Note],
    singer: Singer,
    n_samples: int,
    sample_rate: int,
) -> np.ndarray:
    """Sing a melody: pulses of the vocal cords and noise, shaped by the vocal tract.

    Parameters
    ----------
    rng : np.random.Generator
        Decides the noise and the small unsteadiness of the voice.
    notes : list of Note
        In the order of time, not overlapping.
    singer : Singer
    n_samples : int
    sample_rate : int
        [Hz]

    Returns
    -------
    np.ndarray, shape=(n_samples,), float32
        Mono, level arbitrary; silent where nothing is sung.
    """
    hop = round(sample_rate * FRAME_SECONDS)
    n_frames = n_samples // hop + 5  # frame i is centred on sample i * hop
    times = np.arange(n_frames) * (hop / sample_rate)
    pitch = _pitch_curve(rng, notes, singer, times)
    loudness = _loudness_curve(rng, notes, times)
    frequencies = np.fft.rfftfreq(4 * hop, 1 / sample_rate)
    resonances = _resonance_curves(notes, singer, times)
    tract = _vocal_tract(resonances, frequencies)
    # The roll-off at the first resonance, which carries the vowel, undone: all are equally loud.
    loudness *= _rolloff(resonances[0], singer) ** -1

    # Both sources have the same power per hertz at every pitch and sample rate. The noise misses
    # the harmonics' roll-off, so that breath is what one hears at the top, as in real voices.
    f0 = np.interp(np.arange(n_samples), np.arange(n_frames) * hop, _hertz(pitch))
    cords = _to_frames(_pulses(f0, sample_rate) * np.sqrt(f0), n_frames, hop)
    noise = _to_frames(rng.standard_normal(n_samples) * np.sqrt(sample_rate / 4), n_frames, hop)
    cords *= _rolloff(frequencies, singer)
    tract *= loudness[:, None]
    hiss = tract * np.float32(0.02 * singer.breath) + _consonant_bands(notes, times, frequencies)
    return _from_frames(cords * tract + noise * hiss, n_samples, hop)


def _draw_sheet(rng: np.random.Generator, seconds: float) -> Sheet:
    """Draw tempo, key and progression."""
    mode = str(rng.choice(list(SCALES)))
    beat = 60 / rng.uniform(76, 126)
    return Sheet(
        beat=beat,
        tonic=int(rng.integers(55, 67)),
        scale=SCALES[mode],
        chords=PROGRESSIONS[mode][rng.integers(len(PROGRESSIONS[mode]))],
        n_bars=int(np.ceil(seconds / (4 * beat))),
    )


def _draw_singer(rng: np.random.Generator) -> Singer:
    """Draw a bass, tenor, alto or soprano with a voice of its own."""
    lowest, tract = ((43, 0.97), (48, 1.02), (55, 1.14), (60, 1.19))[rng.integers(4)]
    return Singer(
        lowest=lowest,
        tract=tract * rng.uniform(0.96, 1.04),
        vibrato_hz=rng.uniform(4.8, 6.2),
        vibrato_depth=rng.uniform(0.25, 0.6),
        breath=rng.uniform(0.3, 1.0),
        darkness=rng.uniform(1.5, 2.1),
    )


def _title(number: int) -> str:
    """Return two words, different ones for every number from 1 to 100."""
    what = ["Amber", "Early", "Far", "Gold", "Low", "Paper", "Red", "Still", "Warm", "Wild"]
    which = ["Bay", "Dawn", "Door", "Hill", "Lamp", "Letter", "Moon", "River", "Road", "Song"]
    tens, ones = divmod(number * 37 % 100, 10)
    return f"{what[tens]} {which[ones]}"


def _melody(rng: np.random.Generator, sheet: Sheet, singer: Singer) -> list[Note]:
    """Make phrases of two bars, the second of them ending early so that the singer can breathe."""
    opening = RHYTHMS[rng.integers(len(RHYTHMS))]  # comes back, so that the song is *a* song
    intro = int(sheet.n_bars >= 8)
    lowest = next(degree for degree in range(-14, 14) if sheet.pitch(degree) >= singer.lowest)
    degree = lowest + 4
    notes = []
    for bar in range(intro, sheet.n_bars):
        ending = (bar - intro) % 2 == 1
        if ending:
            rhythm = CADENCES[rng.integers(len(CADENCES))]
        else:
            rhythm = opening if rng.random() < 0.6 else RHYTHMS[rng.integers(len(RHYTHMS))]
        beat = 0.0
        for length in rhythm:
            degree = int(np.clip(degree + rng.choice((-2, -1, -1, 0, 1, 1, 2)), lowest, lowest + 9))
            if beat % 2 == 0:  # strong beats agree with the chord
                degree = min(_octaves_of(sheet.chord(bar)), key=lambda tone: abs(tone - degree))
            notes.append(_syllable(rng, sheet, bar, beat, length, degree))
            beat += length
    return notes


def _octaves_of(chord: tuple[int, int, int]) -> list[int]:
    """Repeat a chord's degrees in all octaves anybody sings."""
    return [tone + 7 * octave for octave in range(-4, 4) for tone in chord]


def _syllable(
    rng: np.random.Generator, sheet: Sheet, bar: int, beat: float, length: float, degree: int
) -> Note:
    """Give a note its time and its text."""
    return Note(
        start=(4 * bar + beat) * sheet.beat + rng.uniform(0, 0.02),
        seconds=length * sheet.beat - 0.02,
        pitch=sheet.pitch(degree),
        loudness=rng.uniform(0.65, 1.0),
        consonant=str(rng.choice(list(CONSONANTS))),
        vowel=str(rng.choice(list("aeiou"))),
    )


def _pitch_curve(
    rng: np.random.Generator, notes: list[Note], singer: Singer, times: np.ndarray
) -> np.ndarray:
    """Return the pitch at every time [MIDI notes]: glides, late vibrato, unsteadiness."""
    pitch = np.full(len(times), float(notes[0].pitch) if notes else 60.0)
    depth = np.zeros(len(times))
    for note in notes:
        pitch[_index(times, _onset(note)) :] = note.pitch
        inside = slice(_index(times, note.start), _index(times, note.start + note.seconds))
        # A singer lands on the note first: vibrato starts after 0.2 s and is full after 0.6 s.
        depth[inside] = np.clip((times[inside] - note.start - 0.2) / 0.4, 0, 1)
    rate = singer.vibrato_hz * (1 + 0.05 * _wander(rng, times, 1.0))
    turns = np.cumsum(rate * np.gradient(times)) + rng.random()
    vibrato = np.sin(2 * np.pi * turns)
    unsteady = 0.08 * _wander(rng, times, 0.5) + 0.04 * _wander(rng, times, 0.03)
    return _smooth(pitch, 0.09) + singer.vibrato_depth * _smooth(depth, 0.1) * vibrato + unsteady


def _loudness_curve(rng: np.random.Generator, notes: list[Note], times: np.ndarray) -> np.ndarray:
    """Return the voice's amplitude at every time, 0..1; consonants soften or stop it."""
    loudness = np.zeros(len(times))
    for note in notes:
        onset, start = _index(times, _onset(note)), _index(times, note.start)
        end = _index(times, note.start + note.seconds)
        swell = np.sin(np.linspace(0.25, 0.85, end - start) * np.pi)  # grows, then gives way
        loudness[onset:start] = note.loudness * CONSONANTS[note.consonant].voicing * 0.7
        loudness[start:end] = note.loudness * swell
    shimmer = 1 + 0.06 * _wander(rng, times, 0.05)
    return (_smooth(loudness, 0.05) * shimmer).astype(np.float32)


def _resonance_curves(notes: list[Note], singer: Singer, times: np.ndarray) -> np.ndarray:
    """Return the vocal tract's resonances [Hz], shape=(5, n_frames), gliding between vowels."""
    curves = np.tile(np.array(VOWELS["a"], float)[:, None], len(times))
    for note in notes:
        start = _index(times, note.start)
        if note.consonant == "nasal":
            curves[:, _index(times, _onset(note)) : start] = np.c_[VOWELS["nasal"]].T
            start -= 2
        curves[:, start:] = np.array(VOWELS[note.vowel])[:, None]
    return np.stack([_smooth(curve, 0.08) for curve in curves]) * singer.tract


def _vocal_tract(resonances: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return the filter of every frame, shape=(n_frames, n_bins): parallel resonators [2]."""
    total = np.zeros((resonances.shape[1], len(frequencies)), np.complex64)
    f = frequencies.astype(np.float32)
    for centre, bandwidth, strength in zip(resonances, BANDWIDTHS, RESONANCES, strict=True):
        response = np.empty_like(total)
        response.real = 1
        response.imag = (f - centre[:, None].astype(np.float32)) * np.float32(2 / bandwidth)
        total += np.float32(strength) / response
    return total


def _rolloff(frequencies: np.ndarray, singer: Singer) -> np.ndarray:
    """Return the amplitude of the vocal cords' harmonics at these frequencies [Hz]."""
    return ((1 + frequencies / 600) ** -singer.darkness).astype(np.float32)


def _consonant_bands(notes: list[Note], times: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """Return the amplitude of the consonants' noise, shape=(n_frames, n_bins)."""
    bands = np.zeros((len(times), len(frequencies)), np.float32)
    octaves = np.log2(np.maximum(frequencies, 1.0))
    for note in notes:
        consonant = CONSONANTS[note.consonant]
        first = _index(times, note.start - consonant.seconds)
        n_frames = _index(times, note.start) - first
        if consonant.noise and n_frames:
            shape = np.exp(-0.5 * ((octaves - np.log2(consonant.centre)) / consonant.width) ** 2)
            rise_and_fall = np.sin(np.pi * (np.arange(n_frames) + 0.5) / n_frames)
            # A wide band would be louder than a narrow one of the same height.
            level = consonant.noise * note.loudness / np.sqrt(consonant.width)
            bands[first : first + n_frames] = level * np.outer(rise_and_fall, shape)
    return bands


def _pulses(f0: np.ndarray, sample_rate: int) -> np.ndarray:
    """Sum all harmonics below Nyquist, each with amplitude 1, in closed form.

    The Dirichlet kernel is ``1/2 + sum(cos(k x) for k in 1..n) = sin((n + 1/2) x) / 2 sin(x/2)``.
    """
    phase = np.cumsum(f0 * (2 * np.pi / sample_rate)) % (2 * np.pi)
    n_harmonics = 0.48 * sample_rate / f0
    whole = np.floor(n_harmonics)
    half_sine = np.sin(phase / 2)
    half_sine[np.abs(half_sine) < 1e-6] = 1e-6  # there the kernel is n + 1/2, to rounding
    kernel = np.sin((whole + 0.5) * np.maximum(phase, 2e-6)) / (2 * half_sine) - 0.5
    # The harmonic that is crossing the top fades in: a whole one would click in every glide.
    return kernel + (n_harmonics - whole) * np.cos((whole + 1) * phase)


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
            tone = _tone(root + above, seconds, BASS, sample_rate, cents=0)
            start = (4 * bar + beat) * sheet.beat
            _add(track, rng.uniform(0.8, 1) * tone, start, sample_rate)
    return track


def _play_chords(
    rng: np.random.Generator, sheet: Sheet, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Play the harmony with a soft held layer and a moving one, shape=(2, n_samples)."""
    track = np.zeros((2, n_samples), np.float32)
    lowest = int(rng.integers(52, 60))
    moving = "struck" if rng.random() < 0.5 else "arpeggio"
    for style, loudness in (("held", rng.uniform(0.3, 0.8)), (moving, rng.uniform(0.6, 1.2))):
        timbre = CHORD_TIMBRES[style][rng.integers(len(CHORD_TIMBRES[style]))]
        tones: dict[tuple[int, float], np.ndarray] = {}  # the same few are played over and over
        for bar in range(sheet.n_bars):
            chord = [(sheet.pitch(degree) - lowest) % 12 + lowest for degree in sheet.chord(bar)]
            for beat, length, pitch in _figure(style, sorted(chord)):
                seconds = length * sheet.beat
                if (pitch, seconds) not in tones:
                    place = _pan(0.8 * np.sin(pitch))[:, None]  # every string has its own
                    tone = _tone(pitch, seconds, timbre, sample_rate, cents=4)
                    tones[pitch, seconds] = place * tone
                start = (4 * bar + beat) * sheet.beat + rng.uniform(0, 0.01)
                velocity = loudness * rng.uniform(0.7, 1)
                _add(track, np.float32(velocity) * tones[pitch, seconds], start, sample_rate)
    return track


def _figure(style: str, chord: list[int]) -> list[tuple[float, float, int]]:
    """Spread a chord over a bar: (beat, length [beats], MIDI note)."""
    if style == "held":
        return [(0, 4, pitch) for pitch in chord]
    if style == "struck":
        strum = 0.03  # beats from string to string
        notes = [*chord, chord[0] + 12]
        return [
            (beat + strum * i, 1.4, pitch)
            for beat in (0, 1.5, 2.5)
            for i, pitch in enumerate(notes)
        ]
    low, middle, high = chord
    return [
        (i / 2, 1, pitch)
        for i, pitch in enumerate((low, middle, high, low + 12, high, middle, high, middle))
    ]


def _play_drums(
    rng: np.random.Generator, sheet: Sheet, n_samples: int, sample_rate: int
) -> np.ndarray:
    """Play one pattern with a kit of its own, shape=(2, n_samples)."""
    kit, pans = _draw_kit(rng, sample_rate), {"kick": 0.0, "snare": 0.1, "hats": 0.45}
    pattern = BEATS[rng.integers(len(BEATS))]
    swing = rng.uniform(0, 0.12)  # every second sixteenth comes late by this part of one
    track = np.zeros((2, n_samples), np.float32)
    for bar in range(sheet.n_bars):
        for drum, steps in pattern.items():
            for step in (i for i, mark in enumerate(steps) if mark == "x"):
                start = (4 * bar + (step + swing * (step % 2)) / 4) * sheet.beat
                hit = rng.uniform(0.7, 1) * kit[drum]
                _add(track, np.outer(_pan(pans[drum]), hit), start, sample_rate)
    return track


def _draw_kit(rng: np.random.Generator, sample_rate: int) -> dict[str, np.ndarray]:
    """Make one hit of every drum, shape=(n_samples,) each."""
    t = np.arange(round(0.35 * sample_rate)) / sample_rate
    fade = np.clip((0.35 - t) / 0.05, 0, 1) * np.clip(t / 0.001, 0, 1)
    low, skin = rng.uniform(42, 55), rng.uniform(170, 220)
    falling = low * t + 3 * low * 0.03 * (1 - np.exp(-t / 0.03))  # cycles: from 4 low down to low
    kick = np.sin(2 * np.pi * falling) * np.exp(-t / rng.uniform(0.08, 0.15))
    # A second difference lifts noise by 12 dB an octave, which is what cymbals and wires are.
    sizzle = np.diff(rng.standard_normal(len(t) + 2), 2) / np.sqrt(6)
    rattle = np.diff(rng.standard_normal(len(t) + 1)) / np.sqrt(2)
    snare = 0.5 * np.sin(2 * np.pi * skin * t) * np.exp(-t / 0.07)
    snare += 0.5 * rattle * np.exp(-t / rng.uniform(0.06, 0.12))
    hats = 0.25 * sizzle * np.exp(-t / rng.uniform(0.02, 0.06))
    return {"kick": kick * fade, "snare": snare * fade, "hats": hats * fade}


def _tone(pitch: int, seconds: float, timbre: Timbre, sample_rate: int, cents: float) -> np.ndarray:
    """Play one note, shape=(2, n_samples): left and right `cents` apart, darker as it decays."""
    frequency = float(_hertz(pitch))
    n_harmonics = int(np.clip(0.45 * sample_rate / frequency, 1, 60))
    bright = _cycle(n_harmonics, timbre.rolloff, timbre.even)
    dark = _cycle(n_harmonics, timbre.rolloff + 1.2, timbre.even)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    apart = 2 ** (np.array([[-0.5], [0.5]]) * cents / 1200)
    turns = frequency * apart * t  # (2, n_samples)
    place = ((turns - np.floor(turns)) * CYCLE).astype(np.int32)
    bright_now = np.exp(-4 * t / timbre.decay).astype(np.float32)
    wav = np.take(bright, place) * bright_now + np.take(dark, place) * (1 - bright_now)
    release = np.clip((seconds - t) / 0.04, 0, 1)
    envelope = np.clip(t / timbre.attack, 0, 1) * np.exp(-t / timbre.decay) * release
    return wav * envelope.astype(np.float32)


def _cycle(n_harmonics: int, rolloff: float, even: float) -> np.ndarray:
    """Tabulate one period of a harmonic sound, shape=(CYCLE,)."""
    k = np.arange(1, n_harmonics + 1)
    spectrum = np.zeros(CYCLE // 2 + 1, complex)
    # Quadratic phases: harmonics that all start together make a wave of spikes.
    spectrum[k] = k**-rolloff * np.where(k % 2, 1, even) * np.exp(1j * k * k)
    return (np.fft.irfft(spectrum) * (CYCLE / 2)).astype(np.float32)


def _draw_room(rng: np.random.Generator, sample_rate: int) -> np.ndarray:
    """Draw a room's response, shape=(2, n_samples): decaying noise of energy 1, a little late."""
    decay = rng.uniform(0.12, 0.3)  # to 1/e [s]
    t = np.arange(round(3 * decay * sample_rate)) / sample_rate
    room = rng.standard_normal((2, len(t))) * np.exp(-t / decay) * (t > 0.012)
    room[:, 1:] += room[:, :-1]  # walls swallow the top
    return (room / np.sqrt(np.mean((room**2).sum(1)))).astype(np.float32)


def _reverberate(wav: np.ndarray, room: np.ndarray, amount: float) -> np.ndarray:
    """Add the room's answer to the sum of both channels, shape=(2, n_samples)."""
    if not amount:
        return wav
    n_samples = wav.shape[1]
    size = _fast_size(n_samples + room.shape[1])
    sent = np.fft.rfft(wav.mean(0).astype(np.float32), size)
    return (
        wav + np.float32(amount) * np.fft.irfft(sent * np.fft.rfft(room, size), size)[:, :n_samples]
    )


def _mix(
    rng: np.random.Generator, parts: dict[str, np.ndarray], sample_rate: int
) -> dict[str, np.ndarray]:
    """Set the levels of the parts, close the song softly and scale its peak."""
    n_samples = parts["vocals"].shape[1]
    closing = np.clip((n_samples - np.arange(n_samples)) / (0.02 * sample_rate), 0, 1)
    parts = {name: wav * closing.astype(np.float32) for name, wav in parts.items()}
    for name, balance_db in BALANCE_DB.items():
        parts[name] *= _gain(balance_db + rng.uniform(-1.5, 1.5), parts[name])
    rest = parts["bass"] + parts["drums"] + parts["other"]
    parts["vocals"] *= _gain(rng.uniform(*VOCALS_DB), parts["vocals"]) / _gain(0.0, rest)
    peak = np.abs(rest + parts["vocals"]).max(initial=0)
    scale = PEAK / peak if peak > 0 else 1.0
    return {name: (wav * scale).astype(np.float32) for name, wav in parts.items()}


def _gain(level_db: float, wav: np.ndarray) -> np.float32:
    """Return the factor that gives a waveform this RMS [dB]; silence stays as it is."""
    rms = np.sqrt(np.mean(np.square(wav))) if wav.any() else 1.0
    return np.float32(10 ** (level_db / 20) / rms)


def _write_song(tree: Path, song: str, parts: dict[str, np.ndarray], sample_rate: int) -> None:
    """Write the four sources and the mixture of one song as 16-bit wav."""
    import soundfile  # here, so that making songs needs numpy only

    # Rounded first, so that the mixture on disk is the exact sum of the sources on disk.
    whole = {name: np.round(wav * 32767).astype(np.int16) for name, wav in parts.items()}
    files = {f"Sources/{song}/{name}.wav": wav for name, wav in whole.items()}
    files[f"Mixtures/{song}/mixture.wav"] = sum(whole.values())
    for name, wav in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tree / name, wav.T, sample_rate, subtype="PCM_16")


def _to_frames(wav: np.ndarray, n_frames: int, hop: int) -> np.ndarray:
    """Take windowed spectra, shape=(n_frames, 2 * hop + 1); frame i is centred on i * hop."""
    padded = np.pad(wav.astype(np.float32), (2 * hop, (n_frames + 2) * hop - len(wav)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, 4 * hop)[::hop][:n_frames]
    return np.fft.rfft(frames * _window(hop))


def _from_frames(spectra: np.ndarray, n_samples: int, hop: int) -> np.ndarray:
    """Overlap and add what `_to_frames` made, shape=(n_samples,); its first hop fades in."""
    frames = np.fft.irfft(spectra, 4 * hop).astype(np.float32) * (_window(hop) / 1.5)
    parts = frames.reshape(len(frames), 4, hop)
    total = np.zeros((len(frames) + 3, hop), np.float32)
    for i in range(4):
        total[i : i + len(frames)] += parts[:, i]
    return total.ravel()[2 * hop : 2 * hop + n_samples]


def _window(hop: int) -> np.ndarray:
    """Return the periodic Hann window of four hops; its squares, a hop apart, add up to 1.5."""
    return (0.5 - 0.5 * np.cos(np.pi / (2 * hop) * np.arange(4 * hop))).astype(np.float32)


def _smooth(curve: np.ndarray, seconds: float) -> np.ndarray:
    """Average a curve of one value per frame over a Hann window of this length."""
    half = max(1, round(seconds / FRAME_SECONDS / 2))
    window = np.hanning(2 * half + 3)[1:-1]
    return np.convolve(np.pad(curve, half, mode="edge"), window / window.sum(), "valid")


def _wander(rng: np.random.Generator, times: np.ndarray, seconds: float) -> np.ndarray:
    """Return random drift with standard deviation 1 that changes within some `seconds`."""
    curve = _smooth(rng.standard_normal(len(times)), seconds)
    return curve / max(curve.std(), 1e-9)


def _index(times: np.ndarray, seconds: float) -> int:
    """Return the first frame at or after a time; the number of frames if there is none."""
    return int(np.searchsorted(times, seconds))


def _onset(note: Note) -> float:
    """Return when the note's consonant starts [s]."""
    consonant = CONSONANTS[note.consonant]
    return note.start - consonant.closure - consonant.seconds


def _hertz(pitch: np.ndarray | float) -> np.ndarray:
    """Turn MIDI notes into frequencies [Hz]."""
    return 440 * 2 ** ((np.asarray(pitch) - 69) / 12)


def _pan(position: float) -> np.ndarray:
    """Return the gains of left and right, shape=(2,); position -1..1, power stays the same."""
    angle = (position + 1) * np.pi / 4
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def _add(track: np.ndarray, sound: np.ndarray, seconds: float, sample_rate: int) -> None:
    """Add a sound to a track from a time on; what does not fit is cut off."""
    place = track[:, round(seconds * sample_rate) :][:, : sound.shape[1]]
    place += sound[:, : place.shape[1]]


def _fast_size(at_least: int) -> int:
    """Return a length whose Fourier transform is fast: 2, 3 or 5 times a power of two."""
    powers = [2**k for k in range(40)]
    return min(m * power for m in (2, 3, 5) for power in powers if m * power >= at_least)
