"""What libsndfile cannot read: m4a, mp4, webm, aac, wma … through PyAV, or else through ffmpeg.

`open_sound` returns a `Sound`, which is read like a `soundfile.SoundFile`: AAC and its like as
floats, ALAC as the integers of the file. The encoder's delay and padding are cut off where the
container tells them, so that a song in an m4a has the length of the wav it was made from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hparams import InputError

SLACK = 4096  # samples that a container without an exact length may promise too many: a few frames

_MAGIC = {
    b"\x1a\x45\xdf\xa3": "webm",
    b"\x30\x26\xb2\x75": "wma",
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
_DTYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "flt": np.float32, "dbl": np.float64}


class DecoderError(Exception):
    """The decoder's own words about what is wrong with a file."""


@dataclass(frozen=True)
class _Header:
    samplerate: int
    channels: int
    frames: int
    exact: bool  # whether `frames` is the length to the sample
    codec: str
    bits: int | None  # of an integer sample, None for floats
    tags: dict[str, str] = field(default_factory=dict)


def container_of(file: BinaryIO) -> str | None:
    """Name the container a file begins like, if it is one to try PyAV and ffmpeg on."""
    start = os.pread(file.fileno(), 8, 0)
    if start[4:] == b"ftyp":
        return "m4a"
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return name
    if len(start) == 8 and start[0] == 0xFF and start[1] & 0xF6 == 0xF0:
        return "aac"
    return None


def open_sound(path: Path, file: BinaryIO, container: str) -> Sound:
    """Open the first audio stream of a file with what is installed.

    Parameters
    ----------
    path : Path
    file : file
        The same file, open; it has to stay open as long as the sound.
    container : str
        What `container_of` calls it.

    Returns
    -------
    Sound

    Raises
    ------
    InputError
        If neither PyAV nor ffmpeg is installed.
    DecoderError
        If there is no sound that they can decode.
    """
    try:
        import av
    except ImportError:
        if shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None:
            raise InputError(
                f"{path}: {container} needs PyAV or ffmpeg (pip install av, or install ffmpeg)"
            ) from None
        return Sound(container, *_open_ffmpeg(path))
    return Sound(container, *_open_pyav(av, file))


class Sound:
    """A sound file being decoded, with the attributes and the `read` of a SoundFile."""

    def __init__(self, container: str, header: _Header, blocks: Iterator[np.ndarray]) -> None:
        self.format = container.upper()
        self.samplerate, self.channels = header.samplerate, header.channels
        self.frames = header.frames
        self.subtype = header.codec.upper()
        if header.bits is not None:
            self.subtype = f"PCM_{-(-header.bits // 8) * 8}".replace("PCM_8", "PCM_U8")
        self.slack = 0 if header.exact else SLACK
        self._tags = header.tags
        self._blocks = blocks
        self._rest = np.zeros((0, self.channels), np.float32)
        self._n_left = header.frames if header.exact else 2**62  # what follows is padding

    def __enter__(self) -> Sound:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop decoding."""
        self._blocks.close()

    def copy_metadata(self) -> dict[str, str]:
        """Return title, artist and so on."""
        return dict(self._tags)

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
                if block.shape[1] != self.channels:
                    raise DecoderError("the number of channels changes")
                self._rest = block
            n = min(n_wanted - n_done, len(self._rest))
            out[n_done : n_done + n] = _scaled(self._rest[:n], out.dtype)
            self._rest = self._rest[n:]
            n_done += n
        self._n_left -= n_done
        return out[:n_done]


def _scaled(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Move the lowest and highest values of one number type to those of another."""
    if block.dtype == np.uint8:
        block = (block.astype(np.int32) - 128) << 24
    elif block.dtype == np.int16:
        block = block.astype(np.int32) << 16
    if block.dtype == np.int32 and dtype != np.int32:
        return block.astype(dtype) * dtype.type(2.0**-31)
    return block


def _tags_of(*dictionaries: dict[str, str]) -> dict[str, str]:
    found = {}
    for tags in dictionaries:
        for name, value in tags.items():
            if name.lower() in _TAGS:
                found[_TAGS[name.lower()]] = value
    return found


# --- PyAV -----------------------------------------------------------------------------------------


def _open_pyav(av: Any, file: BinaryIO) -> tuple[_Header, Iterator[np.ndarray]]:
    file.seek(0)
    try:
        container = av.open(file)
    except (av.FFmpegError, ValueError) as error:
        raise DecoderError(_words(error)) from error
    try:
        if not container.streams.audio:
            raise DecoderError("no sound in it")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        kind = codec.format.name.removesuffix("p") if codec.format else ""
        if not codec.sample_rate or kind not in _DTYPES:
            raise DecoderError(f"cannot decode {codec.name}")
        bits = {"u8": 8, "s16": 16, "s32": 32}.get(kind)
        if codec.name == "alac" and len(codec.extradata or b"") > 17:
            bits = codec.extradata[17]  # of a sample; FFmpeg has only 16 and 32 bits
        if stream.duration is not None:
            duration = stream.duration * stream.time_base
        else:
            duration = Fraction(container.duration or 0, av.time_base)
        header = _Header(
            codec.sample_rate,
            codec.layout.nb_channels,
            round(duration * codec.sample_rate),
            _is_exact(container.format.name, stream.time_base, codec.sample_rate),
            codec.name,
            bits,
            _tags_of(dict(container.metadata), dict(stream.metadata)),
        )
    except BaseException:
        container.close()
        raise
    blocks = _pyav_blocks(av, container, stream, header)
    next(blocks)
    return header, blocks


