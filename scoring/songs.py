"""What a separated song is worth: beside the floor and the ceilings.

    true vocals, accompaniment ──▶ mixture ──▶ systems' vocals, accompaniment ──▶ scores

Waveforms of a song are float32 of (2, n_channels, n_samples): vocals, then accompaniment. BSSEval
sees everything rounded to 16 bits, which changes nothing that came from files of 16 bits: what a
lossy decoder leaves far below that makes its equations so ill-conditioned that museval's own
scores change by 0.3 dB when all signals are scaled alike.

Everybody is scored on the same frames and songs. Where a true source is silent there is nothing to
separate, and nobody has a score; a silent estimate of what can be heard scores `WORST_DB` in every
metric. (museval leaves such a frame out, which would reward silence where a song is hard.)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import audio
from hparams import UNTUNED_MASK, HParams
from scoring import bsseval, metrics
from scoring.metrics import BEST_DB, WORST_DB
from scoring.tables import FLOOR, IDEALS, STEMS, numbers

BITS_DB = 98.0  # SIR and SAR of a whole song go no higher: 16 bits hold no more
SongScores = dict[str, dict[str, dict[str, Any]]]  # of a song: system, stem, metric


# --- What is scored -------------------------------------------------------------------------------


def middle(n: int, n_wanted: float | None) -> slice:
    """Return the middle `n_wanted` of n samples or frames; None wants all."""
    n_kept = n if n_wanted is None else max(1, min(n, round(n_wanted)))
    return slice((n - n_kept) // 2, (n - n_kept) // 2 + n_kept)


def render(
    mixture: np.ndarray, mask: torch.Tensor, sample_rate: int, hp: HParams, settings: dict[str, Any]
) -> np.ndarray:
    """Apply a mask to a mixture; accompaniment is mixture − vocals.

    Parameters
    ----------
    mixture : np.ndarray, shape=(n_channels, n_samples), float32
    mask : torch.Tensor, shape=(1 or n_channels, n_bins, n_frames), in [0, 1]
        As `Separator.song_mask` or `ideal_mask` gives it.
    sample_rate : int
    hp : HParams
        Of the mask.
    settings : dict
        Mask settings, as `audio.vocals_mask` takes them.

    Returns
    -------
    np.ndarray, shape=(2, n_channels, n_samples), float32
    """
    grid = audio.grid_at(sample_rate, hp)
    spec = audio.stft(torch.from_numpy(mixture), grid)
    spec = audio.apply_mask(spec, audio.vocals_mask(mask, **settings))
    vocals = audio.istft(spec, grid, mixture.shape[-1]).numpy()
    return np.stack([vocals, mixture - vocals])


def ideal_mask(references: np.ndarray, sample_rate: int, hp: HParams, name: str) -> torch.Tensor:
    """Return an ideal mask, (1, n_bins, n_frames).

    Like the network's it is one mask for all channels, knows `hp`'s bins, and has 8 bits: the
    ceiling is what such a mask can reach, and not what any method can.

    Parameters
    ----------
    name : {"ideal_binary", "ideal_ratio"}
    """
    mask_of = {"ideal_binary": audio.ideal_binary_mask, "ideal_ratio": audio.ideal_ratio_mask}
    wavs = torch.from_numpy(references.mean(1))
    specs = audio.to_network_bins(audio.stft(wavs, audio.grid_at(sample_rate, hp)), hp)
    return audio.quantize_mask(mask_of[name](*specs))[None]


def ideals(references: np.ndarray, sample_rate: int, hp: HParams) -> dict[str, np.ndarray]:
    """Separate a song by its ideal masks, through the front end and rendering of the network."""
    masks = {name: ideal_mask(references, sample_rate, hp, name) for name in IDEALS}
    return {
        name: render(references.sum(0), mask, sample_rate, hp, UNTUNED_MASK)
        for name, mask in masks.items()
    }


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
        ``n_frames``; ``silent``: in how many of them a reference, or else a system's estimate, is
        silent; ``scores``: by system and stem, lists of ``sdr``, ``isr``, ``sir``, ``sar``
        (BSSEval v4, a number a frame) and, of the whole song, ``v3_sdr``, ``v3_sir``, ``v3_sar``
        (BSSEval v3 on the mean of the channels), ``nsdr`` (``v3_sdr`` minus that of the floor) and
        ``si_sdr``. What is averaged over songs is limited: ``v3_sdr`` and ``si_sdr`` to `WORST_DB`
        and `BEST_DB`, ``v3_sir`` and ``v3_sar`` to `WORST_DB` and `BITS_DB`. None is a score that
        nobody has: a reference is silent in the frame or song, or it was not taken.
    """
    mixture = references.sum(0)
    estimates = {FLOOR: np.stack([mixture, mixture]), **estimates}
    truth = _to_16_bits(references)
    guesses = torch.empty(len(estimates), *truth.shape)
    for guess, estimate in zip(guesses, estimates.values(), strict=True):
        guess.copy_(_to_16_bits(estimate))
    silent = {"reference": silent_frames(truth, sample_rate)}
    silent |= {
        name: silent_frames(guess, sample_rate) & ~silent["reference"]
        for name, guess in zip(estimates, guesses, strict=True)
    }
    frames = bsseval.bss_eval_v4(truth, guesses, sample_rate, sample_rate)
    frames = bsseval.Scores(*(_worst_if_none(x, ~silent["reference"]) for x in frames))
    del guesses, guess  # what is left to do needs the room
    missing = torch.full((len(estimates), len(STEMS)), math.nan)
    whole = bsseval.WholeScores(missing, missing, missing)
    if v3 or (v3 is None and references.shape[1] == 1):
        true_mono = _to_16_bits(references.mean(1))
        mono = torch.stack([_to_16_bits(estimate.mean(1)) for estimate in estimates.values()])
        whole = bsseval.bss_eval_v3(true_mono, mono)
        whole = whole._replace(
            sdr=whole.sdr.clamp(WORST_DB, BEST_DB),
            sir=whole.sir.clamp(WORST_DB, BITS_DB),
            sar=whole.sar.clamp(WORST_DB, BITS_DB),
        )
        heard = true_mono.any(-1).all()
        whole = bsseval.WholeScores(*(_worst_if_none(x, heard) for x in whole))
    is_heard = truth.flatten(1).any(-1).all()
    scores: SongScores = {}
    for i, (system, estimate) in enumerate(estimates.items()):
        scores[system] = {}
        for j, stem in enumerate(STEMS):
            of_frames = {name: numbers(x[i, j]) for name, x in frames._asdict().items()}
            of_song = {
                **{f"v3_{name}": x[i, j] for name, x in whole._asdict().items()},
                "nsdr": whole.sdr[i, j] - whole.sdr[0, j],
                "si_sdr": si_sdr(estimate[j], references[j]) if is_heard else math.nan,
            }
            names, values = zip(*of_song.items(), strict=True)
            scores[system][stem] = of_frames | dict(zip(names, numbers(values), strict=True))
    n_silent = {name: int(where.sum()) for name, where in silent.items()}
    return {"n_frames": len(silent["reference"]), "silent": n_silent, "scores": scores}


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return `metrics.si_sdr`, limited to `WORST_DB` and `BEST_DB`; NaN of a silent reference."""
    return float(np.clip(metrics.si_sdr(estimate, reference), WORST_DB, BEST_DB))


def _worst_if_none(scores: torch.Tensor, heard: torch.Tensor) -> torch.Tensor:
    """Give silent estimates, which have no score, the worst one where the truth is heard."""
    return torch.where(scores.isnan() & heard, WORST_DB, scores)


def silent_frames(wavs: torch.Tensor, window: int) -> torch.Tensor:
    """Say of each frame whether one of the sources (2, n_channels, n_samples) is silent in it."""
    n_samples = wavs.shape[-1]
    window = min(window, n_samples)
    frames = wavs.sum(1)[:, : n_samples // window * window].unflatten(-1, (-1, window))
    return (frames == 0).all(-1).any(0)


def _to_16_bits(wav: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(wav).mul(2**15).round_().div_(2**15)
