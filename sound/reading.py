"""Sound files: what they are, reading block by block, sample formats.

Samples travel as *codes*, the integers that stand in the file (-32768..32767 for 16 bits), so that
what is read, split and written adds up exactly; float files keep their floats. Arrays are
(n_channels, n_samples). Every problem with a file is an `InputError` of one line.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from hparams import RANGES, InputError
from sound import decoding, headers

MAX_CHANNELS = 1024  # as in libsndfile
MAX_LEVEL = 1e6  # +120 dB re full scale: louder float samples would overflow the STFT

# A read takes at least this many samples, for speed. Written blocks stay below 65536 samples, above
# which libsndfile's Vorbis encoder crashes.
DISK_BLOCK = 16384

_BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": None, "DOUBLE": None}
_ENDLESS = 2**60  # samples
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


def probe(path: str | os.PathLike, allow_truncated: bool = False) -> AudioInfo:
    """Read a sound file's header and say at once what is wrong with the file.

    Parameters
    ----------
    path : path-like
        Any name the file system allows; the content decides the format, not the extension.
    allow_truncated : bool
        Accept a file that is cut off; `n_samples` is then what the file holds.

    Returns
    -------
    AudioInfo

    Raises
    ------
    InputError
        If there is no such file, it is not a regular readable file, is empty, is not audio, holds
        no samples or fewer than its header promises, or has a sample rate out of range.
    """
    file, sound, info = _open(Path(path), allow_truncated)
    with file, sound:
        return info


def sample_format(subtype: str) -> SampleFormat:
    """Choose what to write for a libsndfile subtype: itself, or PCM_16 where that is not kept."""
    if subtype == "PCM_S8":  # in AIFF and FLAC; the same codes are called unsigned in a WAV
        subtype = "PCM_U8"
    if subtype not in _BITS:
        subtype = "PCM_16"
    return SampleFormat(subtype, _BITS[subtype])


def _open(path: Path, allow_truncated: bool) -> tuple[BinaryIO, Sound, AudioInfo]:
    """Open and check a sound file; the caller closes file and sound."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_open_regular(path))
        sound = stack.enter_context(_open_sound(path, file))
        info = _inspect(path, file, sound, allow_truncated)
        stack.pop_all()  # all is well: they stay open
    return file, sound, info


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file; libsndfile itself would only say "System error."."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{path}: is a directory (name a sound file)")
        if not stat.S_ISREG(mode):  # opening a FIFO would wait for ever
            raise InputError(f"{path}: is not a regular file (save the sound to a file first)")
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the caller closes it)
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"{path}: no such file (a name cannot hold a null byte)") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise InputError(f"{path}: empty file (copy or download it again)")
    return file


