"""What is scored: which songs, and what systems made of them, read in the song's own shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hparams import InputError
from scoring import scorebook
from sound import reading, tracks
from sound.tracks import Part, Track


class Job(NamedTuple):
    """A song, and the files that systems have made of it: by system, by stem."""

    track: Track
    estimates: dict[str, dict[str, Path]]


def choose(
    root: Path, found: list[Track], split: str | None, every: int = 1, subset: int | None = None
) -> tuple[list[Track], str]:
    """Choose the songs of a folder that are scored, and name their split.

    Parameters
    ----------
    root : Path
        The folder, for messages.
    found : list of Track
    split : {"test", "train", "all"}, optional
        By default test, or all where the layout has none.
    every, subset : int, optional
        As for `thin`.

    Raises
    ------
    InputError
        If there are none.
    """
    songs = [track for track in found if len(track.signals) == 2]
    if not songs:
        raise InputError(f"{root}: no song has both vocals and accompaniment to compare with")
    split = split or ("test" if any(song.split == "test" for song in songs) else "all")
    songs = [song for song in songs if split in (song.split, "all")]
    if not songs:
        raise InputError(f"{root}: no songs of the split {split!r} (try --split all)")
    return thin(songs, every, subset), split


def thin(songs: list[Any], every: int, subset: int | None) -> list[Any]:
    """Take only every so many-th song, and of these only `subset`, evenly spread."""
    songs = songs[::every]
    n = min(subset or len(songs), len(songs))
    return [songs[i * len(songs) // n] for i in range(n)]


def pair(songs: list[Track], folders: dict[str, Path]) -> tuple[list[Job], list[str]]:
    """Give each song the files that systems made of it.

    Parameters
    ----------
    songs : list of Track
    folders : dict of Path
        By system.

    Returns
    -------
    list of Job
        The largest first: a long song at the end would keep all waiting.
    list of str
        A message for every song that lacks an estimate.

    Raises
    ------
    InputError
        As `tracks.find_estimates`.
    """
    files = {name: tracks.find_estimates(folder, songs) for name, folder in folders.items()}
    jobs, bad = [], []
    for song in songs:
        own = {name: of_songs[song.name] for name, of_songs in files.items()}
        missing = [str(folder) for name, folder in folders.items() if not own[name]]
        if missing:
            bad.append(
                f"{song.name}: no estimate in {', '.join(missing)} "
                "(<song>/vocals.wav or <song>_vocals.wav)"
            )
        else:
            jobs.append(Job(song, own))
    jobs.sort(key=lambda j: (-sum(map(scorebook.size_of, j.track.paths)), j.track.name))
    return jobs, bad


def read(
    system: str, files: dict[str, Path], mixture: np.ndarray, sample_rate: int
) -> tuple[np.ndarray, list[str]]:
    """Read what a system made of a song, in the song's shape.

    Parameters
    ----------
    system : str
        Its name, for the notes.
    files : dict of Path
        Of "vocals", of "accompaniment", or of both; the other one is what the mixture leaves.
    mixture : np.ndarray, shape=(n_channels, n_samples)
    sample_rate : int

    Returns
    -------
    np.ndarray, shape=(2, n_channels, n_samples), float32
        Vocals and accompaniment.
    list of str
        What was done to them, for the user to read.

    Raises
    ------
    InputError
        If a file cannot be read, has another rate, is more than ``tracks.TRIM_SECONDS`` shorter
        or longer, or has channels that do not go with the song's.
    """
    wavs, notes = {}, []
    for stem, path in files.items():
        info = reading.probe(path)
        if info.sample_rate != sample_rate:
            raise InputError(
                f"{path}: {info.sample_rate} Hz, the song has {sample_rate} Hz; convert it"
            )
        wavs[stem], done = _fitted(path, tracks.read_part(Part(path)), mixture.shape, sample_rate)
        notes += [f"{stem} of {system}: {what}" for what in done]
    vocals = wavs["vocals"] if "vocals" in wavs else mixture - wavs["accompaniment"]
    return np.stack([vocals, wavs.get("accompaniment", mixture - vocals)]), notes


def _fitted(
    path: Path, wav: np.ndarray, shape: tuple[int, int], sample_rate: int
) -> tuple[np.ndarray, list[str]]:
    """Bring a file's sound into the song's shape; returns what was done, too."""
    (n_channels, n_samples), notes = shape, []
    n_here = wav.shape[-1]
    if abs(n_here - n_samples) > tracks.TRIM_SECONDS * sample_rate:
        raise InputError(
            f"{path}: {n_here} samples, the song has {n_samples}; export it again from "
            "the same start to the same end"
        )
    if n_here != n_samples:
        done = "trimmed" if n_here > n_samples else "padded with silence"
        notes.append(f"{n_here} samples, the song has {n_samples}; {done}")
        wav = np.pad(wav[:, :n_samples], ((0, 0), (0, max(0, n_samples - n_here))))
    if len(wav) != n_channels:
        if 1 not in (len(wav), n_channels):
            raise InputError(f"{path}: {len(wav)} channels, the song has {n_channels}")
        done = "copied" if n_channels > 1 else "averaged"
        notes.append(f"{len(wav)} channels {done} to {n_channels}")
        wav = np.broadcast_to(wav.mean(0), shape)
    return wav, notes


def sources(job: Job, root: Path) -> dict[str, Any]:
    """Say which files a song's scores come from, as `scorebook.identity`; songs lie in `root`."""
    return {
        "files": [scorebook.identity(path, root) for path in job.track.paths],
        "estimates": {
            name: [scorebook.identity(path, path.parent) for path in files.values()]
            for name, files in job.estimates.items()
        },
    }
