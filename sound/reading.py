"""Sound files: what they are, reading block by block, sample formats.

Samples travel as *codes*, the integers that stand in the file (-32768..32767 for 16 bits), so that
what is read, split and written adds up exactly; float files keep their floats. Arrays are
(n_channels, n_samples). Every problem with a file is an `InputError` of one line. What was decoded
is counted and compared with what the header promised: a song never ends early without a word.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from hparams import RANGES, InputError
from sound import decoding

MAX_CHANNELS = 1024  # as in libsndfile
MAX_LEVEL = 1e6  # +120 dB re full scale: louder float samples would overflow the STFT
MP3_FRAME = 1152  # samples; an MP3 header may promise up to one frame more than is decoded

# Written blocks stay below 65536 samples, above which libsndfile's Vorbis encoder crashes.
DISK_BLOCK = 16384

_BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": None, "DOUBLE": None}
_EXACT = (*_BITS, "PCM_S8")  # what libsndfile gives as it stands in the file, and seeks in exactly
_UNKNOWN_LENGTH = 2**62  # libsndfile's n_samples for a stream of unknown length is 2**63 - 1


Sound = soundfile.SoundFile | decoding.Sound  # what both of them can


@dataclass(frozen=True)
class SampleFormat:
    """How samples are written: libsndfile's name, and the bits of an integer (None for floats)."""

    subtype: str
    bits: int | None


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a sound file promises.

    `n_samples` counts samples per channel; None: a pipe that does not tell. `warnings` are
    sentences about oddities that do not stop us, without the path. `tags` are title, artist,
    album, date, comment, tracknumber, genre, copyright and license, where the file has them.
    """

    path: Path
    sample_rate: int
    n_channels: int
    n_samples: int | None
    sample_format: SampleFormat
    container: str = "WAV"
    warnings: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def seconds(self) -> float | None:
        """Duration [s], None where `n_samples` is."""
        return None if self.n_samples is None else self.n_samples / self.sample_rate


# --- Headers ------------------------------------------------------------------------------------


def probe(path: str | os.PathLike, allow_truncated: bool = False, stream: int = 0) -> AudioInfo:
    """Read a sound file's header and say at once what is wrong with the file.

    Parameters
    ----------
    path : path-like
        Any name the file system allows; the content decides the format, not the extension.
    allow_truncated : bool
        Accept a file that is cut off; `n_samples` is then what the file holds.
    stream : int
        Which sound of a file that has several, as .stem.mp4 has five.

    Returns
    -------
    AudioInfo

    Raises
    ------
    InputError
        If there is no such file, it is not a regular readable file, is empty, is not audio, holds
        no samples or fewer than its header promises, or has a sample rate out of range.
    """
    file, sound, info = _open(Path(path), allow_truncated, stream)
    with file, sound:
        return info


def check_path(path: str | os.PathLike) -> None:
    """Refuse what is no regular file with something in it, without opening it."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{path}: no such file (a name cannot hold a null byte)") from error
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: permission denied (change its permissions)")
    if stat.S_ISDIR(status.st_mode):
        raise InputError(f"{path}: is a directory (name a sound file)")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for ever
        raise InputError(f"{path}: is not a regular file (save the sound to a file first)")
    if status.st_size == 0:
        raise InputError(f"{path}: empty file (copy or download it again)")


def sample_format(subtype: str) -> SampleFormat:
    """Choose what to write for a libsndfile subtype: itself, or PCM_16 where that is not kept."""
    if subtype == "PCM_S8":  # in AIFF and FLAC; the same codes are called unsigned in a WAV
        subtype = "PCM_U8"
    if subtype not in _BITS:
        subtype = "PCM_16"
    return SampleFormat(subtype, _BITS[subtype])


def _open(path: Path, allow_truncated: bool, stream: int) -> tuple[BinaryIO, Sound, AudioInfo]:
    """Open and check a sound file; the caller closes file and sound."""
    check_path(path)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", buffering=0))
        except OSError as error:
            raise InputError(f"{path}: {reason(error)}") from error
        sound = stack.enter_context(_open_sound(path, file, stream))
        info = _inspect(path, file, sound, allow_truncated)
        stack.pop_all()  # all is well: they stay open
    return file, sound, info


