"""SI-SDR: worked by hand, and unmoved by what the ear would not notice either."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scoring.metrics import si_sdr


@pytest.mark.parametrize(
    ("estimate", "reference", "expected_db"),
    [
        ([1, 1], [1, 0], 0.0),  # as much error as voice
        ([2, 1], [1, 0], 20 * math.log10(2)),
        ([10, 1], [3, 0], 20.0),
        ([1, 10], [3, 0], -20.0),
        ([3, 0], [1, 1], 0.0),  # (1.5, 1.5) of voice and (1.5, -1.5) of error
        (
            [2, 1, 0, 1],
            [1, 1, 1, 1],
            10 * math.log10(4 / 2),
        ),  # one of voice, (1, 0, -1, 0) of error
    ],
)
def test_si_sdr_is_what_one_works_out_by_hand(estimate, reference, expected_db):
    found = si_sdr(np.array(estimate), np.array(reference))
    assert isinstance(found, float)
    np.testing.assert_allclose(found, expected_db, atol=1e-12)


@pytest.mark.parametrize("snr_db", [-30, 0, 12.5, 90])
def test_a_voice_with_an_unrelated_tone_scores_their_ratio(snr_db):
    t = np.arange(44100) / 44100
    voice, tone = np.sin(2 * np.pi * 440 * t), np.cos(2 * np.pi * 1000 * t)  # orthogonal
    found = si_sdr(voice + 10 ** (-snr_db / 20) * tone, voice)
    np.testing.assert_allclose(found, snr_db, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, -0.5, 3, 1e30])
def test_neither_loudness_nor_polarity_of_the_estimate_matters(scale):
    rng = np.random.default_rng(0)
    estimate, reference = rng.normal(size=(2, 1001))
    expected = si_sdr(estimate, reference)
    np.testing.assert_allclose(si_sdr(scale * estimate, reference), expected, atol=1e-9)
    np.testing.assert_allclose(si_sdr(estimate, scale * reference), expected, atol=1e-9)


def test_loud_float32_sounds_are_summed_without_overflow():
    wav = np.full(1000, 1e25, np.float32)
    estimate = wav.copy()
    estimate[::2] *= 3  # mean 2, deviation 1
    np.testing.assert_allclose(si_sdr(estimate, wav), 20 * math.log10(2), atol=1e-5)


def test_a_constant_offset_is_an_error_too():
    voice = np.tile([1.0, -1.0], 50)
    np.testing.assert_allclose(si_sdr(voice + 0.1, voice), 20, atol=1e-9)


def test_the_voice_itself_scores_beyond_all_audio():
    voice = np.random.default_rng(0).normal(size=999)
    assert si_sdr(voice, voice) > 200
    assert si_sdr(voice[:1], 2 * voice[:1]) > 200


def test_a_silent_reference_has_no_score():
    assert math.isnan(si_sdr(np.ones(10), np.zeros(10)))
    assert math.isnan(si_sdr(np.zeros(10), np.zeros(10)))
    assert math.isnan(si_sdr(np.zeros(0), np.zeros(0)))


def test_an_estimate_with_nothing_of_the_voice_scores_minus_infinity():
    assert si_sdr(np.zeros(4), np.ones(4)) == -math.inf
    assert si_sdr(np.array([1.0, -1.0]), np.ones(2)) == -math.inf


def test_channels_are_scored_together_as_one_long_signal():
    estimate, reference = np.random.default_rng(0).normal(size=(2, 2, 500))
    found = si_sdr(estimate, reference)
    assert found == si_sdr(np.concatenate(estimate), np.concatenate(reference))
    each = [si_sdr(*pair) for pair in zip(estimate, reference, strict=True)]
    assert abs(found - np.mean(each)) > 0.1, "it is not the channels' mean"


def test_scoring_modifies_nothing():
    estimate, reference = np.random.default_rng(0).normal(size=(2, 50))
    before = estimate.copy(), reference.copy()
    si_sdr(estimate, reference)
    np.testing.assert_array_equal((estimate, reference), before)
