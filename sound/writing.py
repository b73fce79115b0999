"""Output files: names, formats, checks before any work; they appear whole and together.

`AtomicFiles` opens temporary files beside their targets and renames them all at the end;
`SoundWriter` writes a sound into one of them and reads it back.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from hparams import InputError
from sound.headers import SAMPLE_BYTES
from sound.reading import DISK_BLOCK, AudioInfo, SampleFormat, code_range, reason

MAX_WAV_BYTES = 2**32 - 2**16  # the sizes in a WAV header have 32 bits; RF64 beyond this
MAX_NAME_BYTES = 255  # of a file name, on every common file system
CONTAINERS = ("wav", "flac", "ogg", "mp3")
MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)

_SUBTYPES = {  # what a lossless container keeps, and the bits of its samples
    "wav": {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": None, "DOUBLE": None},
    "flac": {"PCM_S8": 8, "PCM_16": 16, "PCM_24": 24},
}
_LOSSY = {"ogg": "VORBIS", "mp3": "MPEG_LAYER_III"}
# Measured on a minute of a song, 44.1 kHz stereo (SNR is no measure of how it sounds, but it ranks
# the settings of one encoder): Vorbis at 0, 0.1, 0.2 and libsndfile's own choice takes 295, 221,
# 179 and 101 kbit/s for 37, 32, 29 and 21 dB; MP3 with a variable rate at 0, 0.1 and 0.2 takes
# 194, 169 and 146 kbit/s for 34, 31 and 28 dB, a constant 320 kbit/s has 45 dB.
_QUALITY = {
    "ogg": {"compression_level": 0.1},
    "mp3": {"compression_level": 0.0, "bitrate_mode": "VARIABLE"},
}
_LOSSY_FRAME = {"ogg": 0, "mp3": 1152}  # samples that a length may be wrong by


# --- Formats --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFormat:
    """How a sound is written: the container, and the codes that `SoundWriter.write` takes."""

    container: str  # "wav", "flac", "ogg" or "mp3"
    sample_format: SampleFormat  # FLOAT for ogg and mp3

    @property
    def subtype(self) -> str:
        """What is in the file, in libsndfile's words."""
        if self.container in _LOSSY:
            return _LOSSY[self.container]
        subtype = self.sample_format.subtype
        return "PCM_S8" if (self.container, subtype) == ("flac", "PCM_U8") else subtype


def choose_format(
    info: AudioInfo, container: str = "wav", subtype: str | None = None
) -> OutputFormat:
    """Choose how to write a sound like an input, and refuse what the container cannot hold.

    Parameters
    ----------
    info : AudioInfo
        The input: its rate, channels and sample format.
    container : {"wav", "flac", "ogg", "mp3"}
    subtype : str, optional
        libsndfile's name: PCM_16, PCM_24, FLOAT … By default the input's sample format; FLAC,
        which has neither floats nor 32 bits, gets 24 bits for them.

    Returns
    -------
    OutputFormat

    Raises
    ------
    InputError
        If the container has no such subtype, sample rate or number of channels.
    """
    if container not in CONTAINERS:
        raise InputError(
            f"there is no format {container!r} (choose one of {', '.join(CONTAINERS)})"
        )
    _check_limits(info, container)
    if container in _LOSSY:
        if subtype not in (None, _LOSSY[container]):
            raise InputError(
                f"{container} has no subtype {subtype} (it is always lossy: leave it out)"
            )
        return OutputFormat(container, SampleFormat("FLOAT", None))
    known = _SUBTYPES[container]
    if subtype is None:
        subtype = info.sample_format.subtype
        if container == "flac":
            subtype = {"PCM_U8": "PCM_S8", "PCM_16": "PCM_16"}.get(subtype, "PCM_24")
    elif subtype == "PCM_S8" and container == "wav":  # the same codes are called unsigned there
        subtype = "PCM_U8"
    elif subtype == "PCM_U8" and container == "flac":
        subtype = "PCM_S8"
    if subtype not in known:
        raise InputError(f"{container} has no subtype {subtype} (choose one of {', '.join(known)})")
    codes = "PCM_U8" if subtype == "PCM_S8" else subtype
    return OutputFormat(container, SampleFormat(codes, known[subtype]))


