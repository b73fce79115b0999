"""BSSEval, the field's ruler for separated signals: version 4 in frames, version 3 for a whole.

    estimate = true source + spatial distortion + interference + artifacts
               └── its own source, filtered ──┘
               └─────────── all sources, filtered ───────────┘

Definitions are museval's and mir_eval's, which the tests compare with. Every score is a ratio of
energies of filtered frames, and no filtered sound is made for it: one FFT for each frame and
channel serves the correlations that the filters are solved from and, by Parseval, the energies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from hparams import InputError

N_TAPS = 512
REACH = N_TAPS - 1  # samples that a filter looks back
BLOCK_FFT = 2**15  # version 3 transforms blocks of this size: large against a filter, yet in cache
N_TOGETHER = 16  # frames of one system, while its filters are in cache
LIMIT_DB = 300.0  # two sums of 53-bit numbers differ by no more, unless one is 0
EPSILON = torch.finfo(torch.float64).eps


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
    _check(references, estimates, 3, window, hop)
    systems = estimates.reshape(math.prod(estimates.shape[:-3]), *references.shape)
    energies = _Energies(*_frame_energies(references, systems, window, hop))
    scores = (
        _decibels(energies.true, energies.error),
        _decibels(energies.true, energies.spatial),
        _sir(energies.filtered, energies.interference, len(references)),
        _decibels(energies.explained, energies.artifacts),
    )
    batch = estimates.shape[:-3]
    return Scores(*(score.reshape(*batch, *score.shape[1:]) for score in scores))


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

    References
    ----------
    .. [1] Vincent, Gribonval and Févotte, "Performance measurement in blind audio source
       separation", IEEE TASLP 14(4), 2006.
    """
    _check(references, estimates, 2)
    systems = estimates.reshape(math.prod(estimates.shape[:-2]), *references.shape)
    filtered, unfiltered, explained, interference, artifacts = _whole_energies(references, systems)
    scores = WholeScores(
        _decibels(filtered, unfiltered),
        _sir(filtered, interference, len(references)),
        _decibels(explained, artifacts),
    )
    any_silent = _silent(references[:, None]).any()
    is_silent = torch.stack([_silent(system[:, None]) | any_silent for system in systems])
    for score in scores:
        score[is_silent] = math.nan
    return WholeScores(*(score.reshape(estimates.shape[:-1]) for score in scores))


def _check(
    references: torch.Tensor, estimates: torch.Tensor, n_axes: int, window: int = 1, hop: int = 1
) -> None:
    """Refuse arrays that are not of one shape, systems aside, and frames without samples."""
    shape = tuple(references.shape)
    if len(shape) != n_axes or 0 in shape[:-1]:
        axes = "n_sources, n_channels, n_samples" if n_axes == 3 else "n_sources, n_samples"
        raise InputError(f"references of shape {shape}; expected ({axes})")
    if tuple(estimates.shape[-n_axes:]) != shape:
        raise InputError(f"estimates of shape {tuple(estimates.shape)}, references of {shape}")
    if window < 1 or hop < 1:
        raise InputError(f"a window of {window} and a hop of {hop} samples; both must be positive")


