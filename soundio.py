"""Sound files: headers, block-wise reading and writing, sample formats, atomic outputs.

Samples travel as *codes*, the integers that stand in the file (-32768..32767 for 16 bits), so that
what is read, split and written adds up exactly; float files keep their floats. Arrays are
(n_channels, n_samples). Every problem with a file is an `InputError` of one line. Outputs appear
under their names only when they are whole: written aside, flushed, read back, then renamed.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from hparams import RANGES, InputError

MAX_LEVEL = 1e6  # +120 dB re full scale: louder float samples would overflow the STFT
MAX_WAV_BYTES = 2**32 - 2**16  # the sizes in a WAV header have 32 bits; RF64 beyond this
MAX_NAME_BYTES = 255  # of a file name, on every common file system
MP3_FRAME = 1152  # samples; an MP3 header may promise up to one frame more than is decoded

# A read takes at least this many samples: below about 5000, soundfile's seek after every read
# makes libsndfile 1.2.2 return other samples from Opus files. Written blocks stay below 65536
# samples, above which its Vorbis encoder crashes.
_DISK_BLOCK = 16384

_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8}
_BITS = {"PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32, "FLOAT": None, "DOUBLE": None}
_MPEG_1_KBIT = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_MPEG_2_KBIT = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_UNKNOWN_LENGTH = 2**62  # libsndfile's n_samples for a stream of unknown length is 2**63 - 1


@dataclass(frozen=True)
class SampleFormat:
    """How samples are written: libsndfile's name, and the bits of an integer (None for floats)."""

    subtype: str
    bits: int | None


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a sound file promises.

    `n_samples` counts samples per channel. `warnings` are sentences about oddities that do not
    stop us, without the path.
    """

    path: Path
    sample_rate: int
    n_channels: int
    n_samples: int
    sample_format: SampleFormat
    container: str = "WAV"
    warnings: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Duration [s]."""
        return self.n_samples / self.sample_rate


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


def _open(path: Path, allow_truncated: bool) -> tuple[BinaryIO, soundfile.SoundFile, AudioInfo]:
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
        raise InputError(f"{path}: {_reason(error)}") from error
    except ValueError as error:  # a null byte in the name
        raise InputError(f"{path}: no such file (a name cannot hold a null byte)") from error
    if os.fstat(file.fileno()).st_size == 0:
        file.close()
        raise InputError(f"{path}: empty file (copy or download it again)")
    return file


def _open_sound(path: Path, file: BinaryIO) -> soundfile.SoundFile:
    """Let libsndfile look at the content; by descriptor, because it guesses from odd names."""
    try:
        return soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        if os.pread(file.fileno(), 4, 4) == b"ftyp":
            fix = "m4a and mp4 need converting: ffmpeg -i song.m4a song.wav"
        else:
            fix = "convert it to wav or flac"
        what = error.error_string.rstrip(".")
        raise InputError(f"{path}: not audio that can be read: {what} ({fix})") from error


def _inspect(
    path: Path, file: BinaryIO, sound: soundfile.SoundFile, allow_truncated: bool
) -> AudioInfo:
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
    n_samples, problem, warning = _check_length(file.fileno(), sound)
    if problem and not allow_truncated:
        raise InputError(f"{path}: {problem} (use --allow-truncated)")
    return AudioInfo(
        path=path,
        sample_rate=sound.samplerate,
        n_channels=sound.channels,
        n_samples=n_samples,
        sample_format=sample_format(sound.subtype),
        container=sound.format,
        warnings=tuple(text for text in (problem, warning) if text),
    )


