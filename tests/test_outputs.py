"""Output files: they appear whole and together, say what was written, and overwrite no input."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
import wave
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import FORMATS, RATE, like, names, noise, read_codes, wav_bytes, write

from hparams import InputError
from sound import reading, writing
from sound.reading import AudioInfo, Reader, SampleFormat, probe
from sound.writing import AtomicFiles, OutputFormat, SoundWriter, choose_format, predicted_bytes


@contextlib.contextmanager
def opened(paths: list[Path], info: AudioInfo, **kwargs) -> Iterator[list[SoundWriter]]:
    """Open sounds like `info` that appear together."""
    fmt = choose_format(info, **kwargs)
    with AtomicFiles(dict.fromkeys(paths, predicted_bytes(info, fmt)), [info.path]) as files:
        yield [files.sound(path, info, fmt) for path in paths]


def check(paths: list[Path], info: AudioInfo, inputs: tuple = ()) -> None:
    n_bytes = predicted_bytes(info, choose_format(info))
    writing.check_outputs(dict.fromkeys(paths, n_bytes), writing.identities([info.path, *inputs]))


@pytest.mark.parametrize("subtype", FORMATS)
def test_what_is_written_is_what_is_read_for_every_format(tmp_path, subtype):
    fmt, rng = SampleFormat(subtype, FORMATS[subtype]), np.random.default_rng(0)
    shape, path = (3, 40_001), tmp_path / "new" / "out.wav"
    if fmt.bits:
        top = 2 ** (fmt.bits - 1)
        codes = rng.integers(-top, top, shape).astype(np.int32)
        codes[:, :2] = -top, top - 1
    else:
        codes = rng.normal(0, 9, shape).astype({"FLOAT": "f4", "DOUBLE": "f8"}[subtype])
    with opened([path], like(tmp_path / "in.wav", subtype, 3, shape[1])) as files:
        files[0].write(codes[:, :1])
        files[0].write(codes[:, 1:])
    read = read_codes(path)
    assert read.dtype == codes.dtype
    np.testing.assert_array_equal(read, codes)
    info = probe(path)
    assert (info.sample_rate, info.sample_format, info.warnings) == (RATE, fmt, ())
    assert names(path.parent) == ["out.wav"]


def test_the_standard_library_reads_the_same_codes(tmp_path):
    codes = np.array([[-(2**23), 5, 2**23 - 1]], np.int32)
    with opened([tmp_path / "o.wav"], like(tmp_path / "i.wav", "PCM_24")) as files:
        files[0].write(codes)
    with wave.open(str(tmp_path / "o.wav")) as file:
        raw = file.readframes(9)
    seen = [int.from_bytes(raw[i : i + 3], "little", signed=True) for i in range(0, 9, 3)]
    assert seen == codes[0].tolist()


def test_the_same_float_sound_is_the_same_file_at_any_time(tmp_path):
    paths = [tmp_path / "now.wav", tmp_path / "later.wav"]
    for path, pause in zip(paths, (0, 1.1), strict=True):
        time.sleep(pause)  # libsndfile notes the second of writing
        with opened([path], like(tmp_path / "in.wav", "FLOAT")) as files:
            files[0].write(np.ones((1, 100), np.float32))
    assert b"PEAK" in paths[0].read_bytes()
    assert reading.sha256(paths[0]) == reading.sha256(paths[1])


def test_beyond_4_gib_the_header_has_64_bits(tmp_path):
    info = like(tmp_path / "in.wav", n_samples=2**31)
    path = tmp_path / "out.wav"
    with opened([path], info) as files:
        files[0].write(np.ones((1, 100), np.int32))
    assert path.read_bytes()[:4] == b"RF64"
    np.testing.assert_array_equal(read_codes(path), np.ones((1, 100)))


def test_two_outputs_appear_together_and_replace_the_old_ones(tmp_path):
    paths = [write(tmp_path / name, b"old") for name in ("a.wav", "b.wav")]
    with opened(paths, like(tmp_path / "in.wav")) as files:
        for i in (0, 1):
            files[i].write(np.full((1, 10), i))
        assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    for i, path in enumerate(paths):
        np.testing.assert_array_equal(read_codes(path), np.full((1, 10), i))
    assert names(tmp_path) == ["a.wav", "b.wav"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, error):
    path = write(tmp_path / "a.wav", b"old")
    with pytest.raises(error), opened([path, tmp_path / "b.wav"], like(path / "x")) as files:  # noqa: PT012
        files[0].write(np.zeros((1, 10), np.int32))
        raise error
    assert names(tmp_path) == ["a.wav"]
    assert path.read_bytes() == b"old"


def test_a_file_that_does_not_read_back_as_written_is_not_kept(tmp_path, monkeypatch):
    def cut(fd: int) -> None:
        os.ftruncate(fd, 50)

    monkeypatch.setattr(writing, "_clear_peak_time", cut)
    path = write(tmp_path / "a.wav", b"old")
    info = like(tmp_path / "in.wav")
    with pytest.raises(InputError, match="reads back as"), opened([path], info) as files:
        files[0].write(np.zeros((1, 10), np.int32))
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.wav"]


def test_if_one_target_becomes_impossible_neither_output_appears(tmp_path):
    a, b = write(tmp_path / "a.wav", b"old"), tmp_path / "b.wav"
    info = like(tmp_path / "in.wav")
    with pytest.raises(InputError, match="is a directory"), opened([a, b], info) as files:  # noqa: PT012
        files[0].write(np.zeros((1, 10), np.int32))
        b.mkdir()
    assert a.read_bytes() == b"old"
    assert names(tmp_path) == ["a.wav", "b.wav"]


def test_outputs_of_dead_runs_are_removed_and_those_of_living_ones_kept(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write(tmp_path / f".a.wav.tmp-{child.pid}", b"dead")
    keep = [f".a.wav.tmp-{os.getppid()}", ".a.wav.tmp-x", f".b.wav.tmp-{child.pid}"]
    for name in keep:
        write(tmp_path / name, b"")
    with opened([tmp_path / "a.wav"], like(tmp_path / "in.wav")) as files:
        files[0].write(np.zeros((1, 10), np.int32))
    assert names(tmp_path) == sorted([*keep, "a.wav"])


def test_an_input_is_never_overwritten(tmp_path):
    source = write(tmp_path / "song.wav", wav_bytes(bytes(2000)))
    other = write(tmp_path / "other.wav", wav_bytes(bytes(2000)))
    (tmp_path / "link.wav").symlink_to("song.wav")
    os.link(source, tmp_path / "hard.wav")
    info = probe(source)
    for name in ("song.wav", "link.wav", "hard.wav", "../" + tmp_path.name + "/song.wav"):
        with pytest.raises(InputError, match="would overwrite the input"):
            check([tmp_path / name], info)
        with pytest.raises(InputError, match="would overwrite the input"):
            opened([tmp_path / name], info).__enter__()
    check([other], info)
    with pytest.raises(InputError, match=r"would overwrite the input .*other.wav"):
        check([other], info, (source, other))
    with pytest.raises(InputError, match="two outputs"):
        check([tmp_path / "x.wav", tmp_path / "y" / ".." / "x.wav"], info)


def test_impossible_outputs_are_told_before_any_work(tmp_path):
    info = like(tmp_path / "in.wav")
    write(tmp_path / "file", b"")
    (tmp_path / "folder.wav").mkdir()
    for name, what in {
        "file/out.wav": "not a directory",
        "file/deep/out.wav": "not a directory",
        "folder.wav": "is a directory",
        "x" * 300 + "/out.wav": "not writable: the name is too long",
    }.items():
        with pytest.raises(InputError, match=what):
            check([tmp_path / name], info)
    with pytest.raises(InputError, match="not a regular file"):
        writing.check_writable(Path("/dev/null"))
    with pytest.raises(InputError, match="not writable"):
        writing.check_writable(Path("/proc/self/out.wav"))
    assert names(tmp_path) == ["file", "folder.wav"]


def test_missing_space_is_told_before_any_work(tmp_path):
    info = like(tmp_path / "in.wav", n_samples=2**60)
    with pytest.raises(InputError, match=r"no space left on .*: need \S+ MB, have \S+ MB"):
        opened([tmp_path / "out.wav"], info).__enter__()
    assert names(tmp_path) == []


def test_two_outputs_need_the_space_of_two(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    info = like(tmp_path / "in.wav", n_samples=1_000_000)
    check([tmp_path / "a.wav"], info)
    with pytest.raises(InputError, match=r"need 4\.01 MB, have 3 MB"):
        check([tmp_path / "a.wav", tmp_path / "b.wav"], info)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of 2 MiB; needs root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_writing_keeps_the_old_files(small_disk, tmp_path):
    paths = [write(small_disk / name, b"old") for name in ("a.wav", "b.wav")]
    info = like(tmp_path / "in.wav", n_samples=400_000)  # two of 0.8 MB are announced
    what = f"no space left on {small_disk}: need 1.61 MB, have "
    with pytest.raises(InputError, match=what), opened(paths, info) as files:  # noqa: PT012
        write(small_disk / "stranger", bytes(700_000))
        for _ in range(40):
            files[0].write(np.zeros((1, 10_000), np.int32))
            files[1].write(np.zeros((1, 10_000), np.int32))
    assert names(small_disk) == ["a.wav", "b.wav", "stranger"]
    assert [path.read_bytes() for path in paths] == [b"old", b"old"]
    with pytest.raises(InputError, match="no space left on"):
        writing.replace_atomically(paths[0], lambda file: file.write(bytes(3_000_000)))
    assert names(small_disk) == ["a.wav", "b.wav", "stranger"]
    assert paths[0].read_bytes() == b"old"


def test_long_names_are_cut_between_characters_and_stay_different(tmp_path):
    def output(stem: str) -> str:
        return writing.output_path(tmp_path, f"folder/{stem}.wav", "_vocals.wav").name

    assert output("a.b.c") == "a.b.c_vocals.wav"
    assert output("x" * 244) == "x" * 244 + "_vocals.wav"
    long = [output("é" * 123), output("é" * 122 + "e"), output("é" * 125), output("x" * 251)]
    assert len(set(long)) == len(long)
    for name in long:
        assert len(os.fsencode(name)) <= 255
        assert name.endswith("_vocals.wav")
        name.encode()  # no half characters
    assert os.fsencode(output(os.fsdecode(b"\xff" * 251))).startswith(b"\xff" * 230)


# --- Small files --------------------------------------------------------------------------------


def test_a_small_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "manifest.json"
    writing.replace_atomically(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        writing.replace_atomically(path, fail)
    assert path.read_bytes() == b"first"
    assert names(path.parent) == ["manifest.json"]


def test_a_failed_small_file_tells_the_reason(tmp_path, monkeypatch):
    def fail(number: int, kind: type = OSError):
        def write(_file) -> None:
            raise kind(number, os.strerror(number))

        return write

    path = tmp_path / "x.npy"
    for number, what in {
        errno.ENOSPC: "no space left on",
        errno.EDQUOT: "no space left on",
        errno.EFBIG: "x.npy: could not be written: larger than",
        errno.EIO: "x.npy: could not be written: Input/output error",
    }.items():
        with pytest.raises(InputError, match=what):
            writing.replace_atomically(path, fail(number))
    with pytest.raises(InputError, match="is a directory"):
        writing.replace_atomically(tmp_path, fail(0))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InputError, match="no space left on"):  # torch.save says RuntimeError
        writing.replace_atomically(path, fail(0, RuntimeError))
    assert names(tmp_path) == []


def test_odd_names_are_read_and_written(tmp_path):
    content = wav_bytes(np.arange(10, dtype="<i2").tobytes())
    odd = ["-x.wav", "a b.wav", "😀.wav", "a\nb.wav", 'it\'s "x".wav', os.fsdecode(b"\xff\xfe.wav")]
    for name in [*odd, "a.b.c.wav", "é" * 125 + ".wav", "x" * 251 + ".wav"]:
        path = write(tmp_path / name, content)
        info = probe(path)
        output = writing.output_path(tmp_path / "out", path, "_vocals.wav")
        with opened([output], info) as files:
            files[0].write(read_codes(path))
        np.testing.assert_array_equal(read_codes(output), [np.arange(10)])


# --- Formats --------------------------------------------------------------------------------------

TAGS = {
    **{"title": "Träume 日本", "artist": "A & B", "album": "X", "date": "1999"},
    **{"comment": "live", "tracknumber": "3", "genre": "Rock", "copyright": "me"},
}


@pytest.mark.parametrize(
    ("container", "native", "subtype", "codes", "in_file"),
    [
        *[("wav", name, None, name, name) for name in FORMATS],
        ("wav", "PCM_16", "PCM_24", "PCM_24", "PCM_24"),
        ("wav", "PCM_U8", "PCM_S8", "PCM_U8", "PCM_U8"),
        ("flac", "PCM_U8", None, "PCM_U8", "PCM_S8"),
        ("flac", "PCM_16", None, "PCM_16", "PCM_16"),
        *[("flac", name, None, "PCM_24", "PCM_24") for name in ("PCM_24", "PCM_32", "FLOAT")],
        ("flac", "DOUBLE", "PCM_16", "PCM_16", "PCM_16"),
        ("ogg", "PCM_16", None, "FLOAT", "VORBIS"),
        ("mp3", "PCM_24", None, "FLOAT", "MPEG_LAYER_III"),
    ],
)
def test_the_format_keeps_what_the_container_can(
    tmp_path, container, native, subtype, codes, in_file
):
    info = replace(like(tmp_path / "in.wav", native, 2, 30_000), tags=TAGS)
    fmt = choose_format(info, container, subtype)
    assert fmt == OutputFormat(container, SampleFormat(codes, FORMATS[codes]))
    assert fmt.subtype == in_file
    path = tmp_path / "out"
    wav = noise(30_000).T
    sound = reading.to_codes(wav, fmt.sample_format)
    with opened([path], info, container=container, subtype=subtype) as files:
        files[0].write(sound[:, :1])
        files[0].write(sound[:, 1:])
    assert soundfile.info(path).subtype == in_file
    assert probe(path).tags == {k: v for k, v in TAGS.items() if (k, container) != NO_ROOM}
    with Reader(path) as reader:
        read = np.concatenate(list(reader.blocks(999, fmt.sample_format)), axis=1)
    if container in ("wav", "flac"):
        np.testing.assert_array_equal(read, sound)
    else:  # the length to the sample, and white noise is the hardest
        assert read.shape == sound.shape
        assert np.mean((read - wav) ** 2) < 0.2 * np.mean(wav**2)
    assert path.stat().st_size < predicted_bytes(info, fmt)


NO_ROOM = ("copyright", "mp3")  # libsndfile writes no such frame


def test_what_a_container_cannot_hold_is_told_before_any_work(tmp_path):
    info = like(tmp_path / "in.wav", n_channels=2)
    for container, change, what in (
        ("mp3", {"sample_rate": 96000}, "MP3 allows only 8000, .* 48000 Hz, this is 96000 Hz"),
        ("mp3", {"n_channels": 6}, "mp3 allows at most 2 channels, this has 6"),
        ("flac", {"n_channels": 9}, "flac allows at most 8 channels, this has 9"),
        ("flac", {"sample_rate": 96001}, "multiples of 10 Hz above 65535 Hz, this is 96001 Hz"),
        ("ogg", {"sample_rate": 384_000}, "Vorbis allows at most 192000 Hz"),
        ("ogg", {"n_channels": 256}, "ogg allows at most 255 channels"),
    ):
        with pytest.raises(InputError, match=what) as error:
            choose_format(replace(info, **change), container)
        assert str(error.value).endswith("(write wav instead)")
        assert choose_format(replace(info, **change), "wav")
    for container, subtype in (
        *[("flac", "FLOAT"), ("flac", "PCM_32"), ("wav", "ULAW"), ("ogg", "PCM_16"), ("mp3", "X")],
    ):
        with pytest.raises(InputError, match=f"{container} has no subtype {subtype} "):
            choose_format(info, container, subtype)
    with pytest.raises(InputError, match="no format 'opus'"):
        choose_format(info, "opus")


@pytest.mark.parametrize("rate", [4000, 65530, 192_000, 384_000])
@pytest.mark.parametrize("container", ["flac", "ogg"])
def test_the_limits_leave_only_what_the_encoders_take(tmp_path, container, rate):
    info = replace(like(tmp_path / "in.wav", n_channels=2), sample_rate=rate)
    if (container, rate) == ("ogg", 384_000):
        pytest.skip("refused, as Vorbis crashes")
    with opened([tmp_path / "out"], info, container=container) as files:
        bits = choose_format(info, container).sample_format.bits
        files[0].write(np.zeros((2, 3000), np.int32 if bits else np.float32))
    assert probe(tmp_path / "out").sample_rate == rate


def test_a_mask_and_a_page_appear_together_with_their_sound(tmp_path):
    paths = [tmp_path / name for name in ("a.wav", "a.zip", "a.html")]
    info = like(tmp_path / "in.wav")

    def write_all(page: bytes) -> None:
        with AtomicFiles(dict.fromkeys(paths, 10_000), [info.path]) as files:
            sound = files.sound(paths[0], info, choose_format(info))
            sound.write(np.full((1, 100), 7))
            with zipfile.ZipFile(files[paths[1]], "w") as archive:
                archive.writestr("mask", "0123")
            files[paths[2]].write(page)
            if not page:
                raise ValueError("a bug")
            assert [path.exists() for path in paths] == [False] * 3

    with pytest.raises(ValueError, match="a bug"):
        write_all(b"")
    assert names(tmp_path) == []
    write_all(b"<html>")
    np.testing.assert_array_equal(read_codes(paths[0]), np.full((1, 100), 7))
    assert zipfile.ZipFile(paths[1]).read("mask") == b"0123"
    assert paths[2].read_bytes() == b"<html>"
    assert names(tmp_path) == ["a.html", "a.wav", "a.zip"]


def test_only_failed_writes_are_told_as_such(tmp_path):
    for error, kind in (
        (BrokenPipeError(errno.EPIPE, "nobody listens"), BrokenPipeError),
        (FileNotFoundError(errno.ENOENT, "no such file", "template.html"), FileNotFoundError),
        (OSError(errno.EFBIG, "too big"), InputError),
        (OSError(errno.EIO, "broken", str(tmp_path / "b.wav")), InputError),
    ):
        with (
            pytest.raises(kind) as caught,
            opened([tmp_path / "a.wav", tmp_path / "b.wav"], like(tmp_path / "in.wav")),
        ):
            raise error
        assert names(tmp_path) == []
    assert str(caught.value).startswith(f"{tmp_path / 'b.wav'}: could not be written: broken")


@pytest.mark.parametrize("container", writing.CONTAINERS)
def test_the_same_run_gives_the_same_bytes(tmp_path, container):
    info = replace(like(tmp_path / "in.wav", "FLOAT", 2, 100_000), tags=TAGS)
    fmt = choose_format(info, container)
    sound = reading.to_codes(noise(100_000).T, fmt.sample_format)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        with opened([path], info, container=container) as files:
            files[0].write(sound)  # in one call, on which Vorbis crashes in soundfile
        time.sleep(0.01)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    # The checksums of an Ogg's pages fit the serial number that was changed.
    assert read_codes(paths[0]).shape == (2, 100_000)


def test_ogg_checksums_are_those_of_the_specification(tmp_path):
    path = tmp_path / "a.ogg"
    with opened([path], like(path, n_samples=RATE), container="ogg") as files:
        files[0].write(noise(RATE, 1).T.astype(np.float32))
    content, n_pages = path.read_bytes(), 0
    while content:
        n_page = 27 + content[26] + sum(content[27 : 27 + content[26]])
        page, content = bytearray(content[:n_page]), content[n_page:]
        seen = int.from_bytes(page[22:26], "little")
        page[22:26] = bytes(4)
        checksum = 0
        for byte in page:  # RFC 3533: 0x04c11db7, from the highest bit on, beginning with 0
            checksum ^= byte << 24
            for _ in range(8):
                checksum = checksum << 1 ^ (0x104C11DB7 if checksum >> 31 else 0)
        assert seen == checksum
        assert page[14:18] == b"\1\0\0\0"
        n_pages += 1
    assert n_pages > 3


@pytest.mark.parametrize("container", writing.CONTAINERS)
def test_a_disk_that_fills_up_is_told_in_every_format(small_disk, tmp_path, container):
    info = replace(like(tmp_path / "-", n_channels=2), n_samples=1)  # it turns out longer
    fmt = choose_format(info, container)
    block = reading.to_codes(3 * noise(100_000).T, fmt.sample_format)

    def fill() -> None:
        with opened([small_disk / "a"], info, container=container) as files:
            write(small_disk / "stranger", bytes(1_900_000))
            for _ in range(8):
                files[0].write(block)

    with pytest.raises(InputError, match=f"no space left on {small_disk}"):
        fill()
    assert names(small_disk) == ["stranger"]
