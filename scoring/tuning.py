"""Choosing the mask settings that sound best, on songs that a network has not learnt from.

The network separates each song once; every setting renders the mask that it gave.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import audio
import dataset
from hparams import UNTUNED_MASK, HParams, InputError
from model import learnt_songs, load_checkpoint, restore_model, save_checkpoint
from scoring import songs
from scoring.songs import Network
from scoring.tables import STEMS
from separation import Separator
from sound import reading, tracks
from sound.tracks import Track

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
GATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
SHARPNESSES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
LEAST_DB = 0.01  # by which settings must differ to be chosen between


class Candidate(NamedTuple):
    """A song that could be tuned on."""

    name: str
    split: str
    is_learnt: bool
    source: Track | tuple[Path, dataset.Song]  # music, or a built dataset's folder and its entry


class Tuned(NamedTuple):
    """What a song says about all mask settings."""

    name: str
    sha256: tuple[str, ...]  # of the recordings
    scores: tuple[float, ...]  # one for each entry of `mask_grid`; NaN if the vocals are silent


def candidates(
    folders: list[Path], network: Network, kind: str | None, voice_pattern: str
) -> tuple[list[Candidate], list[str]]:
    """List the songs of built datasets, or of folders of music, that have both signals.

    Parameters
    ----------
    folders : list of Path
    network : Network
        On whose grid a dataset must have been built. What it has learnt from is known as
        `dataset.are_learnt` says of built songs, by its name of other music.
    kind, voice_pattern
        As for `tracks.find_tracks`.

    Returns
    -------
    list of Candidate
    list of str
        A message for every song that cannot be used.

    Raises
    ------
    InputError
        If a folder is neither, or was built on another grid.
    """
    learnt, listed, bad = learnt_songs(load_checkpoint(network.checkpoint)), [], []
    for folder in folders:
        if (folder / dataset.MANIFEST).is_file():
            manifest = dataset.load_manifest(folder)
            dataset.check_grid(folder, manifest, songs.hparams_of(network))
            are_learnt = dataset.are_learnt(manifest.songs, learnt)
            for song, is_learnt in zip(manifest.songs, are_learnt, strict=True):
                if set(song.parts) == set(STEMS):
                    listed.append(Candidate(song.id, song.split, is_learnt, (folder, song)))
        else:
            found = tracks.find_tracks(folder, kind, voice_pattern)
            bad += found.bad
            for track in found.tracks:
                if len(track.signals) == 2:
                    is_learnt = track.name in learnt.values()
                    listed.append(Candidate(track.name, track.split, is_learnt, track))
    return listed, bad


def mask_grid() -> list[dict[str, Any]]:
    """List the mask settings that tuning tries: all binary ones, then all soft ones."""
    hard = [{"mask_at_eval": True, "eval_mask_threshold": t} for t in THRESHOLDS]
    soft = [
        {"mask_at_eval": False, "noise_gate": gate, "mask_sharpness": sharpness}
        for gate, sharpness in product(GATES, SHARPNESSES)
    ]
    return hard + soft


def tune_candidate(network: Network, seconds: float, song: Candidate) -> Tuned:
    """Score all mask settings on the middle `seconds` of one song."""
    separator = songs.load_network(network)
    if isinstance(song.source, Track):
        hashes = tuple(map(reading.sha256, song.source.paths))
        rate = tracks.measure(song.source).sample_rate
        references = tracks.read_channels(song.source)
        kept = songs.middle(references.shape[-1], seconds * rate)
        references = np.ascontiguousarray(references[..., kept])
    else:
        rate = separator.hp.sample_rate
        references = read_built(*song.source, separator.hp, seconds)
        hashes = tuple(file["sha256"] for file in song.source[1].inputs)
    return Tuned(song.name, hashes, tuple(tune_song(separator, references, rate)))


def read_built(folder: Path, song: dataset.Song, hp: HParams, seconds: float | None) -> np.ndarray:
    """Bring the middle `seconds` of a built song back to sound, mono at ``hp.sample_rate``.

    Raises
    ------
    InputError
        If its array is missing or damaged.
    """
    array = dataset.open_spectrogram(folder, song, hp.n_bins)
    n_wanted = None if seconds is None else seconds * hp.sample_rate / hp.hop_length
    kept = torch.from_numpy(array[songs.middle(len(array), n_wanted)].astype(np.float32))
    spec = torch.view_as_complex(kept).permute(1, 2, 0)  # (n_parts, n_bins, n_frames)
    spec = spec[[song.parts.index(stem) for stem in STEMS]]
    grid = audio.grid_at(hp.sample_rate, hp)
    wav = audio.istft(spec, grid, max(1, (spec.shape[-1] - 1) * grid.hop_length))
    return wav[:, None].numpy()


def tune_song(separator: Separator, references: np.ndarray, sample_rate: int) -> list[float]:
    """Return the SI-SDR of the vocals for every entry of `mask_grid`; NaN if they are silent.

    Parameters
    ----------
    separator : Separator
    references : np.ndarray, shape=(2, n_channels, n_samples), float32
    sample_rate : int
    """
    mixture = references.sum(0)
    mask = separator.song_mask(mixture, sample_rate)

    def score(settings: dict[str, Any]) -> float:
        settings = {**UNTUNED_MASK, **settings}
        vocals, _ = songs.separate_by_mask(
            mixture, mask, sample_rate, separator.hp, settings, separator.is_mid_side(len(mixture))
        )
        return songs.limited_si_sdr(vocals, references[0])

    return [score(settings) for settings in mask_grid()]


def mean_scores(tuned: list[Tuned]) -> np.ndarray:
    """Average over songs; one that was given twice counts once, two of one name count both."""
    distinct = {(song.name, song.sha256): song.scores for song in tuned}
    return np.mean([distinct[key] for key in sorted(distinct)], 0)


def best_settings(scores: np.ndarray) -> dict[str, Any]:
    """Choose the mask settings with the best scores.

    Parameters
    ----------
    scores : np.ndarray, shape=(len(mask_grid()),)

    Returns
    -------
    dict
        All of ``MASK_SETTINGS``: the best threshold, the best gate with its sharpness, and in
        ``mask_at_eval`` which of the two sounds better.

    Raises
    ------
    InputError
        If all binary masks score the same, or all soft ones: there is nothing to choose by.
    """
    grid = mask_grid()
    for kind, part in zip(("binary", "soft"), np.split(scores, [len(THRESHOLDS)]), strict=True):
        if np.ptp(part) < LEAST_DB:
            raise InputError(
                f"all {kind} masks score {part.mean():.2f} dB, which tells nothing (give more "
                "songs or --seconds, or a network that has learnt something)"
            )
    hard = int(np.argmax(scores[: len(THRESHOLDS)]))
    soft = len(THRESHOLDS) + int(np.argmax(scores[len(THRESHOLDS) :]))
    is_hard = bool(scores[hard] > scores[soft])
    return {**UNTUNED_MASK, **grid[soft], **grid[hard], "mask_at_eval": is_hard}


def curves(scores: np.ndarray, settings: dict[str, Any]) -> list[str]:
    """Write the mean scores of all settings as lines, with an arrow at the best of each kind."""
    hard, soft = np.split(scores, [len(THRESHOLDS)])
    lines = ["", "binary mask: SI-SDR of the vocals [dB] by eval_mask_threshold"]
    for threshold, score in zip(THRESHOLDS, hard, strict=True):
        arrow = "  ←" if threshold == settings["eval_mask_threshold"] else ""
        lines.append(f"{threshold:6.2f} {score:8.2f}{arrow}")
    lines += ["", "soft mask: by noise_gate (down) and mask_sharpness (across)"]
    lines.append(" " * 6 + "".join(f"{sharpness:9.2f}" for sharpness in SHARPNESSES))
    best = settings["noise_gate"], settings["mask_sharpness"]
    for gate, row in zip(GATES, soft.reshape(len(GATES), -1), strict=True):
        line = f"{gate:6.2f}"
        for sharpness, score in zip(SHARPNESSES, row, strict=True):
            line += f"{score:8.2f}{'←' if (gate, sharpness) == best else ' '}"
        lines.append(line.rstrip())
    return [*lines, "", "best: " + ", ".join(f"{n}={value}" for n, value in settings.items())]


def store(path: Path, settings: dict[str, Any], before: str, tuned: list[Tuned]) -> None:
    """Put mask settings into a checkpoint, and leave all else in it as it is.

    Parameters
    ----------
    path : Path
    settings : dict
        All of ``MASK_SETTINGS``.
    before : str
        The file's hash when tuning began.
    tuned : list of Tuned
        What the settings were chosen on, so that evaluate.py can tell them when it scores them.

    Raises
    ------
    InputError
        If the file is not the one any more that was tuned.
    """
    if reading.sha256(path) != before:
        raise InputError(f"{path}: has changed since tuning began (tune it again)")
    contents = load_checkpoint(path)
    model, hp = restore_model(path, contents)
    contents["mask_settings"] = settings
    contents["tuned_on"] = [{"name": s.name, "sha256": list(s.sha256)} for s in sorted(tuned)]
    # Weights and hparams are among the contents and replace those of `model` and `hp`: hparams that
    # an earlier version did not know stay out.
    save_checkpoint(path, model, hp, **contents)