def _open_sound(path: Path, file: BinaryIO, stream: int) -> Sound:
    """Let libsndfile look at the content, not at the name: it guesses from odd ones."""
    try:
        # Windows has descriptors of a library's own.
        source = file.fileno() if os.name == "posix" else file
        sound = soundfile.SoundFile(source, closefd=False)
        # Otherwise soundfile seeks to where it already is after every read, and libsndfile 1.2.2
        # then goes on with other samples in MP3 (up to 0.7 of full scale were seen) and Opus.
        sound.seekable = lambda: False
        return sound
    except soundfile.LibsndfileError as error:
        what, container = error.error_string.rstrip("."), decoding.container_of(file)
        if container is not None:
            try:
                return decoding.open_sound(path, file, container, stream)
            except decoding.DecoderError as better:
                what = f"{container}, and {better}"
        raise InputError(
            f"{path}: not audio that can be read: {what} (convert it to wav or flac)"
        ) from error


def _inspect(path: Path, file: BinaryIO, sound: Sound, allow_truncated: bool) -> AudioInfo:
    """Compare what the header says with what the file can hold."""
    if sound.frames > _UNKNOWN_LENGTH:
        raise InputError(f"{path}: its header does not tell its length (convert it to wav)")
    if sound.frames <= 0:
        raise InputError(f"{path}: no audio samples (record or copy it again)")
    low, high = RANGES["sample_rate"]
    if not low <= sound.samplerate <= high:
        raise InputError(
            f"{path}: sample rate {sound.samplerate} Hz is not between {low:g} and {high:g} Hz "
            "(convert it, or repair its header)"
        )
    position = file.tell()
    problem, warning = _check_riff(file, sound) or _check_ogg(file) or ("", "")
    file.seek(position)
    if problem and not allow_truncated:
        raise InputError(f"{path}: {problem} (export it again, or generate.py --allow-truncated)")
    tags = sound.copy_metadata()
    return AudioInfo(
        path=path,
        sample_rate=sound.samplerate,
        n_channels=sound.channels,
        n_samples=sound.frames,
        sample_format=sample_format(sound.subtype),
        container=sound.format,
        warnings=tuple(text for text in (problem, warning) if text),
        tags={name: tags[name] for name in sorted(tags) if name != "software"},
    )


def _check_riff(file: BinaryIO, sound: Sound) -> tuple[str, str] | None:
    """Find what libsndfile forgives a WAV: returns (problem, warning), None for another file."""
    file.seek(0)
    start = file.read(12)
    if start[:4] not in (b"RIFF", b"RIFX", b"RF64") or start[8:] != b"WAVE":
        return None
    order = "big" if start[:4] == b"RIFX" else "little"
    size64 = 0
    for _ in range(10_000):  # a hostile file can hold millions of empty chunks
        entry = file.read(8)
        name, size = entry[:4], int.from_bytes(entry[4:], order)
        if len(entry) < 8:
            break
        if name == b"data":
            promised = size64 if start[:4] == b"RF64" and size == 0xFFFFFFFF else size
            n_bytes = os.fstat(file.fileno()).st_size - file.tell()
            if promised <= n_bytes:
                break
            if is_unknown_length(promised):
                return "", "its header does not tell its length (written by a pipe?)"
            n_promised = round(sound.frames * promised / n_bytes) if n_bytes else promised
            return f"header promises {n_promised} frames, file holds {sound.frames}", ""
        if name == b"ds64":  # RF64 keeps its 64-bit sizes here
            size64 = int.from_bytes(file.read(16)[8:], "little")
            size -= 16
        file.seek(size + size % 2, os.SEEK_CUR)
    return "", ""


def is_unknown_length(size: int) -> bool:
    """Say whether a WAV's data chunk was begun by somebody who did not know its size.

    Whoever writes into a pipe cannot return to the header and leaves the largest number there. Any
    other size is believed: a cut file of 3 GB has more than 0x7FFFFFFF in its header, too.
    """
    return size >= 0xFFFF0000 or 0x7FFF0000 <= size <= 0x80000000


def _check_ogg(file: BinaryIO) -> tuple[str, str] | None:
    """Look at the end of an Ogg file; returns as `_check_riff`.

    Its last page must be whole, marked as the last, and of the stream that the first page began:
    of several that follow each other, as in recorded radio, libsndfile reads the first.
    """
    file.seek(0)
    first = file.read(18)
    if first[:4] != b"OggS":
        return None
    file.seek(max(0, os.fstat(file.fileno()).st_size - 65536))  # a page has at most 65307 bytes
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    n_page = 27 + page[26] + sum(page[27 : 27 + page[26]]) if len(page) >= 27 else 27
    if len(page) < n_page or not page[5] & 4:
        return "its end is missing", ""
    if page[14:18] != first[14:18]:  # the streams' serial numbers
        return "several sounds in one file, of which only the first can be read", ""
    return "", ""


