"""Scores of a song: museval's and mir_eval's own numbers, invariances, silence, ideal masks."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch

import audio
from hparams import UNTUNED_MASK, HParams
from scoring import songs
from scoring.songs import score_song
from scoring.tables import FLOOR, IDEALS, STEMS, song_score, summarise

RATE = 8000
HP = HParams(sample_rate=8000, n_fft=256, hop_length=64)


def song(seconds: float = 3.4, n_channels: int = 2, seed: int = 0) -> np.ndarray:
    """A gliding tone over noise, of 16 bits."""
    n = round(seconds * RATE)
    rng, t = np.random.default_rng(seed), np.arange(n) / RATE
    voice = 0.3 * np.sin(2 * np.pi * (300 + 100 * np.sin(3 * t)) * t) * (1 + np.sin(5 * t)) / 2
    pan = np.linspace(1, 0.5, n_channels)[:, None]
    both = np.stack([voice * pan, 0.1 * rng.normal(size=(n_channels, n))])
    return (np.rint(both * 2**15) / 2**15).astype(np.float32)


def leaky(references: np.ndarray, amount: float = 0.3) -> np.ndarray:
    """Sources with some of the other in each, and a little noise."""
    noise = 0.01 * np.random.default_rng(9).normal(size=references.shape)
    return (references + amount * references[::-1] + noise).astype(np.float32)


def floats(values: list[float | None]) -> np.ndarray:
    return np.array(values, dtype=float)


# --- Songs --------------------------------------------------------------------------------------


def test_every_frame_scores_what_museval_gives():
    bss_eval = pytest.importorskip("museval.metrics").bss_eval
    references = song()
    references[0, :, RATE : 2 * RATE] = 0
    estimate = np.rint(leaky(references) * 2**15).astype(np.float32) / 2**15
    found = score_song(references, {"it": estimate}, RATE)
    frames_first = (x.transpose(0, 2, 1) for x in (references, estimate))
    expected = bss_eval(*frames_first, window=RATE, hop=RATE)[:4]
    assert found["n_frames"] == 3
    assert found["silent"] == {"reference": 1, FLOOR: 0, "it": 0}
    for name, of_stems in zip(("sdr", "isr", "sir", "sar"), expected, strict=True):
        for stem, values in zip(STEMS, of_stems, strict=True):
            ours = floats(found["scores"]["it"][stem][name])
            np.testing.assert_allclose(ours, values, atol=1e-4, err_msg=name)
            assert math.isclose(
                song_score(found["scores"]["it"][stem], name),
                np.nanmedian(values),
                abs_tol=1e-4,
            )


@pytest.mark.parametrize(("n_channels", "seconds", "v3"), [(1, 3.4, None), (2, 9, True)])
def test_whole_songs_score_what_mir_eval_gives_and_n_is_the_gain_over_the_mixture(
    n_channels, seconds, v3
):
    separation = pytest.importorskip("mir_eval.separation")
    references = song(seconds, n_channels)
    estimate = np.rint(leaky(references) * 2**15).astype(np.float32) / 2**15
    found = score_song(references, {"it": estimate}, RATE, v3)["scores"]["it"]
    truth, guess = (np.rint(x.mean(1) * 2**15) / 2**15 for x in (references, estimate))
    mixture = np.rint(references.sum(0).mean(0) * 2**15) / 2**15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mir_eval is about to drop this function
        expected = separation.bss_eval_sources(truth, guess, False)
        floor = separation.bss_eval_sources(truth, np.stack([mixture, mixture]), False)
    for j, stem in enumerate(STEMS):
        ours = [found[stem][name] for name in ("v3_sdr", "v3_sir", "v3_sar", "nsdr")]
        theirs = [score[j] for score in expected[:3]] + [expected[0][j] - floor[0][j]]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_version_3_is_taken_of_mono_songs_unless_asked_for():
    for n_channels, v3, is_there in ((1, None, True), (2, None, False), (2, True, True)):
        found = score_song(song(1.1, n_channels), {}, RATE, v3)["scores"][FLOOR]["vocals"]
        assert (found["v3_sdr"] is not None) == is_there
    assert score_song(song(1.1, 1), {}, RATE, False)["scores"][FLOOR]["vocals"]["nsdr"] is None


def test_scaling_an_estimate_leaves_si_sdr_and_moves_sdr():
    references = song()
    quiet = 0.25 * leaky(references)
    found = score_song(references, {"loud": leaky(references), "quiet": quiet}, RATE)["scores"]
    loud, quiet = found["loud"]["vocals"], found["quiet"]["vocals"]
    assert loud["si_sdr"] == pytest.approx(quiet["si_sdr"], abs=2e-4)
    assert song_score(loud, "sdr") > song_score(quiet, "sdr") + 1


def test_the_mixture_of_equally_loud_parts_is_at_zero_db():
    n = 2 * RATE
    t = np.arange(n) / RATE
    both = np.stack([np.sin(2 * np.pi * f * t) for f in (440, 1000)])[:, None].astype(np.float32)
    found = score_song(0.5 * both, {}, RATE)["scores"][FLOOR]
    assert found["vocals"]["si_sdr"] == pytest.approx(0, abs=0.01)
    assert song_score(found["vocals"], "sdr") == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("n_channels", [1, 2])
@pytest.mark.parametrize("silent", ["vocals", "accompaniment", "estimate", "all"])
def test_silence_is_counted_and_neither_crashes_nor_becomes_infinite(n_channels, silent):
    references = song(2.5, n_channels)
    estimate = leaky(references)
    if silent in STEMS:
        references[STEMS.index(silent)] = 0
    else:
        estimate[:] = 0
        references *= silent == "estimate"
    found = score_song(references, {"it": estimate}, RATE)
    assert found["silent"]["reference"] == (0 if silent == "estimate" else 2)
    assert found["silent"]["it"] == (2 if silent == "estimate" else 0)
    summary = summarise([{**found, "seconds": 2.5}])
    worst = songs.WORST_DB if silent == "estimate" else None
    for stem, of in found["scores"]["it"].items():
        assert of["sdr"] == of["isr"] == of["sir"] == of["sar"] == [worst, worst]
        assert of["si_sdr"] == worst
        if n_channels == 1:
            assert of["v3_sdr"] == of["v3_sir"] == of["v3_sar"] == worst
        assert summary["it"][stem]["sdr"]["value"] == worst
        assert summary["it"][stem]["sdr"]["n_songs"] == (silent == "estimate")
        assert (found["scores"][FLOOR][stem]["si_sdr"] is None) == (worst is None)
    json.dumps(found, allow_nan=False)
    json.dumps(summary, allow_nan=False)


def test_silence_where_a_song_is_hard_raises_no_score():
    """All are scored on the same frames, and the other stem keeps its own."""
    references = song(4, 1)
    estimate = leaky(references, 0.1)
    estimate[:, :, :RATE] = leaky(references, 1.5)[:, :, :RATE]
    quiet = estimate.copy()
    quiet[0, :, :RATE] = 0
    found = score_song(references, {"it": estimate, "quiet": quiet}, RATE)
    before, after = found["scores"]["it"], found["scores"]["quiet"]
    for metric in ("sdr", "isr", "sir", "sar", "v3_sdr", "v3_sir", "v3_sar", "si_sdr"):
        if isinstance(before["vocals"][metric], list):
            assert after["vocals"][metric][0] == songs.WORST_DB
            assert None not in after["vocals"][metric]
        if metric in ("sdr", "sar"):
            scores = (song_score(of["vocals"], metric) for of in (after, before))
            assert np.subtract(*scores) <= 0.05
    assert after["accompaniment"] == before["accompaniment"]
    assert found["silent"] == {"reference": 0, FLOOR: 0, "it": 0, "quiet": 1}


def test_a_copy_of_the_truth_and_parts_that_are_alike_do_not_outweigh_other_songs():
    references = song(2, 1)
    found = score_song(references, {"copy": references}, RATE)["scores"]["copy"]
    for stem in STEMS:
        assert found[stem]["si_sdr"] == found[stem]["v3_sdr"] == songs.BEST_DB
        assert found[stem]["v3_sir"] == found[stem]["v3_sar"] == songs.BITS_DB
        assert song_score(found[stem], "sdr") > 200
    alike = score_song(references[[0, 0]], {"it": leaky(references)}, RATE)["scores"]
    for system in (FLOOR, "it"):
        for metric in ("nsdr", "v3_sdr", "si_sdr", "v3_sir", "v3_sar"):
            assert abs(alike[system]["vocals"][metric]) < 99


@pytest.mark.parametrize("n_samples", [1, 100, 600, RATE - 1])
def test_songs_shorter_than_a_frame_are_one_frame(n_samples):
    references = song()[..., 1000 : 1000 + n_samples]
    found = score_song(np.ascontiguousarray(references), {}, RATE)
    assert found["n_frames"] == len(found["scores"][FLOOR]["vocals"]["sdr"]) == 1
    json.dumps(found, allow_nan=False)


def test_a_frame_is_silent_where_the_channels_sum_to_nothing():
    references = song(3)
    references[0, 0, :RATE] = 0  # the other channel goes on
    references[0, 1, RATE:] = -references[0, 0, RATE:]
    found = score_song(references, {}, RATE)
    assert found["silent"]["reference"] == 2
    assert [x is None for x in found["scores"][FLOOR]["vocals"]["sdr"]] == [False, True, True]


def test_bsseval_hears_16_bits_and_si_sdr_all():
    references = song(1.5)
    fine = references + np.float32(1e-6) * np.random.default_rng(5).normal(size=references.shape)
    found = score_song(references, {"it": fine.astype(np.float32)}, RATE)["scores"]["it"]["vocals"]
    assert found["sdr"][0] > 200
    loud = 1e4 * fine - (1e4 - 1) * references  # the difference at −40 dB
    found = score_song(references, {"it": loud.astype(np.float32)}, RATE)["scores"]["it"]["vocals"]
    assert found["si_sdr"] < 25


def test_inputs_are_not_modified():
    references = song(1.2)
    estimates = {"it": leaky(references)}
    before = references.copy(), estimates["it"].copy()
    score_song(references, estimates, RATE)
    np.testing.assert_array_equal(references, before[0])
    np.testing.assert_array_equal(estimates["it"], before[1])
    assert list(estimates) == ["it"]


# --- Ceilings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025])
def test_ideal_masks_are_those_of_the_whole_songs_stft(rate):
    references = song()
    found = songs.ideals(references, rate, HP)
    grid = audio.grid_at(rate, HP)
    mixture = torch.from_numpy(references.sum(0))
    specs = audio.stft(torch.from_numpy(references.mean(1)), grid)
    for name in IDEALS:
        ideal = getattr(audio, f"{name}_mask")(*audio.to_network_bins(specs, HP))
        spec = audio.apply_mask(audio.stft(mixture, grid), audio.quantize_mask(ideal)[None])
        vocals = audio.istft(spec, grid, mixture.shape[-1])
        np.testing.assert_allclose(found[name][0], vocals, atol=2e-6)
        np.testing.assert_allclose(found[name].sum(0), mixture, atol=1e-7)


def test_ceilings_lie_far_above_the_floor():
    references = song()
    found = score_song(references, songs.ideals(references, RATE, HP), RATE)
    summary = summarise([{**found, "seconds": 3.4}])
    for stem in STEMS:
        of = {system: summary[system][stem]["si_sdr"]["value"] for system in summary}
        assert min(of[name] for name in IDEALS) > of[FLOOR] + 5
        assert summary["ideal_ratio"][stem]["si_sdr"]["share"] == 1
        assert summary[FLOOR][stem]["si_sdr"]["share"] == 0


def test_a_masks_settings_are_heard():
    references = song()
    mixture, mask = references.sum(0), songs.ideal_mask(references, RATE, HP, "ideal_ratio")
    soft = songs.render(mixture, mask, RATE, HP, UNTUNED_MASK)
    hard = songs.render(mixture, mask, RATE, HP, UNTUNED_MASK | {"mask_at_eval": True})
    assert np.abs(hard - soft).max() > 0.01
    np.testing.assert_allclose(hard.sum(0), mixture, atol=1e-6)


def test_the_middle_is_what_an_excerpt_takes():
    assert songs.middle(10, None) == slice(0, 10)
    assert songs.middle(10, 4) == slice(3, 7)
    assert songs.middle(10, 99) == slice(0, 10)
    assert songs.middle(10, 0.1) == slice(4, 5)