def _open_sound(path: Path, file: BinaryIO) -> Sound:
    """Let libsndfile look at the content; by descriptor, because it guesses from odd names."""
    try:
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
        # Otherwise soundfile seeks to where it already is after every read, and libsndfile 1.2.2
        # then goes on with other samples in MP3 (up to 0.7 of full scale were seen) and Opus.
        sound.seekable = lambda: False
        return sound
    except soundfile.LibsndfileError as error:
        what, container = error.error_string.rstrip("."), decoding.container_of(file)
        if container is not None:
            try:
                return decoding.open_sound(path, file, container)
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
    n_samples, problem, warning = headers.check_length(file.fileno(), sound)
    if problem and not allow_truncated:
        raise InputError(f"{path}: {problem} (export it again, or generate.py --allow-truncated)")
    sound_tags = sound.copy_metadata()
    return AudioInfo(
        path=path,
        sample_rate=sound.samplerate,
        n_channels=sound.channels,
        n_samples=n_samples,
        sample_format=sample_format(sound.subtype),
        container=sound.format,
        warnings=tuple(text for text in (problem, warning) if text),
        tags={name: sound_tags[name] for name in sorted(sound_tags) if name != "software"},
    )


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
        Replace NaN and infinity in float files by 0; `n_fixed` counts them.
    start : float >= 0
        Where to begin [s], to the nearest sample, in every format the same samples as a read from
        the beginning gives.
    duration : float > 0, optional
        How much to read [s], at most to the end. `info.n_samples` is then the excerpt's.

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
    ) -> None:
        self._file, self._sound, info = _open(Path(path), allow_truncated)
        try:
            self._first, self._last = _excerpt(info, start, duration)
        except InputError:
            self.__exit__()
            raise
        self._n_promised = info.n_samples
        self.info = replace(info, n_samples=min(self._last, info.n_samples) - self._first)
        self._stamp = _stamp(self._file)
        self._allow_truncated = allow_truncated
        self._fix_nonfinite = fix_nonfinite
        self._position = 0  # in the file
        self.n_fixed = 0  # non-finite samples zeroed so far
        self.n_clipped = 0  # samples beyond full scale, which the codes asked for cannot hold

    @property
    def n_read(self) -> int:
        """Samples per channel of the excerpt that were read so far."""
        return max(0, min(self._position, self._last) - self._first)

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
        if subtype not in headers.SAMPLE_BYTES:
            for block in self._read(n_samples, "float32"):
                yield to_codes(block, wanted)
        elif native.bits is None:
            for block in self._read(n_samples, "float32" if subtype == "FLOAT" else "float64"):
                if wanted.bits is not None:
                    self.n_clipped += int((np.abs(block) > 1).sum())
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
        """Yield (n_channels, <= n_samples) of the excerpt from large reads, checked."""
        n_disk = n_samples * -(-DISK_BLOCK // n_samples)  # a whole number of blocks
        if self._first and _seeks_exactly(self._sound):
            self._position = self._sound.seek(self._first)
        held = None  # what is left of a read that does not begin where the excerpt does
        while self._position < self._last and len(block := self._read_once(n_disk, dtype)):
            begin, end = self._first - self._position, self._last - self._position
            skipped = max(0, begin)
            wanted = block[skipped:end]
            self._check_floats(wanted, self._position + skipped)
            self._position += len(block)
            if held is not None:
                wanted = np.concatenate([held, wanted])
            n_whole = len(wanted) - len(wanted) % n_samples
            held = wanted[n_whole:] if n_whole < len(wanted) else None
            for start in range(0, n_whole, n_samples):
                yield wanted[start : start + n_samples].T  # (n_channels, n_samples)
        self._check_end()
        if held is not None:
            yield held.T

    def _read_once(self, n_samples: int, dtype: str) -> np.ndarray:
        """Read (<= n_samples, n_channels), empty at the end."""
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

    def _check_floats(self, block: np.ndarray, position: int) -> None:
        """Refuse or zero NaN and infinity, refuse what would overflow; changes `block`."""
        if self._sound.subtype.startswith("PCM") or not block.size:
            return
        n_disk, dtype = DISK_BLOCK, block.dtype.name

        def count_rest() -> int:
            n_bad = 0
            while (rest := self._read_once(n_disk, dtype)).size:
                n_bad += int((~np.isfinite(rest)).sum())
            return n_bad

        self.n_fixed += check_floats(block, self.info, position, self._fix_nonfinite, count_rest)

    def _check_end(self) -> None:
        """Make sure that all promised samples came, from a file that nobody touched."""
        path, promised = self.info.path, min(self._n_promised, self._last)
        if _stamp(self._file) != self._stamp:
            raise InputError(f"{path}: changed while it was read (run again when it is complete)")
        slack = headers.MP3_FRAME if self.info.container == "MP3" else 0
        slack = getattr(self._sound, "slack", slack)
        if self._position < promised - slack and not self._allow_truncated:
            raise InputError(
                f"{path}: header promises {self._n_promised} frames, file holds {self._position} "
                "(export it again, or generate.py --allow-truncated)"
            )
        if not self.n_read:  # the header guessed, and the excerpt begins beyond the real end
            begin, end = (n / self.info.sample_rate for n in (self._first, self._position))
            raise _begins_too_late(path, f"{begin:.3f}", end)


def _seeks_exactly(sound: Sound) -> bool:
    """Say whether seeking finds the sample that reading from the start would: not in MP3."""
    return isinstance(sound, soundfile.SoundFile) and sound.subtype in headers.SAMPLE_BYTES


def _begins_too_late(path: Path, begin: str, end: float) -> InputError:
    return InputError(
        f"{path}: the excerpt begins at {begin} s, but the sound ends at {end:.3f} s "
        "(begin earlier)"
    )


def _excerpt(info: AudioInfo, start: float, duration: float | None) -> tuple[int, int]:
    """Return the first sample of an excerpt and the one after its last, at most `_ENDLESS`.

    The last is not limited to what the header promises: some of them guess.
    """
    first, last = 0, _ENDLESS
    if not 0 <= start < _ENDLESS / info.sample_rate:
        raise InputError(f"{info.path}: an excerpt cannot begin at {start:g} s (0 or later)")
    first = round(start * info.sample_rate)
    if first >= info.n_samples:
        raise _begins_too_late(info.path, f"{start:g}", info.seconds)
    if duration is not None:
        if not duration > 0:
            raise InputError(f"{info.path}: an excerpt cannot last {duration:g} s (more than 0)")
        last = first + max(1, round(min(duration * info.sample_rate, float(2**50))))
    return first, last


def check_floats(
    block: np.ndarray,
    info: AudioInfo,
    position: int,
    fix: bool,
    count_rest: Callable[[], int] = lambda: 0,
) -> int:
    """Refuse or zero NaN and infinity, refuse what would overflow.

    Parameters
    ----------
    block : np.ndarray, shape=(n_samples, n_channels), float
        Changed where it is fixed.
    info : AudioInfo
        Names the file in messages.
    position : int
        Samples before the block.
    fix : bool
        Zero what is not finite.
    count_rest : callable
        Counts what is not finite after this block, so that the message needs no second run.

    Returns
    -------
    int
        Samples fixed.

    Raises
    ------
    InputError
        If samples are not finite, or larger than `MAX_LEVEL`.
    """
    if not block.size or max(block.max(), -block.min()) <= MAX_LEVEL:  # false for NaN
        return 0
    bad = ~np.isfinite(block)
    n_bad = int(bad.sum())
    if n_bad and not fix:
        at = (position + int(bad.any(axis=1).argmax())) / info.sample_rate
        n_bad += count_rest()
        noun = "sample" if n_bad == 1 else "samples"
        raise InputError(
            f"{info.path}: {n_bad} non-finite {noun}, first at {at:.3f} s "
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
    return n_bad


def _stamp(file: BinaryIO) -> tuple[int, int]:
    """Return what changes when somebody writes into a file."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


# --- Codes --------------------------------------------------------------------------------------


def to_float(codes: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert codes to float32, full scale 1; 32-bit integers and doubles are rounded.

    Parameters
    ----------
    codes : np.ndarray, any shape
        Integers at the bit depth of `sample_format`, or floats.
    sample_format : SampleFormat

    Returns
    -------
    np.ndarray, same shape, float32
        Integers lie in [-1, 1].
    """
    if sample_format.bits is None:
        return codes.astype(np.float32)
    return codes.astype(np.float32) * np.float32(2.0 ** (1 - sample_format.bits))


def to_codes(wav: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert a waveform to the nearest codes, clipped to their range.

    Parameters
    ----------
    wav : np.ndarray, any shape, float
        Full scale is 1; finite.
    sample_format : SampleFormat

    Returns
    -------
    np.ndarray, same shape
        int32; float32 for FLOAT and float64 for DOUBLE, where nothing is clipped.
    """
    bits = sample_format.bits
    if bits is None:
        return wav.astype(np.float32 if sample_format.subtype == "FLOAT" else np.float64)
    assert np.isfinite(wav).all(), "NaN would become a full-scale click"
    # float32 has no room for the largest code of 32 bits, nor for a half code of 24 bits.
    scaled = wav.astype(np.float64 if bits > 16 else np.float32) * 2.0 ** (bits - 1)
    low, high = code_range(bits)
    return np.rint(scaled).clip(low, high).astype(np.int32)


def convert_codes(codes: np.ndarray, native: SampleFormat, wanted: SampleFormat) -> np.ndarray:
    """Convert codes of one sample format to those of another.

    Parameters
    ----------
    codes : np.ndarray, any shape
        Codes of `native`.
    native, wanted : SampleFormat

    Returns
    -------
    np.ndarray, same shape
        Codes of `wanted`: the same ones if the formats are the same; exact from few bits to more
        and from integers to floats that have the room, otherwise rounded and clipped.
    """
    if native == wanted:
        return codes
    if native.bits is None:
        return to_codes(codes, wanted)
    if wanted.bits is None:
        wav = codes * 2.0 ** (1 - native.bits)
        return wav.astype(np.float32 if wanted.subtype == "FLOAT" else np.float64)
    n_lost = native.bits - wanted.bits
    if n_lost <= 0:
        return codes << -n_lost
    rounded = np.rint(codes * 2.0**-n_lost)
    return rounded.clip(*code_range(wanted.bits)).astype(np.int32)


def limit_to_remainder(
    vocals: np.ndarray, mixture: np.ndarray, sample_format: SampleFormat
) -> tuple[np.ndarray, int]:
    """Limit vocals so that mixture − vocals can be written, too.

    With codes from lo to hi and a mixture x, the vocals are limited to
    [max(lo, x − hi), min(hi, x − lo)].

    Parameters
    ----------
    vocals, mixture : np.ndarray, same shape
        Codes.
    sample_format : SampleFormat

    Returns
    -------
    vocals : np.ndarray, same shape and dtype
    n_limited : int
        Codes that changed; always 0 in float formats, which have no limits.
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
