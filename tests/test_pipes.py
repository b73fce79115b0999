"""Sound through pipes: at once, for ever, and the same codes as in a file."""

import io
import itertools

import numpy as np
import pytest
from sounds import RATE, read_codes, some_codes, wav_bytes

from hparams import InputError
from sound.pipes import ENCODINGS, PipeReader, PipeWriter, RawFormat
from sound.reading import probe
from sound.writing import Separated

MONO, STEREO = RawFormat(RATE, 1, "s16le"), RawFormat(RATE, 2, "s16le")


def read_all(content: bytes, raw: RawFormat | None = None, n: int = 700, **options) -> np.ndarray:
    return np.concatenate(list(PipeReader(io.BytesIO(content), raw, **options).blocks(n)), axis=1)


def test_what_is_sent_is_read_back(tmp_path):
    for encoding, n_channels in itertools.product(ENCODINGS, (1, 6)):
        codes = some_codes(ENCODINGS[encoding].subtype, (n_channels, 2000))
        raw = RawFormat(RATE, n_channels, encoding)
        contents = []
        for has_header in (True, False):
            file = io.BytesIO()
            writer = PipeWriter(file, raw, "vocals", has_header)
            for part in (codes[:, :1], codes[:, 1:]):
                writer.write(Separated(part, part, part))
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
    infinite = np.full(3000, np.inf, np.float32).tobytes()
    wav = r"not a wav stream \(raw PCM needs --sample-format, --rate and --channels\)"
    for content, raw, what in (
        (b"\xff\xfb\x90\x64" + bytes(1000), None, wav),
        (b"RIFF\0\0\0\0WAVEdata" + bytes(100), None, "damaged wav header"),
        (wav_bytes(bytes(99), bits=24), None, "format 1, 24 bits and 1 channels .send 16 bits"),
        (wav_bytes(b"", size=0), None, "standard input: empty"),
        (b"", STEREO, "standard input: empty"),
        (infinite, RawFormat(RATE, 1, "f32le"), r"standard input: sample of inf at 0\.000 s"),
    ):
        with pytest.raises(InputError, match=what):
            read_all(content, raw)
    with pytest.raises(InputError, match="standard input: closed"):
        PipeReader(None)
