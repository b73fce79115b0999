"""One song of a dataset: from its sources to its array and its record in the journal.

Arrays appear under their names only when they are whole and their pair has been checked; the
record follows. A song whose record says that its sources are as they were is not built again.
torch is imported by the functions that need it: build_dataset.py checks paths before.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from hparams import GRID, HParams, InputError
from learning.alignment import PairCheck
from sound import reading, tracks, writing
from sound.tracks import Track

if TYPE_CHECKING:
    import torch

    from audio import Grid

SONGS, JOURNAL = "songs", ".build"  # in the output, beside the manifest
BLOCK = 2**17  # samples decoded at once: enough for PairCheck, few enough for the cache
SILENT = 1e-4  # vocals that never pass -80 dBFS are counted as silent


@dataclass(frozen=True)
class Task:
    """What all songs of one build share."""

    root: Path
    output: Path
    hp: HParams
    verify: bool
    check_pairs: bool


def build_song(task: Task, track: Track) -> dict[str, Any]:
    """Write one song's spectrogram and its record.

    Raises
    ------
    InputError
        If a source cannot be read or changes meanwhile, if the pair does not fit, if the sound is
        too loud for float16, or if the disk is full.
    """
    import audio
    from dataset import Song

    hp, file = task.hp, file_of(task, track)
    sources = sources_of(task, track)
    extent = tracks.measure(track)
    grid = audio.grid_at(extent.sample_rate, hp)
    shape = (grid.n_frames(extent.n_samples), len(track.signals), hp.n_bins, 2)
    digest, pair, peaks = hashlib.sha256(), PairCheck(), np.zeros(len(track.signals))

    def listen() -> Iterator[np.ndarray]:
        for block in tracks.read_blocks(track, BLOCK):
            np.maximum(peaks, np.abs(block).max(1), out=peaks)
            if task.check_pairs and len(block) == 2:
                pair.add(*block)
            yield block

    def write(out: BinaryIO) -> None:
        header = npy_header(shape)
        n_bytes = len(header) + 2 * math.prod(shape)
        if hasattr(os, "posix_fallocate"):  # a disk that is too full says so now
            os.posix_fallocate(out.fileno(), 0, n_bytes)
        for data in itertools.chain([header], spectrogram_blocks(listen(), grid, hp)):
            digest.update(data)
            out.write(data)
        assert out.tell() == n_bytes, "the spectrogram has another length than its header says"
        problem = pair.problem(extent.sample_rate, has_mixture=bool(track.mixture))
        if problem:
            raise InputError(f"{track.vocals[0].path}: {problem} (--no-check-pairs: use as it is)")

    try:
        writing.replace_atomically(task.output / file, write)
    except OverflowError as error:
        raise InputError(
            f"{track.paths[0]}: too loud: peak {peaks.max():.3g}, where 1 is full scale (lower it)"
        ) from error
    inputs = [
        {
            "path": _within(task, path),
            "size": path.stat().st_size,
            "sha256": reading.sha256(path),
        }
        for path in track.paths
    ]
    if sources_of(task, track) != sources:
        raise InputError(f"{track.paths[0]}: a source changed while it was read (run again)")
    song = Song(
        id=track.name,
        file=file,
        split=track.split,
        singer=track.singer,
        group=track.group,
        parts=track.signals,
        n_frames=shape[0],
        sample_rate=extent.sample_rate,
        seconds=extent.seconds,
        sha256=digest.hexdigest(),
        inputs=tuple(inputs),
        speed=track.speed,
    )
    record = {
        "sources": sources,
        "song": asdict(song),
        "n_bytes": (task.output / file).stat().st_size,
        "pair_checked": task.check_pairs,
        "silent": bool(track.vocals and peaks[0] < SILENT),
    }
    text = json.dumps(record)
    writing.replace_atomically(journal_of(task, file), lambda out: out.write(text.encode()))
    return record


def spectrogram_blocks(
    blocks: Iterable[np.ndarray], grid: Grid, hp: HParams
) -> Iterator[np.ndarray]:
    """Take the STFT block by block, equal to `audio.stft` of the whole, in the dataset's form.

    Parameters
    ----------
    blocks : iterable of np.ndarray, shape=(n_parts, any), float32
        Consecutive stretches of a waveform, full scale 1.

    Yields
    ------
    np.ndarray, shape=(n_frames of the block, n_parts, hp.n_bins, 2), float16
        ``1 + n_samples // hop_length`` frames in all.

    Raises
    ------
    OverflowError
        If float16 cannot hold a value.
    """
    import torch
    import torch.nn.functional as F

    half, carried = grid.n_fft // 2, None
    ends = itertools.chain(map(torch.from_numpy, blocks), [None])
    for wav in ends:
        if wav is None:  # the end: centred frames look half a window into silence
            wav = F.pad(carried, (0, half))
        elif carried is None:  # the start: the same
            wav = F.pad(wav, (half, 0))
        else:
            wav = torch.cat([carried, wav], -1)
        n_frames = max(0, (wav.shape[-1] - grid.n_fft) // grid.hop_length + 1)
        if n_frames:
            yield stored_form(wav, grid, hp)
        carried = wav[..., n_frames * grid.hop_length :]


def stored_form(wav: torch.Tensor, grid: Grid, hp: HParams) -> np.ndarray:
    """Transform all whole frames of (n_parts, any) samples: (n_frames, n_parts, n_bins, 2)."""
    import torch

    import audio

    spec = audio.to_network_bins(audio.frames_to_spec(wav, grid), hp)  # (n_parts, n_bins, n_frames)
    pairs = torch.view_as_real(spec.permute(2, 0, 1))  # (n_frames, n_parts, n_bins, 2)
    stored = torch.empty(pairs.shape, dtype=torch.float16)
    stored.copy_(pairs)  # turns and converts in one pass
    if not stored.isfinite().all():
        raise OverflowError("float16 reaches 65504")
    return stored.numpy()


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return what stands before the numbers in a float16 .npy file."""
    header = io.BytesIO()
    about = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def finished(task: Task, track: Track) -> dict[str, Any] | None:
    """Return the record of a song that is built, if its sources are as they were then."""
    file = file_of(task, track)
    try:
        record = json.loads(journal_of(task, file).read_text())
        kept = (
            (task.output / file).stat().st_size == record["n_bytes"]
            and record["sources"] == sources_of(task, track)
            and (record["pair_checked"] or not task.check_pairs)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if kept else None


def damage(task: Task, song: dict[str, Any]) -> str:
    """Hash a finished song and its sources; returns what differs from the record, or ""."""
    if reading.sha256(task.output / song["file"]) != song["sha256"]:
        return f"{task.output / song['file']}: damaged; built again"
    for source in song["inputs"]:
        path = task.root / source["path"]
        if reading.sha256(path) != source["sha256"]:
            return f"{path}: other content under the same size and date; built again"
    return ""


def sources_of(task: Task, track: Track) -> dict[str, Any]:
    """Describe all that a finished song depends on, as the journal keeps it."""
    parts = {
        name: [(_within(task, part.path), part.channel, part.stream) for part in parts]
        for name, parts in track.parts.items()
    }
    stamps = []
    for path in track.paths:
        try:
            stamps.append((path.stat().st_size, path.stat().st_mtime_ns))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from error
    labels = (track.split, track.singer, track.group)
    return json.loads(json.dumps({"labels": labels, "parts": parts, "stamps": stamps}))


def _within(task: Task, path: Path) -> str:
    return path.relative_to(task.root).as_posix()


def grid_of(hp: HParams) -> dict[str, int]:
    """Return the settings that a dataset binds."""
    return {name: getattr(hp, name) for name in GRID}


def file_of(task: Task, track: Track) -> str:
    """Name a song's array within the dataset: the same again for the same song and grid."""
    from dataset import FORMAT

    # Two grids have two names, so that --overwrite can build beside the old dataset.
    about = repr((track.name, grid_of(task.hp), FORMAT)).encode(errors="surrogatepass")
    readable = re.sub(r"[^A-Za-z0-9]+", "_", track.name)[:64]
    return f"{SONGS}/{readable}-{hashlib.sha256(about).hexdigest()[:12]}.npy"


def journal_of(task: Task, file: str) -> Path:
    """Name the record that belongs to a song's array."""
    return task.output / JOURNAL / Path(file).with_suffix(".json").name
