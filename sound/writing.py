"""Output files: formats, names, what must not be overwritten, and sounds that appear whole.

`SoundWriter` writes into a temporary file beside its target, which takes the target's name at the
end of the ``with`` block and is removed if that ends in an error.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

import cli
from hparams import InputError
from sound import containers
from sound.reading import BITS, DISK_BLOCK, AudioInfo, Reader, SampleFormat, probe

MADE_BY = "Vocal Mask"
MAX_WAV_BYTES = 2**32 - 2**20  # the sizes in a WAV header have 32 bits; RF64 beyond this
MPEG_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)

SUBTYPES = {  # what a container keeps, and the bits of its samples
    "wav": BITS,
    "flac": {"PCM_16": 16, "PCM_24": 24},
    "ogg": {"VORBIS": None},
    "mp3": {"MPEG_LAYER_III": None},
}
# Of one song, Vorbis at 0, 0.1, 0.2 and libsndfile's own choice makes 295, 221, 179 and 101 kbit/s,
# with an SNR of 37, 32, 29 and 21 dB; MP3 at 0, 0.1 and 0.2 194, 169, 146 (34, 31, 28 dB).
_LOSSY = {
    "ogg": {"compression_level": 0.1},
    "mp3": {"compression_level": 0.0, "bitrate_mode": "VARIABLE"},
}


@dataclass(frozen=True)
class OutputFormat:
    """How a sound is written: the container, and the codes that `SoundWriter.write` takes."""

    container: str  # "wav", "flac", "ogg" or "mp3"
    subtype: str  # what is in the file, in libsndfile's words
    sample_format: SampleFormat  # FLOAT for ogg and mp3


def choose_format(
    info: AudioInfo, container: str = "wav", subtype: str | None = None
) -> OutputFormat:
    """Choose how to write a sound like an input: its rate, channels and sample format.

    `subtype` is one of the container's ``SUBTYPES``, by default the input's where there is room.
    InputError if the container has no such rate or number of channels.
    """
    _check_limits(info, container)
    known, native = SUBTYPES[container], info.sample_format.subtype
    if subtype is None:  # in FLAC, 8 bits fit into 16, of all others 24 are kept
        fitting = "PCM_16" if native == "PCM_U8" else "PCM_24"
        subtype = next(name for name in (native, fitting, *known) if name in known)
    codes = "FLOAT" if container in _LOSSY else subtype
    return OutputFormat(container, subtype, SampleFormat(codes, known[subtype]))


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


def identities(paths: Iterable[Path]) -> dict[tuple[int, int], Path]:
    """Return the files among `paths` by what they are, by whatever name."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            found[status.st_dev, status.st_ino] = path
    return found


def check_outputs(outputs: Iterable[Path], inputs: dict[tuple[int, int], Path]) -> None:
    """Refuse outputs that cannot be written, or would overwrite one of the `identities`."""
    for path in outputs:
        cli.check_writable(path)
        for identity in identities([path]).keys() & inputs.keys():
            raise InputError(
                f"{path}: would overwrite the input {inputs[identity]} (write to another folder)"
            )


class Record(NamedTuple):
    """What an output holds about itself: 8 digits each for what it was made of."""

    source: str  # the song's content
    place: str  # and its path
    how: str  # network and settings

    def __str__(self) -> str:
        return "".join(self)


def record_in(path: Path) -> Record | None:
    """Return what an output holds about itself; None if nothing, or there is no output."""
    found, is_whole = [], True
    with contextlib.suppress(InputError, OSError):
        is_page = path.suffix == ".html"
        info = None if is_page else probe(path, allow_truncated=True)
        text = path.read_text(errors="replace") if is_page else str(info.tags)
        found = re.findall(MADE_BY + 3 * " ?([0-9a-f]{8})", text)  # the song may be an output, too
        is_whole = is_page or not info.warnings
        if found and not is_page and info.container == "FLAC":  # its header does not tell
            is_whole = False
            with Reader(path, start=(info.n_samples - 1) / info.sample_rate) as reader:
                is_whole = reader.read().size > 0
    record = Record(*found[-1]) if found else None
    return record if is_whole or not record else record._replace(how="cut")