def _check_length(fd: int, sound: soundfile.SoundFile) -> tuple[int, str, str]:
    """Find what libsndfile forgives silently: returns (n_samples, problem, warning), "" for none.

    `n_samples` is what can be read.
    """
    start, n_bytes = _skip_id3(fd), os.fstat(fd).st_size
    magic = os.pread(fd, 4, start)
    if magic == b"OggS":
        return sound.frames, "" if _ogg_ends(fd, n_bytes) else "its end is missing", ""
    if sound.format == "MP3":
        return _check_mp3_length(fd, start, n_bytes, sound.frames)
    found = _find_data(fd, magic, start)
    if found is None:
        return sound.frames, "", ""
    data, promised = found
    held = n_bytes - data
    if promised <= held:
        n_lost = _junk_bytes(fd, magic, data + promised, n_bytes)
        return sound.frames, "", f"{n_lost} bytes after the data chunk ignored" if n_lost else ""
    width = _BYTES.get(sound.subtype, 0) * sound.channels
    n_held = min(sound.frames, held // width) if width else sound.frames
    # Whoever writes into a pipe cannot return to the header and leaves the largest number there.
    # Any other size is believed: a cut file of 3 GB has more than 0x7FFFFFFF in its header, too.
    if promised >= 0xFFFF0000 or 0x7FFF0000 <= promised <= 0x80000000:
        return n_held, "", "its header does not tell its length (written by a pipe?)"
    if width:
        return n_held, f"header promises {promised // width} frames, file holds {n_held}", ""
    return n_held, f"header promises {promised} bytes, file holds {held}", ""


@dataclass(frozen=True)
class _Layout:
    """How a container lists its chunks."""

    n_header: int  # bytes before the first chunk
    entry: str  # struct format of (name, size)
    data: bytes = b"data"  # name of the chunk with the samples
    align: int = 1  # chunks start at multiples of this many bytes
    n_counted: int = 0  # bytes of the entry that its size counts
    n_lead: int = 0  # bytes in the data chunk before the samples


_LAYOUTS = {
    b"RIFF": _Layout(12, "<4sI", align=2),
    b"RIFX": _Layout(12, ">4sI", align=2),
    b"RF64": _Layout(12, "<4sI", align=2),
    b"FORM": _Layout(12, ">4sI", data=b"SSND", align=2, n_lead=8),  # AIFF
    b"caff": _Layout(8, ">4sq"),
    b"riff": _Layout(40, "<16sQ", align=8, n_counted=24),  # Sony Wave64
}


def _find_data(fd: int, magic: bytes, start: int) -> tuple[int, int] | None:
    """Find the samples in a chunked file; returns (offset, promised size) [bytes], or None."""
    if magic == b".snd":  # Sun AU has no chunks, only a fixed header
        offset, size = struct.unpack(">II", os.pread(fd, 8, start + 4))
        return start + offset, size
    layout = _LAYOUTS.get(magic)
    if layout is None:
        return None
    n_entry, size64 = struct.calcsize(layout.entry), 0
    position = start + layout.n_header
    for _ in range(10_000):  # a hostile file can hold millions of empty chunks
        entry = os.pread(fd, n_entry, position)
        if len(entry) < n_entry:
            return None
        name, size = struct.unpack(layout.entry, entry)
        position += n_entry
        size -= layout.n_counted
        if name == b"ds64":  # RF64 keeps its 64-bit sizes here
            size64 = int.from_bytes(os.pread(fd, 8, position + 8), "little")
        if name[:4] == layout.data:
            if magic == b"RF64" and size == 0xFFFFFFFF:
                size = size64
            return position + layout.n_lead, size - layout.n_lead
        if not 0 <= size < 2**62:
            return None
        position += size + -size % layout.align
    return None


def _junk_bytes(fd: int, magic: bytes, end: int, n_bytes: int) -> int:
    """Count the bytes after a RIFF data chunk, if they are no further chunk."""
    end += end % 2
    if magic not in (b"RIFF", b"RIFX", b"RF64") or end >= n_bytes:
        return 0
    entry = os.pread(fd, 8, end)
    if len(entry) == 8:
        name, size = struct.unpack(_LAYOUTS[magic].entry, entry)
        if all(32 <= byte < 127 for byte in name) and end + 8 + size <= n_bytes:
            return 0
    return n_bytes - end


def _skip_id3(fd: int) -> int:
    """Return the size of an ID3v2 tag (titles, cover art) in front of the sound, 0 for none."""
    tag = os.pread(fd, 10, 0)
    if len(tag) < 10 or tag[:3] != b"ID3":
        return 0
    size = 0
    for byte in tag[6:]:  # seven bits in each byte
        size = size << 7 | byte & 0x7F
    return 10 + size


def _ogg_ends(fd: int, n_bytes: int) -> bool:
    """Say whether an Ogg file's last page is whole and marked as the last."""
    tail = os.pread(fd, 65536, max(0, n_bytes - 65536))  # a page has at most 65307 bytes
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27:
        return False
    n_segments = page[26]
    n_page = 27 + n_segments + sum(page[27 : 27 + n_segments])
    return bool(page[5] & 4) and n_page <= len(page)


def _check_mp3_length(fd: int, start: int, n_bytes: int, n_samples: int) -> tuple[int, str, str]:
    """Count an MP3's samples where no Xing header does it; returns as `_check_length`.

    libsndfile then guesses the length from the file's size, cover art included, and the bit rate
    of its beginning; where the guess is too short it reads no further.
    """
    head = os.pread(fd, 4096, start)
    if b"Xing" in head or b"Info" in head:
        return n_samples, "", ""
    n_found, end = _count_mp3_samples(fd, start)
    if n_found > n_samples + 2 * MP3_FRAME:
        problem = f"only {n_samples} of its {n_found} frames can be decoded: convert it to wav"
        return n_samples, problem, ""
    if end > n_bytes:
        return min(n_found, n_samples), "", "its last MP3 frame is cut; it may have been longer"
    if n_bytes - end > 128 and os.pread(fd, 8, end)[:3] not in (b"TAG", b"APE", b"LYR", b"ID3"):
        return n_samples, f"no MP3 frame at byte {end} of {n_bytes}", ""
    return min(n_found, n_samples), "", ""


def _count_mp3_samples(fd: int, position: int) -> tuple[int, int]:
    """Walk over MPEG layer III frames [1] as far as they go; returns (n_samples, end [bytes]).

    References
    ----------
    .. [1] ISO/IEC 11172-3:1993 and 13818-3:1998, 2.4.2.3 (the header of a frame).
    """
    n_samples = 0
    while len(header := os.pread(fd, 4, position)) == 4:
        word = int.from_bytes(header, "big")
        version, rate, index = word >> 19 & 3, word >> 10 & 3, word >> 12 & 15
        is_layer_3 = word >> 21 == 0x7FF and word >> 17 & 3 == 1
        if not is_layer_3 or version == 1 or rate == 3 or index in (0, 15):
            break
        is_mpeg_1 = version == 3
        halvings = {3: 0, 2: 1, 0: 2}[version]  # MPEG 1, 2, 2.5
        sample_rate = (44100, 48000, 32000)[rate] >> halvings
        kbit = (_MPEG_1_KBIT if is_mpeg_1 else _MPEG_2_KBIT)[index]
        padding = word >> 9 & 1
        position += (144 if is_mpeg_1 else 72) * kbit * 1000 // sample_rate + padding
        n_samples += MP3_FRAME if is_mpeg_1 else MP3_FRAME // 2
    return n_samples, position


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

    Raises
    ------
    InputError
        As `probe`; while reading, if samples are missing, non-finite or far beyond full scale, if
        the decoder fails, or if the file changes.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        allow_truncated: bool = False,
        fix_nonfinite: bool = False,
    ) -> None:
        self._file, self._sound, self.info = _open(Path(path), allow_truncated)
        self._stamp = _stamp(self._file)
        self._allow_truncated = allow_truncated
        self._fix_nonfinite = fix_nonfinite
        self.n_read = 0  # samples per channel so far
        self.n_fixed = 0  # non-finite samples zeroed so far

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._sound.close()
        self._file.close()

    def blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield the file's codes.

        Parameters
        ----------
        n_samples : int > 0
            Samples per channel of every block but the last.

        Yields
        ------
        np.ndarray, shape=(n_channels, <= n_samples)
            int32 at the native bit depth (8 bits: -128..127); float32 for FLOAT, float64 for
            DOUBLE. Other subtypes (MP3, Vorbis, ADPCM …) are rounded and clipped to 16 bits.

        Raises
        ------
        InputError
            As for `Reader`.
        """
        subtype, bits = self._sound.subtype, self.info.sample_format.bits
        if bits is None:
            yield from self._read(n_samples, "float32" if subtype == "FLOAT" else "float64")
        elif subtype in _BYTES:
            for block in self._read(n_samples, "int32"):  # libsndfile fills the upper bits
                yield block >> (32 - bits)
        else:
            for block in self._read(n_samples, "float32"):
                yield to_codes(block, self.info.sample_format)

    def float_blocks(self, n_samples: int) -> Iterator[np.ndarray]:
        """Yield the file as float32, full scale 1, for uses that need no exactness.

        Parameters and errors as for `blocks`; lossy formats are not rounded to 16 bits, and float
        files may pass ±1.
        """
        yield from self._read(n_samples, "float32")

    def _read(self, n_samples: int, dtype: str) -> Iterator[np.ndarray]:
        """Yield (n_channels, <= n_samples) from large reads, checked."""
        n_disk = n_samples * -(-_DISK_BLOCK // n_samples)  # a whole number of blocks
        while (block := self._read_once(n_disk, dtype)).size:
            if not self._sound.subtype.startswith("PCM"):
                self._check_floats(block)
            self.n_read += len(block)
            for start in range(0, len(block), n_samples):
                yield block[start : start + n_samples].T  # (n_channels, n_samples)
        self._check_end()

    def _read_once(self, n_samples: int, dtype: str) -> np.ndarray:
        """Read (<= n_samples, n_channels), empty at the end."""
        block = np.empty((n_samples, self.info.n_channels), dtype)
        try:
            return self._sound.read(out=block)
        except soundfile.LibsndfileError as error:
            if self._allow_truncated and self.n_read:
                return block[:0]
            at, what = self.n_read / self.info.sample_rate, error.error_string.rstrip(".")
            raise InputError(
                f"{self.info.path}: damaged after {at:.3f} s: {what} "
                "(copy it again, or convert it to wav)"
            ) from error

    def _check_floats(self, block: np.ndarray) -> None:
        """Refuse or zero NaN and infinity, refuse what would overflow; changes `block`."""
        if max(block.max(), -block.min()) <= MAX_LEVEL:  # false for NaN
            return
        bad = ~np.isfinite(block)
        if bad.any():
            if not self._fix_nonfinite:
                raise self._nonfinite_error(bad, block.dtype.name)
            block[bad] = 0
            self.n_fixed += int(bad.sum())
        loud = np.abs(block).max(axis=1) > MAX_LEVEL
        if loud.any():
            at = (self.n_read + int(loud.argmax())) / self.info.sample_rate
            raise InputError(
                f"{self.info.path}: sample of {np.abs(block).max():g} at {at:.3f} s, where full "
                f"scale is 1 and {MAX_LEVEL:g} the limit (scale it down)"
            )

    def _nonfinite_error(self, bad: np.ndarray, dtype: str) -> InputError:
        """Count the bad samples of the whole file, so that the message needs no second run."""
        at = (self.n_read + int(bad.any(axis=1).argmax())) / self.info.sample_rate
        n_bad, n_disk = int(bad.sum()), len(bad)
        while (block := self._read_once(n_disk, dtype)).size:
            n_bad += int((~np.isfinite(block)).sum())
        noun = "sample" if n_bad == 1 else "samples"
        return InputError(
            f"{self.info.path}: {n_bad} non-finite {noun}, first at {at:.3f} s "
            "(--fix-nonfinite zeroes them)"
        )

    def _check_end(self) -> None:
        """Make sure that all promised samples came, from a file that nobody touched."""
        path, promised = self.info.path, self.info.n_samples
        if _stamp(self._file) != self._stamp:
            raise InputError(f"{path}: changed while it was read (run again when it is complete)")
        slack = MP3_FRAME if self.info.container == "MP3" else 0
        if self.n_read < promised - slack and not self._allow_truncated:
            raise InputError(
                f"{path}: header promises {promised} frames, file holds {self.n_read} "
                "(use --allow-truncated)"
            )


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
    low, high = _code_range(bits)
    return np.rint(scaled).clip(low, high).astype(np.int32)


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
    low, high = _code_range(sample_format.bits)
    wide = mixture.astype(np.int64)  # x - lo passes int32 at 32 bits
    limited = vocals.clip(np.maximum(low, wide - high), np.minimum(high, wide - low))
    return limited.astype(vocals.dtype), int((limited != vocals).sum())


def _code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


# --- Writing ------------------------------------------------------------------------------------


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


def check_outputs(
    paths: Sequence[Path], info: AudioInfo, inputs: Iterable[str | os.PathLike] = ()
) -> None:
    """Find out before any work whether outputs as long as an input can be written.

    Parameters
    ----------
    paths : sequence of Path
        The outputs; missing directories are created.
    info : AudioInfo
        Rate, channels, length and sample format of each output, and the input it is made from.
    inputs : iterable of path-like
        Further files that must not be overwritten.

    Raises
    ------
    InputError
        If an output would overwrite an input or another output, cannot be created, or the disk
        has too little space.
    """
    paths = [Path(path) for path in paths]
    if len({os.path.abspath(path) for path in paths}) < len(paths):
        raise InputError(f"{paths[0]}: named for two outputs (give each its own name)")
    for path in paths:
        check_writable(path)
        for source in (info.path, *inputs):
            if _same_file(path, source):
                raise InputError(
                    f"{path}: would overwrite the input {source} (write to another folder)"
                )
    for directory in sorted({path.parent for path in paths}):
        n_files = sum(path.parent == directory for path in paths)
        _check_space(directory, n_files * _predicted_bytes(info))


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
        raise InputError(f"{directory}: not writable: {_reason(error)}") from error
    if not os.access(directory, os.W_OK | os.X_OK):  # false on a read-only disk even for root
        raise InputError(f"{directory}: not writable (choose another folder)")
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a directory (choose another name)")
    if not stat.S_ISREG(mode):  # renaming onto /dev/null would replace the device
        raise InputError(f"{path}: is not a regular file (choose another name)")


class OutputFiles:
    """Write sound files that appear together, whole, or not at all.

    Use as a context manager; ``outputs.write(i, codes)`` appends to ``paths[i]``. At the end of
    the ``with`` block all files are flushed to disk, read back and renamed; an exception removes
    them instead and leaves what was there before.

    Parameters
    ----------
    paths : sequence of path-like
        The outputs, WAV (RF64 beyond 4 GiB).
    info : AudioInfo
        Rate, channels and sample format of every output. `n_samples` is the expected length,
        `path` the input, which is never overwritten.

    Raises
    ------
    InputError
        As `check_outputs`; later, if the disk is full or a file does not read back as written.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], info: AudioInfo) -> None:
        self._paths = [Path(path) for path in paths]
        self._info = info
        self._temporaries = [_temporary(path) for path in self._paths]
        self._files: list[BinaryIO] = []
        self._sounds: list[soundfile.SoundFile] = []
        self._n_written = [0] * len(self._paths)
        check_outputs(self._paths, info)

    def __enter__(self) -> OutputFiles:
        try:
            for path, temporary in zip(self._paths, self._temporaries, strict=True):
                _remove_stale(path)
                self._files.append(open(temporary, "w+b", buffering=0))
                self._sounds.append(self._start(self._files[-1]))
        except (OSError, soundfile.LibsndfileError) as error:
            raise self._failure(error) from error
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, i: int, codes: np.ndarray) -> None:
        """Append codes to the i-th output.

        Parameters
        ----------
        i : int
            Index into `paths`.
        codes : np.ndarray, shape=(n_channels, any)
            As `Reader.blocks` yields them.

        Raises
        ------
        InputError
            If the disk is full.
        """
        bits = self._info.sample_format.bits
        if bits is None:
            assert np.isfinite(codes).all(), "non-finite output"
            data = codes.T
        else:
            low, high = _code_range(bits)
            assert codes.size == 0 or (low <= codes.min() and codes.max() <= high), "code range"
            data = codes.T.astype(np.int32) << (32 - bits)  # libsndfile takes the upper bits
        try:
            for start in range(0, len(data), _DISK_BLOCK):
                block = np.ascontiguousarray(data[start : start + _DISK_BLOCK])
                self._sounds[i].write(block)
        except (AssertionError, soundfile.LibsndfileError) as error:  # soundfile asserts the count
            raise self._failure(error) from error
        self._n_written[i] += len(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        except (OSError, soundfile.LibsndfileError) as error:
            raise self._failure(error) from error
        finally:
            self._discard()

    def _start(self, file: BinaryIO) -> soundfile.SoundFile:
        info = self._info
        return soundfile.SoundFile(
            file.fileno(),
            "w",
            samplerate=info.sample_rate,
            channels=info.n_channels,
            subtype=info.sample_format.subtype,
            format="RF64" if _predicted_bytes(info) > MAX_WAV_BYTES else "WAV",
            closefd=False,
        )

    def _finish(self) -> None:
        """Flush, verify and rename all files."""
        for i, (sound, file) in enumerate(zip(self._sounds, self._files, strict=True)):
            sound.close()
            _clear_peak_time(file.fileno())
            os.fsync(file.fileno())
            self._verify(i)
        for path in self._paths:  # all of them before the first is replaced
            check_writable(path)
        for temporary, path in zip(self._temporaries, self._paths, strict=True):
            os.replace(temporary, path)
        for directory in {path.parent for path in self._paths}:
            _sync_directory(directory)

    def _verify(self, i: int) -> None:
        """Read a finished file's header back and compare."""
        info, path = self._info, self._paths[i]
        with soundfile.SoundFile(os.fsencode(self._temporaries[i])) as sound:
            seen = (sound.frames, sound.samplerate, sound.channels, sound.subtype)
        wanted = (
            self._n_written[i],
            info.sample_rate,
            info.n_channels,
            info.sample_format.subtype,
        )
        if seen != wanted:
            raise InputError(f"{path}: reads back as {seen}, not {wanted} (is the disk sound?)")

    def _failure(self, error: Exception) -> InputError:
        """Remove everything, then explain; in this order, so that "have" counts our own files."""
        self._discard()
        n_bytes = len(self._paths) * _predicted_bytes(self._info)
        return _write_error(self._paths[0], error, n_bytes)

    def _discard(self) -> None:
        """Close and remove whatever is left of the temporary files."""
        for sound in self._sounds:
            with contextlib.suppress(soundfile.LibsndfileError):  # a full disk, again
                sound.close()
        for file in self._files:
            file.close()
        for _, temporary in zip(self._files, self._temporaries, strict=False):  # ours only
            temporary.unlink(missing_ok=True)


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
        raise _write_error(path, error) from error
    except RuntimeError as error:  # torch.save's word for a full disk
        if not _is_full(path.parent):
            raise
        raise _write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def sha256(path: str | os.PathLike) -> str:
    """Hash a file's content, in hexadecimal; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}") from error


def _predicted_bytes(info: AudioInfo) -> int:
    """Size of one output [bytes], a little generous."""
    return info.n_samples * info.n_channels * _BYTES[info.sample_format.subtype] + 4096


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


def _write_error(path: Path, error: Exception, n_bytes: int | None = None) -> InputError:
    """Explain a failed write; `n_bytes` is what the whole output needs."""
    free = _free_bytes(path.parent)
    number = getattr(error, "errno", None)
    too_large = n_bytes is not None and n_bytes > free  # libsndfile only says "System error."
    if number in (errno.ENOSPC, errno.EDQUOT) or too_large or _is_full(path.parent):
        return InputError(_no_space(path.parent, n_bytes, free))
    return InputError(f"{path}: could not be written: {_reason(error)}")


def _reason(error: Exception) -> str:
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


def _same_file(path: Path, other: str | os.PathLike) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return False


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


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks cannot, and need not
            os.fsync(fd)
    finally:
        os.close(fd)
