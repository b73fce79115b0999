"""How long a file really is: what is cut, unknown or guessed is told, never passed over."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import soundfile
from sounds import RATE, noise, read_codes, wav_bytes, write

from hparams import InputError
from sound.headers import MP3_FRAME
from sound.reading import Reader, probe


def test_a_wav_that_is_cut_off_is_refused_unless_allowed(tmp_path):
    whole = wav_bytes(bytes(range(250)) * 8, n_channels=2)
    path = write(tmp_path / "cut.wav", whole[: 44 + 1000 + 2])  # and half a frame
    with pytest.raises(InputError, match=r"promises 500 frames, file holds 250 .*truncated"):
        probe(path)
    with pytest.raises(InputError, match="file holds 250"):
        Reader(path)
    info = probe(path, allow_truncated=True)
    assert info.n_samples == 250
    assert "promises 500 frames" in info.warnings[0]
    codes = read_codes(path, allow_truncated=True)
    expected = np.frombuffer(whole[44:1044], "<i2").reshape(250, 2).T
    np.testing.assert_array_equal(codes, expected)


def test_a_cut_aiff_counts_samples_not_the_bytes_before_them(tmp_path):
    path = tmp_path / "cut.aiff"
    soundfile.write(path, noise(1000, 1), RATE, "PCM_16")
    write(path, path.read_bytes()[:-20])
    with pytest.raises(InputError, match="promises 1000 frames, file holds 990 "):
        probe(path)


def test_an_ogg_without_its_last_page_is_refused(tmp_path):
    path = tmp_path / "cut.ogg"
    soundfile.write(path, noise(3 * RATE), RATE)
    content = path.read_bytes()
    write(path, content[: content.rindex(b"OggS")])
    with pytest.raises(InputError, match="its end is missing"):
        probe(path)


@pytest.mark.parametrize("container", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "OGG", "MP3"])
def test_scrambled_headers_are_read_or_refused_but_never_a_crash(tmp_path, container):
    path, rng = tmp_path / "sound", np.random.default_rng(0)
    soundfile.write(path, noise(2000, 1), RATE, format=container)
    content = path.read_bytes()
    for _ in range(60):
        changed = bytearray(content)
        for at in rng.integers(0, 130, rng.integers(1, 6)):
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        try:
            codes = read_codes(write(path, changed[: rng.integers(5, 2 * len(changed))]))
        except InputError:
            continue
        assert codes.size


def test_the_length_that_a_pipe_writes_is_accepted_with_a_warning(tmp_path):
    data = np.arange(1000, dtype="<i2").tobytes()
    for size in (0xFFFFFFFF, 0xFFFFFFFF - 36, 0x7FFFFFFF, 0x7FFFF000, 0x80000000):
        path = write(tmp_path / "pipe.wav", wav_bytes(data, size=size))
        info = probe(path)
        assert info.n_samples == 1000
        assert len(info.warnings) == 1
        assert "pipe" in info.warnings[0]
        np.testing.assert_array_equal(read_codes(path), [np.arange(1000)])


def test_a_cut_file_of_three_gigabytes_is_not_mistaken_for_a_pipe(tmp_path):
    # Not every size from 0x7FFFFFFF on comes from a pipe: a real recording may be that large.
    path = write(tmp_path / "cut.wav", wav_bytes(bytes(2000), size=3_000_000_000))
    with pytest.raises(InputError, match="promises 1500000000 frames, file holds 1000"):
        probe(path)


def test_bytes_after_a_data_chunk_that_ends_too_early_are_counted(tmp_path):
    noisy = np.random.default_rng(0).integers(0, 255, 2000, np.uint8).tobytes()
    path = write(tmp_path / "short.wav", wav_bytes(noisy, size=500))
    info = probe(path)
    assert info.n_samples == 250
    assert info.warnings == ("1500 bytes after the data chunk ignored",)


def test_chunks_around_the_samples_raise_no_warning(tmp_path):
    data, odd = np.arange(5, dtype=np.uint8).tobytes(), b"LIST" + struct.pack("<I", 3) + b"abc\0"
    after = b"\0" + b"id3 " + struct.pack("<I", 4) + b"song"  # the odd data chunk is padded
    content = wav_bytes(data, bits=8, before=odd) + after
    path = write(tmp_path / "chunks.wav", content)
    assert probe(path).warnings == ()
    np.testing.assert_array_equal(read_codes(path), [np.arange(5) - 128])
    tag = b"ID3\4\0\0\0\0\1\0" + bytes(128)  # 7 bits a byte: 128
    assert probe(write(path, tag + content)).n_samples == 5
    with pytest.raises(InputError, match="file holds 4 "):
        probe(write(path, tag + content[: -len(after) - 1]))


def test_an_mp3_with_variable_bit_rate_and_no_length_header_is_never_cut_short(tmp_path):
    path, n_samples = tmp_path / "vbr.mp3", 8 * RATE
    wav = 0.1 * np.sin(np.arange(n_samples) / 7)[:, None]
    wav[n_samples // 2 :] += noise(n_samples - n_samples // 2, 1)  # needs larger frames
    with soundfile.SoundFile(
        path, "w", RATE, 1, bitrate_mode="VARIABLE", compression_level=0.5
    ) as f:
        f.write(wav)
    content = path.read_bytes()
    assert abs(probe(path).n_samples - n_samples) <= MP3_FRAME
    second_frame = content.index(content[:2], 4)
    write(path, content[second_frame:])  # without the frame that holds the Xing header
    with pytest.raises(InputError, match=r"of its 35\d\d\d\d frames .*: convert it"):
        probe(path)


def test_an_mp3_with_constant_bit_rate_needs_no_length_header(tmp_path):
    path = tmp_path / "cbr.mp3"
    soundfile.write(path, noise(RATE, 1), RATE, compression_level=0.5, bitrate_mode="CONSTANT")
    content = path.read_bytes()
    assert content[21:25] in (b"Info", b"Xing")
    content = content[content.index(content[:2], 4) :]
    cover = b"ID3\4\0\0\0\1\0\0" + bytes(2**14)  # libsndfile counts it as music
    for before, after in ((b"", b""), (cover, b""), (b"", b"TAG+" + bytes(351))):
        write(path, before + content + after)
        n_read = read_codes(path).shape[1]
        assert abs(n_read - RATE) <= 2 * MP3_FRAME
        assert abs(n_read - probe(path).n_samples) <= MP3_FRAME
        assert probe(path).warnings == ()
    write(path, content[: len(content) // 2 + 100])
    assert "last MP3 frame is cut" in probe(path).warnings[0]
    write(path, content[:5000] + bytes(5000) + content[10_000:])
    with pytest.raises(InputError, match=r"no MP3 frame at byte \d+ of \d+"):
        probe(path)
