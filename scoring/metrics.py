"""Scores of separated signals: SI-SDR, and BSSEval in its versions 3 and 4.

    estimate = true source + spatial distortion + interference + artifacts
               └── its own source, filtered ──┘
               └─────────── all sources, filtered ───────────┘

BSSEval's definitions are museval's (version 4: frames) and mir_eval's (version 3: whole signals),
which the tests compare with. Every score is a ratio of energies of filtered frames, and no filtered
sound is made for it: one FFT for each frame and channel serves the correlations that the filters
are solved from and, by Parseval, the energies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from hparams import InputError

N_TAPS = 512
REACH = N_TAPS - 1  # samples that a filter looks back
BLOCK_FFT = 2**15  # correlations are taken in blocks: large against a filter, yet in cache
N_TOGETHER = 16  # frames of one system, while its filters are in cache
LIMIT_DB = 300.0  # two sums of 53-bit numbers differ by no more, unless one is 0
EPSILON = torch.finfo(torch.float64).eps


def si_sdr(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Scale-invariant signal-to-distortion ratio.

    Parameters
    ----------
    estimate, reference : np.ndarray, shape=(n_samples,) or (n_channels, n_samples)
        Channels are scored together, as one long signal.

    Returns
    -------
    float
        [dB]; higher is better, 0 dB is as much error as voice, the scale of `estimate` does not
        matter. NaN if `reference` is silent: there is nothing to find. -inf if `estimate` holds
        nothing of it.

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


class Scores(NamedTuple):
    """Scores in frames, each of shape (..., n_sources, n_frames), float64 [dB]."""

    sdr: torch.Tensor  # signal to distortion: the true source over all that was done to it
    isr: torch.Tensor  # image to spatial distortion: over what a filter could undo
    sir: torch.Tensor  # signal to interference: over what is left of the other sources
    sar: torch.Tensor  # signal to artifacts: over what no filtering of any source explains


class WholeScores(NamedTuple):
    """Scores of a whole signal, each of shape (..., n_sources), float64 [dB]."""

    sdr: torch.Tensor
    sir: torch.Tensor
    sar: torch.Tensor


class _Energies(NamedTuple):
    """Energies of a source, its estimate and the estimate's two projections."""

    true: torch.Tensor
    error: torch.Tensor  # estimate - true
    filtered: torch.Tensor  # the estimate's projection on its own source
    spatial: torch.Tensor  # filtered - true
    unfiltered: torch.Tensor  # estimate - filtered
    explained: torch.Tensor  # the estimate's projection on all sources
    interference: torch.Tensor  # explained - filtered
    artifacts: torch.Tensor  # estimate - explained


def bss_eval_v4(references: torch.Tensor, estimates: torch.Tensor, window: int, hop: int) -> Scores:
    """Score estimates frame by frame, with filters that are the same for the whole song.

    Give `window` and `hop` the sample rate, as SiSEC 2018 did, and take medians over frames with
    ``nanmedian``. References that were decoded from a lossy format should be rounded to 16 bits:
    what the encoder removed leaves the filters free to be anything there, and frames' edges let
    it be heard (on one song the median SIR of an ideal mask fell from 16 to -2 dB).

    Parameters
    ----------
    references : torch.Tensor, shape=(n_sources, n_channels, n_samples)
        The true sources, at any scale.
    estimates : torch.Tensor, shape=(..., n_sources, n_channels, n_samples)
        Of one system or of several; what needs only `references` is then done once.
    window, hop : int > 0
        Length and distance of frames [samples]. What remains after the last whole frame is not
        scored; a shorter song is one frame.

    Returns
    -------
    Scores
        NaN in a frame in which any source's reference is silent (its channels sum to 0 at every
        sample), and of a source in a frame in which its own estimate is; there museval leaves out
        the other sources, too, which have their scores here. SIR is NaN if there is one source
        only. Never infinite: beyond ±300 dB scores are ±300 dB.

    Raises
    ------
    InputError
        If the shapes do not fit, a window or hop is not positive, or samples are not finite.

    References
    ----------
    .. [1] Stöter, Liutkus and Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018.
    .. [2] Vincent, Gribonval and Févotte, "Performance measurement in blind audio source
       separation", IEEE TASLP 14(4), 2006.
    """
    energies = _frame_energies(references, estimates, window, hop, ridge=EPSILON)  # as museval
    return Scores(
        _decibels(energies.true, energies.error),
        _decibels(energies.true, energies.spatial),
        _sir(energies),
        _decibels(energies.explained, energies.artifacts),
    )


