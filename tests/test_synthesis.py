from __future__ import annotations

import numpy as np
import pytest
import soundfile

from demo import synthesis
from demo.synthesis import Note, Singer
from hparams import InputError
from scoring import metrics

RATE = 22050
# A plain voice: what is measured below is not moved by vibrato or hidden by breath.
SINGER = Singer(lowest=45, tract=1.0, vibrato_hz=5.5, vibrato_depth=0.0, breath=0.0, darkness=1.8)


def song(seed: int, seconds: float = 8, sample_rate: int = RATE) -> dict[str, np.ndarray]:
    return synthesis.synthesize_song(np.random.default_rng(seed), seconds, sample_rate)


def sung(*notes: Note, singer: Singer = SINGER, seconds: float = 2.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return synthesis.sing(rng, list(notes), singer, round(seconds * RATE), RATE)


def between(wav: np.ndarray, start: float, end: float) -> np.ndarray:
    return wav[round(start * RATE) : round(end * RATE)].astype(float)


def share(wav: np.ndarray, low: float, high: float) -> float:
    """Part of the energy between two frequencies."""
    energy = np.abs(np.fft.rfft(wav * np.hanning(len(wav)))) ** 2
    frequencies = np.fft.rfftfreq(len(wav), 1 / RATE)
    return energy[(frequencies >= low) & (frequencies < high)].sum() / energy.sum()


@pytest.mark.parametrize("sample_rate", [8000, 22050, 44100])
@pytest.mark.parametrize("seconds", [0.31, 5.0001])
def test_parts_are_stereo_float32_of_the_asked_length_and_finite(seconds, sample_rate):
    parts = song(1, seconds, sample_rate)
    assert sorted(parts) == ["bass", "drums", "other", "vocals"]
    for wav in parts.values():
        assert wav.shape == (2, round(seconds * sample_rate))
        assert wav.dtype == np.float32
        assert np.isfinite(wav).all()


@pytest.mark.parametrize("seed", range(4))
def test_mixture_peaks_at_four_fifths_and_hides_the_vocals(seed):
    parts = song(seed)
    mixture = sum(parts.values())
    np.testing.assert_allclose(np.abs(mixture).max(), 0.8, rtol=1e-3)
    assert -3.5 < metrics.si_sdr(mixture, parts["vocals"]) < 0.5


@pytest.mark.parametrize("seed", range(4))
def test_every_part_plays_and_the_singer_breathes(seed):
    parts = song(seed, seconds=24)
    for wav in parts.values():
        assert np.sqrt(np.mean(wav**2)) > 0.01
    vocals = parts["vocals"].mean(0)
    seconds = np.abs(vocals[: len(vocals) // 2205 * 2205]).reshape(-1, 2205).max(1)  # of 0.1 s
    assert 0.02 < np.mean(seconds < 0.02 * seconds.max()) < 0.5


def test_same_seed_is_the_same_song_and_another_seed_another():
    first, again, other = song(3), song(3), song(4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.allclose(first[name], other[name])


def test_no_part_is_stuck_in_one_loudspeaker():
    for wav in song(5).values():
        left, right = np.sqrt(np.mean(wav**2, axis=1))
        assert 0.5 < left / right < 2


def test_pulses_are_the_sum_of_all_harmonics_below_nyquist():
    f0 = np.linspace(150, 260, 2000)
    phase = np.cumsum(f0 * 2 * np.pi / RATE)
    n_harmonics = 0.48 * RATE / f0
    expected = sum(
        np.clip(n_harmonics - k + 1, 0, 1) * np.cos(k * phase)  # the last one fades in
        for k in range(1, int(n_harmonics.max()) + 2)
    )
    np.testing.assert_allclose(synthesis._pulses(f0, RATE), expected, atol=1e-6)


def test_frames_overlap_to_what_they_were_cut_from():
    wav = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    frames = synthesis._to_frames(wav, 1001 // 55 + 5, 55)
    # The first hop is under one window fewer than the others.
    np.testing.assert_allclose(synthesis._from_frames(frames, 1001, 55)[55:], wav[55:], atol=1e-5)


@pytest.mark.parametrize("pitch", [45, 57, 69])
def test_a_note_has_the_harmonics_of_its_pitch(pitch):
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    vowel = between(sung(Note(0.3, 1.4, pitch, 1.0, "", "a")), 0.5, 1.5)
    # Half a semitone of unsteadiness at most, and next to nothing in the middle between two.
    near = sum(share(vowel, k * f0 * 0.97, k * f0 * 1.03) for k in range(1, 9))
    far = sum(share(vowel, (k + 0.35) * f0, (k + 0.65) * f0) for k in range(1, 9))
    assert near > 0.6
    assert far < 0.01 * near


def test_a_vowel_is_heard_by_its_resonances():
    a, i = (between(sung(Note(0.3, 1.4, 45, 1.0, "", vowel)), 0.5, 1.5) for vowel in "ai")
    assert share(a, 600, 1300) > 5 * share(i, 600, 1300)  # 730 and 1090 Hz
    assert share(i, 200, 400) > 5 * share(a, 200, 400)  # 270 Hz
    assert share(i, 2000, 3200) > 3 * share(i, 1000, 2000)  # 2290 and 3010 Hz


def test_vibrato_begins_after_the_note_has_settled():
    singer = SINGER._replace(vibrato_depth=0.6)
    wav = sung(Note(0.3, 2.0, 57, 1.0, "", "a"), singer=singer, seconds=2.5)
    early, late = between(wav, 0.35, 0.55), between(wav, 1.4, 1.6)
    tenth = 10 * 220.0  # 0.6 semitones move the tenth harmonic by 76 Hz
    assert share(late, tenth - 25, tenth + 25) / share(late, tenth - 110, tenth + 110) < 0.6
    assert share(early, tenth - 25, tenth + 25) / share(early, tenth - 110, tenth + 110) > 0.7


def test_a_consonant_hisses_before_its_vowel_and_is_quieter():
    wav = sung(Note(0.5, 1.0, 57, 1.0, "s", "a"))
    hiss, vowel = between(wav, 0.4, 0.48), between(wav, 0.6, 1.2)
    assert share(hiss, 4000, 11025) > 0.8
    assert share(vowel, 4000, 11025) < 0.05
    assert -20 < 10 * np.log10(np.mean(hiss**2) / np.mean(vowel**2)) < -3


def test_a_plosive_is_preceded_by_silence():
    notes = Note(0.2, 0.8, 57, 1.0, "", "a"), Note(1.02, 0.8, 57, 1.0, "t", "a")
    envelope = np.abs(sung(*notes))
    closed = between(envelope, 0.955, 0.985).max()  # lips are shut from 0.95 to 0.99 s
    assert closed < 0.3 * between(envelope, 0.8, 0.9).max()


def test_nothing_is_heard_before_and_after_the_melody():
    wav = sung(Note(0.5, 0.5, 57, 1.0, "s", "a"))
    loudest = np.abs(wav).max()
    assert loudest > 0
    assert np.abs(between(wav, 0, 0.35)).max() < 1e-4 * loudest
    assert np.abs(between(wav, 1.1, 2.0)).max() < 1e-4 * loudest


def test_slides_between_notes_do_not_click():
    notes = [Note(0.2 + 0.3 * i, 0.28, 52 + 5 * (i % 2), 1.0, "", "aeiou"[i]) for i in range(5)]
    wav = sung(*notes)
    spectra = np.abs(np.fft.rfft(wav[: len(wav) // 256 * 256].reshape(-1, 256) * np.hanning(256)))
    top = spectra[:, 95:].max(1)  # above 8 kHz, where a click would stand alone
    assert top.max() < 0.01 * spectra.max()
    assert top.max() < 12 * np.median(top[round(0.3 * RATE / 256) : round(1.5 * RATE / 256)])


def test_the_voice_slides_from_note_to_note():
    notes = Note(0.2, 0.78, 57, 1.0, "", "a"), Note(1.0, 0.8, 64, 1.0, "", "a")
    wav = sung(*notes)
    # From 220 to 330 Hz: what lies between is passed when the note changes, and only then.
    before, passing, after = (share(between(wav, t, t + 0.04), 250, 300) for t in (0.6, 0.98, 1.4))
    assert passing > 0.01
    assert max(before, after) < 0.003


def test_a_note_without_consonant_begins_softly():
    envelope = np.abs(sung(Note(0.5, 1.0, 57, 1.0, "", "a")))
    steps = [between(envelope, t, t + 0.01).max() / envelope.max() for t in (0.44, 0.48, 0.5, 0.54)]
    assert steps[0] < 0.01
    assert 0.03 < steps[1] < 0.2  # the vocal cords start a little early
    assert 0.3 < steps[2] < 0.6 < steps[3]


def test_singer_keeps_time_with_the_band():
    late = sung(Note(58.0, 1.0, 57, 1.0, "", "a"), seconds=60)
    heard = np.flatnonzero(np.abs(late) > 0.1 * np.abs(late).max()) / RATE
    np.testing.assert_allclose([heard[0], heard[-1]], [58.0, 59.0], atol=0.03)


def test_no_notes_are_silence():
    assert not sung().any()


def test_tree_is_laid_out_like_dsd100(tmp_path):
    root = tmp_path / "made" / "dsd100"
    synthesis.write_dsd100(root, n_train=2, n_test=1, seconds=0.5, sample_rate=RATE, seed=7)
    files = {str(file.relative_to(root)) for file in root.rglob("*.wav")}
    mixtures = sorted(root.glob("Mixtures/*/*/mixture.wav"))
    songs = [f"{file.parts[-3]}/{file.parts[-2]}" for file in mixtures]
    assert [name[:8] for name in songs] == ["Dev/051 ", "Dev/052 ", "Test/001"]
    assert all(" - " in name for name in songs)
    assert files == {f"Mixtures/{name}/mixture.wav" for name in songs} | {
        f"Sources/{name}/{part}.wav" for name in songs for part in synthesis.PARTS
    }
    assert {file.name for file in (tmp_path / "made").iterdir()} == {"dsd100"}


def test_no_two_songs_share_a_title():
    assert len({synthesis._title(number) for number in range(1, 101)}) == 100


def test_mixture_on_disk_is_the_exact_sum_of_its_sources(toy_tree):
    mixtures = sorted(toy_tree.glob("Mixtures/*/*/mixture.wav"))
    assert len(mixtures) == 4
    for mixture in mixtures:
        info = soundfile.info(mixture)
        assert (info.subtype, info.channels, info.samplerate) == ("PCM_16", 2, RATE)
        folder = toy_tree / "Sources" / mixture.parent.relative_to(toy_tree / "Mixtures")
        sources = [soundfile.read(file, dtype="int16")[0] for file in sorted(folder.iterdir())]
        assert len(sources) == 4
        np.testing.assert_array_equal(
            soundfile.read(mixture, dtype="int16")[0], sum(wav.astype(int) for wav in sources)
        )


def test_a_song_does_not_depend_on_how_many_there_are(tmp_path):
    for n_train in (1, 2):
        synthesis.write_dsd100(tmp_path / str(n_train), n_train, 1, 0.5, RATE, seed=7)
    few = {file.relative_to(tmp_path / "1"): file for file in tmp_path.glob("1/**/*.wav")}
    assert len(few) == 10
    for name, file in few.items():
        assert file.read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_existing_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        synthesis.write_dsd100(tmp_path, 1, 1, 0.5, RATE, seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupted_tree_leaves_nothing_behind(tmp_path, monkeypatch):
    real, done = synthesis.synthesize_song, []

    def interrupted(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(True)
        return real(*arguments)

    monkeypatch.setattr(synthesis, "synthesize_song", interrupted)
    with pytest.raises(KeyboardInterrupt):
        synthesis.write_dsd100(tmp_path / "dsd100", 2, 1, 0.5, RATE, seed=0)
    assert list(tmp_path.iterdir()) == []
