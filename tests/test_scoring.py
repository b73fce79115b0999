"""Scoring: songs beside museval and mir_eval, silence, ceilings, files, tables, tuning."""

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sounds import write_wav

import model
from hparams import UNTUNED_MASK, HParams, InputError
from scoring import metrics, songs, tables, tuning
from scoring.songs import read_estimates, score_song, separate_by_mask
from scoring.tables import FLOOR, IDEALS, METRICS, STEMS, song_score, summarise
from separation import Separator
from sound import tracks

RATE = 8000
HP = HParams(sample_rate=8000, n_fft=256, hop_length=64)
TINY = HParams(width=2, stft_frames=3, model_type="convnet")
MIXTURE = np.random.default_rng(0).normal(0, 0.1, (2, RATE)).astype(np.float32)


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


@pytest.mark.parametrize("seconds", [3.4, 0.5])
def test_every_frame_scores_what_museval_gives(seconds, monkeypatch):
    """In blocks, beside another system, and of a song that is shorter than a frame."""
    bss_eval = pytest.importorskip("museval.metrics").bss_eval
    monkeypatch.setattr(metrics, "BLOCK_FFT", 2048)
    references = song(seconds)
    references[0, :, RATE : 2 * RATE] = 0
    estimate = np.rint(leaky(references) * 2**15).astype(np.float32) / 2**15
    of = score_song(references, {"silent": 0 * estimate, "it": estimate}, RATE)
    scores, silent = of["it"], of["silent"]["vocals"]["sdr"]
    assert silent == [tables.WORST_DB, None, tables.WORST_DB][: len(silent)]  # museval: none of all
    frames_first = (x.transpose(0, 2, 1) for x in (references, estimate))
    expected = bss_eval(*frames_first, window=RATE, hop=RATE)[:4]
    for name, of_stems in zip(("sdr", "isr", "sir", "sar"), expected, strict=True):
        for stem, values in zip(STEMS, of_stems, strict=True):
            of_frames = np.array(scores[stem][name], dtype=float)
            np.testing.assert_allclose(of_frames, values, atol=1e-4, err_msg=name)
            assert song_score(scores[stem], name) == pytest.approx(np.nanmedian(values), abs=1e-4)


def test_whole_songs_score_what_mir_eval_gives_and_n_is_the_gain_over_the_mixture():
    separation = pytest.importorskip("mir_eval.separation")
    references = song(3.4, 1)
    estimate = np.rint(leaky(references) * 2**15).astype(np.float32) / 2**15
    scores = score_song(references, {"it": estimate}, RATE)["it"]
    mixture = np.rint(references.sum(0)[0] * 2**15) / 2**15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mir_eval is about to drop this function
        expected = separation.bss_eval_sources(references[:, 0], estimate[:, 0], False)
        floor = separation.bss_eval_sources(references[:, 0], np.stack([mixture, mixture]), False)
    for j, stem in enumerate(STEMS):
        values = [scores[stem][name] for name in ("v3_sdr", "v3_sir", "v3_sar", "nsdr")]
        golden = [score[j] for score in expected[:3]] + [expected[0][j] - floor[0][j]]
        np.testing.assert_allclose(values, golden, atol=1e-4)


@pytest.mark.parametrize("gain", [1, -2])
def test_a_channel_that_is_a_copy_changes_no_score(gain):
    """Its filters have no unique solution."""
    references, gains = song(2.5, 1), np.array([[1], [gain]], np.float32)
    estimate = leaky(references)
    mono = score_song(references, {"it": estimate}, RATE)["it"]
    stereo = score_song(gains * references, {"it": gains * estimate}, RATE)["it"]
    for stem, name in itertools.product(STEMS, ("sdr", "isr", "sir", "sar", "si_sdr")):
        np.testing.assert_allclose(stereo[stem][name], mono[stem][name], atol=1e-3)


def test_si_sdr_is_what_one_works_out_by_hand():
    for estimate, reference, expected_db in (
        ([1, 1], [1, 0], 0),  # as much error as voice
        ([2, 1], [1, 0], 20 * math.log10(2)),
        ([1, 10], [3, 0], -20),
        ([3, 0], [1, 1], 0),  # (1.5, 1.5) of voice and (1.5, -1.5) of error
        ([[1, 0], [1, 0]], [[1, 0], [0, 0]], 0),  # channels are one long signal
        ([0, 0], [1, 1], -math.inf),
        ([1, 1], [0, 0], math.nan),
    ):
        for scale in (1, -1e-9):  # neither loudness nor polarity matters
            found = metrics.si_sdr(scale * np.array(estimate), np.array(reference))
            np.testing.assert_allclose(found, expected_db, atol=1e-9)