def are_done(outputs: Iterable[Path], identify: Callable[[], Record]) -> bool:
    """Say whether all outputs of a song are there, whole, as they would be made now.

    InputError if others are there: of another song of that name, or not of this program.
    """
    paths = [*outputs]
    records = {path: record_in(path) for path in paths if path.exists()}
    record = identify() if records else None  # a new song is not read for this
    for path, its in records.items():
        other = "is there and was not made by this program" if its is None else ""
        if its and its.source != record.source and its.place != record.place:
            other = "is made of another song of that name"
        if other:
            raise InputError(f"{path}: {other} (--overwrite it, or name another --output-dir)")
    as_now = [(its.source, its.how) == (record.source, record.how) for its in records.values()]
    return len(as_now) == len(paths) and all(as_now)


class Separated(NamedTuple):
    """A stretch of a separated song, in codes of (n_channels, n) that add up: what writers take."""

    mixture: np.ndarray
    vocals: np.ndarray
    accompaniment: np.ndarray
    n_limited: int = 0  # samples of the vocals that were limited, so that the accompaniment fits


class SoundWriter:
    """Write one stem; it appears at the end of the ``with`` block, whole or not at all.

    `info` tells rate, channels, tags and expected length, `record` what the stem is made of.
    """

    def __init__(
        self, path: Path, info: AudioInfo, fmt: OutputFormat, stem: str, record: object = ""
    ) -> None:
        self._path, self._info, self._format, self._stem = path, info, fmt, stem
        made_by = f"{MADE_BY} {record}".strip()
        self._tags = info.tags | {"software": made_by}
        if fmt.container == "mp3":  # has no place for it
            self._tags["comment"] = f"{info.tags.get('comment', '')} [{made_by}]".strip()
        self._dtype = np.float64 if fmt.sample_format.subtype == "DOUBLE" else np.float32

    def __enter__(self) -> SoundWriter:
        info, fmt = self._info, self._format
        n_bytes = info.n_samples * info.n_channels * (fmt.sample_format.bits or 64) // 8
        is_long = fmt.container == "wav" and n_bytes > MAX_WAV_BYTES
        with contextlib.ExitStack() as stack:
            self._temporary = temporary = stack.enter_context(cli.new_file(self._path))
            try:
                self._sound = soundfile.SoundFile(
                    str(temporary) if os.name == "nt" else os.fsencode(temporary),
                    "w",
                    samplerate=info.sample_rate,
                    channels=info.n_channels,
                    subtype=fmt.subtype,
                    format="RF64" if is_long else fmt.container.upper(),
                    **_LOSSY.get(fmt.container, {}),
                )
            except soundfile.LibsndfileError as error:
                raise self._failure(error) from error
            stack.push(self._close)
            for name, text in self._tags.items():  # title, artist and so on
                with contextlib.suppress(soundfile.LibsndfileError):  # no place for this one
                    setattr(self._sound, name, text.encode(errors="replace").decode())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def write(self, part: Separated) -> None:
        """Append the stem's codes, of the format's ``sample_format``; lossy encoders clip at ±1."""
        codes = getattr(part, self._stem)
        bits = self._format.sample_format.bits
        if bits is None:
            assert np.isfinite(codes).all(), "non-finite output"
            data = codes.T.astype(self._dtype, copy=False)
        else:
            data = codes.T.astype(np.int32) << (32 - bits)  # libsndfile takes the upper bits
        if self._format.container in _LOSSY:
            data = data.clip(-1, 1)
        try:
            for start in range(0, len(data), DISK_BLOCK):
                self._sound.write(np.ascontiguousarray(data[start : start + DISK_BLOCK]))
        except (AssertionError, soundfile.LibsndfileError) as error:  # soundfile asserts the count
            raise self._failure(error) from error

    def _close(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._sound.close()
        except soundfile.LibsndfileError as error:
            if kind is None:  # else that is what is told
                raise self._failure(error) from error
        if self._format.container == "mp3" and kind is None:
            with open(self._temporary, "r+b") as file:
                containers.tell_utf8(file)

    def _failure(self, error: Exception) -> InputError:
        """Explain a failed write: libsndfile does not tell the reason, so the disk is asked."""
        free = shutil.disk_usage(self._path.parent).free
        if free < 2**20:
            return InputError(f"{self._path}: no space left on {self._path.parent} (free some)")
        what = getattr(error, "error_string", "not all was written").rstrip(".")
        return InputError(f"{self._path}: could not be written: {what} (see ulimit -f)")
