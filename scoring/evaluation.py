"""An evaluation: what decides its scores, and one song's record, from its files to its scores."""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import model as networks
from hparams import HParams
from scoring import estimates, songs
from scoring.estimates import Job
from scoring.metrics import BEST_DB, WORST_DB
from scoring.scorebook import Record
from separation import Separator
from sound import reading, tracks

BOTH = {"hard": {"mask_at_eval": True}, "soft": {"mask_at_eval": False}}


@dataclasses.dataclass(frozen=True)
class Network:
    """A checkpoint, and how it is to run; small enough to be sent to other processes."""

    checkpoint: Path
    device: str
    hp: HParams  # with --set
    explicit: tuple[tuple[str, Any], ...]  # what --set named


@dataclasses.dataclass(frozen=True)
class Task:
    """What an evaluation is of, for every process to know."""

    root: Path
    hp: HParams  # of the ideal masks, where there is no network
    seconds: float | None
    v3: bool | None  # as `songs.score_song` takes it
    network: Network | None  # None: bounds
    both_masks: bool = False  # the network's binary mask and its soft one, not what it prefers


@functools.lru_cache(maxsize=1)
def load(network: Network) -> Separator:
    """Load a network, once in each process."""
    return Separator.load(network.checkpoint, network.device, network.hp, dict(network.explicit))


def describe(task: Task, layout: str, folders: dict[str, Path]) -> dict[str, Any]:
    """Collect what decides the scores: two runs of which this is equal give the same.

    Parameters
    ----------
    task : Task
    layout : str
        As `tracks.find_tracks` names it.
    folders : dict of Path
        Of the systems whose files are scored, too.

    Returns
    -------
    dict
        As JSON keeps it.

    Raises
    ------
    InputError
        If the checkpoint cannot be loaded.
    """
    about: dict[str, Any] = {
        "dataset": {"name": task.root.resolve().name, "layout": layout},
        "seconds": task.seconds,
        "v3": task.v3,
        "estimates": {name: str(folder.resolve()) for name, folder in folders.items()},
        "checkpoint": None,
        "hparams": dataclasses.asdict(task.hp),
        "conventions": {
            "bsseval_v4": "frames of 1 s, 512 taps",
            "bsseval_v3": "whole song, mean of the channels, 512 taps",
            "rounding": "references and estimates to 16 bits before BSSEval, not before SI-SDR",
            "ceilings": "one mask of 8 bits for all channels on the network's bins",
            "silence": f"true source: nobody has a score; estimate only: {WORST_DB:g} dB",
            "limits_db": {
                "si_sdr, v3_sdr": [WORST_DB, BEST_DB],
                "v3_sir, v3_sar": [WORST_DB, songs.BITS_DB],
            },
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "project": _project_commit(),
        },
    }
    if task.network is not None:
        separator, checkpoint = load(task.network), task.network.checkpoint
        about["checkpoint"] = {
            "file": checkpoint.name,
            "sha256": reading.sha256(checkpoint),
            "dtype": str(separator.dtype).removeprefix("torch."),
            "device": task.network.device.split(":")[0],
        }
        about["hparams"] = dataclasses.asdict(separator.hp)
        about["mask_settings"] = separator.mask_settings
        about["both_masks"] = task.both_masks
    return json.loads(json.dumps(about))  # as it is when it is read again


def _project_commit() -> str | None:
    """Return the commit of this code, with -dirty where it was changed; None without git."""
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        ran = subprocess.run(
            [*command, "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def known_songs(checkpoint: Path) -> tuple[dict[str, str] | None, list[dict[str, Any]]]:
    """Return which songs a checkpoint knows already.

    Returns
    -------
    learnt : dict, optional
        The songs that it has learnt from, as `model.learnt_songs`; None if it does not say.
    tuned : list of dict
        ``name`` and ``sha256``, the hashes of the recordings, of the songs that its mask settings
        were tuned on, as `tuning.store` has them; empty if it does not say.
    """
    contents = networks.load_checkpoint(checkpoint)
    tuned = contents.get("tuned_on", [])
    if "data" not in contents:
        return None, tuned
    return networks.learnt_songs(contents), tuned


def marks(
    record: Record, learnt: dict[str, str] | None, tuned: list[dict[str, Any]]
) -> dict[str, bool]:
    """Say of a scored song whether it, or its namesake, was learnt from or tuned on.

    Parameters
    ----------
    record : dict
    learnt, tuned
        As `known_songs` gives them.
    """
    hashes = {sha256 for song in tuned for sha256 in song["sha256"]}
    return {
        "learnt": record["name"] in (learnt or {}).values(),
        "tuned": record["name"] in {song["name"] for song in tuned}
        or any(file["sha256"] in hashes for file in record["files"]),
    }


def score_track(task: Task, job: Job) -> Record:
    """Separate one song in every way, and score it.

    Parameters
    ----------
    task : Task
    job : Job

    Returns
    -------
    dict
        What `songs.score_song` gives, with what the song is, which files it was read from, and
        ``notes`` on what was odd about them.

    Raises
    ------
    InputError
        If a file cannot be read, or does not fit the song.
    """
    track, extent = job.track, tracks.measure(job.track)
    rate, notes = extent.sample_rate, list(extent.notes)
    references = tracks.read_channels(track)
    kept = songs.middle(references.shape[-1], task.seconds and task.seconds * rate)
    theirs, mixture = {}, references.sum(0)
    for name, files in job.estimates.items():
        wav, done = estimates.read(name, files, mixture, rate)
        theirs[name] = np.ascontiguousarray(wav[..., kept])
        notes += done
    references = np.ascontiguousarray(references[..., kept])
    hp = task.hp if task.network is None else load(task.network).hp
    systems = separate(task, np.ascontiguousarray(mixture[..., kept]), rate) | theirs
    systems |= songs.ideals(references, rate, hp)
    n_channels, n_samples = references.shape[1:]
    if n_samples < rate:
        notes.append(f"shorter than a frame of 1 s: one frame of {n_samples} samples")
    return {
        "name": track.name,
        "group": track.group,
        "split": track.split,
        "sample_rate": rate,
        "n_channels": n_channels,
        "seconds": n_samples / rate,
        **estimates.sources(job, task.root),
        "notes": notes,
        **songs.score_song(references, systems, rate, task.v3),
    }


def separate(task: Task, mixture: np.ndarray, sample_rate: int) -> dict[str, np.ndarray]:
    """Separate a mixture (n_channels, n_samples) by the network, which listens once.

    Returns
    -------
    dict of np.ndarray, shape=(2, n_channels, n_samples)
        Vocals and accompaniment, by system: ``model``, or ``hard`` and ``soft``.
    """
    if task.network is None:
        return {}
    separator = load(task.network)
    if not task.both_masks:
        return {"model": np.stack(separator.separate(mixture, sample_rate))}
    mask, own = separator.song_mask(mixture, sample_rate), separator.mask_settings
    return {
        name: songs.render(mixture, mask, sample_rate, separator.hp, own | settings)
        for name, settings in BOTH.items()
    }
