"""What separated songs are worth: beside the floor, the ceilings, and each other.

    true vocals, accompaniment ──▶ mixture ──▶ systems' vocals, accompaniment ──▶ scores

Waveforms of a song are float32 of (2, n_channels, n_samples): vocals, then accompaniment. BSSEval
sees everything rounded to 16 bits, which changes nothing that came from files of 16 bits: what a
lossy decoder leaves far below that makes its equations so ill-conditioned that museval's own
scores change by 0.3 dB when all signals are scaled alike.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import audio
import bsseval
import dataset
import metrics
from hparams import UNTUNED_MASK, HParams
from metrics import WORST_DB
from separation import Separator

STEMS = dataset.PARTS
FLOOR, IDEALS = "floor", ("ideal_binary", "ideal_ratio")
CEILING = "ideal_ratio"  # what the share of the way is counted to
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(1, 20))
GATES = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
SHARPNESSES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
SongScores = dict[str, dict[str, dict[str, Any]]]  # of a song: system, stem, metric


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


# --- What is scored -------------------------------------------------------------------------------


def middle(n: int, n_wanted: float | None) -> slice:
    """Return the middle `n_wanted` of n samples or frames; None wants all."""
    n_kept = n if n_wanted is None else max(1, min(n, round(n_wanted)))
    return slice((n - n_kept) // 2, (n - n_kept) // 2 + n_kept)


def read_built(folder: Path, song: dataset.Song, hp: HParams, seconds: float | None) -> np.ndarray:
    """Bring the middle `seconds` of a built song back to sound, mono at ``hp.sample_rate``.

    Raises
    ------
    InputError
        If its array is missing or damaged.
    """
    array = dataset.open_spectrogram(folder, song, hp.n_bins)
    n_wanted = None if seconds is None else seconds * hp.sample_rate / hp.hop_length
    kept = torch.from_numpy(array[middle(len(array), n_wanted)].astype(np.float32))
    spec = torch.view_as_complex(kept).permute(1, 2, 0)  # (n_parts, n_bins, n_frames)
    spec = spec[[song.parts.index(stem) for stem in STEMS]]
    grid = audio.grid_at(hp.sample_rate, hp)
    wav = audio.istft(spec, grid, max(1, (spec.shape[-1] - 1) * grid.hop_length))
    return wav[:, None].numpy()


def without_network(hp: HParams, device: torch.device | str = "cpu") -> Separator:
    """Make a separator that only renders given masks, as they are."""
    identity = torch.nn.Identity()
    return Separator(identity, hp, torch.zeros(hp.n_bins), dict(UNTUNED_MASK), torch.device(device))


def render(
    separator: Separator,
    mixture: np.ndarray,
    sample_rate: int,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> np.ndarray:
    """Separate a mixture of (n_channels, n_samples); accompaniment is mixture − vocals.

    Parameters
    ----------
    settings : dict, optional
        Mask settings that replace those of `separator`, which is not changed.
    **options
        As for `Stream`: ``saved`` renders a given mask, ``on_mask`` hears of the network's.
    """
    separator = copy.copy(separator)
    separator.mask_settings = {**separator.mask_settings, **(settings or {})}
    stream = separator.stream(sample_rate, len(mixture), **options)
    vocals = torch.cat([stream.push(mixture), stream.finish()], -1).numpy()
    return np.stack([vocals, mixture - vocals])


def replay(levels: np.ndarray) -> Callable[[int], np.ndarray]:
    """Return what gives mask columns back, n by n, for a stream's ``saved``."""
    position = 0

    def columns(n: int) -> np.ndarray:
        nonlocal position
        position += n
        return levels[..., position - n : position]

    return columns


