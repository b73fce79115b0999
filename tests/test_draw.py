"""The README's pictures: what they show is what the network heard and answered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import audio
import model as networks
from hparams import UNTUNED_MASK, HParams
from learning import sampling
from separation import Separator
from tools import charts, figures


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """An untrained network with strong opinions: its mask differs from place to place."""
    hp = HParams(width=4)
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("draw") / "net.pth"
    network = networks.build_model(hp)
    network.head.weight.data.mul_(100)
    networks.save_checkpoint(
        path,
        network,
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
    assert figures.main([str(checkpoint), str(mixture), str(folder), "--seconds", "2"]) == 0
    assert {path.name for path in folder.iterdir()} == {"masks.png", "inference.png"}
    assert figures.main([str(checkpoint), str(mixture), str(folder), "--vocals", str(vocals)]) == 0
    names = {"masks.png", "inference.png", "why.png", "approach.png"}
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.iterdir():
        pixels = np.asarray(Image.open(path))
        assert pixels.shape[1] == figures.WIDTH
        assert pixels.std() > 20  # neither blank nor all of one colour


def test_the_mask_that_is_shown_is_the_network_s(checkpoint, song, tmp_path):
    assert figures.main([str(checkpoint), str(song[0]), str(tmp_path), "--seconds", "30"]) == 0
    pixels = np.asarray(Image.open(tmp_path / "masks.png"))
    shown = pixels[figures.PANEL + 2 * figures.MARGIN : 2 * (figures.PANEL + figures.MARGIN)]

    separator = Separator.load(checkpoint)
    hp = separator.hp
    wav, rate = figures._read(song[0], 0, 30)
    spec = audio.to_network_bins(audio.stft(torch.from_numpy(wav), audio.grid_at(rate, hp)), hp)
    seen = audio.features(spec, separator.curve_db, hp.mixture_power, hp)
    mask = separator.mask(torch.nn.functional.pad(seen, (hp.lookahead, hp.lookahead)))
    expected = Image.fromarray(charts.colours(mask.flip(0).numpy()))

    def small(picture: Image.Image) -> np.ndarray:
        red = np.asarray(picture.resize((96, 20), Image.Resampling.BOX), dtype=float)[..., 0]
        return red - red.mean(1, keepdims=True)  # what differs over time

    found, expected = small(Image.fromarray(shown)), small(expected)

    def likeness(seen: np.ndarray) -> float:
        return float(np.corrcoef(seen.ravel(), expected.ravel())[0, 1])

    assert likeness(found) > 0.9
    assert max(likeness(found[::-1]), likeness(found[:, ::-1])) < 0.7  # the right way round


@pytest.mark.parametrize("mask_target", ["ratio", "activity"])
def test_every_panel_shows_what_its_name_says(checkpoint, song, monkeypatch, mask_target):
    wav, rate = figures._read(song[0], 0, 3)
    truth, _ = figures._read(song[1], 0, 3)
    separator = Separator.load(checkpoint)
    separator.hp = replace(separator.hp, mask_target=mask_target)
    excerpt = figures._hear(separator, wav, rate, truth)
    vocals, accompaniment = (
        audio.to_network_bins(
            audio.stft(torch.from_numpy(part), audio.grid_at(rate, separator.hp)), separator.hp
        )
        for part in (truth, wav - truth)
    )
    target = sampling.mask_target(vocals, accompaniment, separator.curve_db, separator.hp)
    torch.testing.assert_close(excerpt.seen["target"], target)
    np.testing.assert_allclose(excerpt.waves["vocals"], separator.separate(wav, rate)[0], atol=1e-6)

    drawn = []
    monkeypatch.setattr(figures._Canvas, "spectrogram", lambda self, seen, box: drawn.append(seen))
    figures._approach(excerpt)
    centre = excerpt.loudest("true vocals")
    slice_, answer, true_column = drawn[2:]
    around = slice(centre - 12, centre + 13)
    torch.testing.assert_close(slice_, excerpt.seen["mixture"][:, around])
    torch.testing.assert_close(answer[:, 0], excerpt.seen["mask"][:, centre])
    torch.testing.assert_close(true_column[:, 0], target[:, centre])


def test_what_is_louder_has_its_colour(checkpoint):
    rng = np.random.default_rng(0)
    voice, band = rng.standard_normal((2, 44100)).astype(np.float32) / 10
    for share, colour in ((0.1, figures.BAND), (10.0, figures.VOICE)):
        excerpt = figures._hear(
            Separator.load(checkpoint), share * voice + band, 22050, share * voice
        )
        pixels = np.asarray(figures._why(excerpt))[-60:, 500:].reshape(-1, 3).astype(float)
        hue = pixels.mean(0) / pixels.mean(0).max()
        np.testing.assert_allclose(hue, np.array(colour) / max(colour), atol=0.15)


def test_the_share_of_clear_bins_is_counted(checkpoint, song):
    """Two sounds that never meet are told apart everywhere, two alike nowhere."""
    rng = np.random.default_rng(0)
    low, high = (np.sin(2 * np.pi * f / 22050 * np.arange(44100)) / 4 for f in (300, 3000))
    noise = rng.standard_normal(44100) / 10
    separator = Separator.load(checkpoint)
    apart = figures._hear(separator, low + high, 22050, low)
    alike = figures._hear(separator, 2 * noise, 22050, noise)
    assert figures.percent_clear(apart) > 99
    assert figures.percent_clear(alike) == 0
    centre = apart.loudest("true vocals")
    assert 12 <= centre < apart.seen["mixture"].shape[1] - 12


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--start", "1000"], "begins at 1000 s"),
        (["--vocals", "SHORT"], "name the vocals of this very song"),
        (["--start", "1e305"], "cannot begin at 1e+305 s"),
        (["--vocals", "missing.wav"], "missing.wav"),
    ],
)
def test_what_cannot_be_drawn_is_told(checkpoint, song, tmp_path, capsys, words, said):
    short = tmp_path / "short.wav"
    soundfile.write(short, np.zeros(100), 22050)
    words = [str(short) if word == "SHORT" else word for word in words]
    folder = tmp_path / "pictures"
    assert figures.main([str(checkpoint), str(song[0]), str(folder), *words]) == 1
    assert said in capsys.readouterr().err
    assert not list(folder.glob("*"))


def test_times_beyond_the_song_show_all_of_it_and_the_shortest_one_sample(
    checkpoint, song, tmp_path
):
    shown = []
    for seconds in ("1e305", f"{soundfile.info(song[0]).duration}", "1e-5"):
        words = [str(checkpoint), str(song[0]), str(tmp_path), "--seconds", seconds]
        assert figures.main(words) == 0
        shown.append((tmp_path / "masks.png").read_bytes())
    assert shown[0] == shown[1] != shown[2]
