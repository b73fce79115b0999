"""What libsndfile cannot read, through PyAV: m4a, mp4, webm, wma, odd mp3, the stems of MUSDB18.

`open_sound` returns a `Sound`, which is read like a `soundfile.SoundFile`, always as floats: of
ALAC's 16 bits, too, every one comes back. The encoder's delay and padding are cut off where the
container tells them, so that a song in an m4a has the length of the wav it was made from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hparams import InputError

STEM_MP4 = ".stem.mp4"  # of which every sound is wanted
SLACK = 4096  # samples that a container without an exact length may promise too many: a few frames

_MAGIC = {
    b"\x1a\x45\xdf\xa3": "webm",
    b"\x30\x26\xb2\x75": "wma",
    b"ID3": "mp3",
    b"OggS": "ogg",  # with a codec that libsndfile does not know: Speex, FLAC
}
_TAGS = {k: k for k in ("title", "artist", "album", "date", "comment", "genre", "copyright")}
_TAGS["track"] = "tracknumber"  # as libsndfile calls it
UNKNOWN_LENGTH = 2**63 - 1  # as libsndfile says of a FLAC that does not tell its length
_SCALES = {"s16": 2.0**-15, "s32": 2.0**-31, "flt": 1.0, "dbl": 1.0}  # FFmpeg's sample formats


class DecoderError(Exception):
    """The decoder's own words about what is wrong with a file."""


def container_of(file: BinaryIO) -> str | None:
    """Name the container a file begins like, if it is one to try PyAV on."""
    file.seek(0)
    start = file.read(8)
    if start[4:] == b"ftyp":
        return "m4a"
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return name
    if len(start) == 8 and start[0] == 0xFF and start[1] & 0xE0 == 0xE0:
        return "aac" if start[1] & 0xF6 == 0xF0 else "mp3"
    return None


def open_sound(path: Path, file: BinaryIO, container: str, stream: int = 0) -> Sound:
    """Open one audio stream of a file.

    `file` is the same as `path`, open, as long as the sound; `container` what `container_of` calls
    it. InputError without PyAV, DecoderError if there is no such sound that it can decode.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{path}: {container} needs PyAV (pip install av)") from None
    file.seek(0)
    try:
        opened = av.open(file, metadata_errors="replace")
    except (av.FFmpegError, ValueError) as error:
        raise DecoderError(_words(error)) from error
    try:
        return Sound(opened, stream, container)
    except BaseException:
        opened.close()
        raise


class Sound(contextlib.AbstractContextManager):
    """A sound being decoded, with the attributes and the `read` of a SoundFile.

    `frames` is what the container promises, and by at most `slack` too many; `UNKNOWN_LENGTH` where
    it promises nothing.
    """

    def __init__(self, container: Any, index: int, name: str) -> None:
        if index >= len(container.streams.audio):
            n = len(container.streams.audio)
            raise DecoderError(f"{n} audio streams, {index + 1} wanted" if n else "no sound in it")
        stream = container.streams.audio[index]
        codec = stream.codec_context
        kind = codec.format.name.removesuffix("p") if codec and codec.format else ""
        if kind not in _SCALES or not codec.sample_rate:
            raise DecoderError(f"cannot decode {codec.name if codec else 'its codec'}")
        self._container, self._stream, self.format = container, stream, name.upper()
        self.samplerate, self.channels = codec.sample_rate, codec.layout.nb_channels
        self.subtype, self._scale = codec.name.upper(), _SCALES[kind]
        duration = Fraction(container.duration or 0, 1_000_000)
        if stream.duration is not None:
            duration = stream.duration * stream.time_base
        # Of AAC without a container FFmpeg guesses the length from the bit rate.
        is_told = duration > 0 and container.format.name != "aac"
        self.frames = round(duration * self.samplerate) if is_told else UNKNOWN_LENGTH
        # MP4's edit list counts samples; what follows is padding.
        is_exact = "mp4" in container.format.name and stream.time_base * self.samplerate <= 1
        self.slack = 0 if is_exact else SLACK
        self._n_left = self.frames if is_exact else 2**62
        self._tags = {**container.metadata, **stream.metadata}
        self.n_sounds = len(container.streams.audio)
        self._blocks = self._decode()
        self._rest = np.zeros((0, self.channels), np.float32)

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding."""
        self._blocks.close()
        self._container.close()

    def copy_metadata(self) -> dict[str, str]:
        """Return title, artist and so on."""
        return {_TAGS[name]: text for name, text in self._tags.items() if name in _TAGS}

    def read(self, out: np.ndarray) -> np.ndarray:
        """Fill (n_samples, n_channels), float32, and return it; it is shorter only at the end."""
        n_done, n_wanted = 0, min(len(out), self._n_left)
        while n_done < n_wanted:
            if not len(self._rest):
                block = next(self._blocks, None)
                if block is None:
                    break
                self._rest = block
            n = min(n_wanted - n_done, len(self._rest))
            out[n_done : n_done + n] = self._rest[:n]
            self._rest = self._rest[n:]
            n_done += n
        self._n_left -= n_done
        return out[:n_done]

    def _decode(self) -> Iterator[np.ndarray]:
        """Yield (n_samples, n_channels)."""
        import av

        try:
            for frame in self._container.decode(self._stream):
                if frame.sample_rate != self.samplerate:
                    raise DecoderError("the sample rate changes")
                if frame.layout.nb_channels != self.channels:
                    raise DecoderError("the number of channels changes")
                samples = frame.to_ndarray() * np.float64(self._scale)
                yield samples.T if frame.format.is_planar else samples.reshape(-1, self.channels)
        except av.FFmpegError as error:
            raise DecoderError(_words(error)) from error


def _words(error: Exception) -> str:
    return f"PyAV says: {getattr(error, 'strerror', None) or error}"
