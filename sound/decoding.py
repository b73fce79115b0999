"""What libsndfile cannot read, through PyAV: m4a, mp4, webm, wma, odd mp3, the stems of MUSDB18.

`open_sound` returns a `Sound`, which is read like a `soundfile.SoundFile`: AAC and its like as
floats, ALAC as the integers of the file. The encoder's delay and padding are cut off where the
container tells them, so that a song in an m4a has the length of the wav it was made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hparams import InputError

SLACK = 4096  # samples that a container without an exact length may promise too many: a few frames

_MAGIC = {
    b"\x1a\x45\xdf\xa3": "webm",
    b"\x30\x26\xb2\x75": "wma",
    b"ID3": "mp3",
    b"OggS": "ogg",  # with a codec that libsndfile does not know: Speex, FLAC
    b"caff": "caf",  # ALAC as ffmpeg packs it
    b"wvpk": "wavpack",
    b"MAC ": "ape",
    b"\x0b\x77": "ac3",
}
_TAGS = {
    **{name: name for name in ("title", "artist", "album", "date", "comment", "genre")},
    **{"copyright": "copyright", "track": "tracknumber"},
}


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

    Parameters
    ----------
    path : Path
    file : file
        The same file, open; it has to stay open as long as the sound.
    container : str
        What `container_of` calls it.
    stream : int
        Which of its audio streams.

    Raises
    ------
    InputError
        If PyAV is not installed.
    DecoderError
        If there is no such sound that it can decode.
    """
    try:
        import av
    except ImportError:
        raise InputError(f"{path}: {container} needs PyAV (pip install av)") from None
    file.seek(0)
    try:
        opened = av.open(file)
    except (av.FFmpegError, ValueError) as error:
        raise DecoderError(_words(error)) from error
    try:
        return Sound(opened, stream, container)
    except BaseException:
        opened.close()
        raise


class Sound:
    """A sound being decoded, with the attributes and the `read` of a SoundFile.

    Attributes
    ----------
    frames : int
        Samples per channel, as the container promises them.
    slack : int
        By how many that may be too many: 0 where it is the length to the sample.
    """

    def __init__(self, container: Any, index: int, name: str) -> None:
        if index >= len(container.streams.audio):
            n = len(container.streams.audio)
            raise DecoderError(f"{n} audio streams, {index + 1} wanted" if n else "no sound in it")
        stream = container.streams.audio[index]
        codec = stream.codec_context
        kind = codec.format.name.removesuffix("p") if codec and codec.format else ""
        if codec is None or not codec.sample_rate or kind not in ("u8", "s16", "s32", "flt", "dbl"):
            raise DecoderError(f"cannot decode {codec.name if codec else 'its codec'}")
        self._container, self._stream, self.format = container, stream, name.upper()
        self.samplerate, self.channels = codec.sample_rate, codec.layout.nb_channels
        bits = {"u8": 8, "s16": 16, "s32": 32}.get(kind)
        if codec.name == "alac" and len(codec.extradata or b"") > 17:
            bits = codec.extradata[17]  # of a sample; FFmpeg has only 16 and 32 bits
        self.subtype = codec.name.upper()
        if bits is not None:
            self.subtype = f"PCM_{-(-bits // 8) * 8}".replace("PCM_8", "PCM_U8")
        if stream.duration is not None:
            duration = stream.duration * stream.time_base
        else:
            duration = Fraction(container.duration or 0, 1_000_000)
        self.frames = round(duration * self.samplerate)
        # MP4's edit list counts samples; what follows is padding.
        is_exact = "mp4" in container.format.name and stream.time_base * self.samplerate <= 1
        self.slack = 0 if is_exact else SLACK
        self._n_left = self.frames if is_exact else 2**62
        self._tags = {**container.metadata, **stream.metadata}
        self._blocks = self._decode()
        self._rest = np.zeros((0, self.channels), np.float32)

    def __enter__(self) -> Sound:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding."""
        self._blocks.close()
        self._container.close()

    def copy_metadata(self) -> dict[str, str]:
        """Return title, artist and so on."""
        tags = {name.lower(): text for name, text in self._tags.items()}
        return {ours: tags[name] for name, ours in _TAGS.items() if name in tags}

    def read(self, out: np.ndarray) -> np.ndarray:
        """Fill (n_samples, n_channels) as libsndfile does: int32 uses the upper bits first.

        Returns the part that was filled, which is shorter only at the end. Raises DecoderError.
        """
        n_done, n_wanted = 0, min(len(out), self._n_left)
        while n_done < n_wanted:
            if not len(self._rest):
                block = next(self._blocks, None)
                if block is None:
                    break
                self._rest = block
            n = min(n_wanted - n_done, len(self._rest))
            out[n_done : n_done + n] = _scaled(self._rest[:n], out.dtype)
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
                samples = frame.to_ndarray()
                yield samples.T if frame.format.is_planar else samples.reshape(-1, self.channels)
        except av.FFmpegError as error:
            raise DecoderError(_words(error)) from error


def _scaled(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Move the lowest and highest values of one number type to those of another."""
    if block.dtype == np.uint8:
        block = (block.astype(np.int32) - 128) << 24
    elif block.dtype == np.int16:
        block = block.astype(np.int32) << 16
    if block.dtype == np.int32 and dtype != np.int32:
        return block.astype(dtype) * dtype.type(2.0**-31)
    return block


def _words(error: Exception) -> str:
    return f"PyAV says: {getattr(error, 'strerror', None) or error}"