def _check_limits(info: AudioInfo, container: str) -> None:
    """Refuse the rates and channels that an encoder refuses, or (Vorbis) crashes on."""
    rate, n_channels, what = info.sample_rate, info.n_channels, ""
    if container == "mp3" and rate not in MPEG_RATES:
        what = f"MP3 allows only {', '.join(map(str, MPEG_RATES))} Hz, this is {rate} Hz"
    elif container == "ogg" and rate > 192_000:
        what = f"Vorbis allows at most 192000 Hz, this is {rate} Hz"
    elif container == "flac" and rate > 65535 and rate % 10:
        what = f"FLAC allows only multiples of 10 Hz above 65535 Hz, this is {rate} Hz"
    most = {"mp3": 2, "flac": 8, "ogg": 255}.get(container, n_channels)
    if n_channels > most:
        what = f"{container} allows at most {most} channels, this has {n_channels}"
    if what:
        raise InputError(f"{info.path}: {what} (write wav instead)")


def predicted_bytes(info: AudioInfo, fmt: OutputFormat) -> int:
    """Return the size of a sound as long as the input [bytes], a little generous."""
    n_samples = info.n_samples * info.n_channels
    tags = 4 * sum(len(name) + len(text) + 16 for name, text in info.tags.items())
    if fmt.container in _LOSSY:
        return n_samples * 5 // 8 + tags + 16384  # Vorbis takes this for full-scale noise
    return n_samples * SAMPLE_BYTES[fmt.subtype] + tags + 4096


# --- Names and checks -----------------------------------------------------------------------------


def output_path(directory: str | os.PathLike, source: str | os.PathLike, suffix: str) -> Path:
    """Name an output after its source.

    Parameters
    ----------
    directory : path-like
        Where the output goes.
    source : path-like
        Its name, without folder and last extension, begins the output's name.
    suffix : str
        Ends it, extension included: "_vocals.wav" makes ``a.b.c_vocals.wav`` of ``a.b.c.wav``.

    Returns
    -------
    Path
        At most 255 bytes of name; a longer stem is cut and gets a hash, so that two songs that
        begin alike do not meet.
    """
    stem = Path(source).stem
    room = MAX_NAME_BYTES - len(os.fsencode(suffix))
    if len(os.fsencode(stem)) > room:
        mark = "~" + hashlib.sha256(os.fsencode(stem)).hexdigest()[:8]
        while len(os.fsencode(stem + mark)) > room:
            stem = stem[:-1]  # whole characters
        stem += mark
    return Path(directory) / f"{stem}{suffix}"


Identity = tuple[int, int]  # of a file, whatever links lead to it: device and inode


