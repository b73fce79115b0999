"""Effects that training draws at random: what they do to a known sound."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import audio
from hparams import HParams
from learning import augmentation
from learning.augmentation import EQ_HZ, N_DRAWS, N_ROOMS

OFF = HParams()
ON = replace(OFF, equalizer_db=4, reverb=0.6, compression=0.5)


def draws(n: int, hp: HParams, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(augmentation.draw(np.random.default_rng(seed), n, hp))


def noise(n: int, n_frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, OFF.n_bins, n_frames, dtype=torch.complex64, generator=generator)


def energy_db(spec: torch.Tensor) -> torch.Tensor:
    return 10 * spec.abs().square().sum((-2, -1)).log10()


# --- All of them --------------------------------------------------------------------------------


def test_without_effects_nothing_is_drawn_and_nothing_changes():
    vocals, accompaniment = noise(2, 30), noise(2, 30, 1)
    assert draws(2, OFF).shape == (2, 0)
    found = augmentation.apply(vocals, accompaniment, draws(2, OFF), OFF)
    assert torch.equal(found[0], vocals)
    assert torch.equal(found[1], accompaniment)


def test_effects_change_both_parts_each_chunk_in_its_own_way():
    vocals, accompaniment = noise(1, 60).expand(4, -1, -1), noise(1, 60, 1).expand(4, -1, -1)
    before = vocals.clone()
    found = augmentation.apply(vocals, accompaniment, draws(4, ON), ON)
    assert torch.equal(vocals, before), "what came in is left alone"
    for part, was in zip(found, (vocals, accompaniment), strict=True):
        assert part.shape == was.shape
        assert part.isfinite().all()
        assert len({round(float(level), 3) for level in energy_db(part)}) == 4
    again = augmentation.apply(vocals, accompaniment, draws(4, ON), ON)
    assert torch.equal(again[0], found[0])


@pytest.mark.parametrize("name", ["equalizer_db", "reverb", "compression"])
def test_each_effect_can_be_had_alone(name):
    hp = replace(OFF, **{name: 1.0})
    vocals, accompaniment = noise(3, 40) * torch.rand(40), noise(3, 40, 1)
    drawn = draws(3, hp)
    assert drawn.shape == (3, N_DRAWS)
    found_vocals, found_accompaniment = augmentation.apply(vocals, accompaniment, drawn, hp)
    assert not torch.allclose(found_vocals, vocals)
    assert torch.equal(found_accompaniment, accompaniment) == (name != "equalizer_db")


def test_silence_stays_silent():
    silence = torch.zeros(2, OFF.n_bins, 40, dtype=torch.complex64)
    vocals, accompaniment = augmentation.apply(silence, silence, draws(2, ON), ON)
    assert not vocals.any()
    assert not accompaniment.any()


# --- The compressor -----------------------------------------------------------------------------


@pytest.mark.parametrize("evenness", [0.0, 0.3, 0.5])
def test_a_compressor_brings_levels_together(evenness):
    loud = torch.where(torch.arange(100) < 50, 1.0, 0.1)  # 20 dB apart
    spec = noise(1, 100) * loud
    found = augmentation.compress(spec, torch.tensor([evenness]))
    apart = energy_db(found[..., 10:40]) - energy_db(found[..., 60:90])
    before = energy_db(spec[..., 10:40]) - energy_db(spec[..., 60:90])
    assert float(apart) == pytest.approx((1 - evenness) * float(before), abs=0.5)


def test_a_compressor_does_not_raise_a_noise_floor_to_a_voice():
    loud = torch.where(torch.arange(100) < 50, 1.0, 1e-4)  # 80 dB apart
    spec = noise(1, 100) * loud
    found = augmentation.compress(spec, torch.tensor([0.5]))
    raised = energy_db(found[..., 60:]) - energy_db(spec[..., 60:])
    assert float(raised) == pytest.approx(15, abs=1)


# --- The room -----------------------------------------------------------------------------------


def answer(wet: float, decay_s: float, room: int = 0) -> torch.Tensor:
    """A room's answer to a click: (n_bins, n_frames)."""
    click = torch.zeros(1, OFF.n_bins, 60, dtype=torch.complex64)
    click[..., 5] = 1
    wets, decays = torch.tensor([wet]), torch.tensor([decay_s])
    return augmentation.reverberate(click, wets, decays, torch.tensor([room]), OFF)[0]


