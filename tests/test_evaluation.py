"""What an evaluation is of: what a checkpoint says about itself, what decides the scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import model
from hparams import HParams
from scoring import evaluation

HP = HParams(width=2, stft_frames=3, model_type="convnet")


@pytest.mark.parametrize(
    ("stored", "learnt"),
    [
        ({}, None),
        ({"data": []}, {}),
        ({"data": ["a song 0f", "b 1e"]}, {"a song 0f": "a song", "b 1e": "b"}),
        ({"data": ["a song x1.15 0f"]}, {"a song x1.15 0f": "a song"}),
        ({"data": ["b 1e"], "learnt_before": ["a 0f"]}, {"a 0f": "a", "b 1e": "b"}),
    ],
)
def test_a_checkpoint_says_what_it_has_learnt_or_that_it_does_not_know(stored, learnt, tmp_path):
    path = tmp_path / "net.pth"
    model.save_checkpoint(
        path, model.build_model(HP), HP, curve_db=torch.zeros(HP.n_bins), **stored
    )
    assert evaluation.known_songs(path)[0] == learnt


def test_songs_that_were_tuned_on_are_known_by_name_or_by_content(tmp_path):
    path = tmp_path / "net.pth"
    tuned = [{"name": "a", "sha256": ["01", "02"]}]
    extra = {"curve_db": torch.zeros(HP.n_bins), "data": ["learnt 0f"], "tuned_on": tuned}
    model.save_checkpoint(path, model.build_model(HP), HP, **extra)
    for name, sha256, expected in (
        ("a", "03", (False, True)),
        ("b", "02", (False, True)),
        ("b", "03", (False, False)),
        ("learnt", "03", (True, False)),
    ):
        record = {"name": name, "files": [{"sha256": sha256}]}
        found = evaluation.marks(record, *evaluation.known_songs(path))
        assert tuple(found.values()) == expected


def test_what_decides_the_scores_is_the_same_when_read_again():
    tasks = [evaluation.Task(Path("music"), HP, s, None, None) for s in (None, 5.0)]
    folders = {"other": Path("theirs")}
    whole, excerpt = (evaluation.describe(task, "stems", folders) for task in tasks)
    assert whole["estimates"] == {"other": str(Path.cwd() / "theirs")}
    assert json.loads(json.dumps(whole)) == whole
    assert whole["checkpoint"] is None
    assert {name for name in whole if whole[name] != excerpt[name]} == {"seconds"}
