"""The front end: waveform ⇄ STFT at any sample rate, features, masks.

    wav ──stft──▶ spec ──features──▶ features ──network──▶ mask ──× spec──▶ spec ──istft──▶ wav

Everything is a torch tensor with frequency second to last and time last, on any device. A
full-scale sine has magnitude 1 in `spec` at every sample rate. No function looks further than
its own frames, but the slow `level_gain_db`, which knows the frames before: nothing is normalised
by a maximum or mean of the song.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hparams import HParams

RATE_TOLERANCE = 0.01  # a grid may deviate from the reference grid's durations by this share
# Loudest frames of produced songs and karaoke lie between -19 and -9 dB. Moved by -20 to +20 dB
# they are separated as well as before, within 0.15 dB; by -30 0.6 dB worse, by +40 5 dB.
QUIET_DB, MUSIC_DB, LOUD_DB = -35.0, -20.0, 0.0
MOST_GAIN_DB = 60.0  # what is softer still is noise
RELEASE_DB = 2.0  # a second, at which a loud passage is forgotten


class Grid(NamedTuple):
    """Window and hop of the STFT at one sample rate."""

    sample_rate: int  # [Hz]
    n_fft: int  # [samples]
    hop_length: int  # [samples]

    @property
    def n_bins(self) -> int:
        """Bins from 0 Hz to Nyquist."""
        return self.n_fft // 2 + 1

    def n_frames(self, n_samples: int) -> int:
        """Frames of a waveform: one centred on sample 0, then one every hop."""
        return 1 + n_samples // self.hop_length


def grid_at(sample_rate: int, hp: HParams) -> Grid:
    """Choose window and hop so that bins and frames mean the same at every sample rate [Hz].

    Among the hops within 1 % of the reference duration, the one with the smallest large prime
    factor (a fast FFT size), and of those the nearest: 44.1 kHz gets 2048/512, 48 kHz 2240/560.
    """
    exact = hp.hop_length * sample_rate / hp.sample_rate
    low, high = math.ceil(exact * (1 - RATE_TOLERANCE)), math.floor(exact * (1 + RATE_TOLERANCE))
    hops = list(range(low, high + 1)) or [max(1, round(exact))]
    # Primes up to 7 all have fast code paths, so distance decides among those.
    hop = min(hops, key=lambda hop: (max(7, _largest_prime_factor(hop)), abs(hop - exact)))
    return Grid(sample_rate, hop * (hp.n_fft // hp.hop_length), hop)


def frames_to_spec(wav: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Take the STFT of the whole frames inside a stretch of samples, without padding.

    Maps (..., n_fft + (n_frames - 1) * hop_length) to complex (..., n_bins, n_frames), where time
    varies slowest in memory. The window is a periodic Hann window.
    """
    frames = wav.unfold(-1, grid.n_fft, grid.hop_length)  # (..., n_frames, n_fft)
    # The window sums to n_fft / 2 and a sine splits into two halves: 4 / n_fft in all.
    window = _window(grid.n_fft, 4 / grid.n_fft, wav.device, wav.dtype)
    return torch.fft.rfft(frames * window).mT