def identities(paths: Iterable[str | os.PathLike]) -> dict[Identity, Path]:
    """Say which files these are, without those that do not exist."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            found[status.st_dev, status.st_ino] = Path(path)
    return found


def check_outputs(sizes: Mapping[Path, int], inputs: Mapping[Identity, Path]) -> None:
    """Find out before any work whether outputs can be written.

    Parameters
    ----------
    sizes : mapping of Path to int
        The outputs and how large they will be [bytes]; missing directories are created.
    inputs : mapping
        `identities` of files that must not be overwritten.

    Raises
    ------
    InputError
        If an output would overwrite an input or another output, cannot be created, or the disk
        has too little space for all.
    """
    seen = set()
    for path in sizes:
        if (absolute := os.path.abspath(path)) in seen:
            raise InputError(f"{path}: named for two outputs (give each its own name)")
        seen.add(absolute)
        for source in identities([path]).keys() & inputs.keys():
            raise InputError(
                f"{path}: would overwrite the input {inputs[source]} (write to another folder)"
            )
        check_writable(path)
    for directory in sorted({path.parent for path in sizes}):
        n_bytes = sum(n for path, n in sizes.items() if path.parent == directory)
        _check_space(directory, n_bytes)


def check_writable(path: Path) -> None:
    """Make sure that a file can be created or replaced at `path`; creates its directory.

    Raises
    ------
    InputError
        If its directory cannot be created or written to, or `path` is no regular file.
    """
    directory = path.parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mode = os.stat(path).st_mode if path.exists() else stat.S_IFREG
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{directory}: not a directory (choose another folder)") from error
    except OSError as error:
        raise InputError(f"{path}: not writable: {reason(error)}") from error
    if not os.access(directory, os.W_OK | os.X_OK):  # false on a read-only disk even for root
        raise InputError(f"{directory}: not writable (choose another folder)")
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a directory (choose another name)")
    if not stat.S_ISREG(mode):  # renaming onto /dev/null would replace the device
        raise InputError(f"{path}: is not a regular file (choose another name)")


# --- Writing --------------------------------------------------------------------------------------


class AtomicFiles:
    """Write files that appear together, whole, or not at all.

    A context manager: ``files[path]`` is a temporary file beside `path`, open for reading and
    writing. At the end of the ``with`` block all are flushed to disk and renamed; an exception
    removes them instead and leaves what was there before.

    Parameters
    ----------
    sizes : mapping of path-like to int
        The outputs and how large they will be [bytes], for the check of the disk.
    inputs : iterable of path-like
        Files that must not be overwritten.

    Raises
    ------
    InputError
        As `check_outputs`; later, for every OSError of writing: if the disk is full.
    """

    def __init__(
        self, sizes: Mapping[str | os.PathLike, int], inputs: Iterable[str | os.PathLike] = ()
    ) -> None:
        self._sizes = {Path(path): n_bytes for path, n_bytes in sizes.items()}
        self._temporaries = {path: _temporary(path) for path in self._sizes}
        self._files: dict[Path, BinaryIO] = {}
        self._writers: list[SoundWriter] = []
        check_outputs(self._sizes, identities(inputs))

    def __enter__(self) -> AtomicFiles:
        try:
            for path, temporary in self._temporaries.items():
                _remove_stale(path)
                self._files[path] = open(temporary, "w+b")
        except OSError as error:
            raise self._failure(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def __getitem__(self, path: str | os.PathLike) -> BinaryIO:
        return self._files[Path(path)]

    def sound(self, path: str | os.PathLike, info: AudioInfo, fmt: OutputFormat) -> SoundWriter:
        """Begin a sound in one of the files; it is closed and verified with the others."""
        path = Path(path)
        self._writers.append(SoundWriter(self[path], path, info, fmt))
        return self._writers[-1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: object
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except OSError as failed:
            error = failed
        finally:
            self._discard()
        if isinstance(error, OSError) and self._is_ours(error):
            raise self._failure(error) from error

    def _is_ours(self, error: OSError) -> bool:
        """Tell a failed write from what else can go wrong while the files are open."""
        if error.filename is not None:
            named = Path(os.fsdecode(error.filename))
            return named in self._sizes or named in self._temporaries.values()
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)

    def _finish(self) -> None:
        """Flush, verify and rename all files."""
        for writer in self._writers:
            writer.close()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        for path in self._files:  # all of them before the first is replaced
            check_writable(path)
        for path, temporary in self._temporaries.items():
            os.replace(temporary, path)
        for directory in {path.parent for path in self._files}:
            _sync_directory(directory)

    def _failure(self, error: OSError) -> InputError:
        """Remove everything, then explain; in this order, so that "have" counts our own files."""
        self._discard()
        named = Path(os.fsdecode(error.filename or ""))
        path = named if named in self._sizes else next(iter(self._sizes))
        return write_error(path, error, sum(self._sizes.values()))

    def _discard(self) -> None:
        """Close and remove whatever is left of the temporary files."""
        for writer in self._writers:
            writer.abandon()
        for path, file in self._files.items():  # ours only
            with contextlib.suppress(OSError):  # a full disk, again
                file.close()
            self._temporaries[path].unlink(missing_ok=True)


class SoundWriter:
    """Write one sound into an open file.

    Parameters
    ----------
    file : file
        Empty, open for reading and writing.
    path : Path
        What the file will be called, for messages.
    info : AudioInfo
        Rate, channels, tags and expected length.
    fmt : OutputFormat

    Raises
    ------
    OSError
        If the disk is full; `AtomicFiles` makes an InputError of it.
    """

    def __init__(self, file: BinaryIO, path: Path, info: AudioInfo, fmt: OutputFormat) -> None:
        self._file, self._path, self._info, self._format = file, path, info, fmt
        self._bits = fmt.sample_format.bits
        self._n_written = 0
        is_long = predicted_bytes(info, fmt) > MAX_WAV_BYTES
        try:
            # By a descriptor of its own: libsndfile writes its header once more when it closes.
            self._sound = soundfile.SoundFile(
                os.dup(file.fileno()),
                "w",
                samplerate=info.sample_rate,
                channels=info.n_channels,
                subtype=fmt.subtype,
                format="RF64" if fmt.container == "wav" and is_long else fmt.container.upper(),
                **_QUALITY.get(fmt.container, {}),
            )
            self._write_tags()
        except soundfile.LibsndfileError as error:
            raise self._failure(error) from error

    def write(self, codes: np.ndarray) -> None:
        """Append codes.

        Parameters
        ----------
        codes : np.ndarray, shape=(n_channels, any)
            In the format's ``sample_format``. Lossy encoders clip at ±1.

        Raises
        ------
        OSError
            If the disk is full.
        """
        bits = self._bits
        if bits is None:
            assert np.isfinite(codes).all(), "non-finite output"
            data = codes.T.astype(self._dtype, copy=False)
        else:
            low, high = code_range(bits)
            assert codes.size == 0 or (low <= codes.min() and codes.max() <= high), "code range"
            data = codes.T.astype(np.int32) << (32 - bits)  # libsndfile takes the upper bits
        if self._format.container in _LOSSY:
            data = data.clip(-1, 1)
        try:
            for start in range(0, len(data), DISK_BLOCK):
                block = np.ascontiguousarray(data[start : start + DISK_BLOCK])
                self._sound.write(block)
        except (AssertionError, soundfile.LibsndfileError) as error:  # soundfile asserts the count
            raise self._failure(error) from error
        self._n_written += len(data)

    def close(self) -> None:
        """Finish the file and read its header back.

        Raises
        ------
        OSError
            If the disk is full.
        InputError
            If the file does not read back as written.
        """
        if self._sound.closed:
            return
        try:
            self._sound.close()
        except soundfile.LibsndfileError as error:
            raise self._failure(error) from error
        fd = self._file.fileno()
        if self._format.container == "wav":
            _clear_peak_time(fd)
        if self._format.container == "ogg":
            _set_ogg_serial(fd)
        self._verify()

    def abandon(self) -> None:
        """Close without looking."""
        with contextlib.suppress(soundfile.LibsndfileError):  # a full disk, again
            self._sound.close()

    @property
    def _dtype(self) -> type:
        return np.float64 if self._format.sample_format.subtype == "DOUBLE" else np.float32

    def _write_tags(self) -> None:
        """Keep title, artist and so on, as far as the container has room for them."""
        for name, text in self._info.tags.items():
            with contextlib.suppress(soundfile.LibsndfileError):  # no place for this one
                setattr(self._sound, name, text.encode(errors="replace").decode())

    def _verify(self) -> None:
        """Read a finished file's header back and compare."""
        info, fmt = self._info, self._format
        fd = self._file.fileno()
        os.lseek(fd, 0, os.SEEK_SET)
        try:
            with soundfile.SoundFile(fd, closefd=False) as sound:
                seen = (sound.frames, sound.samplerate, sound.channels, sound.subtype)
        except soundfile.LibsndfileError as error:
            raise self._failure(error) from error
        wanted = (self._n_written, info.sample_rate, info.n_channels, fmt.subtype)
        slack = _LOSSY_FRAME.get(fmt.container, 0)
        if abs(seen[0] - wanted[0]) > slack or seen[1:] != wanted[1:]:
            raise InputError(
                f"{self._path}: reads back as {seen}, not {wanted} (is the disk sound?)"
            )

    def _failure(self, error: Exception) -> OSError:
        """Name the file; libsndfile does not tell the reason, so the disk is asked later."""
        what = getattr(error, "error_string", None) or "not all was written"
        return OSError(errno.EIO, what.rstrip("."), str(self._path))


