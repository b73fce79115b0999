"""Sound through pipes: at once, for ever, and the same codes as in a file."""

from __future__ import annotations

import io
import itertools
import os
import threading
import time

import numpy as np
import pytest
import soundfile
from sounds import RATE, noise, read_codes, some_codes, wav_bytes

from hparams import InputError
from sound.pipes import ENCODINGS, PipeReader, PipeWriter, RawFormat
from sound.reading import probe
from sound.writing import Separated

MONO, STEREO = RawFormat(RATE, 1, "s16le"), RawFormat(RATE, 2, "s16le")


def read_all(content: bytes, raw: RawFormat | None = None, n: int = 700, **options) -> np.ndarray:
    return np.concatenate(list(PipeReader(io.BytesIO(content), raw, **options).blocks(n)), axis=1)


def part(codes: np.ndarray) -> Separated:
    return Separated(codes, codes, codes)


def test_a_wav_in_a_pipe_has_the_codes_of_the_file(tmp_path):
    for subtype, container in (("PCM_16", "WAV"), ("FLOAT", "WAVEX")):
        path = tmp_path / "song"
        soundfile.write(path, noise(3001, 2), RATE, subtype, format=container)
        reader = PipeReader(io.BytesIO(path.read_bytes()))
        codes, info = np.concatenate(list(reader.blocks(500)), axis=1), probe(path)
        assert reader.info.sample_format == info.sample_format
        assert (reader.info.sample_rate, reader.info.n_samples) == (RATE, 3001)
        assert reader.warnings == []
        np.testing.assert_array_equal(codes, read_codes(path))


def test_what_is_sent_is_read_back(tmp_path):
    for encoding, n_channels in itertools.product(ENCODINGS, (1, 6)):
        codes = some_codes(ENCODINGS[encoding].subtype, (n_channels, 2000))
        raw = RawFormat(RATE, n_channels, encoding)
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
    around = wav_bytes(data, before=b"LIST\3\0\0\0abc\0") + b"id3 \4\0\0\0song"
    np.testing.assert_array_equal(read_all(around), [range(1000)])
    for size in (0, 0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000):
        reader = PipeReader(io.BytesIO(wav_bytes(data, size=size)))
        assert reader.info.n_samples is None
        np.testing.assert_array_equal(np.concatenate(list(reader.blocks(7)), 1), [range(1000)])


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
        (wav_bytes(bytes(99), bits=24), "format 1, 24 bits and 1 channels .send 16 bits"),
        (wav_bytes(bytes(8), n_channels=0), "and 0 channels"),
        (wav_bytes(b"", size=0), "standard input: empty"),
    ):
        with pytest.raises(InputError, match=what):
            read_all(content)
    with pytest.raises(InputError, match="standard input: empty"):
        read_all(b"", STEREO)
    with pytest.raises(InputError, match="standard input: closed"):
        PipeReader(None)
    infinite = np.full(3000, np.inf, np.float32).tobytes()
    with pytest.raises(InputError, match=r"standard input: sample of inf at 0\.000 s"):
        read_all(infinite, RawFormat(RATE, 1, "f32le"))


@pytest.mark.parametrize("raw", [None, RawFormat(48000, 1, "s16le")])
def test_a_packet_is_given_as_soon_as_its_last_byte_is_there(raw):
    reading, writing = os.pipe()
    packet = np.arange(960, dtype="<i2").tobytes()  # 20 ms
    with open(reading, "rb", -1 if raw else 0) as file, open(writing, "wb", 0) as live:
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


def test_a_closed_or_full_output_is_told_and_a_listener_who_leaves_is_no_error_of_the_file():
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb", buffering=0) as file, pytest.raises(BrokenPipeError):
        PipeWriter(file, MONO, "vocals", True)
    with pytest.raises(InputError, match="standard output: closed"):
        PipeWriter(None, MONO, "vocals", True)
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(InputError, match="standard output: could not be written: No space left"),
    ):
        PipeWriter(file, MONO, "vocals", True)
