"""The listening page: it sounds like the song, its pictures are true, and it asks for nothing."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from sound import page as pages
from sound.page import LOW_HZ, OCTAVES, ROWS, PageWriter
from sound.reading import AudioInfo, SampleFormat
from sound.writing import Separated

FLOAT = SampleFormat("FLOAT", None)


def page_of(folder: Path, mixture, vocals, rate: int, block: int = 2**16, **options) -> str:
    """The page of a song that arrives in blocks."""
    n_promised = options.get("n_promised", mixture.shape[1])
    name, tags = Path(options.get("name", "song.wav")), options.get("tags", {})
    info = AudioInfo(name, rate, len(mixture), n_promised, FLOAT, tags=tags)
    with PageWriter(folder / "x.html", info, FLOAT, options.get("settings", {})) as page:
        for start in range(0, mixture.shape[1], block):
            x, v = (wav[:, start : start + block] for wav in (mixture, vocals))
            page.write(Separated(x, v, x - v))
    return (folder / "x.html").read_text(encoding="utf-8")


def song(rate: int, seconds: float, n_channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A mixture and its vocals: two sweeps, which never repeat."""
    t, pan = np.arange(round(seconds * rate)) / rate, np.linspace(1, 0.5, n_channels)[:, None]
    tones = [0.3 * np.sin(2 * np.pi * (low + 30 * t) * t) for low in (200, 90)]
    return (pan * sum(tones)).astype(np.float32), (pan * tones[0]).astype(np.float32)


def tracks(page: str) -> list[tuple[np.ndarray, int]]:
    """What vocals and accompaniment sound like, (n_channels, n_samples), and their rates."""
    found = re.findall(r'<script type="text/plain" id="\w+">([^<]*)</script>', page)
    decoded = [soundfile.read(io.BytesIO(base64.b64decode(f)), always_2d=True) for f in found]
    return [(wav.T, rate) for wav, rate in decoded]


def pictures(page: str) -> dict[str, np.ndarray]:
    """The four pictures, (ROWS, n_columns) in 0 … 1, low frequencies first."""
    found = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    images = [Image.open(io.BytesIO(base64.b64decode(f))) for f in found]
    names = ("mixture", "mask", "vocals", "accompaniment")
    values = [np.asarray(image)[::-1] / 255 for image in images]
    return dict(zip(names, values, strict=True))


def test_both_tracks_are_the_song_at_a_rate_that_browsers_know(tmp_path):
    for rate, n_channels in ((4000, 1), (44100, 2), (48000, 6), (96000, 2)):
        mixture, vocals = song(rate, 1.5, n_channels)
        found = tracks(page_of(tmp_path, mixture, vocals, rate))
        assert len(found) == 2
        for (wav, its_rate), signal in zip(found, (vocals, mixture - vocals), strict=True):
            assert its_rate in (8000, 44100, 48000)
            assert len(wav) == min(n_channels, 2 if n_channels < 3 else 1)
            mono = signal.mean(0)
            t = np.arange(wav.shape[1]) / its_rate
            expected = np.interp(t, np.arange(len(mono)) / rate, mono, right=0)
            n = min(len(t), round(1.4 * its_rate))
            error = np.square(wav.mean(0) - expected)[:n].sum() / np.square(expected)[:n].sum()
            assert error < 0.05


def test_the_page_does_not_depend_on_how_the_song_arrives(tmp_path):
    mixture, vocals = song(11025, 6)
    whole = page_of(tmp_path, mixture, vocals, 11025)
    for block in (1000, 7777):
        assert page_of(tmp_path, mixture, vocals, 11025, block) == whole


@pytest.mark.parametrize("gains", [[1], [1, -1]])
def test_a_tone_lies_at_its_pitch_its_time_and_its_level(tmp_path, gains):
    t = np.arange(4 * 44100) / 44100
    vocals = (0.1 * np.sin(2 * np.pi * 1000 * t) * (t >= 2) * np.c_[gains]).astype(np.float32)
    accompaniment = (0.01 * np.sin(2 * np.pi * 4000 * t))[None].astype(np.float32)
    found = pictures(page_of(tmp_path, vocals + accompaniment, vocals, 44100))
    middle = found["vocals"].shape[1] // 2
    low_db, high_db = pages.SPECTROGRAM_DB
    for name, hz, level_db in (("vocals", 1000, -20), ("accompaniment", 4000, -40)):
        row = int(np.log2(hz / LOW_HZ) / OCTAVES * ROWS)
        near = found[name][row - 3 : row + 4, middle + 40 : -40]
        # The energy of the rows around a tone is the tone's, times 1.5 for the window's width.
        energy = 10 ** ((low_db + near * (high_db - low_db)) / 10)
        np.testing.assert_allclose(10 * np.log10(energy.sum(0)), level_db + 1.8, atol=0.6)
        mask = found["mask"][row, middle + 40 : -40]
        assert (mask > 0.9).all() if name == "vocals" else (mask < 0.1).all()
    assert found["vocals"][:, : middle - 40].max() == 0


def test_a_long_song_is_shown_in_part_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "MAX_SECONDS", 2)
    page = page_of(tmp_path, *song(22050, 5), 22050)
    assert "the first 0:02 are shown here" in page
    shorter = page_of(tmp_path, *song(22050, 1), 22050, n_promised=10 * 22050)
    assert "SECONDS = 1.000000" in shorter
    assert pictures(shorter)["vocals"].shape[1] < 250
    assert abs(tracks(page)[0][0].shape[1] - 2 * 22050) < 3000


def test_titles_are_only_shown_and_the_page_asks_the_network_for_nothing(tmp_path):
    evil = '<script>alert("1")</script> & ${title} $x \udcff'
    options = {"tags": {"title": evil}, "settings": {"<b>": "<i>$"}}
    page = page_of(tmp_path, *song(8000, 1), 8000, **options)
    assert "&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; ${title} $x ?" in page
    assert page.count("<script") == 3
    assert "<dt>&lt;b&gt;</dt><dd>&lt;i&gt;$</dd>" in page
    places = re.findall(r'\s(?:src|href|action|data)="?([^\s">]*)', page)
    assert all(place.startswith("data:") for place in places)
    assert len(places) == 4
    assert "default-src 'none'" in page
    assert "http" not in re.sub(r"http-equiv", "", re.sub(r"base64,[^\"]*|>[^<]{5000,}<", "", page))
