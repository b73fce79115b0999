"""Sound through standard input and output, as it comes and for as long as it comes.

WAV of 16 bits or float32, and the same without a header: both are read and written here, not by
libsndfile, which stops after 2^30 samples of a pipe. A block is given as soon as its last byte is
there, so that live sound in small packets does not wait.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from hparams import InputError
from sound.containers import is_unknown_length
from sound.reading import AudioInfo, SampleFormat, check_floats, reason
from sound.writing import Separated

ENCODINGS = {"s16le": SampleFormat("PCM_16", 16), "f32le": SampleFormat("FLOAT", None)}
STDIN, STDOUT = Path("standard input"), Path("standard output")

_DTYPES = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_WAV_TAGS = {(1, 16): "s16le", (3, 32): "f32le"}
_EXTENSIBLE = 0xFFFE  # the format tag of a WAV that keeps its true tag further behind
_MAX_SKIPPED = 2**28  # bytes of chunks before the sound: no cover art is larger


@dataclass(frozen=True)
class RawFormat:
    """What raw PCM does not tell about itself; `encoding` is one of `ENCODINGS`, as in ffmpeg."""

    sample_rate: int
    n_channels: int
    encoding: str

    @property
    def width(self) -> int:
        """Bytes of one sample of all channels."""
        return _DTYPES[self.encoding].itemsize * self.n_channels


class PipeReader:
    """Read sound from a pipe, as `reading.Reader` reads a file.

    `file` is ``sys.stdin``, which is None where it is closed, or a file open for binary reading: a
    WAV, or raw PCM where `raw` describes it.
    """

    def __init__(
        self, file: IO | None, raw: RawFormat | None = None, allow_truncated: bool = False
    ) -> None:
        if file is None or file.closed or file.isatty():
            raise InputError(f"{STDIN}: closed, or a terminal (pipe a sound into it)")
        file = getattr(file, "buffer", file)
        # A raw file gives what it has, which may be less than is wanted and is not yet the end.
        self._file = io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file
        if os.name == "posix":  # blocking: or "nothing yet" is the end
            with contextlib.suppress(OSError):  # no pipe, but a test's bytes
                os.set_blocking(self._file.fileno(), True)
        self._allow_truncated = allow_truncated
        self.raw, n_bytes = (raw, None) if raw else self._read_header()
        self.info = AudioInfo(
            path=STDIN,
            sample_rate=self.raw.sample_rate,
            n_channels=self.raw.n_channels,
            n_samples=None if n_bytes is None else n_bytes // self.raw.width,
            sample_format=ENCODINGS[self.raw.encoding],
        )
        self.warnings: list[str] = []
        self.n_read = 0  # samples per channel so far

    def blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield codes as `reading.Reader.blocks`, each block as soon as it is complete."""
        dtype, width, promised = _DTYPES[self.raw.encoding], self.raw.width, self.info.n_samples
        n_left = 0
        while n := n_samples if promised is None else min(n_samples, promised - self.n_read):
            data = self._take(n * width)
            n_whole = len(data) // width
            codes = np.frombuffer(data[: n_whole * width], dtype).reshape(-1, self.raw.n_channels)
            codes = codes.astype(np.int32 if dtype.kind == "i" else np.float32)
            if dtype.kind == "f":
                check_floats(codes, self.info, self.n_read)
            self.n_read += n_whole
            if n_whole:
                yield codes.T
            if n_whole < n:
                n_left = len(data) % width
                break
        while promised is not None and self._file.read(2**16):  # what follows the sound in a WAV
            pass
        if not self.n_read:
            raise InputError(f"{STDIN}: empty (did the program before it fail?)")
        if n_left:
            self.warnings.append(f"{n_left} bytes at the end are no whole sample")
        if promised is not None and self.n_read < promised:
            problem = f"header promises {promised} frames, {self.n_read} came"
            if not self._allow_truncated:
                raise InputError(f"{STDIN}: {problem} (use --allow-truncated)")
            self.warnings.append(problem)

    def _take(self, n_bytes: int) -> bytes:
        """Read exactly so many bytes, as soon as they are there; fewer only at the end."""
        try:
            return self._file.read(n_bytes)
        except OSError as error:
            raise InputError(f"{STDIN}: {reason(error)}") from error

    def _read_header(self) -> tuple[RawFormat, int | None]:
        """Read up to the first sample of a WAV; returns its format and its length [bytes]."""
        start, raw = self._take(12), None
        if start[:4] != b"RIFF" or start[8:] != b"WAVE":
            raise InputError(
                f"{STDIN}: {'not a wav stream' if start else 'empty'} (raw PCM needs "
                "--sample-format, --rate and --channels)"
            )
        while len(entry := self._take(8)) == 8:
            name, size = struct.unpack("<4sI", entry)
            if name == b"data" and raw is not None:
                return raw, None if not size or is_unknown_length(size) else size
            if name == b"data" or size > _MAX_SKIPPED:
                break
            content = self._take(size + size % 2)
            if name == b"fmt " and len(content) >= 16:
                raw = _raw_of(content)
        raise InputError(f"{STDIN}: damaged wav header (send it as wav again, or as raw PCM)")


