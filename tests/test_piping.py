"""Sound through pipes: at once, for ever, and the same codes as in a file."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import FORMATS, RATE, like, noise, read_codes, wav_bytes

from hparams import InputError
from sound import reading as soundio
from sound.pipes import ENCODINGS, PipeReader, PipeWriter, RawFormat

ROOT = Path(__file__).parent.parent
needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")


def read_all(content: bytes, raw: RawFormat | None = None, n: int = 700, **options) -> np.ndarray:
    with PipeReader(io.BytesIO(content), raw, **options) as reader:
        return np.concatenate(list(reader.blocks(n)), axis=1)


def some_codes(encoding: str, shape: tuple[int, int] = (2, 5000)) -> np.ndarray:
    fmt, rng = ENCODINGS[encoding], np.random.default_rng(0)
    if fmt.bits is None:
        return rng.normal(0, 1, shape).astype("f4" if fmt.subtype == "FLOAT" else "f8")
    low, high = soundio.code_range(fmt.bits)
    codes = rng.integers(low, high + 1, shape).astype(np.int32)
    codes[:, :2] = low, high
    return codes


def send(codes: np.ndarray, encoding: str, raw: bool = False) -> bytes:
    info = replace(like(Path("-"), n_channels=len(codes)), sample_format=ENCODINGS[encoding])
    file = io.BytesIO()
    writer = PipeWriter(file, info, raw)
    writer.write(codes[:, :1])
    writer.write(codes[:, 1:])
    writer.close()
    return file.getvalue()


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("subtype", FORMATS)
@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_a_wav_in_a_pipe_has_the_codes_of_the_file(tmp_path, subtype, n_channels):
    for container in ("WAV", "WAVEX", "RF64"):
        path = tmp_path / "song"
        soundfile.write(path, noise(3001, n_channels), RATE, subtype, format=container)
        with PipeReader(io.BytesIO(path.read_bytes())) as reader:
            codes = np.concatenate(list(reader.blocks(500)), axis=1)
        info = soundio.probe(path)
        assert reader.info == replace(info, path=reader.info.path, container="WAV")
        assert reader.warnings == []
        assert codes.dtype == read_codes(path).dtype
        np.testing.assert_array_equal(codes, read_codes(path))
        assert reader.n_read == info.n_samples == 3001


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_raw_sound_comes_as_it_was_sent(encoding):
    codes = some_codes(encoding)
    content = send(codes, encoding, raw=True)
    raw = RawFormat(RATE, 2, encoding)
    assert len(content) == raw.width * codes.shape[1]
    got = read_all(content, raw)
    assert got.dtype == codes.dtype
    np.testing.assert_array_equal(got, codes)
    other = soundio.SampleFormat("PCM_24", 24)
    with PipeReader(io.BytesIO(content), raw) as reader:
        assert reader.info.n_samples is None
        assert reader.info.seconds is None
        blocks = list(reader.blocks(999, other))
    expected = soundio.convert_codes(codes, ENCODINGS[encoding], other)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), expected)
    with PipeReader(io.BytesIO(content), raw) as reader:
        wav = np.concatenate(list(reader.blocks(999, soundio.SampleFormat("FLOAT", None))), axis=1)
    np.testing.assert_array_equal(wav, soundio.to_float(codes, ENCODINGS[encoding]))


def test_a_length_that_a_pipe_cannot_know_is_not_believed():
    data = np.arange(1000, dtype="<i2").tobytes()
    for size in (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000):
        with PipeReader(io.BytesIO(wav_bytes(data, size=size))) as reader:
            assert reader.info.n_samples is None
            np.testing.assert_array_equal(np.concatenate(list(reader.blocks(7)), 1), [range(1000)])


def test_chunks_around_the_sound_are_not_heard():
    data = np.arange(1001, dtype=np.uint8).tobytes()
    before = b"LIST" + struct.pack("<I", 3) + b"abc\0"
    after = b"\0" + b"id3 " + struct.pack("<I", 4) + b"song"  # the odd data chunk is padded
    content = wav_bytes(data, bits=8, before=before) + after
    np.testing.assert_array_equal(read_all(content), [np.arange(1001) % 256 - 128])


def test_what_follows_the_sound_is_ignored_as_in_a_file():
    data = np.arange(-1000, 1000, dtype="<i2").tobytes()
    for n_samples in (250, 100):  # the header's length falls between two blocks and inside one
        reader = PipeReader(io.BytesIO(wav_bytes(data, size=500)))
        codes = np.concatenate(list(reader.blocks(n_samples)), axis=1)
        np.testing.assert_array_equal(codes, [range(-1000, -750)])
        assert reader.warnings == ["what follows its data chunk is ignored"]


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 2])
def test_a_header_without_a_sound_is_an_error(size):
    with pytest.raises(InputError, match="standard input"):
        read_all(wav_bytes(b"", size=size))


def test_a_sound_that_ends_early_is_an_error_unless_allowed():
    content = wav_bytes(bytes(2000))[:-1001]
    with pytest.raises(InputError, match="standard input: header promises 1000 frames, 499 came"):
        read_all(content)
    with PipeReader(io.BytesIO(content), allow_truncated=True) as reader:
        assert sum(block.shape[1] for block in reader.blocks(300)) == 499
        assert [text.split(",")[0] for text in reader.warnings] == [
            "1 bytes at the end are no whole sample",
            "header promises 1000 frames",
        ]


def test_half_a_sample_at_the_end_is_told_after_all_whole_ones():
    with PipeReader(io.BytesIO(bytes(4003)), RawFormat(RATE, 2, "s16le")) as reader:
        assert [block.shape[1] for block in reader.blocks(600)] == [600, 400]
        assert reader.warnings == ["3 bytes at the end are no whole sample, and ignored"]


def test_what_is_no_wav_is_refused():
    mp3 = b"\xff\xfb\x90\x64" + bytes(1000)
    fmt = b"RIFF\0\0\0\0WAVE"
    ulaw = wav_bytes(bytes(100), tag=7, bits=8)
    closed = io.BytesIO()
    closed.close()
    wav = r"not a wav stream \(raw PCM needs --sample-format, --rate and --channels\)"
    for file, what in (
        (io.BytesIO(mp3), wav),
        (io.BytesIO(b"RIFF\0\0\0\0AVI LIST"), wav),
        (io.BytesIO(b"la"), wav),
        (io.BytesIO(b""), "standard input: empty"),
        (io.BytesIO(fmt), "damaged wav header"),
        (io.BytesIO(fmt + b"data" + bytes(100)), "damaged wav header"),
        (io.BytesIO(fmt + b"junk\xff\xff\xff\xff" + bytes(100)), "damaged wav header"),
        (io.BytesIO(ulaw), "format 7 and 8 bits is not PCM"),
        (io.BytesIO(wav_bytes(bytes(8), n_channels=0)), "standard input: 0 channels"),
        (io.BytesIO(wav_bytes(bytes(8), rate=1)), "standard input: sample rate 1 Hz"),
        (closed, "standard input: closed"),
        (None, "standard input: closed"),
    ):
        with pytest.raises(InputError, match=what):
            PipeReader(file)
    with pytest.raises(InputError, match="standard input: empty"):
        PipeReader(io.BytesIO(b""), RawFormat(RATE, 1, "u8"))


def test_a_raw_format_is_checked():
    for raw, what in (
        ((100, 2, "s16le"), "sample rate 100 Hz"),
        ((RATE, 0, "s16le"), "0 channels"),
        ((RATE, 2000, "s16le"), "2000 channels"),
        ((RATE, 2, "s16be"), "no sample format 's16be' .*s24le"),
    ):
        with pytest.raises(InputError, match=what):
            RawFormat(*raw)


def test_bad_floats_are_placed_or_zeroed():
    wav = np.zeros((1, 3000), np.float32)
    wav[0, 2205] = np.inf
    content, raw = wav.tobytes(), RawFormat(RATE, 1, "f32le")
    with pytest.raises(InputError, match=r"standard input: 1 non-finite sample, first at 0.050 s"):
        read_all(content, raw)
    with PipeReader(io.BytesIO(content), raw, fix_nonfinite=True) as reader:
        assert not np.concatenate(list(reader.blocks(100)), axis=1).any()
        assert reader.n_fixed == 1


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
            time.sleep(0.001)
            live.write(packet[700:])
        watchdog.cancel()


def test_a_pipe_is_read_for_ever_in_constant_memory(tmp_path):
    # 5 GiB of stereo: more samples than the 2^30 at which libsndfile stops, were it 4 bytes each.
    script = tmp_path / "read.py"
    script.write_text(
        "import resource, sys\n"
        "from sound import pipes\n"
        "reader = pipes.PipeReader(sys.stdin.buffer)\n"
        "n, peaks = 0, []\n"
        "for block in reader.blocks(2**20):\n"
        "    n += block.shape[1]\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "print(n, peaks[-1] - peaks[3])\n"
    )
    n_bytes = 5 * 2**30 if os.environ.get("VOCAL_MASK_SLOW") else 2**26
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        process.stdin.write(wav_bytes(b"", bits=8, size=0xFFFFFFFF))
        for _ in range(n_bytes // 2**20):
            process.stdin.write(bytes(2**20))
        process.stdin.close()
        n_samples, growth = map(int, process.stdout.read().split())
    assert n_samples == n_bytes
    assert growth < 4096  # KiB, less than one block


# --- Writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("n_channels", [1, 2, 6])
def test_what_is_sent_is_read_back(tmp_path, encoding, n_channels):
    codes = some_codes(encoding, (n_channels, 2000))
    content = send(codes, encoding)
    np.testing.assert_array_equal(read_all(content), codes)
    path = tmp_path / "saved.wav"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_codes(path), codes)
    assert soundio.probe(path).warnings == (
        "its header does not tell its length (written by a pipe?)",
    )


@needs_ffmpeg
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_ffmpeg_reads_what_is_sent_and_sends_what_is_read(encoding):
    for n_channels in (1, 2, 6):
        codes = some_codes(encoding, (n_channels, 2000))
        command = ["ffmpeg", "-v", "warning", "-i", "-", "-f", encoding, "-c:a", f"pcm_{encoding}"]
        seen = subprocess.run([*command, "-"], input=send(codes, encoding), capture_output=True)
        assert seen.returncode == 0
        assert b"rror" not in seen.stderr
        got = read_all(seen.stdout, RawFormat(RATE, n_channels, encoding))
        np.testing.assert_array_equal(got, codes)
        command = ["ffmpeg", "-v", "error", "-i", "-", "-f", "wav", "-c:a", f"pcm_{encoding}", "-"]
        seen = subprocess.run(command, input=send(codes, encoding), capture_output=True)
        with PipeReader(io.BytesIO(seen.stdout)) as reader:
            assert reader.info.sample_format == ENCODINGS[encoding]
            got = np.concatenate(list(reader.blocks(99)), axis=1)
        np.testing.assert_array_equal(got, codes)


def test_every_block_leaves_at_once():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(writing, "wb") as file:
        writer = PipeWriter(file, like(Path("-")))
        assert len(os.read(reading, 10_000)) == 44
        for _ in range(3):
            writer.write(np.ones((1, 960), np.int32))
            assert len(os.read(reading, 10_000)) == 1920
    os.close(reading)


def test_a_listener_who_leaves_is_no_error_of_the_file():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as file, pytest.raises(BrokenPipeError):
        PipeWriter(file, like(Path("-")))


def test_a_closed_or_full_output_is_told():
    with pytest.raises(InputError, match="standard output: closed"):
        PipeWriter(None, like(Path("-")))
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(InputError, match="standard output: could not be written: No space left"),
    ):
        PipeWriter(file, like(Path("-")))