def ideal_mask(
    references: np.ndarray, sample_rate: int, hp: HParams, name: str
) -> Callable[[int], np.ndarray]:
    """Return what gives an ideal mask's columns, for a stream's ``saved``.

    Like the network's it is one mask for all channels, knows `hp`'s bins, and has 8 bits: the
    ceiling is what such a mask can reach, and not what any method can.

    Parameters
    ----------
    name : {"ideal_binary", "ideal_ratio"}
    """
    grid = audio.grid_at(sample_rate, hp)
    half = grid.n_fft // 2
    wavs = F.pad(torch.from_numpy(references.mean(1)), (half, half))
    mask_of = {"ideal_binary": audio.ideal_binary_mask, "ideal_ratio": audio.ideal_ratio_mask}
    position = 0

    def columns(n: int) -> np.ndarray:
        nonlocal position
        if n == 0:
            return np.zeros((1, hp.n_bins, 0), np.uint8)
        begin, position = position * grid.hop_length, position + n
        frames = wavs[:, begin : begin + (n - 1) * grid.hop_length + grid.n_fft]
        specs = audio.to_network_bins(audio.frames_to_spec(frames, grid), hp)
        return audio.mask_levels(mask_of[name](*specs))[None].numpy()

    return columns


def ideals(references: np.ndarray, sample_rate: int, hp: HParams) -> dict[str, np.ndarray]:
    """Separate a song by its ideal masks, through the front end and rendering of the network."""
    renderer, mixture = without_network(hp), references.sum(0)
    masks = {name: ideal_mask(references, sample_rate, hp, name) for name in IDEALS}
    return {name: render(renderer, mixture, sample_rate, saved=m) for name, m in masks.items()}


# --- The scores of a song -------------------------------------------------------------------------


def score_song(
    references: np.ndarray,
    estimates: dict[str, np.ndarray],
    sample_rate: int,
    v3: bool | None = None,
) -> dict[str, Any]:
    """Score all systems on one song, the mixture as ``floor`` among them.

    Parameters
    ----------
    references : np.ndarray, shape=(2, n_channels, n_samples), float32
    estimates : dict of np.ndarray, of that shape
        By system.
    sample_rate : int
        Of which BSSEval's frames take one second.
    v3 : bool, optional
        Whether to take BSSEval v3, too; by default of mono songs, of which it has been reported.

    Returns
    -------
    dict
        ``n_frames``; ``silent``: in how many of them the reference, or else a system's estimate,
        is silent, and BSSEval v4 therefore undefined; ``scores``: by system and stem, lists of
        ``sdr``, ``isr``, ``sir``, ``sar`` (BSSEval v4, a number a frame) and, of the whole song,
        ``v3_sdr``, ``v3_sir``, ``v3_sar`` (BSSEval v3 on the mean of the channels), ``nsdr``
        (``v3_sdr`` minus that of the floor) and ``si_sdr``, not below `WORST_DB`. None is a score
        that does not exist: of a silent frame, of a silent song, or one that was not taken.
    """
    mixture = references.sum(0)
    estimates = {FLOOR: np.stack([mixture, mixture]), **estimates}
    truth = _to_16_bits(references)
    guesses = torch.stack([_to_16_bits(estimate) for estimate in estimates.values()])
    frames = bsseval.bss_eval_v4(truth, guesses, sample_rate, sample_rate)
    silent = {"reference": silent_frames(truth, sample_rate)}
    silent |= {
        name: silent_frames(guess, sample_rate) & ~silent["reference"]
        for name, guess in zip(estimates, guesses, strict=True)
    }
    missing = torch.full((len(estimates), len(STEMS)), math.nan)
    whole = bsseval.WholeScores(missing, missing, missing)
    if v3 or (v3 is None and references.shape[1] == 1):
        mono = torch.stack([_to_16_bits(estimate.mean(1)) for estimate in estimates.values()])
        whole = bsseval.bss_eval_v3(_to_16_bits(references.mean(1)), mono)
    scores: SongScores = {}
    for i, (system, estimate) in enumerate(estimates.items()):
        scores[system] = {}
        for j, stem in enumerate(STEMS):
            of_frames = {name: _numbers(x[i, j]) for name, x in frames._asdict().items()}
            of_song = {
                **{f"v3_{name}": x[i, j] for name, x in whole._asdict().items()},
                "nsdr": whole.sdr[i, j] - whole.sdr[0, j],
                "si_sdr": si_sdr(estimate[j], references[j]),
            }
            names, values = zip(*of_song.items(), strict=True)
            scores[system][stem] = of_frames | dict(zip(names, _numbers(values), strict=True))
    n_silent = {name: int(where.sum()) for name, where in silent.items()}
    return {"n_frames": len(silent["reference"]), "silent": n_silent, "scores": scores}


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return `metrics.si_sdr` without infinities: at least `WORST_DB`, at most 300 dB."""
    score = metrics.si_sdr(estimate, reference)
    return score if math.isnan(score) else min(max(score, WORST_DB), bsseval.LIMIT_DB)


def silent_frames(wavs: torch.Tensor, window: int) -> torch.Tensor:
    """Say of each frame whether one of the sources (2, n_channels, n_samples) is silent in it."""
    n_samples = wavs.shape[-1]
    window = min(window, n_samples)
    frames = wavs.sum(1)[:, : n_samples // window * window].unflatten(-1, (-1, window))
    return (frames == 0).all(-1).any(0)


def _to_16_bits(wav: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(wav).mul(2**15).round().div(2**15)


def _numbers(values: Any) -> list[float | None]:
    """Round to what a file keeps, 0.0001 dB; None for NaN, which JSON does not know."""
    return [None if math.isnan(value) else round(float(value), 4) for value in values]


# --- The scores of many songs ---------------------------------------------------------------------


def song_score(scores: dict[str, Any], metric: str) -> float:
    """Return one stem's score of a song: of frames their median; NaN if there is none."""
    value = scores[metric]
    return median(value) if isinstance(value, list) else math.nan if value is None else value