def _pyav_blocks(av: Any, container: Any, stream: Any, header: _Header) -> Iterator[np.ndarray]:
    """Yield (n_samples, n_channels); the first `next` only makes sure of the closing."""
    try:
        yield np.zeros((0, header.channels), np.float32)
        for frame in container.decode(stream):
            if frame.sample_rate != header.samplerate:
                raise DecoderError("the sample rate changes")
            samples = frame.to_ndarray()
            yield samples.T if frame.format.is_planar else samples.reshape(-1, header.channels)
    except av.FFmpegError as error:
        raise DecoderError(_words(error)) from error
    finally:
        container.close()


def _words(error: Exception) -> str:
    return f"PyAV says: {getattr(error, 'strerror', None) or error}"


def _is_exact(format_name: str, time_base: Fraction, sample_rate: int) -> bool:
    """Say whether a stream's duration is its length to the sample: MP4's edit list counts so."""
    return "mp4" in format_name and time_base.denominator >= time_base.numerator * sample_rate


# --- ffmpeg ---------------------------------------------------------------------------------------


def _open_ffmpeg(path: Path) -> tuple[_Header, Iterator[np.ndarray]]:
    command = ["-show_streams", "-show_format", "-select_streams", "a", "-of", "json"]
    command = ["ffprobe", "-v", "error", *_READ_ONLY_FILES, *command, _url(path)]
    seen = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if seen.returncode:
        raise DecoderError(_first_line(seen.stderr, path))
    found = json.loads(seen.stdout.decode(errors="replace"))
    if not found.get("streams"):
        raise DecoderError("no sound in it")
    stream, container = found["streams"][0], found["format"]
    rate, kind = int(stream.get("sample_rate", 0)), stream.get("sample_fmt", "").removesuffix("p")
    if not rate or kind not in _DTYPES:
        raise DecoderError(f"ffmpeg cannot decode {stream.get('codec_name')}")
    time_base = Fraction(stream["time_base"])
    if "duration_ts" in stream:
        duration = stream["duration_ts"] * time_base
    else:
        duration = Fraction(container.get("duration", 0))
    bits = {"u8": 8, "s16": 16, "s32": 32}.get(kind)
    if bits:
        bits = int(stream.get("bits_per_raw_sample", 0)) or bits
    header = _Header(
        rate,
        stream["channels"],
        round(duration * rate),
        _is_exact(container["format_name"], time_base, rate),
        stream["codec_name"],
        bits,
        _tags_of(container.get("tags", {}), stream.get("tags", {})),
    )
    return header, _ffmpeg_blocks(path, header)


# Some containers can name other files and addresses to be read in their place.
_READ_ONLY_FILES = ("-protocol_whitelist", "file")


def _ffmpeg_blocks(path: Path, header: _Header) -> Iterator[np.ndarray]:
    """Yield (n_samples, n_channels) out of a pipe; the program starts with the first block."""
    dtype = np.dtype("<f4" if header.bits is None else "<i4")
    command = ["ffmpeg", "-nostdin", "-v", "error", "-xerror", *_READ_ONLY_FILES, "-i", _url(path)]
    command += ["-map", "0:a:0", "-ac", str(header.channels), "-ar", str(header.samplerate)]
    command += ["-f", "f32le" if header.bits is None else "s32le", "pipe:1"]
    width = dtype.itemsize * header.channels
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        try:
            while data := process.stdout.read(16384 * width):  # a whole number of samples
                n_whole = len(data) // width * width
                yield np.frombuffer(data[:n_whole], dtype).reshape(-1, header.channels)
            if process.wait():
                log.seek(0)
                raise DecoderError(_first_line(log.read(10_000), path))
        finally:
            process.stdout.close()
            process.kill()
            process.wait()


def _url(path: Path) -> bytes:
    """Name a file so that nothing in its name means anything: no option, protocol or pattern."""
    return b"file:" + os.fsencode(path)


def _first_line(log: bytes, path: Path) -> str:
    lines = log.decode(errors="replace").replace(f"file:{path}: ", "").splitlines()
    line = re.sub(r"^\[.* @ 0x[0-9a-f]+\] ", "", next(iter(lines), "nothing"))
    return f"ffmpeg says: {line}"