def spec_to_frames(spec: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Overlap-add the windowed inverse of every frame, not yet divided by `envelope`.

    Maps complex (..., n_bins, n_frames) to (..., n_fft + (n_frames - 1) * hop_length)::

        frame 0   ├──────────────┤
        frame 1       ├──────────────┤
        frame 2           ├──────────────┤
        sum       ▁▁▁▁▃▃▃▃▆▆▆▆███▆▆▆▆▃▃▃▃▁▁▁▁    each column is one hop
    """
    frames = torch.fft.irfft(spec.mT, n=grid.n_fft)  # (..., n_frames, n_fft)
    window = _window(grid.n_fft, grid.n_fft / 4, spec.device, frames.dtype)
    return _overlap_add(frames * window, grid)


def envelope(present: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sum the squared windows of the frames that are present: what overlap-add multiplied by.

    `present`, (n_frames,), is 1 for a frame of the song, 0 for one before its start or after its
    end. Returns as many samples as `spec_to_frames`: 1.5 where four frames overlap, never 0 within
    a song.
    """
    window = _window(grid.n_fft, 1.0, present.device, present.dtype)
    return _overlap_add(present[:, None] * window.square(), grid)


def stft(wav: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Transform a whole waveform, full scale 1: centred frames, zeros beyond both ends.

    Maps (..., n_samples), of any length, to complex (..., n_fft // 2 + 1, 1 + n_samples //
    hop_length). A full-scale sine has magnitude 1.
    """
    half = grid.n_fft // 2
    return frames_to_spec(F.pad(wav, (half, half)), grid)


def istft(spec: torch.Tensor, grid: Grid, n_samples: int) -> torch.Tensor:
    """Invert `stft` to (..., n_samples); an unchanged `spec` gives the waveform, to rounding.

    It is the least-squares inverse: the sum is divided by that of the squared windows (Griffin and
    Lim, "Signal estimation from modified short-time Fourier transform", IEEE TASSP 32(2), 1984).
    """
    present = torch.ones(spec.shape[-1], device=spec.device)
    middle = slice(grid.n_fft // 2, grid.n_fft // 2 + n_samples)
    return spec_to_frames(spec, grid)[..., middle] / envelope(present, grid)[middle]


def to_network_bins(spec: torch.Tensor, hp: HParams) -> torch.Tensor:
    """Keep the bins the network sees, hp.n_bins; those above a low rate's Nyquist are 0."""
    missing = hp.n_bins - spec.shape[-2]
    return F.pad(spec, (0, 0, 0, missing)) if missing > 0 else spec[..., : hp.n_bins, :]


def a_weighting_db(frequencies: torch.Tensor) -> torch.Tensor:
    """Return how much louder or quieter the ear hears frequencies [Hz] than 1 kHz [dB].

    The A curve of IEC 61672-1:2013, Sound level meters; not below -80 dB.
    """
    f = frequencies.double().square()
    c = [12194.217**2, 20.598997**2, 107.65265**2, 737.86223**2]
    gain = c[0] * f * f / ((f + c[0]) * (f + c[1]) * ((f + c[2]) * (f + c[3])).sqrt())
    return (2.0 + 20 * gain.clamp(min=1e-30).log10()).clamp(min=-80.0).float()


def weighting_curve_db(hp: HParams) -> torch.Tensor:
    """Place the A curve on the network's bins: (n_bins,), float32 [dB].

    ``weighting="linear"`` reads the curve at the bins' own frequencies; ``"mel"`` at as many
    Mel-spaced frequencies, as the original experiments did.
    """
    if hp.weighting == "mel":
        import librosa  # here, because it takes seconds to import and only this needs it

        spaced = librosa.mel_frequencies(hp.n_bins, fmin=20.0, fmax=hp.sample_rate / 2)
        return a_weighting_db(torch.from_numpy(spaced))
    return a_weighting_db(torch.arange(hp.n_bins) * (hp.sample_rate / hp.n_fft))


def features(spec: torch.Tensor, curve_db: torch.Tensor, power: float, hp: HParams) -> torch.Tensor:
    """Weight a spectrogram the way the ear does and scale it to [0, 1].

    `spec`, complex (..., n_bins, n_frames), is the STFT of a mono waveform, `curve_db`, (n_bins,),
    the weight of each bin [dB], `power` 2 for the mixture and 3 ("cubed") for the vocals target.
    Returns float32 of the same shape: 0 is ``hp.min_level_db`` or softer, 1 is 0 dB or louder.
    """
    energy = _energy(spec)
    # One pass of arithmetic for 1 - (10 p log10 |X| + A) / min_level_db, on |X|² to save the root.
    slope = -5 * power / hp.min_level_db
    offset = (1 - curve_db / hp.min_level_db)[:, None]
    return energy.clamp_(min=1e-20).log10_().mul_(slope).add_(offset).clamp_(0, 1)


def loudness_db(spec: torch.Tensor, curve_db: torch.Tensor) -> torch.Tensor:
    """Return the weighted level of every frame of the loudest channel [dB re full scale, RMS].

    `spec`, (n_channels, n_bins, n_frames), becomes (n_frames,), float64; silence is −200 dB. The
    squares of a Hann window's bins sum to three times the mean square of what is in it.
    """
    energy = (_energy(spec) * (10 ** (curve_db / 10))[:, None]).sum(-2).amax(0).double() / 3
    return 10 * energy.clamp(min=1e-20).log10()


def level_gain_db(
    level_db: torch.Tensor, peak_db: torch.Tensor, first: int, hp: HParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Say by how much a recording leaves the levels that networks know, frame by frame [dB].

    A recording's level is the loudest that it has been; what was loud is forgotten by
    ``RELEASE_DB`` a second. Between ``QUIET_DB`` and ``LOUD_DB`` the gain is exactly 0; below it
    grows twice as fast as the level falls, until it brings it to ``MUSIC_DB``.

    `level_db`, (n_frames,), is `loudness_db`'s. `first` is the number of the first frame in its
    song, and `peak_db`, (1,), float64, what the call for the frames before returned, −inf at the
    start: with them, blocks of any size give the same bits. Returns the gains, (n_frames,), and the
    next `peak_db`.
    """
    frames = torch.arange(first, first + len(level_db), device=level_db.device)
    forgotten_db = frames * (RELEASE_DB * hp.hop_length / hp.sample_rate)
    peaks_db = torch.cat([peak_db, level_db + forgotten_db]).cummax(0).values[1:]
    recording_db = peaks_db - forgotten_db
    louder_db = torch.minimum(2 * (QUIET_DB - recording_db), MUSIC_DB - recording_db)
    softer_db = (LOUD_DB - recording_db).clamp(max=0)
    return louder_db.clamp(0, MOST_GAIN_DB) + softer_db, peaks_db[-1:]


def quantize_mask(mask: torch.Tensor) -> torch.Tensor:
    """Round a mask in [0, 1] to 256 levels, so that rounding errors of the network do not show."""
    return mask.mul(255).round().div(255)


def mono(spec: torch.Tensor) -> torch.Tensor:
    """Average the channels of a spectrogram: (n_channels, ...) to (...).

    One by one: torch's mean over the first dimension of complex numbers takes ten times as long.
    """
    return functools.reduce(torch.add, spec.unbind()) / len(spec)


def mid_side(wav: torch.Tensor) -> torch.Tensor:
    """Turn left and right, (2, ...), into their mean and half their difference; linear."""
    left, right = wav
    return torch.stack([(left + right) / 2, (left - right) / 2])


def left_right(wav: torch.Tensor) -> torch.Tensor:
    """Invert `mid_side`, to rounding."""
    mid, side = wav
    return torch.stack([mid + side, mid - side])


def vocals_mask(
    mask: torch.Tensor,
    mask_at_eval: bool,
    eval_mask_threshold: float,
    noise_gate: float,
    mask_sharpness: float = 1.0,
) -> torch.Tensor:
    """Make the mask that is applied from the one in [0, 1] that the network gives.

    With `mask_at_eval` it is binary: 1 above `eval_mask_threshold`, else 0. Otherwise soft: 0 below
    `noise_gate`, and raised to the power of `mask_sharpness` from there on. The accompaniment's
    mask is 1 minus it.
    """
    if mask_at_eval:
        return (mask > eval_mask_threshold).to(mask.dtype)
    soft = mask if mask_sharpness == 1 else mask.pow(mask_sharpness)
    return torch.where(mask < noise_gate, 0, soft)


def apply_mask(spec: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Multiply a spectrogram by a mask that may know only its lower bins.

    Maps complex (n_channels, n_bins, n_frames) and (1 or n_channels, hp.n_bins, n_frames) to the
    first shape; the mask's bins beyond it are left out. Bins above the mask's take the voice's
    share of the energy in the mask's top sixteenth, frame by frame: of several rules the one
    nearest to the truth.
    """
    n_bins, n_known = spec.shape[-2], mask.shape[-2]
    if n_bins <= n_known:
        return spec * mask[..., :n_bins, :]
    top = slice(n_known - n_known // 16, n_known)
    energy = _energy(spec[..., top, :])
    if len(mask) == 1:
        energy = energy.sum(0, keepdim=True)  # one share for all channels: panning stays
    voice = (mask[..., top, :] * energy).sum(-2, keepdim=True)
    share = voice / energy.sum(-2, keepdim=True).clamp(min=1e-20)
    above = share.expand(-1, n_bins - n_known, -1)
    # Time varies slowest in memory, as in the spectrogram: the product takes a fifth of the time.
    return spec * torch.cat([mask.mT, above.mT], -1).mT


def ideal_binary_mask(vocals: torch.Tensor, accompaniment: torch.Tensor) -> torch.Tensor:
    """Return 1 where the voice is louder than the rest, else 0: the binary ceiling."""
    return (_energy(vocals) > _energy(accompaniment)).float()


def ideal_ratio_mask(vocals: torch.Tensor, accompaniment: torch.Tensor) -> torch.Tensor:
    """Return the voice's share of the two energies: the soft ceiling that knows no phases.

    Energies, as in a Wiener filter, because magnitudes score 0.8 to 1.4 dB less SI-SDR on MIR-1K,
    DSD100-style songs and stems.
    """
    vocals, accompaniment = _energy(vocals), _energy(accompaniment)
    return vocals / (vocals + accompaniment).clamp(min=1e-20)


def ideal_phase_mask(vocals: torch.Tensor, accompaniment: torch.Tensor) -> torch.Tensor:
    """Return the mask in [0, 1] that brings the mixture, with its own phase, nearest to the voice.

    On 21 clips of MIR-1K and excerpts of three produced songs it scores 1.0 dB more SI-SDR than the
    share of the energies. It is the truncated phase-sensitive filter of Erdogan et al.,
    "Phase-sensitive and recognition-boosted speech separation using deep recurrent neural
    networks", ICASSP 2015.
    """
    mixture = vocals + accompaniment
    along = vocals.real * mixture.real + vocals.imag * mixture.imag
    return (along / _energy(mixture).clamp(min=1e-20)).clamp(0, 1)


def _energy(spec: torch.Tensor) -> torch.Tensor:
    """Return |X|² without taking the root first."""
    return spec.real.square() + spec.imag.square()


@functools.lru_cache(maxsize=16)
def _window(n_fft: int, scale: float, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Make a scaled periodic Hann window once: live audio needs it for every hop."""
    with torch.inference_mode(False):  # as an ordinary tensor, which training may use, too
        return torch.hann_window(n_fft, device=device, dtype=dtype) * scale


def _overlap_add(frames: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Sum frames that start one hop apart: (..., n_frames, n_fft) to (..., n_samples)."""
    *batch, n_frames, n_fft = frames.shape
    overlap = n_fft // grid.hop_length
    parts = frames.reshape(*batch, n_frames, overlap, grid.hop_length)
    total = parts.new_zeros(*batch, n_frames + overlap - 1, grid.hop_length)
    for i in range(overlap):
        total[..., i : i + n_frames, :] += parts[..., i, :]
    return total.flatten(-2)


def _largest_prime_factor(number: int) -> int:
    """Return the largest prime that divides `number`; 1 for 1."""
    largest, factor = 1, 2
    while factor * factor <= number:
        while number % factor == 0:
            largest, number = factor, number // factor
        factor += 1
    return max(largest, number)
