"""Scores of separated signals: SI-SDR, and BSSEval in its versions 3 and 4.

    estimate = true source + spatial distortion + interference + artifacts
               └── its own source, filtered ──┘
               └─────────── all sources, filtered ───────────┘

BSSEval's definitions are museval's (version 4: frames) and mir_eval's (version 3: whole signals),
which the tests compare with. Every score is a ratio of energies of filtered frames, taken from
their FFTs by Parseval: no filtered sound is made.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.fft
import torch

from hparams import InputError
from scoring.tables import BEST_DB, WORST_DB

N_TAPS = 512
REACH = N_TAPS - 1  # samples that a filter looks back
BLOCK_FFT = 2**15  # correlations are taken in blocks: large against a filter, yet in cache
RIDGE = 1e-14  # of the largest energy: solves what silent or equal channels leave undefined
LIMIT_DB = 300.0  # two sums of 53-bit numbers differ by no more, unless one is 0
EPSILON = torch.finfo(torch.float64).eps


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return the scale-invariant signal-to-distortion ratio [dB] [1].

    Both are (n_samples,) or (n_channels, n_samples); channels are scored together, as one long
    signal. 0 dB is as much error as voice. NaN if `reference` is silent: there is nothing to find;
    -inf if `estimate` holds nothing of it.

    References
    ----------
    .. [1] Le Roux et al., "SDR – half-baked or well done?", ICASSP 2019, equations 3 and 4.
    """
    estimate = np.asarray(estimate, dtype=np.float64).ravel()
    reference = np.asarray(reference, dtype=np.float64).ravel()
    energy = reference @ reference
    if energy == 0:
        return float("nan")
    target = reference * ((estimate @ reference) / energy)
    noise = estimate - target
    with np.errstate(divide="ignore"):
        return float(10 * np.log10((target @ target) / max(noise @ noise, 1e-300)))


