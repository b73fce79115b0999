"""The listening page: it sounds like the song, its pictures are true, and a browser plays it."""

from __future__ import annotations

import base64
import contextlib
import gc
import io
import json
import os
import re
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import audio
from hparams import hparams
from sound import page as report
from sound.page import LOW_HZ, OCTAVES, ROWS, Report

MEGABYTE = 1_000_000


def page_of(
    mixture: np.ndarray,
    vocals: np.ndarray,
    sample_rate: int,
    mask: np.ndarray | None = None,
    block: int | None = None,
    title: str = "Song",
    settings: dict[str, str] | None = None,
) -> bytes:
    """The page of a song that arrives in blocks."""
    n_channels, n_samples = mixture.shape
    file = io.BytesIO()
    grid = audio.grid_at(sample_rate, hparams)
    with Report(title, grid, n_channels, n_samples, settings or {}) as made:
        for start in range(0, n_samples, block or n_samples):
            part = slice(start, start + (block or n_samples))
            made.add(mixture[:, part], vocals[:, part])
        made.write(file)
    return file.getvalue()


def noise(n_channels: int, n_samples: int, level: float = 0.2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.uniform(-level, level, (n_channels, n_samples)).astype(np.float32)


def song(sample_rate: int, seconds: float, n_channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A mixture and its vocals: sweeps of harmonics that never repeat, and no two alike."""
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    signals = []
    for low, sweep in ((200, 37), (90, 23)):
        harmonics = [np.sin(2 * np.pi * k * (low + sweep * t) * t) / k for k in range(1, 8)]
        swell = 0.6 + 0.4 * np.sin(2 * np.pi * (1 + 0.1 * low * t) * t)
        pan = np.linspace(1, 0.5, n_channels)[:, None]
        signals.append((0.12 * pan * swell * sum(harmonics)).astype(np.float32))
    vocals, accompaniment = signals
    return vocals + accompaniment, vocals


def tracks(page: bytes) -> list[tuple[np.ndarray, int]]:
    """What vocals and accompaniment sound like, (n_channels, n_samples), and their rates."""
    found = re.findall(rb'<script type="text/plain" id="\w+">([^<]*)</script>', page)
    assert len(found) == 2
    decoded = [soundfile.read(io.BytesIO(base64.b64decode(f)), always_2d=True) for f in found]
    return [(wav.T, rate) for wav, rate in decoded]


def pictures(page: bytes) -> dict[str, np.ndarray]:
    """The four pictures, (ROWS, n_columns) in 0 … 1, low frequencies first."""
    found = re.findall(rb'src="data:image/png;base64,([^"]*)"', page)
    images = [Image.open(io.BytesIO(base64.b64decode(f))) for f in found]
    names = ("mixture", "mask", "vocals", "accompaniment")
    values = [np.asarray(image)[::-1] / 255 for image in images]
    return dict(zip(names, values, strict=True))


def path_points(page: bytes, name: str) -> np.ndarray:
    """The corners of a drawn area, (n, 2)."""
    (path,) = re.findall(rf'<path class="{name}" d="M([^"]*)Z"/>'.encode(), page)[:1]
    return np.array([point.split() for point in path.decode().split("L")], float)


def row_of(hz: float) -> int:
    return int(np.log2(hz / LOW_HZ) / OCTAVES * ROWS)


# --- What is gathered ---------------------------------------------------------------------------


@pytest.mark.parametrize("sample_rate", [4000, 8000, 11025, 22050, 44100, 48000, 96000, 192000])
def test_both_tracks_are_the_song_at_a_rate_that_browsers_know(sample_rate):
    mixture, vocals = song(sample_rate, 1.5)
    expected = (vocals, mixture - vocals)
    for (wav, rate), signal in zip(
        tracks(page_of(mixture, vocals, sample_rate)), expected, strict=True
    ):
        assert rate in report.MPEG_RATES
        assert wav.shape[1] / rate == pytest.approx(signal.shape[1] / sample_rate, abs=1e-3)
        # Compared at instants that both have, away from what an encoder does at the ends.
        times = np.arange(0.2, 1.3, 1 / 4000)
        heard = np.interp(times, np.arange(wav.shape[1]) / rate, wav[0])
        meant = np.interp(times, np.arange(signal.shape[1]) / sample_rate, signal[0])
        error = np.sqrt(np.mean((heard - meant) ** 2) / np.mean(meant**2))
        assert error < 0.15, error


@pytest.mark.parametrize(("n_channels", "heard"), [(1, 1), (2, 2), (3, 1), (6, 1)])
def test_more_than_two_channels_are_heard_as_their_mean(n_channels, heard):
    mixture, vocals = song(22050, 1, n_channels)
    page = page_of(mixture, vocals, 22050)
    (wav, _), _ = tracks(page)
    assert len(wav) == heard
    meant = vocals if heard == n_channels else vocals.mean(0, keepdims=True)
    assert np.corrcoef(wav[0, 2000:-2000], meant[0, 2000:-2000])[0, 1] > 0.99
    assert ("mono", "stereo")[heard - 1].encode() in page


@pytest.mark.parametrize("n_samples", [1, 2, 511, 512, 1200, 1201, 4097])
@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_a_song_of_any_length_has_a_page(n_samples, n_channels):
    mixture = noise(n_channels, n_samples)
    page = page_of(mixture, 0.5 * mixture, 44100, np.full((513, 1 + n_samples // 512), 0.5, "f4"))
    assert all(wav.shape[1] == n_samples for wav, _ in tracks(page))
    found = pictures(page)
    widths = {picture.shape[1] for picture in found.values()}
    assert widths == {-(-n_samples // 512)}
    assert all(len(found[name]) == ROWS for name in ("mixture", "vocals", "accompaniment"))
    np.testing.assert_allclose(pictures(page)["mask"], 0.5, atol=0.01)


def test_silence_is_silent_and_dark():
    silence = np.zeros((2, 44100), "f4")
    page = page_of(silence, silence, 44100, np.zeros((513, 87), "f4"))
    assert all(not wav.any() for wav, _ in tracks(page))
    assert all(not picture.any() for picture in pictures(page).values())
    assert (path_points(page, "wave")[:, 1] == 0).all()
    assert (path_points(page, "voice")[:, 1] == 0).all()


@pytest.mark.parametrize("sample_rate", [11025, 44100, 96000])
def test_the_page_does_not_depend_on_how_the_song_arrives(sample_rate, monkeypatch):
    mixture, vocals = song(sample_rate, 0.3)
    mask = np.random.default_rng(0).random((513, 26)).astype("f4")
    whole = page_of(mixture, vocals, sample_rate, mask)
    assert page_of(mixture, vocals, sample_rate, mask) == whole
    monkeypatch.setattr(report, "UNIT", 1000)
    for block in (1, 777, 4096):
        assert page_of(mixture, vocals, sample_rate, mask, block) == whole


def test_the_callers_arrays_may_be_filled_again_at_once():
    mixture, vocals = song(22050, 8)
    buffers = np.empty((2, 2, 1 << 16), "f4")
    file = io.BytesIO()
    with Report("Song", audio.grid_at(22050, hparams), *mixture.shape, {}) as made:
        for start in range(0, mixture.shape[1], 1 << 16):
            n = min(1 << 16, mixture.shape[1] - start)
            buffers[..., :n] = mixture[:, start : start + n], vocals[:, start : start + n]
            made.add(*buffers[..., :n])
            buffers[...] = 1
        made.write(file)
    assert file.getvalue() == page_of(mixture, vocals, 22050)


def test_a_tone_lies_at_its_pitch_its_time_and_its_level():
    sample_rate, n = 44100, 4 * 44100
    t = np.arange(n) / sample_rate
    vocals = (0.1 * np.sin(2 * np.pi * 1000 * t) * (t >= 2))[None].astype("f4")
    accompaniment = (0.01 * np.sin(2 * np.pi * 4000 * t))[None].astype("f4")
    page = page_of(vocals + accompaniment, vocals, sample_rate)
    found = pictures(page)
    columns = found["vocals"].shape[1]
    late, early = slice(columns // 2 + 40, columns - 40), slice(40, columns // 2 - 40)
    low_db, high_db = report.SPECTROGRAM_DB
    for name, hz, level_db in (("vocals", 1000, -20), ("accompaniment", 4000, -40)):
        row = row_of(hz)
        near = found[name][row - 3 : row + 4, late]
        # The energy of the rows around a tone is the tone's, times 1.5 for the window's width.
        energy = 10 ** ((low_db + near * (high_db - low_db)) / 10)
        total_db = 10 * np.log10(energy.sum(0))
        np.testing.assert_allclose(total_db, level_db + 1.8, atol=0.6)
        both = found["mixture"][row - 3 : row + 4, late]
        np.testing.assert_allclose(both, near, atol=0.02)
        elsewhere = np.delete(found[name], range(row - 12, row + 13), axis=0)
        assert elsewhere[:, late].max() < 0.1
    assert found["vocals"][:, early].max() == 0
    assert found["accompaniment"][row_of(4000), early].min() > 0.4


def test_the_waveform_shows_every_peak_and_the_strip_the_voice():
    n = 44100
    vocals, mixture = np.zeros((2, n), "f4"), np.zeros((2, n), "f4")
    mixture[0, 22050], mixture[1, 11025] = 0.9, -0.7
    vocals[1, 33075] = mixture[1, 33075] = 0.5
    page = page_of(mixture, vocals, n)
    wave = path_points(page, "wave")
    width = 512
    heights = {int(x): y for x, y in wave if y}
    assert heights == {22050 // width: -900, 11025 // width: 700, 33075 // width: -500}
    parts = page.split(b'class="voice"')
    strip = path_points(b'<path class="voice"' + parts[2], "voice")
    sung = strip[(strip[:, 1] > 0) & (strip[:, 1] < 1000), 0]
    level_db = 10 * np.log10(0.25 / 2 / width)
    low_db, high_db = report.VOICE_DB
    assert sung.tolist() == [33075 // width]
    assert strip[33075 // width, 1] == round(1000 * (high_db - level_db) / (high_db - low_db))


def test_a_very_long_song_is_shown_in_part_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(report, "MAX_SECONDS", 2)
    mixture, vocals = song(22050, 5)
    mask = np.random.default_rng(0).random((513, 431)).astype("f4")
    page = page_of(mixture, vocals, 22050, mask, block=10_000)
    assert b"0:05" in page
    assert b"the first 0:02 are shown here" in page
    assert [wav.shape[1] for wav, _ in tracks(page)] == [44100, 44100]
    short = page_of(mixture[:, :44100], vocals[:, :44100], 22050, mask[:, :173])
    assert b"shown here" not in short
    for name, picture in pictures(short).items():
        np.testing.assert_array_equal(pictures(page)[name], picture)


def test_what_waits_does_not_grow_with_the_song(monkeypatch):
    monkeypatch.setattr(report, "MAX_SECONDS", 4)
    block = noise(2, 30_000)
    with Report("Song", audio.grid_at(44100, hparams), 2, 40 * 30_000, {}) as made:
        for _ in range(40):
            made.add(block, block)
            held = sum(part.nbytes for part in made._waiting) + made._unseen.nbytes
            assert held < 2 * 2 * 4 * (report.UNIT + 30_000 + made._span + made._width)
            assert len(made._waiting) < 10


def test_a_song_that_fails_on_the_way_leaves_nothing_behind(capfd):
    block, n_threads = noise(2, 100_000), threading.active_count()
    made = Report("Song", audio.grid_at(44100, hparams), 2, 200_000, {})
    with contextlib.suppress(KeyError), made:
        made.add(block, block)
        raise KeyError
    assert all(track._sound.closed for track in made._tracks)
    del made
    gc.collect()
    assert threading.active_count() == n_threads
    assert capfd.readouterr() == ("", "")


# --- The file -----------------------------------------------------------------------------------


def test_titles_and_settings_of_any_kind_are_only_shown():
    odd = [
        "</title><script>alert(1)</script>",
        "a\"b'c",
        "two\nlines",
        "\udcff.wav",
        "$rate $$ {x}",
    ]
    odd += ["&amp;", "\0", "Ünï 🎤", ""]
    for text in odd:
        silence = np.zeros((1, 100), "f4")
        page = page_of(silence, silence, 8000, title=text, settings={text: text}).decode()
        assert page.count("<script") == 3
        shown = text.replace("\udcff", "?")
        escaped = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        escaped = escaped.replace('"', "&quot;").replace("'", "&#x27;")
        assert f"<title>{escaped}</title>" in page
        assert f"<h1>{escaped}</h1>" in page
        assert f"<dt>{escaped}</dt><dd>{escaped}</dd>" in page


def test_the_page_asks_the_network_for_nothing():
    page = page_of(*song(8000, 0.5), 8000).decode()
    assert not re.search(r"https?:|\bsrc=\"(?!data:)|url\(|@import|\bfetch\b|\bimport\b", page)
    assert "default-src 'none'" in page


def test_four_minutes_of_the_worst_stereo_are_below_15_megabytes():
    """Loud and quiet noise is what no encoder makes small; here 3 s stand for 240."""
    for level in (1.0, 0.1):
        accompaniment = noise(2, 3 * 48000, level)
        vocals = noise(2, 3 * 48000, level, seed=1)
        page = page_of(accompaniment + vocals, vocals, 48000, noise(513, 259) + 0.5)
        sound = sum(map(len, re.findall(rb'id="\w+">([^<]*)</script>', page)))
        assert 80 * sound + len(page) - sound < 15 * MEGABYTE


@pytest.mark.slow
def test_four_minutes_of_noise_are_below_15_megabytes():
    file = io.BytesIO()
    with Report("Noise", audio.grid_at(48000, hparams), 2, 240 * 48000, {}) as made:
        for second in range(240):
            vocals = noise(2, 48000, 0.5, seed=second)
            made.add(vocals + noise(2, 48000, 0.5, seed=1000 + second), vocals)
        made.write(file)
    assert file.tell() < 15 * MEGABYTE


@pytest.mark.parametrize("seconds", [0.01, 1, 5.9, 6, 61, 240, 600])
def test_round_times_stand_below_the_pictures_at_their_places(seconds):
    found = re.findall(r'left:([\d.]+)%">(\d+):(\d\d)<', report._ticks(seconds))
    assert 1 <= len(found) <= 7
    places = [float(left) * seconds / 100 for left, _, _ in found]
    times = [60 * int(minutes) + int(rest) for _, minutes, rest in found]
    np.testing.assert_allclose(places, times, atol=1e-4 * seconds)
    assert times[0] == 0
    assert places[-1] < 0.99 * seconds


def test_pictures_take_their_colours_from_one_map():
    page = page_of(noise(1, 8000), noise(1, 8000), 8000)
    (first, *_) = re.findall(rb'src="data:image/png;base64,([^"]*)"', page)
    palette = np.array(Image.open(io.BytesIO(base64.b64decode(first))).getpalette())
    np.testing.assert_array_equal(
        palette.reshape(256, 3)[[0, -1]], [report.HEAT[0], report.HEAT[-1]]
    )


# --- In a browser -------------------------------------------------------------------------------

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROGRAM = next((path for path in map(shutil.which, NAMES) if path), None)
SECONDS = 6.5
VIEWS = {"desk": (1280, 900, False), "phone": (390, 844, True)}


class Browser:
    """One page of a headless Chromium, driven by the DevTools protocol through two pipes."""

    def __init__(self, folder: Path) -> None:
        (its_input, ours), (ours_too, its_output) = os.pipe(), os.pipe()
        self._output, self._input = os.fdopen(ours, "wb", 0), os.fdopen(ours_too, "rb", 0)

        def connect() -> None:  # it reads from descriptor 3 and writes to 4
            source, sink = os.dup(its_input), os.dup(its_output)  # either may be 3 or 4 itself
            os.dup2(source, 3)
            os.dup2(sink, 4)

        options = ("--headless", "--no-sandbox", "--mute-audio", "--remote-debugging-pipe")
        self._process = subprocess.Popen(
            [PROGRAM, *options, f"--user-data-dir={folder}"],
            preexec_fn=connect,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(its_input)
        os.close(its_output)
        self._n_calls, self._received = 0, b""
        self._session: dict[str, str] = {}
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send one command and wait for its answer; events that come before it are kept."""
        self._n_calls += 1
        message = {"id": self._n_calls, "method": method, "params": params, **self._session}
        self._output.write(json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._n_calls:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._input], [], [], 60)[0], "the browser does not answer"
            part = self._input.read(1 << 20)
            assert part, "the browser has gone"
            self._received += part
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def get(self, expression: str) -> Any:
        """Evaluate JavaScript in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        end = time.monotonic() + 30
        while not self.get(expression):
            assert time.monotonic() < end, f"in vain: {expression}"
            time.sleep(0.02)

    def open(self, path: Path, width: int, height: int, is_phone: bool) -> None:
        self.show(path, width, height, is_phone)
        self.wait_for("typeof play != 'undefined' && !play.disabled")

    def show(self, path: Path, width: int, height: int, is_phone: bool) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": is_phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=is_phone)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())

    def place(self, selector: str, x: float = 0.5, y: float = 0.5) -> dict[str, float]:
        """Where a part of an element is on the screen."""
        box = f"document.querySelector({selector!r}).getBoundingClientRect()"
        left, top, width, height = (self.get(f"{box}.{n}") for n in ("x", "y", "width", "height"))
        return {"x": left + x * width, "y": top + y * height}

    def mouse(self, kind: str, place: dict[str, float]) -> None:
        buttons = {"button": "left", "buttons": 1, "clickCount": 1}
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", **place, **buttons)

    def click(self, selector: str, x: float = 0.5) -> None:
        place = self.place(selector, x)
        self.mouse("Pressed", place)
        self.mouse("Released", place)

    def tap(self, selector: str, x: float = 0.5) -> None:
        self.call(
            "Input.dispatchTouchEvent", type="touchStart", touchPoints=[self.place(selector, x)]
        )
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def problems(self) -> list[str]:
        """What the console was told, and what was asked of the network."""
        told = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        found = [str(event["params"]) for event in self.events if event["method"] in told]
        asked = [e["params"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in asked]
        return found + [url for url in urls if not url.startswith(("file:", "data:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    if PROGRAM is None or os.name != "posix":
        pytest.skip("needs Chromium")
    with contextlib.closing(Browser(tmp_path_factory.mktemp("browser"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "a song # 100 %.html"
    mixture, vocals = song(44100, SECONDS)
    mask = np.random.default_rng(0).random((513, 560)).astype("f4")
    path.write_bytes(page_of(mixture, vocals, 44100, mask, settings={"noise_gate": "0.1"}))
    return path


@pytest.fixture(params=VIEWS)
def page(request, browser, page_file) -> Iterator[Browser]:
    """The page on a desk and on a phone; whatever is done there, the console stays empty."""
    browser.open(page_file, *VIEWS[request.param])
    browser.act = browser.tap if request.param == "phone" else browser.click
    yield browser
    assert browser.problems() == []


@pytest.mark.torture  # seconds each, in a real browser
def test_the_page_fits_its_screen_and_names_what_can_be_operated(page):
    assert page.get("document.documentElement.scrollWidth <= innerWidth")
    assert page.get("[...document.images].every(image => image.naturalHeight > 140)")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = {(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if "role" in n}
    assert ("button", "Play") in named
    assert ("slider", "Position") in named
    assert {("radio", name) for name in ("Mixture", "Vocals", "Accompaniment")} <= named
    assert ("image", "Spectrogram of the vocals") in named
    assert page.get("document.querySelector('.heard').dataset.track") == "mixture"
    assert page.get("position()") == 0
    assert page.get("byId('time').textContent") == "0:00 / 0:06"


@pytest.mark.torture  # seconds each, in a real browser
def test_playing_moves_clock_and_playhead_at_the_songs_pace_until_it_is_paused(page):
    page.act("#play")
    page.wait_for("position() > 0.2")
    before, began = page.get("position()"), time.monotonic()
    time.sleep(1)
    after, took = page.get("position()"), time.monotonic() - began
    assert after - before == pytest.approx(took, abs=0.25)
    left = page.get("parseFloat(byId('playhead').style.left) / 100 * SHOWN - position()")
    assert abs(left) < 0.1
    page.wait_for("byId('time').textContent == `${clock(position())} / 0:06`")
    assert page.get("play.getAttribute('aria-label')") == "Pause"
    page.act("#play")
    stopped = page.get("position()")
    time.sleep(0.3)
    assert page.get("position()") == stopped >= after
    assert page.get("+seek.value") == pytest.approx(stopped)
    assert page.get("play.getAttribute('aria-label')") == "Play"


@pytest.mark.torture  # seconds each, in a real browser
def test_tracks_are_switched_while_the_song_goes_on(page):
    page.act("#play")
    page.wait_for("position() > 0.1")
    gains = "gains.map(gain => Math.round(1000 * gain.gain.value) / 1000).join(' ')"
    steps = (
        (lambda: page.act("label:nth-of-type(2)"), "vocals", "1 0"),
        (lambda: page.act("label:nth-of-type(3)"), "accompaniment", "0 1"),
        (lambda: page.press("1"), "mixture", "1 1"),
        (lambda: page.press("2"), "vocals", "1 0"),
        (lambda: page.press("3"), "accompaniment", "0 1"),
    )
    began = page.get("began")
    for step, name, expected in steps:
        step()
        page.wait_for(f"{gains} == {expected!r}")
        assert page.get("document.querySelector('input:checked').value") == name
        heard = page.get(
            "[...document.querySelectorAll('.heard')].map(f => f.dataset.track).join()"
        )
        assert heard == name
    assert page.get("began") == began, "nothing was started again"
    assert page.get("sources.length") == 2


@pytest.mark.torture  # seconds each, in a real browser
def test_clicks_taps_drags_and_keys_seek_where_they_should(page):
    shown = page.get("SHOWN")
    for x in (0.25, 0.75):
        page.act("figure[data-track=mixture]", x)
        page.wait_for(f"Math.abs(position() - {x * shown}) < 0.02")
        assert page.get("parseFloat(byId('playhead').style.left)") == pytest.approx(100 * x, abs=1)
    page.press("ArrowLeft")
    assert page.get("position()") == pytest.approx(max(0, 0.75 * shown - 5), abs=0.02)
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.get("position()") == pytest.approx(SECONDS)
    page.act("#seek", 0.5)
    page.wait_for(f"Math.abs(position() - {0.5 * SECONDS}) < 0.2")
    page.press("ArrowLeft")
    page.press(" ")
    page.wait_for("position() > 0.2")  # seeking while it plays: it goes on from there
    page.act(".strip", 0.5)
    page.wait_for(f"position() > {0.5 * shown - 0.02} && position() < {0.5 * shown + 2}")
    now = page.get("position()")
    page.wait_for(f"position() > {now} + 0.2")
    page.press(" ")
    assert page.get("sources.length") == 0


@pytest.mark.torture  # seconds each, in a real browser
def test_a_drag_with_the_mouse_seeks_all_along(browser, page_file):
    browser.open(page_file, *VIEWS["desk"])
    places = [browser.place("#pictures", x, 0.02) for x in (0.2, 0.4, 0.6)]
    browser.mouse("Pressed", places[0])
    for x, place in zip((0.4, 0.6), places[1:], strict=True):
        browser.mouse("Moved", place)
        browser.wait_for(f"Math.abs(position() - {x} * SHOWN) < 0.02")
    browser.mouse("Released", places[2])
    browser.mouse("Moved", places[0])
    assert browser.get("position() / SHOWN") == pytest.approx(0.6, abs=0.01)


@pytest.mark.torture  # seconds each, in a real browser
def test_a_finger_that_scrolls_does_not_seek(browser, page_file):
    browser.open(page_file, *VIEWS["phone"])
    start = browser.place("figure[data-track=mixture]")
    touch = {"type": "touchMove"}
    browser.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[start])
    for i in range(1, 20):
        point = {"x": start["x"] + 0.5 * i, "y": start["y"] - 10 * i}
        browser.call("Input.dispatchTouchEvent", **touch, touchPoints=[point])
    browser.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    browser.wait_for("scrollY > 50")
    assert browser.get("position()") == 0


@pytest.mark.torture  # seconds each, in a real browser
def test_the_song_stops_at_its_end_and_starts_again_from_its_beginning(page):
    page.get("goTo(SECONDS - 0.3)")
    page.act("#play")
    page.wait_for("sources.length == 0")
    assert page.get("position()") == page.get("SECONDS") == pytest.approx(SECONDS)
    assert page.get("byId('time').textContent") == "0:06 / 0:06"
    page.press(" ")
    page.wait_for("position() > 0.1 && position() < 3")


@pytest.mark.parametrize(("sample_rate", "n_channels"), [(4000, 1), (8000, 2), (192000, 6)])
@pytest.mark.torture  # seconds each, in a real browser
def test_songs_of_any_rate_and_channels_play(browser, tmp_path, sample_rate, n_channels):
    (tmp_path / "page.html").write_bytes(page_of(*song(sample_rate, 1.5, n_channels), sample_rate))
    browser.open(tmp_path / "page.html", *VIEWS["desk"])
    assert browser.get("buffers[1].duration") == pytest.approx(1.5, abs=0.05)
    browser.click("#play")
    browser.wait_for("position() > 0.1")
    browser.wait_for("position() == SECONDS")
    assert browser.problems() == []


@pytest.mark.torture  # seconds each, in a real browser
def test_a_song_of_one_sample_plays_and_ends(browser, tmp_path):
    (tmp_path / "page.html").write_bytes(page_of(np.ones((2, 1)), np.ones((2, 1)), 44100))
    browser.open(tmp_path / "page.html", *VIEWS["phone"])
    browser.tap("#play")
    browser.wait_for("position() == SECONDS && sources.length == 0")
    assert browser.problems() == []


@pytest.mark.torture  # seconds each, in a real browser
def test_sound_that_cannot_be_decoded_is_told_on_the_page(browser, tmp_path):
    page = page_of(*song(8000, 0.5), 8000)
    page = re.sub(rb'(id="vocals">)[^<]*', rb"\1AAAA", page)
    (tmp_path / "page.html").write_bytes(page)
    browser.show(tmp_path / "page.html", *VIEWS["desk"])
    browser.wait_for(
        "typeof byId != 'undefined' && byId('time').textContent.includes('cannot decode')"
    )
    assert browser.get("play.disabled")
    assert browser.problems() == []


@pytest.mark.torture  # seconds each, in a real browser
def test_what_is_heard_is_the_song_at_the_playheads_place(browser, page_file):
    browser.open(page_file, *VIEWS["desk"])
    mixture, vocals = song(44100, SECONDS)
    signals = {"mixture": mixture, "vocals": vocals, "accompaniment": mixture - vocals}
    browser.click("#play")
    browser.get("""
        ear = context.createAnalyser(); ear.fftSize = 8192; ear.channelCount = 1;
        gains.forEach(gain => gain.connect(ear)); heard = new Float32Array(8192); 0""")
    for key, (name, signal) in zip("123", signals.items(), strict=True):
        browser.press(key)
        browser.get("goTo(1)")
        browser.wait_for("context.currentTime - began > 1.5")
        end, wav = browser.get(
            "ear.getFloatTimeDomainData(heard), [context.currentTime - began, [...heard]]"
        )
        wav, mono = np.array(wav), signal.mean(0)
        matches = np.correlate(mono, wav, "valid")
        start = int(np.argmax(matches))
        part = mono[start : start + len(wav)]
        assert np.corrcoef(part, wav)[0, 1] > 0.99, name
        assert np.linalg.norm(wav) == pytest.approx(np.linalg.norm(part), rel=0.05), name
        # One packet of 128 samples may lie between the clock and what has been heard.
        assert (start + len(wav)) / 44100 == pytest.approx(end, abs=0.02), name


@pytest.mark.torture  # seconds each, in a real browser
def test_the_browser_decodes_the_songs_samples_in_their_places(browser, page_file):
    browser.open(page_file, *VIEWS["desk"])
    mixture, vocals = song(44100, SECONDS)
    found = []
    for i, signal in enumerate((vocals, mixture - vocals)):
        channels = f"[0, 1].map(c => [...buffers[{i}].getChannelData(c)])"
        wav = np.array(browser.get(channels))
        assert wav.shape[1] / 44100 == pytest.approx(SECONDS, abs=0.05)
        found.append(wav[:, : signal.shape[1]])
        part = signal[0, 100_000:108_192]
        lag = int(np.argmax(np.correlate(wav[0, 99_000:109_192], part, "valid"))) - 1000
        assert abs(lag) <= 1
    middle = slice(5000, -5000)
    error = (found[0] + found[1])[:, middle] - mixture[:, middle]
    assert np.linalg.norm(error) < 0.1 * np.linalg.norm(mixture[:, middle])