def replace_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], None]) -> None:
    """Write a file aside, flush it to disk and rename it over `path`.

    Parameters
    ----------
    path : path-like
        What was there stays until the new file is whole.
    write : callable
        Gets the temporary file, open for binary writing.

    Raises
    ------
    InputError
        If the directory cannot be written to, or the disk is full.
    """
    path = Path(path)
    check_writable(path)
    _remove_stale(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error) from error
    except RuntimeError as error:  # torch.save's word for a full disk
        if not _is_full(path.parent):
            raise
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_space(directory: Path, n_bytes: int) -> None:
    free = _free_bytes(directory)
    if n_bytes > free:
        raise InputError(_no_space(directory, n_bytes, free))


def _no_space(directory: Path, n_bytes: int | None, free: int) -> str:
    need = "" if n_bytes is None else f"need {n_bytes / 1e6:.3g} MB, "
    return f"no space left on {directory}: {need}have {free / 1e6:.3g} MB (free some)"


def _is_full(directory: Path) -> bool:
    """Guess whether a write failed for want of space, where the library does not say."""
    return _free_bytes(directory) < 2**20


def _free_bytes(directory: Path) -> int:
    try:
        return shutil.disk_usage(directory).free
    except OSError:  # the directory went away: space is not what is missing
        return sys.maxsize


