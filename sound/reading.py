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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from hparams import RANGES, InputError
from sound import containers, decoding

MAX_CHANNELS = 1024  # as in libsndfile
MAX_LEVEL = 1e6  # +120 dB re full scale: louder float samples would overflow the STFT
MP3_FRAME = 1152  # samples; an MP3 header may promise up to one frame more than is decoded
# Written blocks stay below 65536 samples, above which libsndfile's Vorbis encoder crashes.
DISK_BLOCK = 16384

BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": None, "DOUBLE": None}
_EXACT = (*BITS, "PCM_S8")  # what libsndfile gives as it stands in the file, and seeks in exactly

OpenSound = soundfile.SoundFile | decoding.Sound  # what both of them can


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


def probe(path: str | os.PathLike, allow_truncated: bool = False, stream: int = 0) -> AudioInfo:
    """Read a sound file's header and say at once what is wrong with the file.

    The content decides the format, not the extension. With `allow_truncated` a file may be cut off,
    and `n_samples` is what it holds; `stream` is which sound of a .stem.mp4, which has five.
    InputError if there is no such file, it is not a regular readable file, is empty, is not audio,
    holds no samples or fewer than its header promises, or has a sample rate out of range.
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
    subtype = "PCM_U8" if subtype == "PCM_S8" else subtype  # as a WAV calls the same codes
    subtype = subtype if subtype in BITS else "PCM_16"
    return SampleFormat(subtype, BITS[subtype])


def _open(path: Path, allow_truncated: bool, stream: int) -> tuple[BinaryIO, OpenSound, AudioInfo]:
    """Open and check a sound file; the caller closes file and sound."""
    check_path(path)
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb", buffering=0))
        except OSError as error:
            raise InputError(f"{path}: {reason(error)}") from error
        sound = stack.enter_context(_open_sound(path, file, stream))
        info = _inspect(path, file, sound, allow_truncated, stream)
        stack.pop_all()  # all is well: they stay open
    return file, sound, info


def _open_sound(path: Path, file: BinaryIO, stream: int) -> OpenSound:
    """Let libsndfile look at the content, not at the name: it guesses from odd ones."""
    try:
        # Windows has descriptors of a library's own.
        return _soundfile(file.fileno() if os.name == "posix" else file)
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


def _soundfile(source: int | BinaryIO) -> soundfile.SoundFile:
    sound = soundfile.SoundFile(source, closefd=False)
    # Otherwise soundfile seeks to where it already is after every read, and libsndfile 1.2.2
    # then goes on with other samples in MP3 (up to 0.7 of full scale were seen) and Opus.
    sound.seekable = lambda: False
    return sound


def _count(path: Path, stream: int) -> int:
    """Decode a file to its end, as its header tells no length."""
    n_samples = 0
    with open(path, "rb", buffering=0) as file, _open_sound(path, file, stream) as sound:
        block = np.empty((2**16, sound.channels), np.float32)
        try:
            while n := len(sound.read(out=block)):
                n_samples += n
        except (soundfile.LibsndfileError, decoding.DecoderError) as error:
            raise InputError(f"{path}: damaged, and no length in its header (copy it)") from error
    return n_samples


def _inspect(
    path: Path, file: BinaryIO, sound: OpenSound, allow_truncated: bool, stream: int
) -> AudioInfo:
    """Compare what the header says with what the file can hold."""
    low, high = RANGES["sample_rate"]
    position = file.tell()
    is_told = sound.frames < decoding.UNKNOWN_LENGTH
    n_samples = sound.frames if is_told else _count(path, stream)
    if n_samples <= 0:
        raise InputError(f"{path}: no audio samples (record or copy it again)")
    if not low <= sound.samplerate <= high:
        raise InputError(
            f"{path}: sample rate {sound.samplerate} Hz is not between {low:g} and {high:g} Hz "
            "(convert it, or repair its header)"
        )
    problem, warning = containers.faults(file, sound)
    file.seek(position)
    n_sounds = getattr(sound, "n_sounds", 1)
    if n_sounds > 1 and not path.name.lower().endswith(decoding.STEM_MP4):
        warning = f"holds {n_sounds} sounds, of which the first is taken"
    if problem and not allow_truncated:
        raise InputError(f"{path}: {problem} (export it again, or generate.py --allow-truncated)")
    tags = sound.copy_metadata()
    return AudioInfo(
        path=path,
        sample_rate=sound.samplerate,
        n_channels=sound.channels,
        n_samples=n_samples,
        sample_format=sample_format(sound.subtype),
        container=sound.format,
        warnings=tuple(text for text in (problem, warning) if text),
        # What is not in UTF-8 came as "\ufffd".
        tags={k: tags[k] for k in sorted(tags) if "\ufffd" not in tags[k]},
    )


class Reader(contextlib.AbstractContextManager):
    """Read a sound file once, block by block; close it by leaving the ``with`` block.

    `start` and `duration` [s] choose an excerpt, whose samples are in every format those of a read
    from the beginning, and whose length `info.n_samples` then is; the rest is as for `probe`.
    InputError as there; if the excerpt begins at or after the end; while reading, if samples are
    missing, non-finite or far beyond full scale, or if the decoder fails.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        allow_truncated: bool = False,
        start: float = 0.0,
        duration: float | None = None,
        stream: int = 0,
    ) -> None:
        self._file, self._sound, info = _open(Path(path), allow_truncated, stream)
        self._n_promised = info.n_samples
        self._endless, self._is_promise = _endless(self._file, self._sound)
        try:
            self._first, self._last = _excerpt(info, start, duration)
            if self._first >= info.n_samples and self._endless is None:
                raise _begins_too_late(info, self._first, info.n_samples)
        except InputError:
            self.__exit__()
            raise
        if self._sound.format == "FLAC" and self._endless:
            self._sound.close()
            self._sound = _soundfile(self._endless)
        # Up to here libsndfile reads; what follows, if something does, is decoded without a header.
        self._n_limit = 2**62 if self._endless is None else info.n_samples
        n_samples = max(0, min(self._last, info.n_samples) - self._first)
        self.info = replace(info, n_samples=n_samples)
        self._allow_truncated = allow_truncated
        self._position = 0  # in the file
        self._problem = ""  # of the end
        self._n_clipped = 0  # samples

    @property
    def n_read(self) -> int:
        """Samples per channel of the excerpt that were read so far."""
        return max(0, self._position - self._first)

    @property
    def warnings(self) -> list[str]:
        """What is odd about the file and was done about it, known when all is read."""
        clipped = f"{self._n_clipped} samples beyond full scale clipped (--subtype FLOAT)"
        told = [clipped if self._n_clipped else "", self._problem]
        return [*self.info.warnings, *filter(None, told)]

    def __exit__(self, *_: object) -> None:
        self._sound.close()
        self._file.close()

    def blocks(
        self, n_samples: int, sample_format: SampleFormat | None = None
    ) -> Iterator[np.ndarray]:
        """Yield the file's codes, (n_channels, n_samples), fewer only at the end.

        They are int32 at the bit depth of `sample_format`, by default the file's own (8 bits:
        -128..127); float32 for FLOAT, float64 for DOUBLE. What is no PCM (MP3, Vorbis, ADPCM …)
        is decoded as floats, then rounded and clipped as `to_codes` does.
        """
        subtype, native = self._sound.subtype, self.info.sample_format
        wanted = sample_format or native
        dtype = {"FLOAT": "float32", "DOUBLE": "float64"}.get(subtype, "int32")
        for block in self._read(n_samples, dtype if subtype in _EXACT else "float32"):
            if subtype not in _EXACT:
                yield to_codes(block, wanted)
            elif native.bits is not None:  # libsndfile fills the upper bits
                yield convert_codes(block >> (32 - native.bits), native, wanted)
            else:
                if wanted.bits is not None:
                    self._n_clipped += int((np.abs(block) > 1).sum())
                yield convert_codes(block, native, wanted)

    def float_blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield the file as float32, full scale 1, which lossy and float files may pass."""
        yield from self._read(n_samples, "float32")

    def read(self) -> np.ndarray:
        """Return all of it as `float_blocks` does: (n_channels, n_samples)."""
        return np.concatenate(list(self.float_blocks(DISK_BLOCK)), axis=1)

    def _read(self, n_samples: int, dtype: str) -> Iterator[np.ndarray]:
        """Yield (n_channels, <= n_samples) of the excerpt, checked."""
        if 0 < self._first < self._n_promised and self._sound.subtype in _EXACT:
            try:
                self._position = self._sound.seek(self._first)
            except soundfile.LibsndfileError as error:
                raise self._damage(error) from error
        while self._position < self._first:  # in MP3, a seek does not find the same samples
            n_skipped = len(self._decode(min(2**16, self._first - self._position), dtype))
            self._position += n_skipped
            if not n_skipped:
                break
        while n := min(n_samples, self._last - self._position):
            block = self._decode(n, dtype)
            if block.dtype.kind == "f":
                check_floats(block, self.info, self._position)
            self._position += len(block)
            if len(block):
                yield block.T  # (n_channels, n_samples)
            if len(block) < n:
                break
        self._check_end()

    def _decode(self, n_samples: int, dtype: str) -> np.ndarray:
        """Read (n_samples, n_channels), fewer only at the end."""
        block = np.empty((n_samples, self.info.n_channels), dtype)
        n_promised, n_read = self._n_limit - self._position, 0
        try:
            n_read = len(self._sound.read(out=block[:n_promised]))
            if n_read == n_promised and self._goes_on():
                n_read += len(self._sound.read(out=block[n_read:]))
        except (soundfile.LibsndfileError, decoding.DecoderError) as error:
            is_tag = self._position + n_read == self._n_promised  # and no sound
            is_tag &= self._sound.format != "FLAC" or not containers.has_second_flac(self._file)
            if not is_tag and not (self._allow_truncated and self._position):
                raise self._damage(error) from error
        return block[:n_read]

    def _damage(self, error: soundfile.LibsndfileError | decoding.DecoderError) -> InputError:
        at, what = self._position / self.info.sample_rate, str(error)
        if isinstance(error, soundfile.LibsndfileError):
            what = error.error_string.rstrip(".")
        return InputError(
            f"{self.info.path}: damaged after {at:.3f} s: {what} "
            "(copy it again, or convert it to wav)"
        )

    def _goes_on(self) -> bool:
        """Whether there may be sound where the header promises no more; it is read next."""
        self._n_limit = 2**62
        if self._sound.format == "FLAC":
            return True
        if self._endless.end - self._file.tell() <= containers.MOST_FRAME:
            return False
        try:
            sound, n_left = _soundfile(self._endless), self._n_promised
            while n_left:  # in MP3, a seek does not find the same samples
                block = np.empty((min(n_left, 2**16), sound.channels), np.float32)
                n_left -= len(sound.read(out=block))
        except soundfile.LibsndfileError:  # no sound, but a tag, say
            return False
        self._sound.close()
        self._sound = sound
        return True

    def _check_end(self) -> None:
        """Make sure that all promised samples came."""
        path, promised, problem = self.info.path, min(self._n_promised, self._last), ""
        begin = self._file.tell()  # of what was not decoded
        is_mpeg = self._sound.subtype.startswith("MPEG")
        slack = MP3_FRAME if is_mpeg else getattr(self._sound, "slack", 0)
        lengths = f"header promises {self._n_promised} frames, file holds {self._position}"
        if self._position < promised - slack and self._is_promise():
            problem = lengths
        elif self._position > self._n_promised and self._endless and self._is_promise():
            self._problem = lengths
        elif is_mpeg and self._endless and self._position < self._last:
            end = self._endless.end
            if end - begin > containers.MOST_FRAME and containers.has_mpeg(self._file, begin, end):
                problem = f"{end - begin} bytes of another or a damaged sound follow"
        if problem and not self._allow_truncated:
            raise InputError(f"{path}: {problem} (export it again, or use --allow-truncated)")
        self._problem = self._problem or problem
        if not self.n_read:  # the header guessed, and the excerpt begins beyond the real end
            raise _begins_too_late(self.info, self._first, self._position)


def _endless(
    file: BinaryIO, sound: OpenSound
) -> tuple[containers.Pieces | None, Callable[[], bool]]:
    """Make a file of a sound that hides how long it is, where a header may be wrong about that.

    Returns also what says whether fewer samples than the header promises mean damage.
    """
    position, is_promise = file.tell(), lambda: True
    if isinstance(sound, decoding.Sound):
        return None, is_promise
    endless = None
    if sound.format == "FLAC":
        endless = containers.endless_flac(file)
    elif sound.subtype.startswith("MPEG"):
        is_mp3 = sound.format == "MP3"
        begin, n_bytes = (0, 2**62) if is_mp3 else containers.chunks_of(file)[0][b"data"]
        endless, is_promise = containers.endless_mpeg(file, begin, n_bytes, sound.frames)
    file.seek(position)
    return endless, is_promise


def _begins_too_late(info: AudioInfo, first: int, n_samples: int) -> InputError:
    begin, end = first / info.sample_rate, n_samples / info.sample_rate
    return InputError(
        f"{info.path}: the excerpt begins at {begin:.3f} s, but the sound ends at {end:.3f} s "
        "(begin earlier)"
    )


def _excerpt(info: AudioInfo, start: float, duration: float | None) -> tuple[int, int]:
    """Return the first sample of an excerpt and the one after its last.

    The last is not limited to what the header promises: some of them guess.
    """
    first = round(min(start * info.sample_rate, 2.0**60))
    if duration is None:
        return first, 2**60
    return first, first + max(1, round(min(duration * info.sample_rate, 2.0**50)))


def check_floats(block: np.ndarray, info: AudioInfo, position: int) -> None:
    """Refuse NaN, infinity, and what would overflow the STFT.

    The block, (n_samples, n_channels), begins at the sample `position`.
    """
    if not block.size or max(block.max(), -block.min()) <= MAX_LEVEL:  # false for NaN
        return
    first = int((~(np.abs(block) <= MAX_LEVEL)).any(axis=1).argmax())
    raise InputError(
        f"{info.path}: sample of {np.abs(block[first]).max():g} at "
        f"{(position + first) / info.sample_rate:.3f} s, where full scale is 1 and {MAX_LEVEL:g} "
        "the limit (scale it down, or repair it)"
    )


def to_float(codes: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert codes of any shape to float32, full scale 1; 32 bits and doubles are rounded."""
    if sample_format.bits is None:
        return codes.astype(np.float32)
    return codes.astype(np.float32) * np.float32(2.0 ** (1 - sample_format.bits))


def to_codes(wav: np.ndarray, sample_format: SampleFormat) -> np.ndarray:
    """Convert a finite waveform to the nearest codes, clipped; float formats are not clipped."""
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


def sha256(path: str | os.PathLike) -> str:
    """Hash a file's content, in hexadecimal; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Say what the operating system meant, with the fix."""
    fixes = {
        errno.ENOENT: "no such file (check the name)",
        errno.EACCES: "permission denied (change its permissions)",
        errno.EPERM: "permission denied (change its permissions)",
    }
    number = getattr(error, "errno", None)
    return fixes.get(number) or f"{getattr(error, 'strerror', None) or error} (check the name)"
