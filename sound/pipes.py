"""Sound through standard input and output, as it comes and for as long as it comes.

WAV and raw PCM only: both are read and written here, not by libsndfile, which stops after 2^30
samples of a pipe. A block is given as soon as its last byte is there, so that live sound in small
packets does not wait.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hparams import RANGES, InputError
from sound.headers import is_unknown_length
from sound.reading import MAX_CHANNELS, AudioInfo, SampleFormat, check_floats, convert_codes, reason

ENCODINGS = {
    "u8": SampleFormat("PCM_U8", 8),
    "s16le": SampleFormat("PCM_16", 16),
    "s24le": SampleFormat("PCM_24", 24),
    "s32le": SampleFormat("PCM_32", 32),
    "f32le": SampleFormat("FLOAT", None),
    "f64le": SampleFormat("DOUBLE", None),
}
STDIN, STDOUT = Path("standard input"), Path("standard output")

_WIDTHS = {"u8": 1, "s16le": 2, "s24le": 3, "s32le": 4, "f32le": 4, "f64le": 8}
_DTYPES = {"u8": "u1", "s16le": "<i2", "s32le": "<i4", "f32le": "<f4", "f64le": "<f8"}
_WAV_TAGS = {
    **{(1, 8): "u8", (1, 16): "s16le", (1, 24): "s24le", (1, 32): "s32le"},
    **{(3, 32): "f32le", (3, 64): "f64le"},
}
_EXTENSIBLE = 0xFFFE  # the format tag of a WAV that keeps its true tag further behind
_SUBFORMAT = bytes.fromhex("000000001000800000aa00389b71")  # of every true tag, after its 2 bytes
_UNKNOWN_BYTES = 0xFFFFFFFF
_MAX_SKIPPED = 2**28  # bytes of chunks before the sound: no cover art is larger


@dataclass(frozen=True)
class RawFormat:
    """What raw PCM does not tell about itself; `encoding` is one of `ENCODINGS`, as in ffmpeg.

    Raises
    ------
    InputError
        If one of them is out of range.
    """

    sample_rate: int
    n_channels: int
    encoding: str

    def __post_init__(self) -> None:
        low, high = RANGES["sample_rate"]
        if not low <= self.sample_rate <= high:
            raise InputError(
                f"sample rate {self.sample_rate} Hz is not between {low:g} and {high:g} Hz"
            )
        if not 1 <= self.n_channels <= MAX_CHANNELS:
            raise InputError(f"{self.n_channels} channels are not between 1 and {MAX_CHANNELS}")
        if self.encoding not in ENCODINGS:
            known = ", ".join(ENCODINGS)
            raise InputError(f"there is no sample format {self.encoding!r} (choose one of {known})")

    @property
    def width(self) -> int:
        """Bytes of one sample of all channels."""
        return _WIDTHS[self.encoding] * self.n_channels


# --- Reading --------------------------------------------------------------------------------------


class PipeReader:
    """Read sound from a pipe, as `reading.Reader` reads a file.

    Parameters
    ----------
    file : file or None
        ``sys.stdin.buffer`` or any other file open for binary reading; None, as `sys.stdin` is
        where standard input is closed, is an error of one line.
    raw : RawFormat, optional
        The file holds raw PCM; by default it is a WAV or RF64.
    allow_truncated : bool
        Take a sound that ends before its header says so.
    fix_nonfinite : bool
        Replace NaN and infinity by 0; `n_fixed` counts them.

    Attributes
    ----------
    info : AudioInfo
        `n_samples` is None unless the header tells it.
    warnings : list of str
        What is odd about the end, known when all is read.

    Raises
    ------
    InputError
        If the file is no such sound, closed, or empty; while reading, if samples are missing,
        non-finite or far beyond full scale.
    """

    def __init__(
        self,
        file: BinaryIO | None,
        raw: RawFormat | None = None,
        allow_truncated: bool = False,
        fix_nonfinite: bool = False,
    ) -> None:
        if file is None or file.closed:
            raise InputError(f"{STDIN}: closed (pipe a sound into it)")
        if file.isatty():
            raise InputError(f"{STDIN}: is a terminal (pipe a sound into it)")
        self._file = file
        self._ahead = b""  # read to recognise the sound, not yet given
        self._allow_truncated = allow_truncated
        self._fix_nonfinite = fix_nonfinite
        self._n_left: int | None = None  # bytes of sound to come, None: to the end
        if raw is None:
            self.raw, self._n_left = self._read_header()
        else:
            self.raw, self._ahead = raw, self._take(1)
            if not self._ahead:
                raise _empty()
        n_samples = None if self._n_left is None else self._n_left // self.raw.width
        self.info = AudioInfo(
            path=STDIN,
            sample_rate=self.raw.sample_rate,
            n_channels=self.raw.n_channels,
            n_samples=n_samples,
            sample_format=ENCODINGS[self.raw.encoding],
            container="RAW" if raw else "WAV",
        )
        self.warnings: list[str] = []
        self.n_read = 0  # samples per channel so far
        self.n_fixed = 0  # non-finite samples zeroed so far

    def __enter__(self) -> PipeReader:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the pipe open: it belongs to who gave it."""

    def blocks(
        self, n_samples: int, sample_format: SampleFormat | None = None
    ) -> Iterator[np.ndarray]:
        """Yield codes as `reading.Reader.blocks`, each block as soon as it is complete."""
        native = self.info.sample_format
        while True:
            data = self._take_sound(n_samples * self.raw.width)
            n_whole = len(data) // self.raw.width
            codes = _decode(data[: n_whole * self.raw.width], self.raw)
            if native.bits is None:
                self.n_fixed += check_floats(codes, self.info, self.n_read, self._fix_nonfinite)
            self.n_read += n_whole
            if n_whole:
                yield convert_codes(codes.T, native, sample_format or native)
            if n_whole < n_samples:
                break
        if not self.n_read:
            raise _empty()
        if len(data) % self.raw.width:
            n_lost = len(data) % self.raw.width
            self.warnings.append(f"{n_lost} bytes at the end are no whole sample, and ignored")
        promised = self.info.n_samples
        if promised is not None and self.n_read < promised:
            problem = f"header promises {promised} frames, {self.n_read} came"
            if not self._allow_truncated:
                raise InputError(f"{STDIN}: {problem} (use --allow-truncated)")
            self.warnings.append(problem)

    def _take(self, n_bytes: int) -> bytes:
        """Read exactly so many bytes, fewer only at the end."""
        parts = [self._ahead[:n_bytes]]
        self._ahead = self._ahead[n_bytes:]
        n_missing = n_bytes - len(parts[0])
        try:
            # A pipe gives what it has, which may be less than is wanted and is not yet the end.
            while n_missing and (part := self._file.read(n_missing)):
                parts.append(part)
                n_missing -= len(part)
        except OSError as error:
            raise InputError(f"{STDIN}: {reason(error)}") from error
        return b"".join(parts)

    def _take_sound(self, n_bytes: int) -> bytes:
        """Take as `_take`, but nothing that follows the data chunk."""
        if self._n_left is None:
            return self._take(n_bytes)
        if not self._n_left:
            return b""
        data = self._take(min(n_bytes, self._n_left))
        self._n_left -= len(data)
        if not self._n_left:
            self._ahead = self._take(9)
            is_padding = len(self._ahead) <= 1  # an odd number of bytes is made even
            if not is_padding and not (len(self._ahead) == 9 and _is_chunk(self._ahead)):
                self.warnings.append("what follows its data chunk is ignored")
            self._ahead = b""
        return data

    def _read_header(self) -> tuple[RawFormat, int | None]:
        """Read up to the first sample of a WAV; returns its format and its length [bytes]."""
        start = self._take(12)
        if not start:
            raise _empty()
        if start[:4] not in (b"RIFF", b"RF64") or start[8:] != b"WAVE":
            raise InputError(
                f"{STDIN}: not a wav stream (raw PCM needs --sample-format, --rate and --channels)"
            )
        raw, size64 = None, _UNKNOWN_BYTES
        while len(entry := self._take(8)) == 8:
            name, size = struct.unpack("<4sI", entry)
            if name == b"data":
                if raw is None:
                    break
                if start[:4] == b"RF64" and size == _UNKNOWN_BYTES:
                    return raw, size64 if 0 < size64 < 2**62 else None
                return raw, None if not size or is_unknown_length(size) else size
            if size > _MAX_SKIPPED:
                break
            content = self._take(size + size % 2)
            if name == b"ds64" and len(content) >= 16:
                size64 = int.from_bytes(content[8:16], "little")
            if name == b"fmt " and len(content) >= 16:
                raw = _raw_of(content)
        raise InputError(f"{STDIN}: damaged wav header (send it as wav again, or as raw PCM)")