def write_error(path: Path, error: Exception, n_bytes: int | None = None) -> InputError:
    """Explain a failed write; `n_bytes` is what the whole output needs."""
    free = _free_bytes(path.parent)
    number = getattr(error, "errno", None)
    too_large = n_bytes is not None and n_bytes > free  # libsndfile only says "System error."
    if number in (errno.ENOSPC, errno.EDQUOT) or too_large or _is_full(path.parent):
        return InputError(f"{path}: {_no_space(path.parent, n_bytes, free)}")
    return InputError(f"{path}: could not be written: {reason(error)}")


def _temporary(path: Path, pid: int | str | None = None) -> Path:
    """Name a temporary file beside `path`: hidden, with our process id, not too long."""
    end = f".tmp-{os.getpid() if pid is None else pid}"
    name = f".{path.name}"
    if len(os.fsencode(name)) > MAX_NAME_BYTES - 16:
        name = "." + hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(name + end)


def _remove_stale(path: Path) -> None:
    """Remove what killed runs left of `path`."""
    begin = _temporary(path, pid="").name
    for name in os.listdir(path.parent):
        pid = name.removeprefix(begin)
        if name.startswith(begin) and pid.isdigit() and not _is_alive(int(pid)):
            path.with_name(name).unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _clear_peak_time(fd: int) -> None:
    """Zero the time of writing that libsndfile puts into float files: same run, same bytes."""
    position = 12
    while len(entry := os.pread(fd, 8, position)) == 8 and entry[:4] != b"data":
        if entry[:4] == b"PEAK":
            os.pwrite(fd, bytes(4), position + 12)  # after the version
            return
        size = int.from_bytes(entry[4:], "little")
        position += 8 + size + size % 2


def _set_ogg_serial(fd: int) -> None:
    """Replace the random serial number of an Ogg stream by 1: same run, same bytes.

    The checksum of a page [1] is linear: it changes by the checksum of the change, which is the
    same four bytes in every page, followed by as many zeros as there are bytes to the page's end.

    References
    ----------
    .. [1] RFC 3533, section 6.
    """
    position, n_bytes = 0, os.fstat(fd).st_size
    powers = [1 << 8]  # x^8, x^16, x^32 … modulo the polynomial: 1, 2, 4 … bytes of zeros
    while len(powers) < 17:
        powers.append(_gf2_product(powers[-1], powers[-1]))
    while position + 27 <= n_bytes:
        page = os.pread(fd, 27 + 255, position)
        n_page = 27 + page[26] + sum(page[27 : 27 + page[26]])
        change = int.from_bytes(page[14:18], "big") ^ 0x01000000
        n_zeros = n_page - 18 + 4  # a checksum is the remainder after four more zeros
        for i, power in enumerate(powers):
            if n_zeros >> i & 1:
                change = _gf2_product(change, power)
        checksum = int.from_bytes(page[22:26], "little") ^ change
        os.pwrite(fd, struct.pack("<I", 1), position + 14)
        os.pwrite(fd, struct.pack("<I", checksum), position + 22)
        position += n_page


def _gf2_product(a: int, b: int) -> int:
    """Multiply two polynomials of 32 bits modulo that of Ogg's checksum."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        b >>= 1
        a <<= 1
        if a >> 32:
            a ^= 0x104C11DB7
    return product


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot, and need not
            os.fsync(fd)
    finally:
        os.close(fd)
