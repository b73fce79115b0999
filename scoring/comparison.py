"""One system against another on the same songs: is it better, or is it chance.

Two files of scores are paired song by song; the interval of the mean difference is bootstrapped.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hparams import InputError
from scoring import tables
from scoring.scorebook import Record

FEWEST = 6  # songs: of fewer, all may differ the same way by chance in more than 1 of 20 cases
Pair = tuple[Record, Record]  # of one song, before and after


class Difference(NamedTuple):
    """One song's score before and after."""

    name: str
    group: str  # the song that it is a clip of
    before: float  # [dB]
    after: float

    @property
    def gain(self) -> float:
        """How much better it is after [dB]."""
        return self.after - self.before


def pair(
    paths: tuple[Path, Path], stored: tuple[dict[str, Any], ...], systems: tuple[str, str]
) -> tuple[list[Pair], int]:
    """Bring the songs of two files together.

    Parameters
    ----------
    paths : tuple of Path
        Of the files, for messages.
    stored : tuple of dict
        What `scorebook.read` gives for them.
    systems : tuple of str
        Whose scores are wanted of each.

    Returns
    -------
    list of tuple
        The records of every song that both files have, by name.
    int
        How many songs are in one file only.

    Raises
    ------
    InputError
        If a file lacks its system, or no song is in both, or one of them is not the same music.
    """
    for path, scores, system in zip(paths, stored, systems, strict=True):
        if system not in scores["summary"]:
            there = ", ".join(scores["summary"]) or "none"
            raise InputError(f"{path}: no system {system!r} (--systems takes of: {there})")
    before, after = ({song["name"]: song for song in scores["songs"]} for scores in stored)
    common = sorted(before.keys() & after.keys())
    if not common:
        raise InputError(f"{paths[1]}: has no song in common with {paths[0]}")
    for name in common:
        if _music(before[name]) != _music(after[name]):
            raise InputError(
                f"{paths[1]}: {name} is not the same music as in {paths[0]}; "
                "score both on the same files and seconds"
            )
    return [(before[name], after[name]) for name in common], len(before.keys() ^ after.keys())


def _music(song: Record) -> tuple[set[str], float]:
    return {file["sha256"] for file in song["files"]}, song["seconds"]


def differences(
    pairs: list[Pair], systems: tuple[str, str], stem: str, metric: str
) -> list[Difference]:
    """Take one metric of the songs that have it before and after."""
    found = []
    for both in pairs:
        before, after = (
            tables.song_score(song["scores"][system][stem], metric)
            for song, system in zip(both, systems, strict=True)
        )
        if math.isfinite(after - before):
            found.append(Difference(both[0]["name"], both[0]["group"], before, after))
    return found


def verdict(found: list[Difference], n_without: int = 0) -> str:
    """Say in words how large a difference is on average, and whether it is more than chance.

    Parameters
    ----------
    found : list of Difference
    n_without : int
        Songs that lack the score before or after.
    """
    if not found:
        return "no song has it in both"
    left_out = f"; {n_without} songs without it: a true source is silent, or it was not taken"
    return _judge(found) + left_out * bool(n_without)


def _judge(found: list[Difference]) -> str:
    gains = np.array([one.gain for one in found])
    groups = [one.group for one in found]
    n_groups = len(set(groups))
    text = f"{gains.mean():+.2f} dB on average"
    if n_groups < 2:
        return f"{text}; one song tells nothing about others"
    low, high = bootstrap(gains, groups)
    if n_groups < FEWEST:
        judgement = f"{n_groups} songs are too few to tell"
    elif low > 0 or high < 0:
        judgement = f"the interval excludes 0: {'better' if low > 0 else 'worse'}"
    else:
        judgement = "the interval holds 0: it may be chance"
    return (
        f"{text}, 95 % interval {low:+.2f} to {high:+.2f}; {judgement} "
        f"({(gains > 0).sum()} of {len(gains)} songs better)"
    )


def bootstrap(
    differences: np.ndarray, groups: list[str], n_resamples: int = 10_000
) -> tuple[float, float]:
    """Return the 95 % interval of a mean of paired differences.

    Parameters
    ----------
    differences : np.ndarray, shape=(n,)
    groups : list of str
        The song that each belongs to. Clips of one song are drawn together, as they are no
        independent witnesses.

    References
    ----------
    .. [1] Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile intervals).
    """
    names, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, differences), np.bincount(index)
    rng = np.random.default_rng(0)
    means = np.empty(n_resamples)
    for i in range(n_resamples):
        drawn = rng.integers(len(names), size=len(names))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