def _decibels(signal: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return (10 * torch.log10(signal / noise)).clamp(-LIMIT_DB, LIMIT_DB)


def _sir(filtered: torch.Tensor, interference: torch.Tensor, n_sources: int) -> torch.Tensor:
    ratio = _decibels(filtered, interference)
    return ratio if n_sources > 1 else torch.full_like(ratio, math.nan)


# --- Version 3: one energy for the whole signal ---------------------------------------------------


def _whole_energies(references: torch.Tensor, systems: torch.Tensor) -> torch.Tensor:
    """Take the energies of whole signals, in memory that does not grow with their length.

    ::

        sources  ───┤past│   block   ├──────   a block and the samples before it: one FFT gives its
        estimate ────────┤   block   ├──────   correlations and, with the filters, its projections

    Parameters
    ----------
    references : torch.Tensor, shape=(n_sources, n_samples)
    systems : torch.Tensor, shape=(n_systems, n_sources, n_samples)

    Returns
    -------
    torch.Tensor, shape=(5, n_systems, n_sources), float64
        Those of `_Energies` that a free filter leaves: ``filtered``, ``unfiltered``,
        ``explained``, ``interference``, ``artifacts``.
    """
    n_samples = references.shape[-1]
    n_fft = min(BLOCK_FFT, _fast_size(n_samples + 2 * REACH))
    block = n_fft - REACH
    filters, own_filters = _whole_filters(references, systems, n_fft)
    energies = torch.zeros(5, *systems.shape[:2], dtype=torch.float64, device=systems.device)
    for start in range(0, n_samples + REACH, block):  # filters echo behind the end
        sources = torch.fft.rfft(_excerpt(references, start - REACH, start + block))
        for k, system in enumerate(systems):
            estimate = _excerpt(system, start, start + block)
            spectra = own_filters[k] * sources, (filters[:, k] * sources[:, None]).sum(0)
            filtered, explained = (torch.fft.irfft(s, n=n_fft)[:, REACH:] for s in spectra)
            differences = estimate - filtered, explained - filtered, estimate - explained
            unfiltered, interference, artifacts = differences
            wavs = filtered, unfiltered, explained, interference, artifacts
            for energy, wav in zip(energies[:, k], wavs, strict=True):
                energy += torch.linalg.vector_norm(wav, dim=-1).square()
    return energies


def _whole_filters(
    references: torch.Tensor, systems: torch.Tensor, n_fft: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve for the filters of whole signals, as spectra.

    Returns
    -------
    filters : torch.Tensor, shape=(n_sources, n_systems, n_sources, n_bins)
        From all sources to each system's estimates.
    own_filters : torch.Tensor, shape=(n_systems, n_sources, n_bins)
        From each source to its own estimates.
    """
    gram, each = _correlate(references, systems)
    # System by system: beside others the solver would round one's filters differently.
    project = _projector(references, gram)
    filters = torch.stack([project(cross) for cross in each], 1)
    own_filters = torch.empty_like(filters[0])
    for j in range(len(references)):
        own = slice(j, j + 1)
        project = _projector(references[own], gram[own, own])
        for k, cross in enumerate(each):
            own_filters[k, j] = project(cross[own, own])
    return torch.fft.rfft(filters, n=n_fft), torch.fft.rfft(own_filters, n=n_fft)


def _excerpt(wav: torch.Tensor, start: int, stop: int, n_before: int = 0) -> torch.Tensor:
    """Cut out samples in double precision, zeros before them; there are zeros around a signal."""
    first = max(0, start)
    inside = wav[..., first:stop]
    excerpt = wav.new_zeros((*wav.shape[:-1], n_before + stop - start), dtype=torch.float64)
    excerpt[..., n_before + first - start :][..., : inside.shape[-1]] = inside
    return excerpt


# --- Version 4: energies of frames ----------------------------------------------------------------


def _frame_energies(
    references: torch.Tensor, systems: torch.Tensor, window: int, hop: int
) -> torch.Tensor:
    """Take the energies of every frame of every system, in memory that does not grow with the song.

    Parameters
    ----------
    references : torch.Tensor, shape=(n_sources, n_channels, n_samples)
    systems : torch.Tensor, shape=(n_systems, n_sources, n_channels, n_samples)

    Returns
    -------
    torch.Tensor, shape=(8, n_systems, n_sources, n_frames), float64
        `_Energies`; NaN where silence leaves them undefined.
    """
    n_sources, n_channels, n_samples = references.shape
    n_frames = 1 + max(0, n_samples - window) // hop
    window = max(1, min(window, n_samples))
    wavs, guesses = references.flatten(0, 1), systems.flatten(1, 2)
    sources = [slice(j * n_channels, (j + 1) * n_channels) for j in range(n_sources)]
    gram, each = _correlate(wavs, guesses)
    # The ridge is museval's; it decides on signals of no more than rounding errors.
    project = _projector(wavs, gram, ridge=EPSILON)
    project_own = [_projector(wavs[own], gram[own, own], ridge=EPSILON) for own in sources]
    filters, own_filters = (
        [project(cross) for cross in each],
        [
            torch.stack([p(cross[own, own]) for p, own in zip(project_own, sources, strict=True)])
            for cross in each
        ],
    )
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
    return found


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
        sources = torch.fft.rfft(_excerpt(references, start - REACH, start + block))
        sources = sources.conj().resolve_conj()
        for products, wavs in zip(each, others, strict=True):
            here = torch.fft.rfft(_excerpt(wavs, start, start + block, n_before=REACH))
            # Row by row: a batched product would be written to memory and read again.
            for row, channel in zip(products, sources, strict=True):
                row.addcmul_(here, channel)
    gram, *crosses = (_lags(products, n_fft) for products in each)
    return gram, crosses


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
