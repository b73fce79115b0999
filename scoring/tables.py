"""The scores of many songs: as a table, as a picture, and one system against another.

The floor is the mixture as estimate, the ceilings are ideal masks. Songs are records as
`songs.scores_of` makes them, in which all systems have their scores of the same frames and songs.
Nothing here needs torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import cli
from hparams import InputError

FORMAT = "vocal-mask scores 4"
STEMS = ("vocals", "accompaniment")
FLOOR, IDEALS = "floor", ("ideal_binary", "ideal_ratio")
WORST_DB = -30.0  # a silent estimate is infinitely bad; scores are averaged from here up
BEST_DB = 30.0  # and a copy of the truth infinitely good: one song must not outweigh all others
FEWEST = 6  # songs: of fewer, all may differ the same way by chance in more than 1 of 20 cases
Record = dict[str, Any]  # of a song, as it is stored
Summary = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by system, stem and metric


class Metric(NamedTuple):
    """A score, and how those of songs become one."""

    name: str
    label: str
    across: str  # songs: "median", "mean", or "length" for the mean weighted by length


METRICS = (
    Metric("sdr", "SDR", "median"),
    Metric("isr", "ISR", "median"),
    Metric("sir", "SIR", "median"),
    Metric("sar", "SAR", "median"),
    Metric("nsdr", "GNSDR", "length"),
    Metric("v3_sir", "GSIR", "length"),
    Metric("v3_sar", "GSAR", "length"),
    Metric("si_sdr", "SI-SDR", "mean"),
)


def song_score(scores: dict[str, Any], metric: str) -> float:
    """Return one stem's score of a song: of frames their median; NaN if there is none."""
    value = scores.get(metric)
    return median(value if isinstance(value, list) else [value])


def median(values: Iterable[float | None]) -> float:
    """Return the median of what is there; NaN if nothing is."""
    numbers = np.array(list(values), dtype=float)  # None becomes NaN
    there = numbers[~np.isnan(numbers)]
    return float(np.median(there)) if len(there) else math.nan


def rounded(value: Any) -> Any:
    """Round a number, or a list of them, to 0.0001 dB; None for NaN, which JSON does not know."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return None if math.isnan(value) else round(value, 4)


def summarise(songs: list[Record]) -> Summary:
    """Bring the scores of songs together.

    Returns, by system, stem and metric: ``value`` [dB], and ``n_songs`` that have it.
    """
    systems = list(songs[0]["scores"])
    summary: Summary = {system: {stem: {} for stem in STEMS} for system in systems}
    for stem, metric in product(STEMS, METRICS):
        weights = np.array([s["seconds"] if metric.across == "length" else 1.0 for s in songs])
        for system in systems:
            values = np.array([song_score(s["scores"][system][stem], metric.name) for s in songs])
            there, value = ~np.isnan(values), median(values)
            if metric.across != "median" and there.any():
                value = float(np.average(values[there], weights=weights[there]))
            cell = {"value": rounded(value), "n_songs": int(there.sum())}
            summary[system][stem][metric.name] = cell
    return summary


def ordered(systems: Iterable[str]) -> list[str]:
    """Put the floor first and the ceilings last."""
    return sorted(systems, key=lambda s: (s in IDEALS) - (s == FLOOR))


def tables(summary: Summary) -> list[str]:
    """Write a table for each stem, its rows the systems, as lines; metrics nobody has stay out."""
    names = [
        metric
        for metric in METRICS
        if any(of[stem][metric.name]["n_songs"] for of in summary.values() for stem in STEMS)
    ]
    width = max([len(system) for system in summary] + [13]) + 1
    lines = []
    for stem in STEMS:
        lines += ["", stem.ljust(width) + "".join(f"{metric.label:>9}" for metric in names)]
        for system in ordered(summary):
            values = [summary[system][stem][metric.name]["value"] for metric in names]
            texts = ("n/a" if value is None else f"{value:.2f}" for value in values)
            lines.append(system.ljust(width) + "".join(f"{text:>9}" for text in texts))
    return lines


def plot_scores(path: Path, songs: list[Record]) -> None:
    """Draw SDR and SI-SDR of both stems: a column for every system, a point for every song."""
    from matplotlib.figure import Figure

    picture = Figure((9.6, 5.6), dpi=100, layout="constrained")
    systems = ordered(songs[0]["scores"])
    metrics = [metric for metric in METRICS if metric.name in ("sdr", "si_sdr")]
    for row, stem in zip(picture.subplots(2, 2), STEMS, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for i, system in enumerate(systems):
                scores = [song_score(song["scores"][system][stem], metric.name) for song in songs]
                values = np.sort([score for score in scores if np.isfinite(score)])
                offsets = np.resize([0, 0.1, -0.1, 0.2, -0.2], len(values))  # side by side
                axes.plot(i + offsets, values, "o", markersize=4, alpha=0.6)
                if len(values):
                    axes.plot([i - 0.3, i + 0.3], [np.median(values)] * 2, "k", linewidth=2)
            axes.set_xticks(range(len(systems)), [name.replace("_", "\n") for name in systems])
            axes.set_title(f"{metric.label} of the {stem} [dB]", loc="left", fontsize=9)
            axes.grid(axis="y", alpha=0.3)
    cli.replace_atomically(path, lambda file: picture.savefig(file, format=path.suffix[1:]))


def write_scores(path: Path, about: dict[str, Any], summary: Summary, songs: list[Record]) -> None:
    """Write the file that `read_scores` reads: every song's scores and what they are of."""
    contents = {"format": FORMAT, "about": about, "summary": summary, "songs": songs}
    data = json.dumps(contents, separators=(",", ":"), allow_nan=False).encode()
    cli.replace_atomically(path, lambda file: file.write(data))


