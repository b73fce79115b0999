"""The README's pictures: what they show is what the network heard and answered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import audio
import charts
import draw
import model as networks
from hparams import UNTUNED_MASK, HParams
from separation import Separator


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained network, whose answers are nobody's guess but always the same."""
    hp = HParams(width=4)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("draw") / "net.pth"
    networks.save_checkpoint(
        path,
        networks.build_model(hp),
        hp,
        curve_db=audio.weighting_curve_db(hp),
        mask_settings=dict(UNTUNED_MASK),
    )
    return path


@pytest.fixture(scope="module")
def song(toy_tree) -> tuple[Path, Path]:
    """A mixture and its vocals."""
    mixture = next(toy_tree.glob("Mixtures/Test/*/mixture.wav"))
    return mixture, toy_tree / "Sources/Test" / mixture.parent.name / "vocals.wav"


def test_pictures_of_a_song(checkpoint, song, tmp_path):
    mixture, vocals = song
    folder = tmp_path / "new" / "folder"
    assert draw.main([str(checkpoint), str(mixture), str(folder), "--seconds", "2"]) == 0
    assert {path.name for path in folder.iterdir()} == {"masks.png", "inference.png"}
    assert draw.main([str(checkpoint), str(mixture), str(folder), "--vocals", str(vocals)]) == 0
    names = {"masks.png", "inference.png", "why.png", "approach.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        pixels = np.asarray(Image.open(path))
        assert pixels.shape[1] == draw.WIDTH
        assert pixels.std() > 20  # neither blank nor all of one colour


def test_the_mask_that_is_shown_is_the_network_s(checkpoint, song, tmp_path):
    assert draw.main([str(checkpoint), str(song[0]), str(tmp_path), "--seconds", "30"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "masks.png"))
    shown = pixels[draw.PANEL + 2 * draw.MARGIN : 2 * (draw.PANEL + draw.MARGIN)]

    separator = Separator.load(checkpoint)
    hp = separator.hp
    wav, rate = draw._read(song[0], 0, 30)
    spec = audio.to_network_bins(audio.stft(torch.from_numpy(wav), audio.grid_at(rate, hp)), hp)
    seen = audio.features(spec, separator.curve_db, hp.mixture_power, hp)
    mask = separator.mask(torch.nn.functional.pad(seen, (hp.context, hp.context)))
    colours = charts.colours(mask.flip(0).numpy())
    for rows, part in ((slice(0, 100), colours[:256]), (slice(100, 200), colours[257:])):
        np.testing.assert_allclose(shown[rows].mean((0, 1)), part.mean((0, 1)), atol=2)


def test_the_share_of_clear_bins_is_counted(checkpoint, song):
    """Two sounds that never meet are told apart everywhere, two alike nowhere."""
    rng = np.random.default_rng(0)
    low, high = (np.sin(2 * np.pi * f / 22050 * np.arange(44100)) / 4 for f in (300, 3000))
    noise = rng.standard_normal(44100) / 10
    separator = Separator.load(checkpoint)
    apart = draw._hear(separator, low + high, 22050, low)
    alike = draw._hear(separator, 2 * noise, 22050, noise)
    assert draw.percent_clear(apart) > 99
    assert draw.percent_clear(alike) == 0
    centre = apart.loudest("true vocals")
    assert 12 <= centre < apart.seen["mixture"].shape[1] - 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--start", "1000"], "nothing left at 1000 s"),
        (["--vocals", "SHORT"], "name the vocals of this very song"),
        (["--vocals", "missing.wav"], "missing.wav"),
    ],
)
def test_what_cannot_be_drawn_is_told(checkpoint, song, tmp_path, capsys, words, said):
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(100), 22050)
    words = [str(short) if word == "SHORT" else word for word in words]
    folder = tmp_path / "pictures"
    assert draw.main([str(checkpoint), str(song[0]), str(folder), *words]) == 1
    assert said in capsys.readouterr().err
    assert not folder.exists()