def _raw_of(content: bytes) -> RawFormat:
    """Read the fmt chunk of a WAV."""
    tag, n_channels, rate, _, _, bits = struct.unpack("<HHIIHH", content[:16])
    if tag == _EXTENSIBLE:
        tag = int.from_bytes(content[24:26], "little")
    if (tag, bits) not in _WAV_TAGS or not n_channels:
        raise InputError(
            f"{STDIN}: a wav with format {tag}, {bits} bits and {n_channels} channels (send 16 "
            "bits, pcm_s16le, or float, pcm_f32le)"
        )
    return RawFormat(rate, n_channels, _WAV_TAGS[tag, bits])


class PipeWriter:
    """Write sound into a pipe as it is made; every block is flushed.

    `file` is ``sys.stdout`` or a file open for binary writing. With `has_header` a WAV header of
    unknown length goes before the samples, as ffmpeg writes it. BrokenPipeError passes: nobody
    listens any more, which is no mistake of the user.
    """

    def __init__(self, file: IO | None, raw: RawFormat, stem: str, has_header: bool) -> None:
        if file is None or file.closed or file.isatty():
            raise InputError(f"{STDOUT}: closed, or a terminal (pipe it into a program or a file)")
        self._file, self._dtype = getattr(file, "buffer", file), _DTYPES[raw.encoding]
        self._stem = stem
        if has_header:
            tag = next(tag for (tag, _), name in _WAV_TAGS.items() if name == raw.encoding)
            sizes = raw.sample_rate * raw.width, raw.width, 8 * self._dtype.itemsize
            fmt = struct.pack("<HHIIHH", tag, raw.n_channels, raw.sample_rate, *sizes)
            head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt
            self._put(b"RIFF\xff\xff\xff\xff" + head + b"data\xff\xff\xff\xff")  # no lengths

    def write(self, part: Separated) -> None:
        """Send the stem's codes."""
        codes = getattr(part, self._stem)
        assert np.isfinite(codes).all(), "non-finite output"
        self._put(np.ascontiguousarray(codes.T).astype(self._dtype).tobytes())

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


class SoundCard:
    """The microphone as a reader and the loudspeakers as a writer, until Ctrl-C.

    As many samples go out as come in, from silence on. InputError without a sound card, and
    without the package that knows it.
    """

    def __init__(self, sample_rate: int, n_channels: int, stem: str) -> None:
        try:
            import sounddevice
        except (ImportError, OSError) as error:  # OSError: the package is there, PortAudio is not
            raise InputError(
                f"--live: {error} (pip install sounddevice, and on Linux apt install "
                "libportaudio2; or use a pipe: --live -)"
            ) from error
        self._module = sounddevice
        self.info = AudioInfo(Path("microphone"), sample_rate, n_channels, None, ENCODINGS["f32le"])
        self.warnings: list[str] = []
        self.n_behind = 0  # samples that the writer is behind the reader: its silence comes first
        self._stem = stem

    def blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield what the microphone hears, (n_channels, n_samples), for ever; play as much."""
        rate, n_channels = self.info.sample_rate, self.info.n_channels
        self._line = np.zeros((n_channels, self.n_behind), np.float32)  # waits to be played
        try:
            with self._module.Stream(rate, n_samples, channels=n_channels, dtype="float32") as card:
                while True:
                    yield card.read(n_samples)[0].T
                    card.write(np.ascontiguousarray(self._line[:, :n_samples].T))
                    self._line = self._line[:, n_samples:]
        except self._module.PortAudioError as error:
            raise InputError(f"--live: {error} (see python -m sounddevice)") from error

    def write(self, part: Separated) -> None:
        """Take what is to be played."""
        self._line = np.concatenate([self._line, getattr(part, self._stem)], axis=1)