def bss_eval_v3(references: torch.Tensor, estimates: torch.Tensor) -> WholeScores:
    """Score whole mono signals; filtering a source costs nothing.

    GNSDR, GSIR and GSAR of MIR-1K are means of these over clips, weighted by their lengths; the
    N of GNSDR subtracts the SDR of the mixture as estimate.

    Parameters
    ----------
    references : torch.Tensor, shape=(n_sources, n_samples)
    estimates : torch.Tensor, shape=(..., n_sources, n_samples)
        Scored in the order given; no permutation is tried.

    Returns
    -------
    WholeScores
        NaN and ±300 dB as in `bss_eval_v4`.

    Raises
    ------
    InputError
        If the shapes do not fit or samples are not finite.
    """
    whole = max(1, references.shape[-1])
    references, estimates = references.unsqueeze(-2), estimates.unsqueeze(-2)
    energies = _frame_energies(references, estimates, whole, whole, ridge=0)
    scores = (
        _decibels(energies.filtered, energies.unfiltered),
        _sir(energies),
        _decibels(energies.explained, energies.artifacts),
    )
    return WholeScores(*(score[..., 0] for score in scores))


def _decibels(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (10 * torch.log10(signal / noise)).clamp(-LIMIT_DB, LIMIT_DB)


def _sir(energies: _Energies) -> torch.Tensor:
    """Take the ratio of signal to interference; NaN where there is no other source."""
    ratio = _decibels(energies.filtered, energies.interference)
    return ratio if ratio.shape[-2] > 1 else torch.full_like(ratio, math.nan)


# --- Energies of frames ---------------------------------------------------------------------------


def _frame_energies(
    references: torch.Tensor, estimates: torch.Tensor, window: int, hop: int, ridge: float
) -> _Energies:
    """Take the energies of every frame of every system.

    Parameters
    ----------
    references : torch.Tensor, shape=(n_sources, n_channels, n_samples)
    estimates : torch.Tensor, shape=(..., n_sources, n_channels, n_samples)
    ridge : float
        Added to the diagonal of the equations; decides on signals of no more than rounding errors.

    Returns
    -------
    _Energies
        Each of shape (..., n_sources, n_frames), float64; NaN where silence leaves them undefined.
    """
    shape = tuple(references.shape)
    if references.ndim != 3 or 0 in shape[:2]:
        raise InputError(
            f"references of shape {shape}; expected (n_sources, n_channels, n_samples)"
        )
    if tuple(estimates.shape[-3:]) != shape:
        raise InputError(f"estimates of shape {tuple(estimates.shape)}, references of {shape}")
    if window < 1 or hop < 1:
        raise InputError(f"a window of {window} and a hop of {hop} samples; both must be positive")
    n_sources, n_channels, n_samples = shape
    n_frames = 1 + max(0, n_samples - window) // hop
    window = max(1, min(window, n_samples))
    systems = estimates.reshape(math.prod(estimates.shape[:-3]), *shape)
    wavs, guesses = references.flatten(0, 1), systems.flatten(1, 2)
    sources = [slice(j * n_channels, (j + 1) * n_channels) for j in range(n_sources)]
    gram, each = _correlate(wavs, guesses)
    project = _projector(wavs, gram, ridge)
    project_own = [_projector(wavs[own], gram[own, own], ridge) for own in sources]
    filters = [project(cross) for cross in each]
    own_filters = [
        torch.stack([p(cross[own, own]) for p, own in zip(project_own, sources, strict=True)])
        for cross in each
    ]
    frame_energies = _FrameEnergies(filters, own_filters, window)
    found = gram.new_full((len(_Energies._fields), len(systems), n_sources, n_frames), math.nan)
    for first in range(0, n_frames, N_TOGETHER):
        frames = {}
        for t in range(first, min(first + N_TOGETHER, n_frames)):
            frame = slice(t * hop, t * hop + window)
            if not _silent(references[..., frame]).any():
                frames[t] = frame, frame_energies.spectrum(wavs[:, frame])
        for k, system in enumerate(systems):
            for t, (frame, true) in frames.items():
                estimate = frame_energies.spectrum(guesses[k][:, frame])
                found[:, k, :, t] = frame_energies(k, true, estimate)
                found[:, k, _silent(system[..., frame]), t] = math.nan
    return _Energies(*found.reshape(-1, *estimates.shape[:-2], n_frames))


class _FrameEnergies:
    """Filter spectra of frames and sum their squares, in memory that is used again."""

    def __init__(
        self, filters: list[torch.Tensor], own_filters: list[torch.Tensor], window: int
    ) -> None:
        self.n_fft = n_fft = _fast_size(window + REACH)  # room for a frame's echo in the filter
        self.filters = [torch.fft.rfft(taps, n=n_fft) for taps in filters]
        self.own_filters = [torch.fft.rfft(taps, n=n_fft) for taps in own_filters]
        n_bins = self.filters[0].shape[-1]
        self.memory = [self.filters[0].new_empty(n_bins) for _ in range(3)]
        self.padded = filters[0].new_zeros(filters[0].shape[1], n_fft)

    def spectrum(self, frame: torch.Tensor) -> torch.Tensor:
        """Transform one frame of (all channels, n_samples)."""
        self.padded[:, : frame.shape[-1]] = frame
        spectrum = torch.fft.rfft(self.padded, norm="ortho")
        # Parseval: every bin stands for two, but the first and the last for one.
        spectrum[:, :: self.n_fft // 2] *= math.sqrt(0.5)
        return spectrum

    def __call__(self, k: int, true: torch.Tensor, estimate: torch.Tensor) -> torch.Tensor:
        """Return `_Energies` of system k's frame as (8, n_sources) from (all channels, n_bins)."""
        explained, filtered, difference = self.memory
        n_sources, n_channels = self.own_filters[k].shape[:2]
        sums = []
        for i in range(n_sources * n_channels):  # one at a time stays in cache
            j, channel = divmod(i, n_channels)
            own = true[j * n_channels : (j + 1) * n_channels]
            _apply(self.filters[k][:, i], true, out=explained)
            _apply(self.own_filters[k][j, :, channel], own, out=filtered)
            pairs = _Energies(
                true=(true[i], None),
                error=(estimate[i], true[i]),
                filtered=(filtered, None),
                spatial=(filtered, true[i]),
                unfiltered=(estimate[i], filtered),
                explained=(explained, None),
                interference=(explained, filtered),
                artifacts=(estimate[i], explained),
            )
            for one, other in pairs:
                wav = one if other is None else torch.sub(one, other, out=difference)
                # As real numbers, because the norm of complex ones is 50 times as slow.
                sums.append(torch.linalg.vector_norm(torch.view_as_real(wav)))
        norms = torch.stack(sums).view(n_sources, n_channels, len(_Energies._fields))
        return 2 * norms.square().sum(1).T


def _apply(filters: torch.Tensor, spectra: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of filtered spectra, both (n, n_bins)."""
    torch.mul(filters[0], spectra[0], out=out)
    for taps, spectrum in zip(filters[1:], spectra[1:], strict=True):
        out.addcmul_(taps, spectrum)


def _silent(frame: torch.Tensor) -> torch.Tensor:
    """Say which sources of (n_sources, n_channels, n_samples) are silent, as museval does."""
    # Nearly all frames are heard at a few samples already, so few are looked through.
    if (frame[..., ::101].sum(-2) != 0).any(-1).all():
        return frame.new_zeros(len(frame), dtype=torch.bool)
    return (frame.sum(-2) == 0).all(-1)


def _correlate(
    references: torch.Tensor, systems: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Correlate whole signals with each other and with estimates, block by block.

    ::

        references  ───┤past│   block   ├──────   Σ x[m] y[m + lag] for lags from 0 to N_TAPS - 1:
        systems     ────────┤   block   ├──────   every y is met by the samples before it

    Parameters
    ----------
    references : torch.Tensor, shape=(n, n_samples)
    systems : torch.Tensor, shape=(n_systems, m, n_samples)

    Returns
    -------
    torch.Tensor, shape=(n, n, N_TAPS)
        Of the references with each other.
    list of torch.Tensor, shape=(n, m, N_TAPS)
        With each system's estimates.
    """
    n_samples = references.shape[-1]
    n_fft = min(BLOCK_FFT, _fast_size(n_samples + 2 * REACH))  # room for blocks and their past
    block, others = n_fft - REACH, [references, *systems]
    shapes = [(len(references), len(wavs), n_fft // 2 + 1) for wavs in others]
    each = [references.new_zeros(shape, dtype=torch.complex128) for shape in shapes]
    for start in range(0, n_samples, block):
        sources = torch.fft.rfft(_padded(references, start - REACH, start + block))
        sources = sources.conj().resolve_conj()
        for products, wavs in zip(each, others, strict=True):
            here = torch.fft.rfft(_padded(wavs, start, start + block, n_before=REACH))
            # Row by row: a batched product would be written to memory and read again.
            for row, channel in zip(products, sources, strict=True):
                row.addcmul_(here, channel)
    gram, *crosses = (_lags(products, n_fft) for products in each)
    return gram, crosses


def _padded(wav: torch.Tensor, start: int, stop: int, n_before: int = 0) -> torch.Tensor:
    """Cut out samples in double precision, zeros before them; there are zeros around a signal."""
    first = max(0, start)
    inside = wav[..., first:stop]
    excerpt = wav.new_zeros((*wav.shape[:-1], n_before + stop - start), dtype=torch.float64)
    excerpt[..., n_before + first - start :][..., : inside.shape[-1]] = inside
    return excerpt


def _lags(products: torch.Tensor, n_fft: int) -> torch.Tensor:
    """Turn sums of cross spectra into correlations at lags from 0 to `N_TAPS` - 1."""
    correlations = torch.fft.irfft(products, n=n_fft)[..., :N_TAPS]
    if not correlations.isfinite().all():
        raise InputError("samples that are not finite numbers cannot be scored")
    return correlations


def _projector(wav: torch.Tensor, gram: torch.Tensor, ridge: float = 0) -> Callable:
    """Factorise the normal equations of filters for `wav`, whose autocorrelations are `gram`.

    Returns
    -------
    Callable
        From correlations with signals, (n_channels, n_signals, N_TAPS), to the filters that bring
        the sum of the channels nearest to each signal, of the same shape.
    """
    kept = _distinct(wav)
    if not kept:
        return torch.zeros_like
    matrix = _toeplitz(gram[kept][:, kept])
    matrix.diagonal().add_(ridge)
    factors, pivots, info = torch.linalg.lu_factor_ex(matrix)
    if info:  # exactly singular: the shortest of all solutions, with the cutoff of NumPy's lstsq
        inverse = torch.linalg.pinv(matrix, rtol=len(matrix) * EPSILON, hermitian=True)

    def project(cross: torch.Tensor) -> torch.Tensor:
        right = cross[kept].mT.flatten(0, 1)  # (n_kept * N_TAPS, n_signals)
        taps = inverse @ right if info else torch.linalg.lu_solve(factors, pivots, right)
        filters = torch.zeros_like(cross)
        filters[kept] = taps.unflatten(0, (len(kept), N_TAPS)).mT
        return filters

    return project


def _distinct(wav: torch.Tensor) -> list[int]:
    """List the channels that are neither silent nor the copy of an earlier one.

    The others add nothing that could be reached by filtering, and make the equations singular; a
    voice in the middle of a stereo song is the same in both channels.
    """
    kept = []
    for i, channel in enumerate(wav):
        if channel.any() and not any(torch.equal(channel, wav[other]) for other in kept):
            kept.append(i)
    return kept


def _toeplitz(gram: torch.Tensor) -> torch.Tensor:
    """Lay out correlations (n, n, lags) as the matrix of all products of delayed channels."""
    lags = torch.cat([gram.transpose(0, 1).flip(-1), gram[..., 1:]], -1)  # -511 to 511
    # Row a, column b is the correlation at lag a - b: windows over the reversed lags, from below.
    blocks = lags.flip(-1).unfold(-1, N_TAPS, 1).flip(-2)  # (n, n, N_TAPS, N_TAPS)
    return blocks.transpose(1, 2).reshape(len(gram) * N_TAPS, -1)


def _fast_size(minimum: int) -> int:
    """Return the smallest even FFT size from `minimum` on that has no prime factor above 5."""
    sizes = []
    for fives in range(14):
        for threes in range(21):
            odd = 5**fives * 3**threes
            sizes.append(odd << max(1, (-(-minimum // odd) - 1).bit_length()))
    return min(sizes)
