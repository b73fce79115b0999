"""A compressed file is as long as its sound, whatever its header says, or it is refused."""

import functools
import io
import struct

import numpy as np
import pytest
import soundfile
from sounds import RATE, read_codes, wav_bytes, write

from hparams import InputError
from sound import tracks
from sound.reading import Reader

SECONDS = 3


@functools.cache
def song(seed: int = 0) -> np.ndarray:
    """Three seconds of tones and noise in 16 bits, mono."""
    rng, times = np.random.default_rng(seed), np.arange(SECONDS * RATE) / RATE
    tone = np.sin(2 * np.pi * (300 + 200 * seed) * times * (1 + 0.1 * times))
    loudness = 0.2 + 0.8 * (np.sin(7 * times) > 0)  # so that bit rates vary
    return (9000 * loudness * (tone + 0.02 * rng.standard_normal(len(times)))).astype(np.int16)


@functools.cache
def encoded(container: str, seed: int = 0, mode: str = "VARIABLE") -> bytes:
    options = {"bitrate_mode": mode, "compression_level": 0.5} if container == "MP3" else {}
    buffer = io.BytesIO()
    soundfile.write(buffer, song(seed), RATE, format=container, **options)
    return buffer.getvalue()


def mp3(seed: int = 0, mode: str = "VARIABLE", count: float | None = 1.0) -> bytes:
    """Encode as MP3; its Xing header counts so many times the frames, None: there is none."""
    content = encoded("MP3", seed, mode)
    at = max(content.find(b"Xing", 0, 99), content.find(b"Info", 0, 99))
    if count is None:
        return content[content.index(b"\xff\xfb", at) :]
    (n_frames,) = struct.unpack_from(">I", content, at + 8)
    return content[: at + 8] + struct.pack(">I", int(count * n_frames)) + content[at + 12 :]


def in_wav(frames: bytes, n_samples: int) -> bytes:
    """Put MPEG layer III into a WAV, which says so by its tag 0x55."""
    extra = struct.pack("<HHIHHH", 12, 1, 2, 417, 1, 1393)
    fact = b"fact" + struct.pack("<II", 4, n_samples)
    wav = wav_bytes(frames + bytes(len(frames) % 2), tag=0x55, bits=0, before=fact)
    fmt = struct.pack("<HHIIHH", 0x55, 1, RATE, 16000, 1, 0) + extra
    at = wav.index(b"fmt ")
    wav = wav[:at] + b"fmt " + struct.pack("<I", len(fmt)) + fmt + wav[at + 24 :]
    return wav[:4] + struct.pack("<I", len(wav) - 8) + wav[8:]


def flac(promised: int) -> bytes:
    content = bytearray(encoded("FLAC"))
    content[21:26] = (content[21] << 32 & 0xF0 << 32 | promised).to_bytes(5, "big")
    return bytes(content)


N = SECONDS * RATE
ID3 = b"ID3\x03\0\0\0\0\x02\0" + bytes(256)
APE = b"APETAGEX" + struct.pack("<IIII", 2000, 5000, 1, 0) + bytes(8)  # the tag's foot
FILES = {  # content, and of which songs it holds all
    "with a header": (mp3(), [0]),
    "with a picture of 20 MB": (b"ID3\3\0\0\x09\x40\0\0" + bytes(9 * 2**21 + 2**20) + mp3(), [0]),
    "with lyrics in an APE tag": (mp3() + bytes(5000 - 32) + APE, [0]),
    "joined": (mp3(0) + mp3(1), [0, 1]),
    "joined, with a tag between": (mp3(0) + ID3 + mp3(1), [0, 1]),
    "without a header": (mp3(count=None), [0]),
    "two without a header": (mp3(count=None) + mp3(1, count=None), [0, 1]),
    "half of it counted": (mp3(count=0.5), [0]),
    "twice of it counted": (mp3(count=2), [0]),
    "in a wav": (in_wav(mp3(count=None), N), [0]),
    "in a wav that lies": (in_wav(mp3(count=None), N // 2), [0]),
    "flac of unknown length": (flac(0), [0]),
    "flac, all but a sample": (flac(N - 1), [0]),
    "flac with a tag at its end": (encoded("FLAC") + b"TAG" + bytes(125), [0]),
    "ogg without a last page": (encoded("OGG")[: encoded("OGG").rindex(b"OggS")], [0]),
}


@pytest.mark.parametrize("name", FILES)
def test_all_of_the_sound_comes_whatever_the_header_says(tmp_path, name):
    content, seeds = FILES[name]
    path = write(tmp_path / "song", content)
    codes = read_codes(path, 5000)[0]
    for i, seed in enumerate(seeds):
        # An MP3 begins with the encoder's delay, which a header tells; a last page holds 0.1 s.
        expected = song(seed).astype(float)[:-20_000]
        part = codes[i * N : i * N + len(expected) + 8000].astype(float)
        product = np.fft.irfft(np.fft.rfft(part, 2 * N) * np.fft.rfft(expected, 2 * N).conj())
        best = part[product.argmax() :][: len(expected)]
        assert np.corrcoef(best, expected)[0, 1] > 0.99
    assert len(codes) == N or name not in ("with a header", "with lyrics in an APE tag")
    assert 0 <= len(codes) + 9000 * ("ogg" in name) - len(seeds) * N < 4000 * len(seeds)
    with Reader(path, start=2.5, duration=0.25) as reader:  # and excerpts lie where they should
        np.testing.assert_array_equal(
            np.concatenate(list(reader.blocks(999)), axis=1)[0], codes[110_250:][:11_025]
        )


@pytest.mark.parametrize("name", ["half of it counted", "joined"])
def test_a_dataset_never_takes_a_part_of_a_song(tmp_path, name):
    write(tmp_path / "voice.wav", FILES[name][0])
    (track,) = tracks.find_tracks(tmp_path, "voices").tracks
    with pytest.raises(InputError, match="longer than its header says"):
        list(tracks.read_blocks(track, 5000))


@functools.cache
def other_mp3(**options) -> bytes:
    """Encode a song of another rate or number of channels."""
    buffer = io.BytesIO()
    wav = np.stack([song(1)] * options.get("n_channels", 1), axis=1)
    soundfile.write(buffer, wav, options.get("rate", RATE), format="MP3")
    return buffer.getvalue()


REFUSED = {
    "mono and stereo": mp3() + other_mp3(n_channels=2),
    "stereo and mono": other_mp3(n_channels=2) + mp3(),
    "mono and stereo without a header": mp3(count=None) + other_mp3(n_channels=2),
    "two rates": mp3() + other_mp3(rate=22050),
    "a small hole of zeros": mp3()[:10_000] + bytes(900) + mp3()[10_900:],
    "two flacs": encoded("FLAC") + encoded("FLAC", 1),
    "mp3 with a hole": mp3()[:10_000] + mp3()[14_000:],
    "flac, twice of it promised": flac(2 * N),
    "two ogg files": encoded("OGG") + encoded("OGG", 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_all_there_is_refused(tmp_path, name):
    path = write(tmp_path / "song", REFUSED[name])
    with pytest.raises(InputError, match=r"promises|damaged|another|its end is missing"):
        read_codes(path, 5000)
