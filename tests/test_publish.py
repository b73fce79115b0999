"""tools/publish.py: what a checkpoint says of itself, and what is left of it when given away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import model
from hparams import HParams
from separation import Separator
from tools import publish

HP = HParams(width=2, stft_frames=3, model_type="convnet")
TERMS = "research use, non-commercial"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    torch.manual_seed(0)
    extra = {
        "curve_db": audio.weighting_curve_db(HP),
        "mask_settings": {"mask_at_eval": True, "eval_mask_threshold": 0.45},
        "data": ["a 00", "b 11"],
        "step": 77,
        "scores": {"soft": 3.25, "loss": -0.3},
        "resume": {"weights": {"x": torch.zeros(50_000)}},
    }
    monkeypatch.chdir(tmp_path)
    model.save_checkpoint(tmp_path / "best.pth", model.build_model(HP), HP, **extra)
    return Path("best.pth")


def test_a_checkpoint_says_what_it_holds(checkpoint, capsys):
    assert publish.main(["best.pth"]) == 0
    said = capsys.readouterr().out
    for text in ("convnet, width 2", "77 steps on 2 songs", "soft 3.25", "0.45", "not said"):
        assert text in said
    assert list(Path().iterdir()) == [checkpoint]


def test_what_is_given_away_separates_alike_and_carries_terms_and_sources(checkpoint, capsys):
    words = ["best.pth", "mine.pth", "--licence", TERMS, "--source", "A", "--source", "B"]
    assert publish.main(words) == 0
    assert f"licence: {TERMS}" in capsys.readouterr().out
    given, trained = (model.load_checkpoint(Path(name)) for name in ("mine.pth", "best.pth"))
    assert (given["licence"], given["sources"]) == (TERMS, ["A", "B"])
    assert given.keys() == (trained.keys() | {"licence", "sources"}) - {"resume"}
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 9000).astype(np.float32)
    separators = [Separator.load(name) for name in ("mine.pth", "best.pth")]
    found, expected = (separator.separate(wav, 22050)[0] for separator in separators)
    np.testing.assert_array_equal(found, expected)
    assert [separator.licence for separator in separators] == [TERMS, ""]


def test_what_is_published_again_keeps_its_terms_and_sources(checkpoint, capsys):
    assert publish.main(["best.pth", "1.pth", "--licence", TERMS, "--source", "A"]) == 0
    assert publish.main(["1.pth", "2.pth"]) == 0
    assert model.load_checkpoint(Path("2.pth"))["licence"] == TERMS
    assert publish.main(["2.pth", "3.pth", "--licence", "free", "--source", "B"]) == 0
    again = model.load_checkpoint(Path("3.pth"))
    assert (again["licence"], again["sources"]) == ("free", ["A", "B"])
    assert f"2.pth: came as {TERMS!r}; its sources' terms still hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["best.pth", "--licence", "x"], 2, "name the .pth"),
        (["best.pth", "mine.pth"], 2, "--licence is missing"),
        (["best.pth", "mine.pth", "--licence", " "], 2, "--licence is missing"),
        (["best.pth", "mine.pth", "--set", "width=3"], 2, "a network is published as it is"),
        (["best.pth", "best.pth", "--licence", "x"], 1, "--overwrite"),
        (["best.pth", "best.pth", "--licence", "x", "--overwrite"], 1, "overwrite the input"),
        (["best.pth", "best.pth/deeper.pth", "--licence", "x"], 1, "best.pth"),
        (["missing.pth"], 1, "no such checkpoint"),
        ([__file__], 1, "not a checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    checkpoint, capsys, words, code, text
):
    before = checkpoint.read_bytes()
    assert publish.main(words) == code
    assert text in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    assert list(Path().iterdir()) == [checkpoint]