def refuse_foreign(path: Path) -> None:
    """Raise InputError if a file is there that `write_scores` did not write."""
    if path.is_file() and b"vocal-mask scores" not in path.read_bytes()[:100]:
        raise InputError(f"{path}: is there and holds no scores (choose another --output)")


def read_scores(path: Path, system: str) -> dict[str, Record]:
    """Read what evaluate.py wrote; returns the songs by name."""
    try:
        stored = json.loads(path.read_text())
        if stored["format"] != FORMAT:
            raise InputError(f"{path}: scores of another version (score again)")
        there = ", ".join(stored["summary"])
        songs = {song["name"]: song for song in stored["songs"]}
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: no scores of evaluate.py, or damaged (score again)") from error
    if system not in stored["summary"]:
        raise InputError(f"{path}: no system {system!r} (--systems takes of: {there or 'none'})")
    return songs


def pair_songs(paths: tuple[Path, Path], systems: tuple[str, str]) -> list[tuple[Record, Record]]:
    """Bring the songs of two files together that both have, in the order of their names.

    InputError as in `read_scores`, or if no song is in both, or one of them is not the same music.
    """
    before, after = map(read_scores, paths, systems)
    if not (common := sorted(before.keys() & after.keys())):
        raise InputError(f"{paths[1]}: has no song in common with {paths[0]}")
    pairs = [(before[name], after[name]) for name in common]
    for pair in pairs:
        if len({(*sorted(song["files"]), song["seconds"]) for song in pair}) > 1:
            what = f"{pair[0]['name']} is not the same music as in {paths[0]}"
            raise InputError(f"{paths[1]}: {what}; score both on the same files and seconds")
    return pairs


def gains_of(
    pairs: list[tuple[Record, Record]], systems: tuple[str, str], metric: str
) -> tuple[np.ndarray, list[str]]:
    """Return what one metric of the vocals gained, for the songs that have it before and after.

    Returns also which song each of them is a clip of.
    """
    before, after = (
        np.array([song_score(song["scores"][system]["vocals"], metric) for song in songs])
        for songs, system in zip(zip(*pairs, strict=True), systems, strict=True)
    )
    there = np.isfinite(after - before)
    groups = [song["group"] for (song, _), is_there in zip(pairs, there, strict=True) if is_there]
    return (after - before)[there], groups


def verdict(gains: np.ndarray, groups: list[str]) -> str:
    """Say in words how large a difference is on average, and whether it is more than chance.

    `groups` are as in `bootstrap`.
    """
    if not len(gains):
        return "no song has it in both"
    text, n_groups = f"{gains.mean():+.2f} dB on average", len(set(groups))
    if n_groups < FEWEST:
        return f"{text}; {n_groups} songs are too few to tell"
    low, high = bootstrap(gains, groups)
    judgement = "holds 0: it may be chance"
    if low > 0 or high < 0:
        judgement = f"excludes 0: {'better' if low > 0 else 'worse'}"
    return (
        f"{text}, 95 % interval {low:+.2f} to {high:+.2f}; the interval {judgement} "
        f"({(gains > 0).sum()} of {len(gains)} songs better)"
    )


def bootstrap(gains: np.ndarray, groups: list[str]) -> tuple[float, float]:
    """Return the 95 % interval of a mean of paired differences [1].

    `groups` names the song that each gain belongs to: clips of one song are drawn together, as they
    are no independent witnesses.

    References
    ----------
    .. [1] Efron and Tibshirani, "An Introduction to the Bootstrap", 1993 (percentile intervals).
    """
    names, index = np.unique(groups, return_inverse=True)
    sums, counts = np.bincount(index, gains), np.bincount(index)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(names), size=(10_000, len(names)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)
