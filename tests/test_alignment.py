from __future__ import annotations

import re

import numpy as np
import pytest

from learning.alignment import PairCheck

RATE = 16000
N_SAMPLES = 6 * RATE


def voice(seed: int) -> np.ndarray:
    """A harmonic tone whose pitch wanders, as tonal as singing; with some breath."""
    rng = np.random.default_rng(seed)
    pitch = 200 + np.cumsum(rng.normal(0, 0.1, N_SAMPLES))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    return (0.1 * tone + rng.normal(0, 0.002, N_SAMPLES)).astype(np.float32)


def band(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, N_SAMPLES).astype(np.float32)


def check(vocals: np.ndarray, mixture: np.ndarray, has_mixture: bool = True) -> str | None:
    pair = PairCheck()
    for start in range(0, len(vocals), 2**15):
        block = slice(start, start + 2**15)
        pair.add(vocals[block], mixture[block] - vocals[block])
    return pair.problem(RATE, has_mixture)


@pytest.mark.parametrize("gain", [0.3, 1, 3])
def test_a_voice_that_is_in_the_mixture_passes(gain):
    assert check(gain * voice(1), gain * voice(1) + band(2)) is None


def test_a_mixture_of_nothing_but_the_voice_passes():
    assert check(voice(1), voice(1)) is None


def test_silent_and_hardly_audible_vocals_pass():
    assert check(np.zeros(N_SAMPLES, np.float32), band(2)) is None
    assert check(0.003 * voice(1), band(2)) is None


@pytest.mark.parametrize("offset", [1, -3, 160, -2000, 6000])
def test_an_offset_is_told_in_samples_and_milliseconds(offset):
    problem = check(voice(1), np.roll(voice(1), offset) + band(2))
    when = "later" if offset > 0 else "earlier"
    milliseconds = f"{abs(offset) / 16:.1f} ms"
    assert re.search(
        rf"holds these vocals {abs(offset)} samples? \({milliseconds}\) {when}", problem
    )
    assert "inverted" not in problem


def test_inverted_polarity_is_told_also_beside_an_offset():
    problem = check(voice(1), -voice(1) + band(2))
    assert "polarity is inverted (gain -1.0" in problem
    assert "samples" not in problem
    problem = check(voice(1), -np.roll(voice(1), 100) + band(2))
    assert "100 samples" in problem
    assert "inverted" in problem


@pytest.mark.parametrize(("gain", "told"), [(0.25, "-12.0 dB"), (2.0, "+6.0 dB")])
def test_another_gain_is_told_in_db(gain, told):
    problem = check(voice(1), gain * voice(1) + 0.01 * band(2))
    assert f"at gain {gain:.2f} ({told})" in problem


def test_the_vocals_of_another_song_are_told():
    assert "does not hold these vocals" in check(voice(1), voice(3) + band(2))


def test_a_mixture_named_accompaniment_is_told():
    problem = check(voice(1), 2 * voice(1) + 0.1 * band(2), has_mixture=False)
    assert "the accompaniment holds the vocals, too (gain 1.0" in problem


def test_an_echo_louder_than_the_voice_is_no_offset():
    echo = 2 * np.roll(voice(1), 3000)
    assert check(voice(1), voice(1) + echo + 0.1 * band(2)) is None


def test_a_recording_too_short_to_judge_passes():
    pair = PairCheck()
    pair.add(voice(1)[:300], band(2)[:300])
    assert pair.problem(RATE, has_mixture=True) is None
