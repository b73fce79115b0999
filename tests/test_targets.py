"""From spectrograms to the loss: mixing, the equalizer, targets, and what a wrong mask costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_dataset import BAND, HP, VOICE, signal

import audio
from hparams import HParams
from learning import targets

OFF = HParams()


def noise(n: int, n_frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, OFF.n_bins, n_frames, dtype=torch.complex64, generator=generator)


def test_an_equalizer_turns_its_bands_and_is_straight_between_them():
    eq_db = torch.tensor([[0.0, 0, 0, 6, -6, 0, 0, 3]])
    spec = noise(1, 20)
    gain_db = 20 * (targets.equalize(spec, eq_db, OFF) / spec).abs().log10()[0, :, 0]
    hz = np.arange(OFF.n_bins) * OFF.sample_rate / OFF.n_fft
    octaves = np.log2(np.maximum(hz, 1) / 62.5)
    expected = np.interp(octaves, np.arange(8), eq_db[0])
    np.testing.assert_allclose(gain_db, expected, atol=1e-3)
    at_707 = np.argmin(abs(hz - 500 * math.sqrt(2)))
    assert gain_db[at_707] == pytest.approx(0, abs=0.5)


def test_a_mixture_is_the_sum_of_its_scaled_parts_and_second_ones_are_added():
    spectrograms = torch.from_numpy(np.stack([signal(7, n_parts=4, seed=s) for s in (1, 2)]))
    gains = torch.tensor([[2.0, -0.5, 0.3, 0], [-1.0, 1.0, 1.0, 3.0]])
    found, two = targets.mix(spectrograms, gains), targets.mix(spectrograms[:, :, :2], gains[:, :2])
    scaled = spectrograms.double() * gains[:, None, :, None, None]
    scaled = torch.view_as_complex(scaled).permute(2, 0, 3, 1)  # (part, song, bin, frame)
    for part in (VOICE, BAND):
        assert two[part].dtype == torch.complex64
        np.testing.assert_allclose(two[part], scaled[part], rtol=1e-6)
        np.testing.assert_allclose(found[part], scaled[part] + scaled[2 + part], atol=1e-6)


# Magnitudes of voice and backing at five bins; their phases must not matter (but to "phase", which
# is the ideal mask that test_audio.py works out).
VOCALS = [0.0, 1.0, 1.0, 0.1, 1e-5]
BACKING = [0.0, 0.0, 2.0, 0.1, 1.0]
EXPECTED = {
    "dominance": [0, 1, 0, 0, 0],
    "ratio": [0, 1, 1 / 5, 1 / 2, 1e-10],
    # 1 - 30 log10 |vocals| / -100 is 0, 1, 1, 0.7 and 0, against 0.65.
    "activity": [0, 1, 1, 1, 0],
}


def test_a_target_is_what_its_definition_says():
    phases = torch.exp(1j * torch.arange(10.0).reshape(2, 5))
    vocals = (torch.tensor(VOCALS) * phases[0])[:, None]
    backing = (torch.tensor(BACKING) * phases[1])[:, None]
    for kind, expected in EXPECTED.items():
        hp = replace(HP, mask_target=kind, mask_threshold=0.65)
        found = targets.mask_target(vocals, backing, torch.zeros(5), hp)
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-12)
    vocals, backing = torch.full((1, 3), 1 + 0j), torch.tensor([[0.5, 0.5j, -0.5]])
    found = targets.mask_target(vocals, backing, torch.zeros(1), replace(HP, mask_target="phase"))
    np.testing.assert_allclose(found[0], [2 / 3, 0.8, 1], rtol=1e-6)


@pytest.mark.parametrize("level_db", [20.0, 0.0, -40.0])
def test_the_sdr_loss_is_the_sdr_of_the_masked_spectrogram(level_db):
    hp, rng = HParams(loss="sdr"), torch.Generator().manual_seed(1)
    mixture = torch.randn(3, 513, 5, dtype=torch.complex64, generator=rng)
    mixture *= 10 ** ((level_db - 60 * torch.rand(3, 513, 5, generator=rng)) / 20)
    mixture[..., :20, :] = 0  # no rumble; the ear's curve would have it count for much
    logits = 3 * torch.randn(3, 513, 5, generator=rng)
    target = torch.rand(3, 513, 5, generator=rng)
    found = targets.mask_loss(logits, target, mixture, audio.weighting_curve_db(hp), hp)
    voice, estimate = target * mixture, logits.sigmoid() * mixture
    wrong, true, least = (
        x.abs().square().sum((1, 2)) for x in (voice - estimate, voice, mixture / 10)
    )
    expected = ((wrong + least) / (true + least)).log10().mean()
    assert float(found) == pytest.approx(float(expected), abs=0.01)


@pytest.mark.parametrize("power", [2.0, 3.0])
def test_a_bin_counts_by_its_amplitude_to_the_power_of_the_loss_weight(power):
    amplitude = torch.tensor([1.0, 0.1, 0.01, 0.001]).reshape(1, 4, 1)
    hp = replace(HP, mixture_power=power, min_level_db=-190.0, loss="cross-entropy")
    logits = torch.tensor([2.0, -1.0, 0.0, 3.0]).reshape(1, 4, 1)
    target = torch.tensor([0.0, 1.0, 0.3, 1.0]).reshape(1, 4, 1)
    errors = -(target * logits.sigmoid().log() + (1 - target) * (-logits).sigmoid().log())
    for loss_weight in (0.0, 0.5, 1.0):
        weights = amplitude**loss_weight
        expected = float((weights * errors).sum() / weights.sum())
        weighted = replace(hp, loss_weight=loss_weight)
        found = targets.mask_loss(logits, target, amplitude + 0j, torch.zeros(4), weighted)
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_worst_chunks_that_a_teacher_labelled_are_left_out_and_no_others():
    losses = torch.tensor([9.0, 1.0, 4.0, 2.0, 8.0, 3.0])
    are_taught = torch.tensor([False, True, True, True, False, True])
    for trim, kept in ((0, [9, 1, 4, 2, 8, 3]), (0.25, [9, 1, 2, 8, 3]), (0.5, [9, 1, 2, 8])):
        found = targets.trimmed_mean(losses, are_taught, trim)
        assert float(found) == pytest.approx(np.mean(kept))
    assert float(targets.trimmed_mean(losses, are_taught | True, 0.5)) == pytest.approx(2)
    assert float(targets.trimmed_mean(losses, are_taught & False, 0.5)) == pytest.approx(4.5)