def _is_guess(file: BinaryIO, sound: Sound) -> bool:
    """Say whether an MP3's length is libsndfile's guess from its size: it has no Xing header."""
    if not isinstance(sound, soundfile.SoundFile) or sound.format != "MP3":
        return False
    position = file.tell()
    file.seek(0)
    start = file.read(10)
    if start[:3] == b"ID3":  # titles, cover art; seven bits of its size in each byte
        file.seek(
            10 + sum(byte << shift for byte, shift in zip(start[6:], (21, 14, 7, 0), strict=True))
        )
    start += file.read(4096)
    file.seek(position)
    return b"Xing" not in start and b"Info" not in start


# --- Reading ------------------------------------------------------------------------------------


class Reader:
    """Read a sound file once, block by block; close it by leaving the ``with`` block.

    Parameters
    ----------
    path : path-like
        As for `probe`.
    allow_truncated : bool
        Take what there is of a file that is cut off.
    fix_nonfinite : bool
        Replace NaN and infinity in float files by 0.
    start : float >= 0
        Where to begin [s], to the nearest sample, in every format the same samples as a read from
        the beginning gives.
    duration : float > 0, optional
        How much to read [s], at most to the end. `info.n_samples` is then the excerpt's.
    stream : int
        As for `probe`.

    Raises
    ------
    InputError
        As `probe`; if the excerpt begins at or after the end; while reading, if samples are
        missing, non-finite or far beyond full scale, if the decoder fails, or if the file changes.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        allow_truncated: bool = False,
        fix_nonfinite: bool = False,
        start: float = 0.0,
        duration: float | None = None,
        stream: int = 0,
    ) -> None:
        self._file, self._sound, info = _open(Path(path), allow_truncated, stream)
        try:
            self._first, self._last = _excerpt(info, start, duration)
        except InputError:
            self.__exit__()
            raise
        self._is_guess = _is_guess(self._file, self._sound)
        self._n_promised = info.n_samples
        self.info = replace(info, n_samples=min(self._last, info.n_samples) - self._first)
        self._stamp = self._changes()
        self._allow_truncated = allow_truncated
        self._fix_nonfinite = fix_nonfinite
        self._position = 0  # in the file
        self._problem = ""  # of the end
        self._n_fixed = self._n_clipped = 0  # samples

    @property
    def n_read(self) -> int:
        """Samples per channel of the excerpt that were read so far."""
        return max(0, self._position - self._first)

    @property
    def warnings(self) -> list[str]:
        """What is odd about the file and was done about it, known when all is read."""
        counts = {
            "samples beyond full scale clipped (--subtype FLOAT)": self._n_clipped,
            "non-finite samples taken as silence": self._n_fixed,
        }
        told = [f"{n} {what}" for what, n in counts.items() if n]
        return [*self.info.warnings, *told, *([self._problem] if self._problem else [])]

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sound.close()
        self._file.close()

    def blocks(
        self, n_samples: int, sample_format: SampleFormat | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the file's codes.

        Parameters
        ----------
        n_samples : int > 0
            Samples per channel of every block but the last.
        sample_format : SampleFormat, optional
            Convert the codes to this; by default they are those of ``info.sample_format``.

        Yields
        ------
        np.ndarray, shape=(n_channels, <= n_samples)
            int32 at the bit depth asked for (8 bits: -128..127); float32 for FLOAT, float64 for
            DOUBLE. What is no PCM (MP3, Vorbis, ADPCM …) is decoded as floats, then rounded and
            clipped as `to_codes` does.

        Raises
        ------
        InputError
            As for `Reader`.
        """
        subtype, native = self._sound.subtype, self.info.sample_format
        wanted = sample_format or native
        if subtype not in _EXACT:
            for block in self._read(n_samples, "float32"):
                yield to_codes(block, wanted)
        elif native.bits is None:
            for block in self._read(n_samples, "float32" if subtype == "FLOAT" else "float64"):
                if wanted.bits is not None:
                    self._n_clipped += int((np.abs(block) > 1).sum())
                yield convert_codes(block, native, wanted)
        else:
            for block in self._read(n_samples, "int32"):  # libsndfile fills the upper bits
                yield convert_codes(block >> (32 - native.bits), native, wanted)

    def float_blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield the file as float32, full scale 1, for uses that need no exactness.

        Parameters and errors as for `blocks`; lossy formats are not rounded to 16 bits, and float
        files may pass ±1.
        """
        yield from self._read(n_samples, "float32")

    def _read(self, n_samples: int, dtype: str) -> Iterator[np.ndarray]:
        """Yield (n_channels, <= n_samples) of the excerpt, checked."""
        if (
            self._first
            and self._sound.subtype in _EXACT
            and not isinstance(self._sound, decoding.Sound)
        ):
            self._position = self._sound.seek(self._first)
        while self._position < self._first:  # in MP3, a seek does not find the same samples
            n_skipped = len(self._decode(min(2**16, self._first - self._position), dtype))
            self._position += n_skipped
            if not n_skipped:
                break
        waiting = None  # until there is more, or the end has been looked at
        while n := min(n_samples, self._last - self._position):
            block = self._decode(n, dtype)
            if not self._sound.subtype.startswith("PCM"):
                at = self._position
                self._n_fixed += check_floats(block, self.info, at, self._fix_nonfinite)
            self._position += len(block)
            if len(block):
                if waiting is not None:
                    yield waiting.T  # (n_channels, n_samples)
                waiting = block
            if len(block) < n:
                break
        self._check_end()
        if waiting is not None:
            yield waiting.T

    def _decode(self, n_samples: int, dtype: str) -> np.ndarray:
        """Read (n_samples, n_channels), fewer only at the end."""
        block = np.empty((n_samples, self.info.n_channels), dtype)
        try:
            return self._sound.read(out=block)
        except (soundfile.LibsndfileError, decoding.DecoderError) as error:
            if self._allow_truncated and self._position:
                return block[:0]
            at, what = self._position / self.info.sample_rate, str(error)
            if isinstance(error, soundfile.LibsndfileError):
                what = error.error_string.rstrip(".")
            raise InputError(
                f"{self.info.path}: damaged after {at:.3f} s: {what} "
                "(copy it again, or convert it to wav)"
            ) from error

    def _check_end(self) -> None:
        """Make sure that all promised samples came, from a file that nobody touched."""
        path, promised = self.info.path, min(self._n_promised, self._last)
        if self._changes() != self._stamp:
            raise InputError(f"{path}: changed while it was read (run again when it is complete)")
        problem = ""
        slack = MP3_FRAME if self.info.container == "MP3" else 0
        if self._position < promised - getattr(self._sound, "slack", slack) and not self._is_guess:
            problem = f"header promises {self._n_promised} frames, file holds {self._position}"
        # Where its guess is too short, or a Xing header lies, libsndfile reads no further.
        n_bytes, n_unread = self._stamp[0], self._stamp[0] - self._file.tell()
        if slack and self._position < self._last and n_unread > max(2**16, 0.02 * n_bytes):
            problem = f"{n_unread} of {n_bytes} bytes were not decoded (convert it to wav)"
        if problem and not self._allow_truncated:
            raise InputError(f"{path}: {problem} (export it again, or use --allow-truncated)")
        self._problem = problem
        if not self.n_read:  # the header guessed, and the excerpt begins beyond the real end
            begin, end = (n / self.info.sample_rate for n in (self._first, self._position))
            raise _begins_too_late(path, f"{begin:.3f}", end)

    def _changes(self) -> tuple[int, int]:
        """Return what changes when somebody writes into the file."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns


