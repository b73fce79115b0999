"""tools/publish.py: what a checkpoint says of itself, and what is left of it when given away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import audio
import model
from hparams import HParams
from separation import Separator
from tools import publish

HP = HParams(width=2, stft_frames=3, model_type="convnet")
TERMS = "research use, non-commercial"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.manual_seed(0)
    extra = {
        "curve_db": audio.weighting_curve_db(HP),
        "mask_settings": {"mask_at_eval": True, "eval_mask_threshold": 0.45},
        "data": ["a 00", "b 11"],
        "step": 77,
        "scores": {"soft": 3.25, "loss": -0.3},
        "resume": {"weights": {"x": torch.zeros(50_000)}},
    }
    model.save_checkpoint(tmp_path / "best.pth", model.build_model(HP), HP, **extra)
    return tmp_path / "best.pth"


def test_a_checkpoint_says_what_it_holds(checkpoint, capsys):
    assert publish.main([str(checkpoint)]) == 0
    said = capsys.readouterr().out
    for text in ("convnet, width 2", "77 steps on 2 songs", "soft 3.25", "0.45", "not said"):
        assert text in said
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_what_is_given_away_separates_alike_and_carries_terms_and_sources(checkpoint, capsys):
    out = checkpoint.with_name("mine.pth")
    words = [str(checkpoint), str(out), "--licence", TERMS, "--source", "A", "--source", "B"]
    assert publish.main(words) == 0
    assert f"licence: {TERMS}" in capsys.readouterr().out
    ours, theirs = model.load_checkpoint(out), model.load_checkpoint(checkpoint)
    assert (ours["licence"], ours["sources"]) == (TERMS, ["A", "B"])
    assert ours.keys() == (theirs.keys() | {"licence", "sources"}) - {"resume"}
    assert out.stat().st_size < checkpoint.stat().st_size - 150_000
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 9000).astype(np.float32)
    found, expected = (Separator.load(path).separate(wav, 22050)[0] for path in (out, checkpoint))
    np.testing.assert_array_equal(found, expected)
    assert (Separator.load(out).licence, Separator.load(checkpoint).licence) == (TERMS, "")


def test_what_is_published_again_keeps_its_sources(checkpoint, capsys):
    first, second = checkpoint.with_name("first.pth"), checkpoint.with_name("second.pth")
    assert publish.main([str(checkpoint), str(first), "--licence", TERMS, "--source", "A"]) == 0
    assert publish.main([str(first), str(second), "--licence", "free", "--source", "B"]) == 0
    again = model.load_checkpoint(second)
    assert (again["licence"], again["sources"]) == ("free", ["A", "B"])
    said = capsys.readouterr().err
    assert f"{first}: came as {TERMS!r}; its sources' terms still hold" in said


def test_what_came_with_terms_keeps_them(checkpoint, capsys):
    first, second = checkpoint.with_name("first.pth"), checkpoint.with_name("second.pth")
    assert publish.main([str(checkpoint), str(first), "--licence", TERMS]) == 0
    assert publish.main([str(first), str(second)]) == 0
    assert model.load_checkpoint(second)["licence"] == TERMS
    assert capsys.readouterr().err == ""
    assert publish.main([str(first), str(second), "--licence", "", "--overwrite"]) == 2
    assert "--licence is missing" in capsys.readouterr().err
    assert model.load_checkpoint(second)["licence"] == TERMS


def test_generate_says_the_terms(checkpoint, tmp_path):
    out, song = tmp_path / "mine.pth", tmp_path / "song.wav"
    assert publish.main([str(checkpoint), str(out), "--licence", TERMS]) == 0
    soundfile.write(song, np.zeros(4000), 22050)
    script = Path(__file__).parent.parent / "generate.py"
    words = [sys.executable, script, out, song, "--output-dir", tmp_path]
    run = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert f"network: {out}: {TERMS}" in run.stdout


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--licence", "x"], 2, "name the .pth"),
        (["--licence", ""], 2, "name the .pth"),
        (["new/mine.pth"], 2, "--licence is missing"),
        (["mine.pth"], 2, "--licence is missing"),
        (["mine.pth", "--licence", " "], 2, "--licence is missing"),
        (["--set", "widht=3"], 2, "--set: a network is published as it is"),
        (["best.pth", "--licence", "x"], 1, "--overwrite"),
        (["best.pth", "--licence", "x", "--overwrite"], 1, "would overwrite the input"),
        (["no/mine.pth/deeper.pth", "--licence", "x"], 1, "mine.pth"),
    ],
)
def test_what_makes_no_sense_is_refused_and_nothing_is_written(
    checkpoint, capsys, monkeypatch, words, code, text
):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "no").mkdir()
    (checkpoint.parent / "no" / "mine.pth").touch()
    before = checkpoint.read_bytes()
    assert publish.main(["best.pth", *words]) == code
    assert text in capsys.readouterr().err
    assert checkpoint.read_bytes() == before
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == ["best.pth", "no"]


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    (tmp_path / "x.pth").write_text("hello")
    assert publish.main([str(tmp_path / "x.pth")]) == 1
    assert "not a checkpoint" in capsys.readouterr().err
    assert publish.main([str(tmp_path / "missing.pth")]) == 1
    assert "no such checkpoint" in capsys.readouterr().err
