"""Choosing the mask settings that sound best, on songs that a network has not learnt from.

The network separates each song once; every setting renders the mask that it gave.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from hparams import UNTUNED_MASK, InputError
from model import load_checkpoint, restore_model, save_checkpoint
from scoring import metrics, songs
from separation import Separator
from sound import tracks

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
GATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
SHARPNESSES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
LEAST_DB = 0.01  # by which settings must differ to be chosen between


def mask_grid() -> list[dict[str, Any]]:
    """List the mask settings that tuning tries: all binary ones, then all soft ones."""
    hard = [{"mask_at_eval": True, "eval_mask_threshold": t} for t in THRESHOLDS]
    soft = [
        {"mask_at_eval": False, "noise_gate": gate, "mask_sharpness": sharpness}
        for gate, sharpness in product(GATES, SHARPNESSES)
    ]
    return hard + soft


def tune_track(task: songs.Evaluation, track: tracks.Track) -> list[float]:
    """Return what `tune_song` says of the middle that the task wants."""
    rate = tracks.measure(track).sample_rate
    references = songs.middle(tracks.read_channels(track), rate, task.seconds)
    return tune_song(songs.load_network(task), references, rate)


def tune_song(separator: Separator, references: np.ndarray, sample_rate: int) -> list[float]:
    """Return the SI-SDR of the vocals for every entry of `mask_grid`; NaN if they are silent.

    `references` are the true vocals and accompaniment, (2, n_channels, n_samples), float32.
    """
    mixture, scores = references.sum(0), []
    mask = separator.song_mask(mixture, sample_rate)
    is_mid_side = separator.is_mid_side(len(mixture))
    for settings in mask_grid():
        vocals, _ = songs.separate_by_mask(
            mixture, mask, sample_rate, separator.hp, {**UNTUNED_MASK, **settings}, is_mid_side
        )
        scores.append(metrics.limited_si_sdr(vocals, references[0]))
    return scores


def best_settings(scores: np.ndarray) -> dict[str, Any]:
    """Choose the mask settings with the best of the scores, (len(mask_grid()),).

    Returns all of ``MASK_SETTINGS``: the best threshold, the best gate with its sharpness, and in
    ``mask_at_eval`` which of the two sounds better. InputError if all binary masks score the same,
    or all soft ones: there is nothing to choose by.
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


def store(path: Path, settings: dict[str, Any], names: list[str]) -> None:
    """Put mask settings into a checkpoint, and leave all else in it as it is.

    `names` are the songs they were chosen on, so that evaluate.py can tell when it scores them.
    """
    contents = load_checkpoint(path)
    model, hp = restore_model(path, contents)
    contents["mask_settings"] = settings
    contents["tuned_on"] = [{"name": name} for name in sorted(names)]
    # Weights and hparams are among the contents and replace those of `model` and `hp`: hparams that
    # an earlier version did not know stay out.
    save_checkpoint(path, model, hp, **contents)
