"""Sound through pipes: at once, for ever, and the same codes as in a file."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import RATE, noise, read_codes, wav_bytes

from hparams import InputError
from sound.pipes import ENCODINGS, PipeReader, PipeWriter, RawFormat
from sound.reading import probe
from sound.writing import Separated

ROOT = Path(__file__).parent.parent


MONO, STEREO = RawFormat(RATE, 1, "s16le"), RawFormat(RATE, 2, "s16le")


def read_all(content: bytes, raw: RawFormat | None = None, n: int = 700, **options) -> np.ndarray:
    return np.concatenate(list(PipeReader(io.BytesIO(content), raw, **options).blocks(n)), axis=1)


def part(codes: np.ndarray) -> Separated:
    return Separated(codes, codes, codes)


def some_codes(encoding: str, n_channels: int) -> np.ndarray:
    rng, shape = np.random.default_rng(0), (n_channels, 2000)
    if encoding == "f32le":
        return rng.normal(0, 1, shape).astype(np.float32)
    return rng.integers(-(2**15), 2**15, shape).astype(np.int32)


@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
@pytest.mark.parametrize("container", ["WAV", "WAVEX"])
def test_a_wav_in_a_pipe_has_the_codes_of_the_file(tmp_path, subtype, container):
    path = tmp_path / "song"
    soundfile.write(path, noise(3001, 2), RATE, subtype, format=container)
    reader = PipeReader(io.BytesIO(path.read_bytes()))
    codes, info = np.concatenate(list(reader.blocks(500)), axis=1), probe(path)
    assert reader.info.sample_format == info.sample_format
    assert (reader.info.sample_rate, reader.info.n_samples) == (RATE, 3001)
    assert reader.warnings == []
    np.testing.assert_array_equal(codes, read_codes(path))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_what_is_sent_is_read_back(tmp_path, encoding, n_channels):
    codes, raw = some_codes(encoding, n_channels), RawFormat(RATE, n_channels, encoding)
    contents = []
    for has_header in (True, False):
        file = io.BytesIO()
        writer = PipeWriter(file, raw, "vocals", has_header)
        writer.write(part(codes[:, :1]))
        writer.write(part(codes[:, 1:]))
        contents.append(file.getvalue())
        got = read_all(file.getvalue(), None if has_header else raw)
        assert got.dtype == codes.dtype
        np.testing.assert_array_equal(got, codes)
    assert len(contents[1]) == raw.width * codes.shape[1]
    path = tmp_path / "saved.wav"
    path.write_bytes(contents[0])
    np.testing.assert_array_equal(read_codes(path), codes)
    assert probe(path).warnings == ("its header does not tell its length (written by a pipe?)",)


def test_a_length_that_a_pipe_cannot_know_is_not_believed():
    data = np.arange(1000, dtype="<i2").tobytes()
    for size in (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000):
        reader = PipeReader(io.BytesIO(wav_bytes(data, size=size)))
        assert reader.info.n_samples is None
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(7)), 1), [range(1000)])


def test_chunks_around_the_sound_are_not_heard():
    data = np.arange(1000, dtype="<i2").tobytes()
    content = wav_bytes(data, before=b"LIST\3\0\0\0abc\0") + b"id3 \4\0\0\0song"
    np.testing.assert_array_equal(read_all(content), [range(1000)])


def test_a_sound_that_ends_early_is_an_error_unless_allowed():
    content = wav_bytes(bytes(2000))[:-1001]
    with pytest.raises(InputError, match="standard input: header promises 1000 frames, 499 came"):
        read_all(content)
    reader = PipeReader(io.BytesIO(content), allow_truncated=True)
    assert sum(block.shape[1] for block in reader.blocks(300)) == 499
    assert reader.warnings == [
        "1 bytes at the end are no whole sample",
        "header promises 1000 frames, 499 came",
    ]


def test_what_is_no_wav_is_refused():
    start = b"RIFF\0\0\0\0WAVE"
    wav = r"not a wav stream \(raw PCM needs --sample-format, --rate and --channels\)"
    for content, what in (
        (b"\xff\xfb\x90\x64" + bytes(1000), wav),
        (b"", "standard input: empty"),
        (start, "damaged wav header"),
        (start + b"data" + bytes(100), "damaged wav header"),
        (start + b"junk\xff\xff\xff\xff" + bytes(100), "damaged wav header"),
        (wav_bytes(bytes(99), bits=24), "format 1 and 24 bits .send 16 bits, pcm_s16le, or float"),
        (wav_bytes(bytes(8), n_channels=0), "standard input: 0 channels"),
        (wav_bytes(bytes(8), rate=1), "standard input: sample rate 1 Hz"),
        (wav_bytes(b"", size=0), "standard input: empty"),
    ):
        with pytest.raises(InputError, match=what):
            read_all(content)
    with pytest.raises(InputError, match="standard input: empty"):
        read_all(b"", STEREO)
    with pytest.raises(InputError, match="standard input: closed"):
        PipeReader(None)
    with pytest.raises(InputError, match="sample rate 100 Hz"):
        RawFormat(100, 2, "s16le")


def test_bad_floats_are_placed_or_zeroed():
    wav = np.zeros((1, 3000), np.float32)
    wav[0, 2205] = np.inf
    content, raw = wav.tobytes(), RawFormat(RATE, 1, "f32le")
    with pytest.raises(InputError, match=r"standard input: non-finite samples, first at 0\.050 s"):
        read_all(content, raw)
    reader = PipeReader(io.BytesIO(content), raw, fix_nonfinite=True)
    assert not np.concatenate(list(reader.blocks(100)), axis=1).any()
    assert reader.warnings == ["1 non-finite samples taken as silence"]


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("raw", [None, RawFormat(48000, 1, "s16le")])
def test_a_packet_is_given_as_soon_as_its_last_byte_is_there(raw, buffering):
    reading, writing = os.pipe()
    packet = np.arange(960, dtype="<i2").tobytes()  # 20 ms
    with open(reading, "rb", buffering) as file, open(writing, "wb", 0) as live:
        live.write((b"" if raw else wav_bytes(b"", size=0xFFFFFFFF, rate=48000)) + packet)
        blocks = PipeReader(file, raw).blocks(960)
        watchdog = threading.Timer(20, live.close)  # a block that waits for more ends too late
        watchdog.start()
        for _ in range(5):
            np.testing.assert_array_equal(next(blocks), [range(960)])
            assert not live.closed
            live.write(packet[:700])  # a packet may come in pieces
            time.sleep(0)
            live.write(packet[700:])
        watchdog.cancel()


def test_a_pipe_is_read_for_ever_in_constant_memory(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(
        "import resource, sys\n"
        "from sound import pipes\n"
        "reader = pipes.PipeReader(sys.stdin)\n"
        "n, peaks = 0, []\n"
        "for block in reader.blocks(2**20):\n"
        "    n += block.shape[1]\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(n, peaks[-1] - peaks[3])\n"
    )
    n_bytes = 2**26
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdin.write(wav_bytes(b"", size=0xFFFFFFFF))
        for _ in range(n_bytes // 2**20):
            process.stdin.write(bytes(2**20))
        process.stdin.close()
        n_samples, growth = map(int, process.stdout.read().split())
    assert n_samples == n_bytes // 2
    assert growth < 4096  # KiB, less than one block


def test_every_block_leaves_at_once():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(writing, "wb") as file:
        writer = PipeWriter(file, MONO, "vocals", True)
        assert len(os.read(reading, 10_000)) == 44
        for _ in range(3):
            writer.write(part(np.ones((1, 960), np.int32)))
            assert len(os.read(reading, 10_000)) == 1920
    os.close(reading)


def test_a_listener_who_leaves_is_no_error_of_the_file():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as file, pytest.raises(BrokenPipeError):
        PipeWriter(file, MONO, "vocals", True)


def test_a_closed_or_full_output_is_told():
    with pytest.raises(InputError, match="standard output: closed"):
        PipeWriter(None, MONO, "vocals", True)
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(InputError, match="standard output: could not be written: No space left"),
    ):
        PipeWriter(file, MONO, "vocals", True)