@pytest.mark.parametrize("decay_s", [0.2, 0.6, 1.2])
def test_a_room_decays_by_60_db_in_its_time(decay_s):
    level_db = 20 * answer(0.5, decay_s).abs().mean(0).clamp(min=1e-20).log10()
    taps = level_db[5 + augmentation.TAP_FRAMES :: augmentation.TAP_FRAMES][:12]
    seconds = augmentation.TAP_FRAMES * OFF.hop_length / OFF.sample_rate
    np.testing.assert_allclose(np.diff(taps), -60 * seconds / decay_s, rtol=1e-3)


@pytest.mark.parametrize("wet", [0.0, 0.1, 0.6])
def test_a_room_adds_the_energy_it_is_asked_for_and_comes_after_the_sound(wet):
    found = answer(wet, 0.7)
    assert not found[:, :5].any()
    np.testing.assert_array_equal(found[:, 5], 1)
    np.testing.assert_allclose(found[:, 6:].abs().square().sum(-1), wet**2, rtol=1e-4, atol=1e-12)


def test_rooms_differ_and_there_is_a_last_one():
    first, last = answer(0.5, 0.7), answer(0.5, 0.7, N_ROOMS - 1)
    assert not torch.allclose(first, last)
    correlation = (first[:, 7] * last[:, 7].conj()).mean() / first[:, 7].abs().square().mean()
    assert correlation.abs() < 0.15


def test_a_chunk_shorter_than_the_echoes_has_those_that_fit():
    spec = noise(1, 5)
    one = torch.tensor([0.5])
    found = augmentation.reverberate(spec, one, one, torch.tensor([3]), OFF)
    assert found.shape == spec.shape
    assert torch.equal(found[..., :2], spec[..., :2])


def test_the_stated_share_of_voices_is_put_into_a_room():
    wet = draws(2000, replace(OFF, reverb=0.3))[:, 2 * len(EQ_HZ)]
    assert float((wet > 0).float().mean()) == pytest.approx(0.3, abs=0.04)
    low, high = (10 ** (level / 20) for level in augmentation.WET_DB)
    assert low <= float(wet[wet > 0].min()) <= float(wet.max()) <= high + 1e-6


# --- The equalizer ------------------------------------------------------------------------------


def test_an_equalizer_turns_its_bands_and_is_straight_between_them():
    eq_db = torch.tensor([[0.0, 0, 0, 6, -6, 0, 0, 3]])
    spec = noise(1, 20)
    gain_db = 20 * (augmentation.equalize(spec, eq_db, OFF) / spec).abs().log10()[0, :, 0]
    hz = np.arange(OFF.n_bins) * OFF.sample_rate / OFF.n_fft
    octaves = np.log2(np.maximum(hz, 1) / 62.5)
    expected = np.interp(octaves, np.arange(8), eq_db[0])
    np.testing.assert_allclose(gain_db, expected, atol=1e-3)
    at_707 = np.argmin(abs(hz - 500 * math.sqrt(2)))
    assert gain_db[at_707] == pytest.approx(0, abs=0.5)


def test_an_equalizer_on_a_spectrogram_is_one_on_the_sound():
    grid = audio.grid_at(22050, OFF)
    wav = torch.sin(2 * math.pi * 1000 * torch.arange(22050) / 22050)
    eq_db = torch.tensor([[0.0, 0, 0, 0, -12, 0, 0, 0]])
    spec = augmentation.equalize(audio.stft(wav, grid)[None], eq_db, OFF)[0]
    out = audio.istft(spec, grid, 22050)
    middle = slice(4000, 18000)
    gain_db = 20 * torch.log10(
        out[middle].square().mean().sqrt() / wav[middle].square().mean().sqrt()
    )
    assert float(gain_db) == pytest.approx(-12, abs=0.6)


def test_gains_of_the_bands_have_the_stated_deviation():
    eq_db = draws(2000, replace(OFF, equalizer_db=4))[:, : 2 * len(EQ_HZ)]
    np.testing.assert_allclose(eq_db.std(0), 4, rtol=0.1)
    np.testing.assert_allclose(eq_db.mean(0), 0, atol=0.4)