def _begins_too_late(path: Path, begin: str, end: float) -> InputError:
    return InputError(
        f"{path}: the excerpt begins at {begin} s, but the sound ends at {end:.3f} s "
        "(begin earlier)"
    )


def _excerpt(info: AudioInfo, start: float, duration: float | None) -> tuple[int, int]:
    """Return the first sample of an excerpt and the one after its last.

    The last is not limited to what the header promises: some of them guess.
    """
    endless = 2**60
    if not 0 <= start < endless / info.sample_rate:
        raise InputError(f"{info.path}: an excerpt cannot begin at {start:g} s (0 or later)")
    first = round(start * info.sample_rate)
    if first >= info.n_samples:
        raise _begins_too_late(info.path, f"{start:g}", info.seconds)
    if duration is None:
        return first, endless
    if not duration > 0:
        raise InputError(f"{info.path}: an excerpt cannot last {duration:g} s (more than 0)")
    return first, first + max(1, round(min(duration * info.sample_rate, 2.0**50)))


def check_floats(block: np.ndarray, info: AudioInfo, position: int, fix: bool) -> int:
    """Refuse or zero NaN and infinity, refuse what would overflow the STFT.

    Parameters
    ----------
    block : np.ndarray, shape=(n_samples, n_channels), float
        Changed where it is fixed.
    info : AudioInfo
        Names the file in messages.
    position : int
        Samples before the block.
    fix : bool
        Zero what is not finite; the return value counts it.
    """
    if not block.size or max(block.max(), -block.min()) <= MAX_LEVEL:  # false for NaN
        return 0
    bad = ~np.isfinite(block)
    if bad.any() and not fix:
        at = (position + int(bad.any(axis=1).argmax())) / info.sample_rate
        raise InputError(
            f"{info.path}: non-finite samples, first at {at:.3f} s "
            "(generate.py --fix-nonfinite zeroes them)"
        )
    block[bad] = 0
    loud = np.abs(block).max(axis=1) > MAX_LEVEL
    if loud.any():
        at = (position + int(loud.argmax())) / info.sample_rate
        raise InputError(
            f"{info.path}: sample of {np.abs(block).max():g} at {at:.3f} s, where full "
            f"scale is 1 and {MAX_LEVEL:g} the limit (scale it down)"
        )
    return int(bad.sum())


