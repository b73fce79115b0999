"""What a producer does to a voice and its band, drawn at random: training hears more than it has.

    vocals ──▶ compress ──▶ reverberate ──▶ equalize
    accompaniment ────────────────────────▶ equalize

All of it acts on spectrograms, on the device, a batch at a time. The reverberation belongs to the
voice, as it does in the stems that people sum.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

from hparams import HParams

EQ_HZ = (62.5, 125.0, 250.0, 500.0, 1000.0, 2000.0, 4000.0, 8000.0)  # an octave equalizer's bands
WET_DB = (-16.0, -4.0)  # energy of the reverberation against that of the dry voice
DECAY_S = (0.2, 1.2)  # time in which a room's sound falls by 60 dB
N_TAPS, TAP_FRAMES = 12, 2  # echoes and how far they are apart: 0.28 s, as windows overlap
N_ROOMS = 997  # how many rooms there are
SMOOTH_FRAMES = 9  # frames over which a compressor measures the level: 0.1 s
N_DRAWS = 2 * len(EQ_HZ) + 4


def draw(rng: np.random.Generator, n: int, hp: HParams) -> np.ndarray:
    """Draw the effects of some chunks.

    Parameters
    ----------
    rng : np.random.Generator
    n : int
        Number of chunks.
    hp : HParams
        Reads ``equalizer_db``, ``reverb`` and ``compression``.

    Returns
    -------
    np.ndarray, shape=(n, N_DRAWS), float32
        What `apply` takes; (n, 0) where all effects are off.
    """
    if not (hp.equalizer_db or hp.reverb or hp.compression):
        return np.zeros((n, 0), np.float32)
    eq_db = hp.equalizer_db * rng.standard_normal((n, 2 * len(EQ_HZ)))
    wet = 10 ** (rng.uniform(*WET_DB, (n, 1)) / 20) * (rng.random((n, 1)) < hp.reverb)
    decay_s, room = rng.uniform(*DECAY_S, (n, 1)), rng.integers(N_ROOMS, size=(n, 1))
    evenness = rng.uniform(0, hp.compression, (n, 1))
    return np.hstack([eq_db, wet, decay_s, room, evenness]).astype(np.float32)


def apply(
    vocals: torch.Tensor, accompaniment: torch.Tensor, draws: torch.Tensor, hp: HParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every chunk its effects.

    Parameters
    ----------
    vocals, accompaniment : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    draws : torch.Tensor, shape=(n, N_DRAWS) or (n, 0)
        On the same device; without columns nothing is done.

    Returns
    -------
    vocals, accompaniment : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    """
    if not draws.shape[1]:
        return vocals, accompaniment
    eq_db, wet, decay_s, room, evenness = draws.split([2 * len(EQ_HZ), 1, 1, 1, 1], 1)
    if hp.compression:
        vocals = compress(vocals, evenness[:, 0])
    if hp.reverb:
        vocals = reverberate(vocals, wet[:, 0], decay_s[:, 0], room[:, 0].long(), hp)
    if hp.equalizer_db:
        for_vocals, for_accompaniment = eq_db.chunk(2, 1)
        vocals = equalize(vocals, for_vocals, hp)
        accompaniment = equalize(accompaniment, for_accompaniment, hp)
    return vocals, accompaniment


def compress(spec: torch.Tensor, evenness: torch.Tensor) -> torch.Tensor:
    """Even the level out: a stretch d dB from the chunk's level comes to (1 - evenness) · d.

    Parameters
    ----------
    spec : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    evenness : torch.Tensor, shape=(n,), in [0, 1)
        No stretch is raised by more than 30 dB times this.
    """
    energy = (spec.real.square() + spec.imag.square()).sum(1, keepdim=True)
    local = F.avg_pool1d(energy, SMOOTH_FRAMES, 1, SMOOTH_FRAMES // 2, count_include_pad=False)
    whole = energy.mean(-1, keepdim=True).clamp(min=1e-10)
    return spec * (local / whole + 1e-3) ** (-evenness[:, None, None] / 2)


def reverberate(
    spec: torch.Tensor, wet: torch.Tensor, decay_s: torch.Tensor, room: torch.Tensor, hp: HParams
) -> torch.Tensor:
    """Add a room: echoes of random phase that decay exponentially (Polack's model, by bins).

    Parameters
    ----------
    spec : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    wet : torch.Tensor, shape=(n,)
        Root of the energy of all echoes together, that of the dry sound being 1.
    decay_s : torch.Tensor, shape=(n,)
        Time of the decay by 60 dB [s].
    room : torch.Tensor, shape=(n,), int64
        Which of the `N_ROOMS` sets of phases.

    References
    ----------
    .. [1] Polack, "La transmission de l'énergie sonore dans les salles", 1988.
    """
    n_bins, n_frames = spec.shape[1:]
    delays = range(TAP_FRAMES, TAP_FRAMES * N_TAPS + 1, TAP_FRAMES)  # [frames]
    frames = torch.arange(TAP_FRAMES, delays.stop, TAP_FRAMES, device=spec.device)
    seconds = frames * (hp.hop_length / hp.sample_rate)
    amplitude = 10 ** (-3 * seconds / decay_s[:, None])  # (n, N_TAPS)
    amplitude = amplitude * (wet[:, None] / amplitude.square().sum(1, keepdim=True).sqrt())
    of_room = room[:, None] + torch.arange(n_bins, device=spec.device)
    angles = _angles(n_bins, spec.device)[:, of_room]  # (N_TAPS, n, n_bins)
    echoes = torch.polar(amplitude.T[..., None].expand_as(angles).contiguous(), angles)
    out = spec.clone()
    for delay, echo in zip(delays, echoes, strict=True):
        if delay < n_frames:
            out[..., delay:].addcmul_(spec[..., : n_frames - delay], echo[..., None])
    return out


@functools.cache
def _angles(n_bins: int, device: torch.device) -> torch.Tensor:
    """Draw the phases of all rooms' echoes, the same ones on every device: a room is a stretch."""
    generator = torch.Generator().manual_seed(0)
    angles = 2 * math.pi * torch.rand(N_TAPS, n_bins + N_ROOMS, generator=generator)
    return angles.to(device)


def equalize(spec: torch.Tensor, eq_db: torch.Tensor, hp: HParams) -> torch.Tensor:
    """Turn the bands of an octave equalizer; between them the curve is straight in log frequency.

    Parameters
    ----------
    spec : torch.Tensor, shape=(n, n_bins, n_frames), complex64
    eq_db : torch.Tensor, shape=(n, len(EQ_HZ))
    """
    hz = torch.arange(hp.n_bins, device=spec.device) * (hp.sample_rate / hp.n_fft)
    place = (hz.clamp(min=1) / EQ_HZ[0]).log2().clamp(0, len(EQ_HZ) - 1)  # in octaves
    below = place.long().clamp(max=len(EQ_HZ) - 2)
    share = place - below
    curve_db = eq_db[:, below] * (1 - share) + eq_db[:, below + 1] * share
    return spec * (10 ** (curve_db / 20))[..., None]
