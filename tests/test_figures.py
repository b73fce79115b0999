"""tools/figures.py: what the pictures show is what the network saw and answered."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from demo import synthesis
from hparams import HParams, InputError
from separation import Separator
from tools import figures

pytest.importorskip("matplotlib")
PRETRAINED = Path(__file__).parent.parent / "pretrained" / "resnet18.pth"


@pytest.fixture(scope="module")
def song(tmp_path_factory) -> tuple[Path, Path]:
    """A mixture and its vocals."""
    folder = tmp_path_factory.mktemp("song")
    parts = synthesis.synthesize_song(np.random.default_rng(0), 3, 22050)
    soundfile.write(folder / "mixture.wav", sum(parts.values()).T, 22050)
    soundfile.write(folder / "vocals.wav", parts["vocals"].T, 22050)
    return folder / "mixture.wav", folder / "vocals.wav"


def test_pictures_of_a_song(song, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert figures.main([str(PRETRAINED), *map(str, (song[0], folder)), "--seconds", "1"]) == 0
    assert [path.name for path in folder.iterdir()] == ["masks.png"]
    words = [str(PRETRAINED), str(song[0]), str(folder), "--vocals", str(song[1])]
    assert figures.main(words) == 0
    names = {"masks.png", "why.png", "approach.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(path.stat().st_size > 10_000 for path in folder.iterdir())


def test_the_mask_that_is_shown_makes_the_vocals_that_are_shown(song):
    (wav, rate), (truth, _) = (figures.read_mono(path, 0, 2) for path in song)
    separator = Separator.load(PRETRAINED)
    waves, seen = figures.look(separator, wav, rate, truth)
    np.testing.assert_allclose(waves["vocals"] + waves["accompaniment"], wav, atol=1e-6)
    assert {picture.shape for picture in seen.values()} == {(513, 1 + len(wav) // 256)}
    # Where the mask lets nothing through, the vocals are quieter than the mixture, and only there.
    removed = seen["mixture"] - seen["vocals"]
    assert removed[seen["mask"] < 0.05].mean() > 0.1
    assert removed[seen["mask"] > 0.95].mean() < 0.01


def test_sounds_that_never_meet_are_told_apart_and_equal_ones_are_not():
    low, high = (np.sin(2 * np.pi * f / 22050 * np.arange(44100)) / 4 for f in (300, 3000))
    noise = np.random.default_rng(0).standard_normal(44100) / 10
    separator = Separator.load(PRETRAINED)
    for mixture, truth, expected in ((low + high, low, 100), (2 * noise, noise, 0)):
        wav, voice = mixture.astype(np.float32), truth.astype(np.float32)
        _, seen = figures.look(separator, wav, 22050, voice)
        assert figures.percent_clear(seen, 100) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--start", "1000"], "begins at 1000.000 s"),
        (["--vocals", "SHORT"], "name the vocals of this very song"),
        (["--vocals", "missing.wav"], "missing.wav"),
    ],
)
def test_what_cannot_be_drawn_is_told(song, tmp_path, capsys, words, said):
    soundfile.write(tmp_path / "short.wav", np.zeros(100), 22050)
    words = [str(tmp_path / "short.wav") if word == "SHORT" else word for word in words]
    folder = tmp_path / "pictures"
    assert figures.main([str(PRETRAINED), str(song[0]), str(folder), *words]) == 1
    assert said in capsys.readouterr().err
    assert not folder.exists()


def test_a_slice_longer_than_the_song_can_be_drawn():
    seen = {name: torch.rand(9, 5) for name in ("mixture", "mask", "target", "true vocals")}
    figures.draw_approach(seen, HParams(stft_lookahead=4))


def test_scores_become_points_and_a_median(tmp_path):
    panels = {"SDR of the vocals": {"mine": [1.0, 2.0, math.nan], "theirs": []}, "SIR": {}}
    for name in ("scores.svg", "again.svg"):
        figures.plot_scores(tmp_path / name, panels)
    assert (tmp_path / "scores.svg").read_text().startswith("<?xml")
    assert (tmp_path / "scores.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    with pytest.raises(InputError, match=r"ends in \.png"):
        figures.plot_scores(tmp_path / "scores.txt", panels)
