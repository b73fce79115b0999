"""tools/: the figures of the benchmark, and networks that are given away."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import audio
import model
from hparams import HParams
from separation import Separator
from tools import benchmark, publish

HP = HParams(width=2, stft_frames=3, model_type="convnet")
TERMS = "research use, non-commercial"


@pytest.mark.parametrize("what", ["network", "generate", "train", "live"])
def test_every_figure_is_measured(what, capsys):
    settings = "--set=width=2", "--set=batch_size=1", "--set=stereo=mean"
    assert benchmark.main([what, "--rounds=1", "--seconds=2", *settings, "--device=cpu"]) == 0
    numbers = re.findall(r" ([-\d.e+]+|nan|inf)$", capsys.readouterr().out, re.MULTILINE)
    assert len(numbers) >= 2
    assert all(0 < float(number) < math.inf for number in numbers)


@pytest.fixture
def checkpoint(empty_folder) -> Path:
    torch.manual_seed(0)
    extra = {
        "curve_db": audio.weighting_curve_db(HP),
        "mask_settings": {"mask_at_eval": True, "eval_mask_threshold": 0.45},
        "data": ["a 00", "b 11"],
        "step": 77,
        "scores": {"soft": 3.25, "loss": -0.3},
        "resume": {"weights": {"x": torch.zeros(50_000)}},
    }
    model.save_checkpoint(Path("best.pth"), model.build_model(HP), HP, **extra)
    return Path("best.pth")


def test_what_is_given_away_separates_alike_and_carries_terms_and_sources(checkpoint, capsys):
    assert publish.main(["best.pth"]) == 0
    printed = capsys.readouterr().out
    for text in ("convnet, width 2", "77 steps on 2 songs", "soft 3.25", "0.45", "not said"):
        assert text in printed
    words = ["best.pth", "mine.pth", "--licence", TERMS, "--source", "A", "--source", "B"]
    assert publish.main(words) == 0
    assert f"licence: {TERMS}" in capsys.readouterr().out
    given, trained = (model.load_checkpoint(Path(name)) for name in ("mine.pth", "best.pth"))
    assert (given["licence"], given["sources"]) == (TERMS, ["A", "B"])
    assert given.keys() == (trained.keys() | {"licence", "sources"}) - {"resume"}
    wav = np.random.default_rng(0).uniform(-0.5, 0.5, 9000).astype(np.float32)
    separators = [Separator.load(name) for name in ("mine.pth", "best.pth")]
    vocals, expected = (separator.separate(wav, 22050)[0] for separator in separators)
    np.testing.assert_array_equal(vocals, expected)
    assert [separator.licence for separator in separators] == [TERMS, ""]
    # Published again, it keeps what it came with.
    assert publish.main(["mine.pth", "2.pth", "--licence", "free", "--source", "C"]) == 0
    again = model.load_checkpoint(Path("2.pth"))
    assert (again["licence"], again["sources"]) == ("free", ["A", "B", "C"])
    assert f"came as {TERMS!r}; its sources' terms still hold" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused_and_nothing_is_written(checkpoint, capsys):
    before = checkpoint.read_bytes()
    for words, code, text in (
        ("best.pth --licence x", 2, "name the .pth"),
        ("best.pth mine.pth", 2, "--licence is missing"),
        ("best.pth mine.pth --set width=3", 2, "a network is published as it is"),
        ("best.pth best.pth --licence x", 1, "is already there"),
        ("missing.pth", 1, "no such checkpoint"),
    ):
        assert publish.main(words.split()) == code
        assert text in capsys.readouterr().err
        assert checkpoint.read_bytes() == before
        assert list(Path().iterdir()) == [checkpoint]
