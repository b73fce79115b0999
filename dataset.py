"""What build_dataset.py wrote: one memory-mapped spectrogram per song, listed in a manifest.

On disk a song is one ``.npy``, float16, shape (n_frames, n_parts, n_bins, 2): time first, so that
a stretch of frames is one contiguous read; the parts are vocals and accompaniment, or only one of
them for material that is there to be remixed; the last axis is real and imaginary. The mixture is
*defined* as vocals + accompaniment. ``manifest.json``, written last, says what is there.
"""

from __future__ import annotations

import json
import tokenize
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hparams import GRID, HParams, InputError, differences, from_dict
from sound import writing

MANIFEST = "manifest.json"
FORMAT = 1
PARTS = ("vocals", "accompaniment")
LEVEL_FRAMES = 128  # frames, evenly spread, from which a song's level is estimated


@dataclass(frozen=True)
class Song:
    """One song of a dataset, as the manifest lists it."""

    id: str  # unique within the dataset
    file: str  # relative to the dataset's folder
    split: str  # "train" or "test"
    singer: str  # where the layout tells; else the same as `group`
    group: str  # the song: its clips are never divided between training and validation
    parts: tuple[str, ...]  # order of the array's second axis
    n_frames: int
    sample_rate: int  # of the recording, times its speed [Hz]
    seconds: float
    sha256: str  # of `file`
    inputs: tuple[dict[str, Any], ...]  # source files: path, size [bytes], sha256
    speed: float = 1.0  # how much faster, and higher, than recorded