# --- Codes --------------------------------------------------------------------------------------


def to_float(codes: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert codes of any shape to float32, full scale 1; 32 bits and doubles are rounded."""
    if sample_format.bits is None:
        return codes.astype(np.float32)
    return codes.astype(np.float32) * np.float32(2.0 ** (1 - sample_format.bits))


def to_codes(wav: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert a finite waveform of any shape to the nearest codes.

    Returns
    -------
    np.ndarray, same shape
        int32, clipped; float32 for FLOAT and float64 for DOUBLE, where nothing is clipped.
    """
    bits = sample_format.bits
    if bits is None:
        return wav.astype(np.float32 if sample_format.subtype == "FLOAT" else np.float64)
    assert np.isfinite(wav).all(), "NaN would become a full-scale click"
    # float32 has no room for the largest code of 32 bits, nor for a half code of 24 bits.
    scaled = (wav if bits <= 16 else wav.astype(np.float64)) * 2.0 ** (bits - 1)
    low, high = code_range(bits)
    return np.rint(scaled).clip(low, high).astype(np.int32)


def convert_codes(codes: np.ndarray, native: SampleFormat, wanted: SampleFormat) -> np.ndarray:
    """Convert codes of one sample format to those of another: exact where there is room."""
    if native == wanted:
        return codes
    return to_codes(codes if native.bits is None else codes * 2.0 ** (1 - native.bits), wanted)


def limit_to_remainder(
    vocals: np.ndarray, mixture: np.ndarray, sample_format: SampleFormat
) -> tuple[np.ndarray, int]:
    """Limit the codes of vocals so that mixture − vocals can be written, too.

    With codes from lo to hi and a mixture x, the vocals are limited to
    [max(lo, x − hi), min(hi, x − lo)]. Returns them, and how many changed: in floats none.
    """
    if sample_format.bits is None:
        return vocals, 0
    low, high = code_range(sample_format.bits)
    wide = mixture.astype(np.int64)  # x - lo passes int32 at 32 bits
    limited = vocals.clip(np.maximum(low, wide - high), np.minimum(high, wide - low))
    return limited.astype(vocals.dtype), int((limited != vocals).sum())


def code_range(bits: int) -> tuple[int, int]:
    """Return the lowest and the highest code."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# --- Files ---


def sha256(path: str | os.PathLike) -> str:
    """Hash a file's content, in hexadecimal; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Say what the operating system or libsndfile meant, with the fix."""
    fixes = {
        errno.ENOENT: "no such file (check the name)",
        errno.EACCES: "permission denied (change its permissions)",
        errno.EPERM: "permission denied (change its permissions)",
        errno.EROFS: "the disk is read-only (choose another folder)",
        errno.ENAMETOOLONG: "the name is too long (shorten it)",
        errno.ENOTDIR: "no such file: a part of the path is not a directory (check the name)",
        errno.ELOOP: "the links go round in a circle (check the name)",
        errno.EFBIG: "larger than files may be here (see ulimit -f)",
    }
    number = getattr(error, "errno", None)
    return fixes.get(number) or getattr(error, "strerror", None) or str(error)