@pytest.mark.parametrize(
    ("n_channels", "silent"), [(1, "vocals"), (2, "accompaniment"), (1, "estimate"), (2, "all")]
)
def test_silence_neither_crashes_nor_becomes_infinite(n_channels, silent):
    references = song(2.5, n_channels)
    estimate = leaky(references)
    if silent in STEMS:
        references[STEMS.index(silent)] = 0
    else:
        estimate[:] = 0
        references *= silent == "estimate"
    scores = score_song(references, {"it": estimate}, RATE)
    worst = tables.WORST_DB if silent == "estimate" else None
    for stem, of in scores["it"].items():
        of.pop("nsdr", None)  # a difference
        assert all(score in (worst, [worst, worst]) for score in of.values())
        assert ("v3_sdr" in of) == (n_channels == 1), "it is reported of mono songs"
        assert (scores[FLOOR][stem]["si_sdr"] is None) == (worst is None)
    summary = summarise([{"scores": scores, "seconds": 2.5}])
    assert summary["it"]["vocals"]["sdr"]["value"] == worst
    json.dumps([scores, summary], allow_nan=False)


def test_ceilings_lie_far_above_the_floor_and_their_parts_add_up():
    references = song()
    masks, mixture = songs.ideal_masks(references, RATE, HP), references.sum(0)
    separated = {n: separate_by_mask(mixture, masks[n], RATE, HP, UNTUNED_MASK) for n in IDEALS}
    summary = summarise([{"scores": score_song(references, separated, RATE), "seconds": 3.4}])
    for stem in STEMS:
        of = {system: summary[system][stem]["si_sdr"] for system in summary}
        assert min(of[name]["value"] for name in IDEALS) > of[FLOOR]["value"] + 5
    for both in separated.values():
        np.testing.assert_allclose(both.sum(0), mixture, atol=1e-7)


def test_what_one_file_leaves_of_the_mixture_is_the_other(tmp_path):
    wav, files = 0.3 * MIXTURE, {}
    for i, stem in enumerate(STEMS):
        files[stem] = write_wav(tmp_path / f"{stem}.wav", wav.T)
        both, notes = read_estimates("it", {stem: files[stem]}, MIXTURE, RATE)
        np.testing.assert_array_equal(both[i], wav)
        np.testing.assert_allclose(both.sum(0), MIXTURE, atol=1e-7)
        assert notes == []
    np.testing.assert_array_equal(read_estimates("it", files, MIXTURE, RATE)[0], [wav, wav])


def test_files_that_nearly_fit_are_fitted_and_that_is_said(tmp_path):
    longer, short = np.pad(MIXTURE, ((0, 0), (0, 3))), MIXTURE[:1, :-1]
    filled = np.pad(MIXTURE[[0, 0], :-1], ((0, 0), (0, 1)))
    for wav, n_channels, expected, said in (
        (longer, 2, MIXTURE, ["trimmed"]),
        (MIXTURE, 1, MIXTURE.mean(0)[None], ["2 channels averaged to 1"]),
        (short, 2, filled, ["padded", "copied"]),
    ):
        files = {"vocals": write_wav(tmp_path / "vocals.wav", wav.T)}
        both, notes = read_estimates("it", files, MIXTURE[:n_channels], RATE)
        np.testing.assert_allclose(both[0], expected, atol=1e-7)
        assert [words in note for note, words in zip(notes, said, strict=True)] == [True] * len(
            said
        )


def record(seconds: float, **scores: dict) -> dict:
    of = dict.fromkeys([metric.name for metric in METRICS])
    full = {s: {stem: {**of, **values} for stem in STEMS} for s, values in scores.items()}
    return {"seconds": seconds, "scores": full}


def test_songs_come_together_as_each_metric_wants():
    four = [
        record(1, it={"sdr": [1.0, None, 2.0, 9.0], "si_sdr": 1.0, "nsdr": 1.0}),
        record(3, it={"sdr": [4.0], "si_sdr": 3.0, "nsdr": 3.0}),
        record(9, it={"sdr": [None], "si_sdr": None, "nsdr": None}),
        record(1, it={"sdr": [30.0], "si_sdr": 8.0, "nsdr": 8.0}),
    ]
    summary = summarise(four)["it"]["vocals"]
    assert summary["sdr"]["value"] == 4  # the median of 2, 4 and 30
    assert summary["si_sdr"]["value"] == 4
    assert summary["nsdr"]["value"] == pytest.approx((1 + 9 + 8) / 5)
    assert [summary[name]["n_songs"] for name in ("sdr", "si_sdr", "isr")] == [3, 3, 0]