def _raw_of(content: bytes) -> RawFormat:
    """Read the fmt chunk of a WAV."""
    tag, n_channels, rate, _, width, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE and content[26:40] == _SUBFORMAT:
        tag = int.from_bytes(content[24:26], "little")
    encoding = _WAV_TAGS.get((tag, width * 8 // n_channels if n_channels else bits))
    if encoding is None:
        raise InputError(
            f"{STDIN}: a wav with format {tag} and {bits} bits is not PCM (send it as PCM)"
        )
    try:
        return RawFormat(rate, n_channels, encoding)
    except InputError as error:
        raise InputError(f"{STDIN}: {error}") from error


def _is_chunk(start: bytes) -> bool:
    """Say whether a chunk begins here, or after the byte that fills an odd one up."""
    entries = (struct.unpack_from("<4sI", start, at) for at in (0, 1))
    return any(
        size < _MAX_SKIPPED and all(32 <= byte < 127 for byte in name) for name, size in entries
    )


def _decode(data: bytes, raw: RawFormat) -> np.ndarray:
    """Turn bytes into codes, (n_samples, n_channels)."""
    if raw.encoding == "s24le":
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        codes = wide.view("<i4")[:, 0] >> 8
    else:
        codes = np.frombuffer(data, _DTYPES[raw.encoding])
        codes = codes.astype(codes.dtype.newbyteorder("=") if "f" in raw.encoding else np.int32)
        if raw.encoding == "u8":
            codes -= 128
    return codes.reshape(-1, raw.n_channels)


def _empty() -> InputError:
    return InputError(f"{STDIN}: empty (did the program before it fail?)")


# --- Writing --------------------------------------------------------------------------------------


class PipeWriter:
    """Write sound into a pipe as it is made; every block is flushed.

    Parameters
    ----------
    file : file or None
        ``sys.stdout.buffer`` or any other file open for binary writing.
    info : AudioInfo
        Rate, channels and sample format.
    raw : bool
        Write the bare samples; by default a WAV header of unknown length goes before them.

    Raises
    ------
    InputError
        If the file is closed or cannot be written to. BrokenPipeError passes: nobody listens any
        more, which is no mistake of the user.
    """

    def __init__(self, file: BinaryIO | None, info: AudioInfo, raw: bool = False) -> None:
        if file is None or file.closed:
            raise InputError(f"{STDOUT}: closed (pipe it into a program or a file)")
        encodings = {fmt.subtype: encoding for encoding, fmt in ENCODINGS.items()}
        self._encoding = encodings[info.sample_format.subtype]
        self._file = file
        self._put(b"" if raw else _wav_header(info, self._encoding))

    def write(self, codes: np.ndarray) -> None:
        """Send codes, (n_channels, any), of ``info.sample_format``."""
        self._put(_encode(codes, self._encoding))

    def close(self) -> None:
        """Do nothing: all is sent, and the pipe belongs to who gave it."""

    def _put(self, data: bytes) -> None:
        try:
            view = memoryview(data)
            while view:  # an unbuffered pipe may take only a part
                view = view[self._file.write(view) :]
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise InputError(f"{STDOUT}: could not be written: {reason(error)}") from error


def _encode(codes: np.ndarray, encoding: str) -> bytes:
    """Turn codes, (n_channels, n_samples), into bytes."""
    fmt = ENCODINGS[encoding]
    codes = np.ascontiguousarray(codes.T)  # (n_samples, n_channels)
    if fmt.bits is None:
        assert np.isfinite(codes).all(), "non-finite output"
    if encoding == "s24le":
        return codes.astype("<i4").reshape(-1, 1).view(np.uint8)[:, :3].tobytes()
    if encoding == "u8":
        codes = codes + 128
    return codes.astype(_DTYPES[encoding]).tobytes()


def _wav_header(info: AudioInfo, encoding: str) -> bytes:
    """Make the header of a WAV of unknown length, as ffmpeg writes it into a pipe."""
    width = _WIDTHS[encoding]
    tag = next(tag for (tag, _), name in _WAV_TAGS.items() if name == encoding)
    rate, n_channels = info.sample_rate, info.n_channels
    is_simple = n_channels <= 2 and encoding in ("u8", "s16le")
    fmt = struct.pack(
        "<HHIIHH",
        tag if is_simple else _EXTENSIBLE,
        n_channels,
        rate,
        rate * n_channels * width,
        n_channels * width,
        8 * width,
    )
    if not is_simple:  # no loudspeakers are named
        fmt += struct.pack("<HHIH", 22, 8 * width, 0, tag) + _SUBFORMAT
    chunks = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt
    unknown = struct.pack("<I", _UNKNOWN_BYTES)
    return b"RIFF" + unknown + chunks + b"data" + unknown