def median(values: list[float | None]) -> float:
    """Return the median of what is there; NaN if nothing is."""
    there = [value for value in values if value is not None and not math.isnan(value)]
    return float(np.median(there)) if there else math.nan


def summarise(songs: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Bring songs together.

    Parameters
    ----------
    songs : list of dict
        Each with ``scores`` as `score_song` gives them and ``seconds``.

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
        cell["value"], cell["share"] = _numbers([cell["value"], cell["share"]])
    return summary


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


# --- Tuning ---------------------------------------------------------------------------------------


def mask_grid() -> list[dict[str, Any]]:
    """List the mask settings that tuning tries: all binary ones, then all soft ones."""
    hard = [{"mask_at_eval": True, "eval_mask_threshold": t} for t in THRESHOLDS]
    soft = [
        {"mask_at_eval": False, "noise_gate": gate, "mask_sharpness": sharpness}
        for gate, sharpness in product(GATES, SHARPNESSES)
    ]
    return hard + soft


def tune_song(separator: Separator, references: np.ndarray, sample_rate: int) -> list[float]:
    """Return the SI-SDR of the vocals for every entry of `mask_grid`; NaN if they are silent.

    The network listens once; all else renders the mask that it gave.
    """
    mixture, columns = references.sum(0), []
    render(separator, mixture, sample_rate, on_mask=columns.append)
    levels = np.concatenate(columns, -1)

    def score(settings: dict[str, Any]) -> float:
        estimate = render(separator, mixture, sample_rate, settings, saved=replay(levels))
        return si_sdr(estimate[0], references[0])

    return [score(settings) for settings in mask_grid()]


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
    """
    grid = mask_grid()
    hard = int(np.argmax(scores[: len(THRESHOLDS)]))
    soft = len(THRESHOLDS) + int(np.argmax(scores[len(THRESHOLDS) :]))
    is_hard = bool(scores[hard] > scores[soft])
    return {**UNTUNED_MASK, **grid[soft], **grid[hard], "mask_at_eval": is_hard}
