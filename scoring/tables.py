"""The scores of many songs as one table and one figure for each metric.

The floor is the mixture as estimate, the ceilings are ideal masks; a share is the part of the way
from the floor to the ideal ratio mask. Songs are records as `scorebook` keeps them, in which all
systems have their scores of the same frames and songs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import numpy as np

import dataset
from scoring.metrics import WORST_DB
from scoring.scorebook import Record
from tools import charts

STEMS = dataset.PARTS
FLOOR, IDEALS = "floor", ("ideal_binary", "ideal_ratio")
CEILING = "ideal_ratio"  # what the share of the way is counted to
Summary = dict[str, dict[str, dict[str, dict[str, Any]]]]  # by system, stem and metric


class Metric(NamedTuple):
    """A score, and how those of songs become one."""

    name: str
    label: str
    across: str  # songs: "median", "mean", or "length" for the mean weighted by length

    @property
    def song_label(self) -> str:
        """Its name where songs are shown one by one: the G is for global."""
        plain = self.label.removeprefix("G")
        return plain if plain == self.label else f"{plain} (v3)"


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

METRIC_NAMES = tuple(metric.name for metric in METRICS)


def song_score(scores: dict[str, Any], metric: str) -> float:
    """Return one stem's score of a song: of frames their median; NaN if there is none."""
    value = scores.get(metric)
    return median(value) if isinstance(value, list) else math.nan if value is None else value


def median(values: list[float | None]) -> float:
    """Return the median of what is there; NaN if nothing is."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.median(there)) if there else math.nan


def summarise(songs: list[Record]) -> Summary:
    """Bring songs together.

    Parameters
    ----------
    songs : list of dict
        Each with ``scores`` as `songs.score_song` gives them and ``seconds``.

    Returns
    -------
    dict
        By system, stem and metric: ``value`` [dB], ``n_songs`` that have it, and ``share``, the
        part of the way from the floor to the ideal ratio mask; None where no way leads up.
    """
    systems = list(songs[0]["scores"]) if songs else []
    summary = {s: {stem: {} for stem in STEMS} for s in systems}
    for system, stem, metric in product(systems, STEMS, METRICS):
        values = np.array([song_score(s["scores"][system][stem], metric.name) for s in songs])
        there = ~np.isnan(values)
        weights = np.array([s["seconds"] if metric.across == "length" else 1.0 for s in songs])
        if metric.across == "median" or not there.any():
            value = median(list(values))
        else:
            value = float(np.average(values[there], weights=weights[there]))
        summary[system][stem][metric.name] = {"value": value, "n_songs": int(there.sum())}
    for system, stem, metric in product(systems, STEMS, METRICS):
        low, here, high = (
            summary[s][stem][metric.name]["value"] if s in summary else math.nan
            for s in (FLOOR, system, CEILING)
        )
        share = (here - low) / (high - low) if high - low > 0.01 else math.nan
        summary[system][stem][metric.name]["share"] = share
    for system, stem, metric in product(systems, STEMS, METRICS):
        cell = summary[system][stem][metric.name]
        cell["value"], cell["share"] = numbers([cell["value"], cell["share"]])
    return summary


def numbers(values: Iterable[float]) -> list[float | None]:
    """Round to what a file keeps, 0.0001 dB; None for NaN, which JSON does not know."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


# --- For people -----------------------------------------------------------------------------------


def tables(summary: Summary) -> list[str]:
    """Write a table for each stem, its rows the systems, as lines; metrics nobody has stay out."""
    metrics = [
        m
        for m in METRICS
        if any(of[stem][m.name]["n_songs"] for of in summary.values() for stem in STEMS)
    ]
    width = max([len(system) for system in summary] + [13]) + 1
    lines = []
    for stem in STEMS if summary else ():
        header = "".join(f"{m.label:>8}       " for m in metrics)
        lines += ["", (stem.ljust(width) + header).rstrip()]
        for system in ordered(summary):
            cells = [summary[system][stem][metric.name] for metric in metrics]
            shown = [cell_text(cell, system not in (FLOOR, *IDEALS)) for cell in cells]
            lines.append((system.ljust(width) + "".join(shown)).rstrip())
    return lines


def omissions(songs: list[Record], summary: Summary) -> list[str]:
    """Say how many frames and songs the tables leave out, and why."""
    n_frames = sum(song["n_frames"] for song in songs)
    lines = []
    if n_silent := sum(song["silent"]["reference"] for song in songs):
        lines.append(
            f"{n_silent} of {n_frames} frames left out of BSSEval v4: a true source is silent"
        )
    for metric in METRICS:
        n_songs = summary[FLOOR]["vocals"][metric.name]["n_songs"] if songs else 0
        if 0 < n_songs < len(songs):
            lines.append(
                f"{len(songs) - n_songs} of {len(songs)} songs left out of {metric.label}: "
                "a true source is silent" + " or it was not taken" * (metric.across == "length")
            )
    for system in ordered(summary):
        if n_silent := sum(song["silent"][system] for song in songs):
            lines.append(
                f"{n_silent} of {n_frames} frames of {system} count {WORST_DB:g} dB: it is silent "
                "where the truth is not"
            )
    return lines


def ordered(systems: Iterable[str]) -> list[str]:
    """Put the floor first and the ceilings last."""
    return sorted(systems, key=lambda s: (s in IDEALS) - (s == FLOOR))


def cell_text(cell: dict[str, Any], with_share: bool) -> str:
    """Write a score and, for a system, its share of the way."""
    value = "n/a" if cell["value"] is None else f"{cell['value']:.2f}"
    share = cell["share"] if with_share else None
    return f"{value:>8}" + ("       " if share is None else f"{f'{100 * share:.0f} %':>7}")


def markdown(name: str, grid: str, n_songs: int, summary: Summary) -> list[str]:
    """Write floor and ceilings as a table of one row in Markdown."""
    scores = [
        " / ".join(cell_text(summary[s]["vocals"][m], False).strip() for m in ("sdr", "si_sdr"))
        for s in (FLOOR, *IDEALS)
    ]
    return [
        "| vocals, SDR / SI-SDR | songs | n_fft, hop | floor | ideal binary | ideal ratio |",
        "|---|---|---|---|---|---|",
        f"| {' | '.join([name, str(n_songs), grid, *scores])} |",
    ]


def figure(songs: list[Record]) -> str:
    """Draw a chart for every metric and stem, a strip of songs for every system, as SVG."""
    systems = ordered(songs[0]["scores"]) if songs else []
    strips_of = []
    for stem, metric in product(STEMS, METRICS):
        strips = {
            system: [song_score(song["scores"][system][stem], metric.name) for song in songs]
            for system in systems
        }
        note = ""
        if metric.name.endswith("sar"):  # 80 dB of rounding would press the others together
            note = "; the floor has no artifacts"
            strips.pop(FLOOR, None)
        if any(math.isfinite(value) for values in strips.values() for value in values):
            title = f"{metric.song_label} of the {stem} [dB], one ○ a song{note}"
            strips_of.append(charts.Strips(title, strips))
    return charts.svg(strips_of)