def limited_si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Return `si_sdr`, limited to `WORST_DB` and `BEST_DB`; NaN of a silent reference."""
    return float(np.clip(si_sdr(estimate, reference), WORST_DB, BEST_DB))


class _Energies(NamedTuple):
    """Of sources in frames, each of shape (n_systems, n_sources, n_frames), float64."""

    true: torch.Tensor
    error: torch.Tensor  # estimate - true
    filtered: torch.Tensor  # the estimate's projection on its own source
    spatial: torch.Tensor  # filtered - true
    unfiltered: torch.Tensor  # estimate - filtered
    explained: torch.Tensor  # the estimate's projection on all sources
    interference: torch.Tensor  # explained - filtered
    artifacts: torch.Tensor  # estimate - explained


def bss_eval_v4(
    references: torch.Tensor, estimates: torch.Tensor, window: int
) -> dict[str, torch.Tensor]:
    """Score estimates frame by frame, with filters that are the same for the whole song [1, 2].

    `references` (n_sources, n_channels, n_samples) are the true sources, at any scale; `estimates`
    (n_systems, n_sources, n_channels, n_samples) those of several systems. Give `window` [samples]
    the sample rate, as SiSEC 2018 did, and take medians over frames; what remains after the last
    whole frame is not scored, and a shorter song is one frame. Round references that come from a
    lossy format to 16 bits: what the encoder removed leaves the filters free to be anything there,
    which frames' edges let through (once a median SIR fell from 16 to -2 dB).

    Returns float64 of (n_systems, n_sources, n_frames) [dB], at most ±300: ``sdr``, the true source
    over all that was done to it; ``isr``, over what a filter could undo; ``sir``, over what is left
    of the other sources; ``sar``, over what no filtering of any source explains. NaN in a frame in
    which any source's reference is silent (its channels sum to 0 at every sample), and of a source
    in a frame in which its own estimate is; there museval leaves out the other sources, too.
    InputError if samples are not finite.

    References
    ----------
    .. [1] Stöter, Liutkus and Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018.
    .. [2] Vincent, Gribonval and Févotte, "Performance measurement in blind audio source
       separation", IEEE TASLP 14(4), 2006.
    """
    energies = _frame_energies(references, estimates, window)
    return {
        "sdr": _decibels(energies.true, energies.error),
        "isr": _decibels(energies.true, energies.spatial),
        "sir": _decibels(energies.filtered, energies.interference),
        "sar": _decibels(energies.explained, energies.artifacts),
    }


def bss_eval_v3(references: torch.Tensor, estimates: torch.Tensor) -> dict[str, torch.Tensor]:
    """Score whole mono signals, in the order given; filtering a source costs nothing.

    Shapes, limits and errors are those of `bss_eval_v4`, without channels and frames; there is no
    ISR. GNSDR, GSIR and GSAR of MIR-1K are means of these over clips, weighted by their lengths;
    the N of GNSDR subtracts the SDR of the mixture as estimate.
    """
    whole = max(1, references.shape[-1])
    energies = _frame_energies(references.unsqueeze(-2), estimates.unsqueeze(-2), whole)
    return {
        "sdr": _decibels(energies.filtered, energies.unfiltered)[..., 0],
        "sir": _decibels(energies.filtered, energies.interference)[..., 0],
        "sar": _decibels(energies.explained, energies.artifacts)[..., 0],
    }


def _decibels(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (10 * torch.log10(signal / noise)).clamp(-LIMIT_DB, LIMIT_DB)


def _frame_energies(references: torch.Tensor, estimates: torch.Tensor, window: int) -> _Energies:
    """Take the energies of every frame of every system; NaN where silence leaves them undefined."""
    n_sources, n_channels, n_samples = references.shape
    n_systems, n_frames = len(estimates), max(1, n_samples // window)
    window = max(1, min(window, n_samples))
    wavs, guesses = references.flatten(0, 1), estimates.flatten(1, 2)
    gram, cross = _correlate(wavs, guesses.flatten(0, 1))
    cross = cross.unflatten(1, (n_systems, len(wavs)))
    sources = [slice(j * n_channels, (j + 1) * n_channels) for j in range(n_sources)]
    n_fft = _fast_size(window + REACH)  # room for a frame's echo in the filter
    # (all channels, n_systems, all channels, n_bins), and of each source by its own channels alone
    filters = torch.fft.rfft(_solve(gram, cross), n=n_fft)
    own = [torch.fft.rfft(_solve(gram[j, j], cross[j, :, j]), n=n_fft) for j in sources]
    energies = gram.new_full((len(_Energies._fields), n_systems, n_sources, n_frames), math.nan)
    for t in range(n_frames):
        frame = slice(t * window, (t + 1) * window)
        if _silent(references[..., frame]).any():
            continue
        true = _spectrum(wavs[:, frame], n_fft)
        for k in range(n_systems):
            estimate = _spectrum(guesses[k][:, frame], n_fft)
            energies[:, k, :, t] = 0
            for i in range(len(wavs)):  # one at a time stays in cache
                j, channel = divmod(i, n_channels)
                explained = (filters[:, k, i] * true).sum(0)
                filtered = (own[j][:, k, channel] * true[sources[j]]).sum(0)
                energies[:, k, j, t] += _energies_of(true[i], estimate[i], filtered, explained)
            energies[:, k, _silent(estimates[k][..., frame]), t] = math.nan
    return _Energies(*energies)


def _spectrum(frame: torch.Tensor, n_fft: int) -> torch.Tensor:
    """Transform a frame so that the squares sum to half its energy, by Parseval."""
    spectrum = torch.fft.rfft(frame.double(), n=n_fft, norm="ortho")
    spectrum[:, :: n_fft // 2] *= math.sqrt(0.5)  # every other bin stands for two
    return spectrum


def _energies_of(
    true: torch.Tensor, estimate: torch.Tensor, filtered: torch.Tensor, explained: torch.Tensor
) -> torch.Tensor:
    """Return `_Energies` of spectra of one channel."""
    signals = _Energies(
        true=true,
        error=estimate - true,
        filtered=filtered,
        spatial=filtered - true,
        unfiltered=estimate - filtered,
        explained=explained,
        interference=explained - filtered,
        artifacts=estimate - explained,
    )
    # As real numbers, because the norm of complex ones is 50 times as slow.
    norms = [torch.linalg.vector_norm(torch.view_as_real(signal)) for signal in signals]
    return 2 * torch.stack(norms).square()


def _silent(frame: torch.Tensor) -> torch.Tensor:
    """Say which sources of (n_sources, n_channels, n_samples) are silent, as museval does."""
    return (frame.sum(-2) == 0).all(-1)


def _correlate(
    references: torch.Tensor, estimates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlate whole signals with each other and with estimates, block by block.

    ::

        references  ───┤past│   block   ├──────   Σ x[m] y[m + lag] for lags from 0 to N_TAPS - 1:
        estimates   ────────┤   block   ├──────   every y is met by the samples before it

    Of references (n, n_samples) and estimates (m, n_samples) returns (n, n, N_TAPS) and
    (n, m, N_TAPS).
    """
    n_samples = references.shape[-1]
    n_fft = min(BLOCK_FFT, _fast_size(n_samples + 2 * REACH))  # room for blocks and their past
    block, both = n_fft - REACH, (references, estimates)
    shapes = [(len(references), len(wavs), n_fft // 2 + 1) for wavs in both]
    sums = [references.new_zeros(shape, dtype=torch.complex128) for shape in shapes]
    for start in range(0, n_samples, block):
        sources = torch.fft.rfft(_excerpt(references, start - REACH, start + block))
        sources = sources.conj().resolve_conj()
        for products, wavs in zip(sums, both, strict=True):
            here = torch.nn.functional.pad(_excerpt(wavs, start, start + block), (REACH, 0))
            here = torch.fft.rfft(here)
            # Row by row: a batched product would be written to memory and read again.
            for row, channel in zip(products, sources, strict=True):
                row.addcmul_(here, channel)
    gram, cross = (torch.fft.irfft(products, n=n_fft)[..., :N_TAPS] for products in sums)
    if not (gram.isfinite().all() and cross.isfinite().all()):
        raise InputError("samples that are not finite numbers cannot be scored")
    return gram, cross


def _excerpt(wav: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Cut out samples in double precision; there are zeros around a signal."""
    return torch.nn.functional.pad(wav, (-start, stop - wav.shape[-1])).double()


def _solve(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Solve for the filters that bring a sum of channels nearest to signals.

    `gram` (n_channels, n_channels, N_TAPS) holds the channels' correlations, `cross`
    (n_channels, ..., N_TAPS) those with the signals; the filters are shaped like `cross`.
    """
    matrix = _toeplitz(gram)
    diagonal = matrix.diagonal()
    diagonal += EPSILON + RIDGE * diagonal.max()
    right = cross.flatten(1, -2).mT.flatten(0, 1)  # (n_channels * N_TAPS, n_signals)
    taps = torch.linalg.solve(matrix, right)
    return taps.unflatten(0, (len(cross), N_TAPS)).mT.reshape(cross.shape)


def _toeplitz(gram: torch.Tensor) -> torch.Tensor:
    """Lay out correlations (n, n, lags) as the matrix of all products of delayed channels."""
    lags = torch.cat([gram.transpose(0, 1).flip(-1), gram[..., 1:]], -1)  # -511 to 511
    # Row a, column b is the correlation at lag a - b: windows over the reversed lags, from below.
    blocks = lags.flip(-1).unfold(-1, N_TAPS, 1).flip(-2)  # (n, n, N_TAPS, N_TAPS)
    return blocks.transpose(1, 2).reshape(len(gram) * N_TAPS, -1)


def _fast_size(minimum: int) -> int:
    """Return an even FFT size from `minimum` on that has no prime factor above 5."""
    return 2 * scipy.fft.next_fast_len(-(-minimum // 2), real=True)