@dataclass(frozen=True)
class Manifest:
    """Everything a dataset says about itself."""

    layout: str  # which layout build_dataset.py recognised
    hparams: dict[str, Any]  # the grid, which binds
    songs: tuple[Song, ...]


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically; a folder without one is an unfinished build."""
    text = json.dumps({"format": FORMAT, **asdict(manifest)}, indent=1, ensure_ascii=True)
    writing.replace_atomically(folder / MANIFEST, lambda file: file.write(text.encode()))


def load_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest.

    Raises
    ------
    InputError
        If the folder is missing, holds no finished dataset, or one of another format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder (build_dataset.py makes datasets)")
    if not path.is_file():
        raise InputError(f"{folder}: no {MANIFEST}; not a dataset, or its build did not finish")
    try:
        stored = json.loads(path.read_text())
        if stored.pop("format") != FORMAT:
            raise InputError(f"{path}: a dataset of another version (build it again)")
        songs = tuple(
            Song(**{**song, "parts": tuple(song["parts"]), "inputs": tuple(song["inputs"])})
            for song in stored.pop("songs")
        )
        from_dict(stored["hparams"])
        return Manifest(**stored, songs=songs)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged (build the dataset again)") from error


def check_grid(folder: Path, manifest: Manifest, hp: HParams) -> None:
    """Raise InputError if a dataset was built on another grid than `hp`."""
    differing = differences(hp, from_dict(manifest.hparams), GRID)
    if differing:
        found = ", ".join(f"{name}={theirs}" for name, (_, theirs) in differing.items())
        asked = ", ".join(str(ours) for ours, _ in differing.values())
        options = " ".join(f"--set {name}={theirs}" for name, (_, theirs) in differing.items())
        raise InputError(
            f"{folder}: built with {found}, not {asked} "
            f"(build it again; a new network can learn from it with {options})"
        )


def open_spectrogram(folder: Path, song: Song, n_bins: int) -> np.ndarray:
    """Map one song's array into memory without reading it.

    Returns
    -------
    np.ndarray, shape=(n_frames, n_parts, n_bins, 2), float16
        Read-only.

    Raises
    ------
    InputError
        If the file is missing, cut short or not what the manifest promises.
    """
    path = folder / song.file
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, tokenize.TokenError) as error:
        raise InputError(f"{path}: missing or damaged (build the dataset again)") from error
    if array.shape != (song.n_frames, len(song.parts), n_bins, 2) or array.dtype != np.float16:
        raise InputError(f"{path}: not the array the manifest promises (build the dataset again)")
    return array


@dataclass(frozen=True)
class OpenSong:
    """A song whose spectrogram is mapped into memory."""

    song: Song
    spectrogram: np.ndarray  # (n_frames, n_parts, n_bins, 2), float16
    level_db: dict[str, float]  # of each part, over the song [dB re full-scale sine]


def open_songs(folders: list[Path], hp: HParams) -> list[OpenSong]:
    """Open every song of some datasets.

    Raises
    ------
    InputError
        If a folder holds no whole dataset, or one on another grid than `hp`.
    """
    songs = []
    for folder in folders:
        manifest = load_manifest(folder)
        check_grid(folder, manifest, hp)
        for song in manifest.songs:
            array = open_spectrogram(folder, song, hp.n_bins)
            songs.append(OpenSong(song, array, _levels_db(array, song.parts)))
    return songs


def identity(songs: list[OpenSong]) -> list[str]:
    """Name exactly the data of a run: id and hash of every song."""
    return [f"{song.song.id} {song.song.sha256}" for song in songs]


def are_learnt(songs: Iterable[Song], learnt: dict[str, str]) -> list[bool]:
    """Tell which built songs a network knows, be it at another speed (`model.learnt_songs`)."""
    played: dict[str, set[str]] = {}  # the names at all its speeds, of every recording
    for built, name in learnt.items():
        played.setdefault(name, set()).add(built.rpartition(" ")[0])
    found = []
    for song in songs:
        names = played.get(song.id.removesuffix(f" x{song.speed:g}"), set())
        found.append(f"{song.id} {song.sha256}" in learnt or bool(names - {song.id}))
    return found


def hold_out(songs: list[OpenSong], hp: HParams) -> tuple[list[OpenSong], list[OpenSong]]:
    """Divide the training songs into those to learn from and those to validate on.

    Whole singers are held out (where the layout does not tell, a song is its own singer), at
    random but reproducibly, until they hold ``valid_fraction`` of the frames. With one or two
    singers, as in the training split of MIR-1K, whole songs with all their clips are held out
    instead.

    Parameters
    ----------
    songs : list of OpenSong
        Those of the "test" split are left out altogether; those at another speed than recorded are
        learnt from, but for the held-out singers' own, and never validated on.

    Raises
    ------
    InputError
        If fewer than two training songs are there, or none of them has vocals with their
        accompaniment to validate on.
    """
    songs = [song for song in songs if song.song.split == "train"]
    whole = [s for s in songs if set(s.song.parts) == set(PARTS) and s.song.speed == 1]
    if len(songs) < 2 or not whole:
        raise InputError(
            f"{len(songs)} training songs, {len(whole)} with vocals and accompaniment as recorded; "
            "training needs 2 or more, and 1 or more of the latter to validate on"
        )
    n_singers = len({song.song.singer for song in whole})

    def group_of(song: OpenSong) -> str:
        return song.song.singer if n_singers > 2 else song.song.group

    rng = np.random.default_rng([hp.seed, 1])
    held: set[str] = set()
    n_wanted = hp.valid_fraction * sum(song.song.n_frames for song in whole)
    n_held = 0
    groups = rng.permutation(sorted({group_of(song) for song in whole}))
    for group in groups[:-1] if len(groups) > 1 else groups:  # one is left to learn from
        if n_held >= n_wanted and held:
            break
        held.add(group)
        n_held += sum(song.song.n_frames for song in whole if group_of(song) == group)
    learn = [song for song in songs if group_of(song) not in held]
    valid = [song for song in whole if group_of(song) in held]
    _check_parts(learn)
    return learn, valid


def validate_elsewhere(
    songs: list[OpenSong], others: list[OpenSong]
) -> tuple[list[OpenSong], list[OpenSong]]:
    """Learn from all training songs; validate on those of `others` that share no file with them.

    Songs at another speed than recorded are not validated on.

    Raises
    ------
    InputError
        If no song is left to validate on, or `songs` lack vocals or accompaniment.
    """
    learn = [song for song in songs if song.song.split == "train"]
    learnt = {recording for song in learn for recording in _recordings(song)}
    valid = [s for s in others if set(s.song.parts) == set(PARTS) and s.song.speed == 1]
    valid = [song for song in valid if not learnt & _recordings(song)]
    if not valid:
        raise InputError(
            f"none of {len(others)} songs to validate on has vocals with their accompaniment and "
            "is not also learnt from (choose other datasets to validate on)"
        )
    _check_parts(learn)
    return learn, valid


def _recordings(song: OpenSong) -> set[str]:
    """Return what a song was built of, at whatever speed, by the hashes of the files."""
    return {source["sha256"] for source in song.song.inputs}


def _levels_db(spectrogram: np.ndarray, parts: tuple[str, ...]) -> dict[str, float]:
    """Estimate each part's level from some frames: root of the summed squares over bins."""
    step = max(1, len(spectrogram) // LEVEL_FRAMES)
    energy = np.square(spectrogram[::step], dtype=np.float32).sum((2, 3)).mean(0)
    return {part: float(10 * np.log10(max(energy[i], 1e-10))) for i, part in enumerate(parts)}


def _check_parts(songs: list[OpenSong]) -> None:
    """Refuse songs from which no mixture can be made."""
    for part in PARTS:
        if not any(part in song.song.parts for song in songs):
            raise InputError(
                f"none of {len(songs)} songs to learn from has {part}; training needs vocals and "
                "accompaniment (give more datasets)"
            )