def test_the_interval_is_that_of_a_mean_and_clips_of_one_song_are_one_witness():
    gains = np.repeat(np.random.default_rng(3).normal(0.5, 1, 20), 5)
    low, high = tables.bootstrap(gains, [str(i) for i in range(100)])
    half = 1.96 * gains.std() / 10
    np.testing.assert_allclose([low, high], gains.mean() + np.array([-half, half]), atol=0.03)
    assert (low, high) == tables.bootstrap(gains, [str(i) for i in range(100)])
    together = tables.bootstrap(gains, [str(i // 5) for i in range(100)])
    assert 1.8 < (together[1] - together[0]) / (high - low) < 2.6  # √5
    assert np.mean(together) == pytest.approx(gains.mean(), abs=0.05)


def gains(*values: float, groups: int | None = None) -> tuple[np.ndarray, list[str]]:
    n = groups or len(values)
    return np.array(values), [str(i % n) for i in range(len(values))]


@pytest.mark.parametrize(
    ("differences", "says"),
    [
        (gains(), "no song has it in both"),
        (gains(1, 2, groups=1), "+1.50 dB on average; 1 songs are too few to tell"),
        (gains(1, 1, 1, 1, 1, 2), "the interval excludes 0: better (6 of 6 songs better)"),
        (gains(*[-1] * 6), "interval -1.00 to -1.00; the interval excludes 0: worse (0 of 6"),
        (gains(1, -1, 1, -1, 1, -1), "the interval holds 0: it may be chance (3 of 6"),
    ],
)
def test_a_verdict_is_no_bolder_than_the_songs_allow(differences, says):
    assert says in tables.verdict(*differences)


def stored(path: Path, **hashes: str) -> Path:
    """Write scores of one system by name and hash of the music."""
    both = {stem: {"sdr": [1.0, None, 3.0], "nsdr": None} for stem in STEMS}
    records = [
        {"name": n, "group": n, "seconds": 1, "files": [h], "scores": {"it": both}}
        for n, h in hashes.items()
    ]
    tables.write_scores(path, {}, summarise(records), records)
    return path


def test_songs_are_paired_by_name_and_must_be_the_same_music(tmp_path):
    a = stored(tmp_path / "a.json", c="1", a="2", x="3")
    b = stored(tmp_path / "b.json", a="2", c="1")
    pairs = tables.pair_songs((a, b), ("it", "it"))
    assert [before["name"] for before, _ in pairs] == ["a", "c"]
    gained, groups = tables.gains_of(pairs, ("it", "it"), "sdr")
    assert (gained.tolist(), len(groups)) == ([0, 0], 2)
    assert tables.gains_of(pairs, ("it", "it"), "nsdr")[1] == []
    for hashes, system, message in (
        ({"a": "1"}, "it", "b.json: a is not the same music as in .*a.json"),
        ({"b": "1"}, "it", "b.json: has no song in common with"),
        ({"a": "2"}, "them", r"b.json: no system 'them' \(--systems takes of: it\)"),
    ):
        stored(b, **hashes)
        with pytest.raises(InputError, match=message):
            tables.pair_songs((a, b), ("it", system))
    for damaged in ("", "[1]", '{"format": 1}', '{"format": "vocal-mask scores 4", "songs": [1]}'):
        b.write_text(damaged)
        with pytest.raises(InputError, match=r"b\.json: .*\(score again\)"):
            tables.pair_songs((a, b), ("it", "it"))


@pytest.mark.parametrize(("binary", "kind"), [(0.0, "binary"), (1.0, "soft")])
def test_curves_that_are_flat_choose_nothing(binary, kind):
    scores = np.full(len(tuning.mask_grid()), -30.0)
    scores[: len(tuning.THRESHOLDS)] += np.linspace(0, binary, len(tuning.THRESHOLDS))
    with pytest.raises(InputError, match=rf"all {kind} masks score -30.00 dB, which tells nothing"):
        tuning.best_settings(scores)


@pytest.mark.parametrize("stereo", ["mean", "mid-side"])
def test_tuned_scores_are_those_of_separating_with_these_settings(stereo, toy_tree, monkeypatch):
    grid = tuning.mask_grid()
    monkeypatch.setattr(tuning, "mask_grid", lambda: grid[9:13] + grid[40:44])
    track = tracks.find_tracks(toy_tree).tracks[0]
    references = np.ascontiguousarray(tracks.read_channels(track)[..., :22050])
    torch.manual_seed(0)
    curve_db, network = torch.zeros(TINY.n_bins), model.build_model(TINY).eval()
    separator = Separator(network, TINY, curve_db, dict(UNTUNED_MASK), torch.device("cpu"))
    separator.stereo = stereo
    scores = tuning.tune_song(separator, references, 22050)
    assert len(set(scores)) > 3
    for settings, score in zip(tuning.mask_grid(), scores, strict=True):
        separator.mask_settings = {**UNTUNED_MASK, **settings}
        vocals, _ = separator.separate(references.sum(0), 22050)
        assert score == pytest.approx(metrics.limited_si_sdr(vocals, references[0]), abs=1e-4)
