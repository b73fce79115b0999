"""Tuning: what is tried, what is chosen, what is stored."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import dataset
import model
from hparams import MASK_SETTINGS, UNTUNED_MASK, HParams, InputError
from scoring import evaluation, tuning
from scoring import songs as scoring
from scoring.tuning import Tuned
from separation import Separator
from sound import tracks

HP = HParams(width=2, stft_frames=3, model_type="convnet")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "best.pth"
    settings = {"mask_at_eval": False, "noise_gate": 0.1}
    extra = {"mask_settings": settings, "curve_db": torch.zeros(HP.n_bins)}
    model.save_checkpoint(path, model.build_model(HP), HP, **extra)
    return path


def test_the_best_of_each_kind_is_chosen_and_the_better_kind_preferred():
    grid = tuning.mask_grid()
    scores = np.zeros(len(grid))
    hard = grid.index({"mask_at_eval": True, "eval_mask_threshold": 0.65})
    soft = grid.index({"mask_at_eval": False, "noise_gate": 0.15, "mask_sharpness": 1.4})
    scores[hard], scores[soft] = 2, 1
    found = tuning.best_settings(scores)
    assert found == {
        "mask_at_eval": True,
        "eval_mask_threshold": 0.65,
        "noise_gate": 0.15,
        "mask_sharpness": 1.4,
    }
    assert list(found) == list(MASK_SETTINGS)
    scores[soft] = 3
    assert tuning.best_settings(scores) == {**found, "mask_at_eval": False}


def test_the_best_of_each_kind_has_its_arrow():
    scores = np.zeros(len(tuning.mask_grid()))
    scores[[3, 40]] = 1
    settings = tuning.best_settings(scores)
    lines = [line for line in tuning.curves(scores, settings) if "←" in line]
    assert len(lines) == 2
    assert lines[0].split() == ["0.20", "1.00", "←"]
    assert lines[1].startswith(f"{settings['noise_gate']:6.2f}")
    assert lines[1].count("←") == 1


def test_tuned_scores_are_those_of_separating_with_these_settings(
    checkpoint, toy_tree, monkeypatch
):
    grid = tuning.mask_grid()
    monkeypatch.setattr(tuning, "mask_grid", lambda: grid[9:13] + grid[40:44])
    track = tracks.find_tracks(toy_tree).tracks[0]
    references = np.ascontiguousarray(tracks.read_channels(track)[..., :22050])
    separator = Separator.load(checkpoint)
    found = tuning.tune_song(separator, references, 22050)
    for settings, score in zip(tuning.mask_grid(), found, strict=True):
        separator.mask_settings = {**UNTUNED_MASK, "noise_gate": 0.1, **settings}
        vocals, _ = separator.separate(references.sum(0), 22050)
        assert score == pytest.approx(scoring.si_sdr(vocals, references[0]), abs=1e-6)
    assert len(set(found)) > 3


def test_curves_that_are_flat_choose_nothing():
    scores = np.full(len(tuning.mask_grid()), -30.0)
    with pytest.raises(InputError, match=r"all binary masks score -30.00 dB, which tells nothing"):
        tuning.best_settings(scores)
    scores[: len(tuning.THRESHOLDS)] = np.linspace(0, 1, len(tuning.THRESHOLDS))
    with pytest.raises(InputError, match="all soft masks"):
        tuning.best_settings(scores)


def test_songs_of_one_name_all_count_and_one_that_is_given_twice_counts_once():
    songs = [Tuned("S", ("a",), (1.0, 2.0)), Tuned("S", ("b",), (3.0, 6.0))]
    assert tuning.mean_scores(songs).tolist() == [2, 4]
    assert tuning.mean_scores([songs[1], *songs]).tolist() == [2, 4]


def test_a_tuned_song_is_known_by_its_recordings_in_either_form(toy_tree, toy_dataset, monkeypatch):
    monkeypatch.setattr(tuning, "tune_song", lambda *_: [0.0])
    monkeypatch.setattr(evaluation, "load", lambda _: SimpleNamespace(hp=HP))
    found = []
    for folder in (toy_tree, toy_dataset):
        songs, _, _ = tuning.validation_songs([folder], {}, HP, "test")
        found.append(tuning.tune_candidate(None, 1, songs[0]))
    assert found[0].name == found[1].name
    assert set(found[0].sha256) <= set(found[1].sha256)


def test_a_song_that_was_learnt_at_another_speed_is_not_tuned_on(toy_dataset):
    songs = dataset.load_manifest(toy_dataset).songs
    learnt = {f"{songs[0].id} x1.15 00": songs[0].id, f"{songs[1].id} other": songs[1].id}
    found = tuning.candidates(toy_dataset, learnt, HP, None, tracks.VOICE_PATTERN)[0]
    assert [c.name for c in found if c.is_learnt] == [songs[0].id]


def test_a_built_song_sounds_as_it_was_recorded(toy_tree, toy_dataset):
    song = dataset.load_manifest(toy_dataset).songs[0]
    (track,) = [t for t in tracks.find_tracks(toy_tree).tracks if t.name == song.id]
    wav = tuning.read_built(toy_dataset, song, HP, None)
    truth = tracks.read_channels(track).mean(1)[:, : wav.shape[-1]]
    assert wav.shape == (2, 1, (song.n_frames - 1) * 256)
    assert np.abs(wav[:, 0] - truth).max() < 1e-3


def test_a_dataset_on_another_grid_is_refused(toy_dataset):
    with pytest.raises(InputError, match="built with n_fft=1024, hop_length=256, not 512, 128"):
        tuning.candidates(toy_dataset, {}, HParams(n_fft=512, hop_length=128))


def test_a_checkpoint_that_changed_meanwhile_is_not_overwritten(checkpoint, tmp_path):
    path = tmp_path / "net.pth"
    shutil.copy(checkpoint, path)
    with pytest.raises(InputError, match="has changed since tuning began"):
        tuning.store(path, dict(UNTUNED_MASK), "0" * 64, [])
    assert path.read_bytes() == checkpoint.read_bytes()
