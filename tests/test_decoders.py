"""What libsndfile cannot read: as long as the original, in step with it, or an error."""

from __future__ import annotations

import builtins
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE, read_codes, write

from hparams import InputError
from sound import decoding
from sound.reading import Reader, SampleFormat, probe

N_SAMPLES = 132_300  # no whole number of AAC frames
HAVE_AV = importlib.util.find_spec("av") is not None
HAVE_FFMPEG = shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


def hide_av(monkeypatch) -> None:
    """Make `import av` fail."""
    original = builtins.__import__

    def find(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find)


@pytest.fixture(params=["av", "ffmpeg"])
def decoder(request, monkeypatch) -> str:
    """Decode with one and without the other."""
    if request.param == "ffmpeg":
        hide_av(monkeypatch)
    elif not HAVE_AV:
        pytest.skip("PyAV is not installed")
    else:
        monkeypatch.setattr(decoding.shutil, "which", lambda _: None)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make the same music in many formats."""
    if not HAVE_FFMPEG:
        pytest.skip("ffmpeg makes the files")
    folder = tmp_path_factory.mktemp("music")
    t = np.arange(N_SAMPLES) / RATE
    sweep = 0.3 * np.sin(2 * np.pi * (200 * t + 400 * t**2))
    soundfile.write(folder / "o.wav", np.stack([sweep, 0.5 * sweep[::-1]], 1), RATE, "PCM_24")
    tags = ["-metadata", "title=Träume", "-metadata", "track=3", "-metadata", "artist=A"]
    for name, *options in (
        *[("song.m4a", *tags), ("song.mp4", "-vn"), ("fast.m4a", "-movflags", "+faststart")],
        *[("song.aac",), ("song.webm", "-c:a", "libopus"), ("song.mka", "-c:a", "aac")],
        *[("song.wma",), ("song.ac3",), ("alac24.m4a", "-c:a", "alac")],
        ("alac16.m4a", "-c:a", "alac", "-sample_fmt", "s16p"),
        ("alac.caf", "-c:a", "alac", "-sample_fmt", "s16p"),
    ):
        command = ["ffmpeg", "-v", "error", "-nostdin", "-i", "o.wav", *options, name]
        made = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        if made.returncode and "opus" not in name:
            assert b"Unknown encoder" in made.stderr, made.stderr
    video = ["-f", "lavfi", "-i", "color=c=red:s=16x16:d=1"]
    subprocess.run(["ffmpeg", "-v", "error", *video, "silent.mp4"], cwd=folder, check=True)
    return folder


def original(folder: Path) -> np.ndarray:
    return soundfile.read(folder / "o.wav", dtype="float32")[0].T


def read_floats(path: Path, **options) -> np.ndarray:
    with Reader(path, **options) as reader:
        return np.concatenate(list(reader.float_blocks(5000)), axis=1)


@pytest.mark.parametrize("name", ["song.m4a", "song.mp4", "fast.m4a"])
def test_an_m4a_has_the_length_of_its_original_and_is_in_step(folder, decoder, name):
    info = probe(folder / name)
    assert (info.sample_rate, info.n_channels, info.n_samples) == (RATE, 2, N_SAMPLES)
    assert (info.sample_format, info.container) == (SampleFormat("PCM_16", 16), "M4A")
    assert not info.warnings
    wav, true = read_floats(folder / name), original(folder)
    assert wav.shape == true.shape
    middle = slice(2000, -2000)
    errors = [np.mean((np.roll(wav, shift) - true)[:, middle] ** 2) for shift in (-1, 0, 1)]
    assert errors[1] < 0.02 * np.mean(true**2)  # and a shift by one sample is heard:
    assert errors[1] < 0.2 * min(errors[0], errors[2])


def test_alac_is_the_original_to_the_bit(folder, decoder):
    for name, bits in (("alac16.m4a", 16), ("alac24.m4a", 24), ("alac.caf", 16)):
        info = probe(folder / name)
        assert info.sample_format == SampleFormat(f"PCM_{bits}", bits)
        codes = read_codes(folder / name)
        true = soundfile.read(folder / "o.wav", dtype="int32")[0].T
        assert codes.shape == true.shape
        assert np.abs(codes - (true >> (32 - bits))).max() <= (bits < 24)  # ffmpeg rounds to 16


@pytest.mark.parametrize("name", ["song.aac", "song.webm", "song.mka", "song.wma", "song.ac3"])
def test_other_containers_are_read_to_their_end(folder, decoder, name):
    if not (folder / name).exists():
        pytest.skip("this ffmpeg has no such encoder")
    info, wav = probe(folder / name), read_floats(folder / name)
    assert abs(info.n_samples - wav.shape[1]) <= decoding.SLACK
    assert abs(info.seconds - N_SAMPLES / RATE) < 0.1
    assert np.sqrt(np.mean(wav**2)) == pytest.approx(
        np.sqrt(np.mean(original(folder) ** 2)), rel=0.1
    )


def test_an_excerpt_behind_the_real_end_is_an_error(folder, decoder):
    found = 0
    for name in ("song.aac", "song.webm", "song.mka", "song.wma", "song.ac3"):
        if not (folder / name).exists():
            continue
        info, n_samples = probe(folder / name), read_floats(folder / name).shape[1]
        if info.n_samples > n_samples + 2:  # the header guessed
            found += 1
            with pytest.raises(InputError, match=r"begins at .* but the sound ends at .*begin ear"):
                read_floats(folder / name, start=(n_samples + 1) / info.sample_rate)
    if not found:
        pytest.skip("all headers are right")


def test_an_excerpt_is_the_same_sound(folder, decoder):
    whole = read_floats(folder / "song.m4a")
    part = read_floats(folder / "song.m4a", start=1.1, duration=0.5)
    np.testing.assert_array_equal(part, whole[:, round(1.1 * RATE) : round(1.6 * RATE)])
    assert read_floats(folder / "alac.caf", start=2.9).shape == (2, RATE // 10)


def test_tags_come_along(folder, decoder):
    expected = {"artist": "A", "title": "Träume", "tracknumber": "3"}
    assert probe(folder / "song.m4a").tags == expected


def test_no_name_means_anything_but_the_file(folder, decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    odd = ["-i.m4a", "a:b.m4a", "http:x.m4a", "a%03d.m4a", "[x] 'y' *.m4a", "a\nb.m4a"]
    for name in [*odd, os.fsdecode(b"\xff.m4a")]:
        shutil.copy(folder / "song.m4a", name)
        assert read_codes(name).shape == (2, N_SAMPLES)


def test_damage_is_an_error_never_a_shorter_success(folder, decoder, tmp_path):
    path = tmp_path / "bad.m4a"
    for name, change, what in (
        ("fast.m4a", lambda d: d[: len(d) // 2], "damaged after|holds"),
        ("fast.m4a", lambda d: d[: len(d) // 2] + bytes(3000) + d[len(d) // 2 + 3000 :], "damaged"),
        ("song.m4a", lambda d: d[: len(d) // 2], "not audio"),
        ("alac24.m4a", lambda d: d[: len(d) // 2], "not audio"),
        ("song.aac", lambda d: d[: len(d) // 2], "damaged after|holds"),
        ("song.aac", lambda d: d[:9000] + bytes(3000) + d[12000:], "no AAC frame at byte"),
        ("song.mka", lambda d: d[: len(d) // 2], "damaged after|holds"),
        ("song.wma", lambda d: d[: len(d) // 2], "damaged after|holds"),
        ("silent.mp4", lambda d: d, "no sound in it"),
    ):
        write(path, change((folder / name).read_bytes()))
        with pytest.raises(InputError, match=what) as error:
            read_codes(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)
        assert "0x" not in str(error.value)


def test_what_there_is_of_a_cut_file_is_read_when_that_is_allowed(folder, decoder, tmp_path):
    content = (folder / "fast.m4a").read_bytes()
    path = write(tmp_path / "cut.m4a", content[: len(content) // 2])
    assert RATE // 2 < read_codes(path, allow_truncated=True).shape[1] < N_SAMPLES


def test_a_decoder_that_dies_is_noticed(folder, tmp_path, monkeypatch):
    hide_av(monkeypatch)
    script = write(
        tmp_path / "ffmpeg", b"#!/bin/sh\nhead -c 400000 /dev/zero\necho 'I die' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(InputError, match=r"damaged after .* ffmpeg says: I die"):
        read_codes(folder / "song.m4a")
    write(script, b"#!/bin/sh\nhead -c 400000 /dev/zero\n")
    with pytest.raises(InputError, match="promises 132300 frames, file holds 50000"):
        read_codes(folder / "song.m4a")


def test_leaving_early_leaves_no_process(folder, monkeypatch):
    hide_av(monkeypatch)
    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(decoding.subprocess, "Popen", start)
    with Reader(folder / "song.m4a") as reader:
        next(reader.blocks(100))
    assert [process.returncode is not None for process in started] == [True, True]  # and ffprobe


def test_garbage_and_texts_never_reach_a_decoder(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "open_sound", lambda *_: pytest.fail("handed on"))
    rng = np.random.default_rng(0)
    for content in (b"la la la\n" * 100, b"#EXTM3U\nhttp://x/y.ts\n", b"ffconcat version 1.0\n"):
        with pytest.raises(InputError, match="not audio"):
            probe(write(tmp_path / "song.m4a", content))
    write(tmp_path / "noise", b"\x00" + rng.bytes(5000))
    with pytest.raises(InputError, match="not audio"):
        probe(tmp_path / "noise")


def test_without_a_decoder_the_error_says_what_to_install(tmp_path, monkeypatch):
    hide_av(monkeypatch)
    monkeypatch.setattr(decoding.shutil, "which", lambda _: None)
    path = write(tmp_path / "song.m4a", b"\0\0\0\x20ftypM4A \0\0\0\0" + bytes(100))
    with pytest.raises(InputError) as error:
        probe(path)
    expected = "m4a needs PyAV or ffmpeg (pip install av, or install ffmpeg)"
    assert str(error.value) == f"{path}: {expected}"
