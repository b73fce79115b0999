"""From a batch of spectrograms to what the network is shown, what it should answer, and the loss.

spectrograms ──mix──▶ vocals, accompaniment ──equalize──▶ features, target ──mask_loss──▶ loss
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import audio
from dataset import EQ_HZ
from hparams import HParams
from learning.ranks import World

LEAST_ENERGY = 1e-7  # of a chunk: what is below is silence, whatever its mask


def mix(spectrograms: torch.Tensor, gains: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale vocals and accompaniment; their sum is a mixture with exactly known vocals.

    Maps (n, n_frames, 2 or 4, n_bins, 2) and gains (n, 2 or 4) to two of (n, n_bins, n_frames),
    complex; second ones, behind the first two, are added to them.
    """
    scaled = spectrograms * gains[:, None, :, None, None]  # float16 times float32: float32
    if scaled.shape[2] > 2:
        scaled = scaled[:, :, :2] + scaled[:, :, 2:]
    both = torch.view_as_complex(scaled)  # (n, n_frames, 2, n_bins)
    return both[:, :, 0].mT, both[:, :, 1].mT


def equalize(spec: torch.Tensor, eq_db: torch.Tensor, hp: HParams) -> torch.Tensor:
    """Turn the bands of an octave equalizer; between them the curve is straight in log frequency.

    `spec` is (n, n_bins, n_frames), complex, and `eq_db` (n, len(EQ_HZ)).
    """
    hz = torch.arange(hp.n_bins, device=spec.device) * (hp.sample_rate / hp.n_fft)
    place = (hz.clamp(min=1) / EQ_HZ[0]).log2().clamp(0, len(EQ_HZ) - 1)  # in octaves
    below = place.long().clamp(max=len(EQ_HZ) - 2)
    share = place - below
    curve_db = eq_db[:, below] * (1 - share) + eq_db[:, below + 1] * share
    return spec * (10 ** (curve_db / 20))[..., None]


@torch.no_grad()
def make_example(
    spectrograms: torch.Tensor,
    gains: torch.Tensor,
    eq_db: torch.Tensor,
    curve_db: torch.Tensor,
    hp: HParams,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix a batch on the device: what the network is shown, and what it should answer.

    `spectrograms` and `gains` are as in `mix`; `eq_db` is (n, 2 len(EQ_HZ)), of vocals and of
    accompaniment, or (n, 0). Returns features (n, 1, n_bins, n_frames), and the target with the
    mixture that it is the mask of, both (n, n_bins, chunk_slices).
    """
    vocals, accompaniment = mix(spectrograms, gains)
    if eq_db.shape[1]:
        for_vocals, for_accompaniment = eq_db.chunk(2, 1)
        vocals = equalize(vocals, for_vocals, hp)
        accompaniment = equalize(accompaniment, for_accompaniment, hp)
    mixture = vocals + accompaniment
    features = audio.features(mixture, curve_db, hp.mixture_power, hp)
    centres = slice(hp.lookback, features.shape[-1] - hp.lookahead, hp.stft_stride)
    target = mask_target(vocals[..., centres], accompaniment[..., centres], curve_db, hp)
    return features[:, None].contiguous(), target, mixture[..., centres]


def mask_target(
    vocals: torch.Tensor, accompaniment: torch.Tensor, curve_db: torch.Tensor, hp: HParams
) -> torch.Tensor:
    """Return the mask that the network is to learn, as ``mask_target`` defines it.

    "activity": 1 where the weighted, cubed, scaled vocals are above ``mask_threshold``;
    "dominance": 1 where they are louder than the accompaniment; "ratio": their share of the two
    energies; "phase": how much of the mixture points their way, cut to 0 to 1. All of shape
    (..., n_bins, n_frames).
    """
    if hp.mask_target == "activity":
        level = audio.features(vocals, curve_db, hp.vocals_power, hp)
        return (level > hp.mask_threshold).float()
    if hp.mask_target == "dominance":
        return audio.ideal_binary_mask(vocals, accompaniment)
    if hp.mask_target == "phase":
        return audio.ideal_phase_mask(vocals, accompaniment)
    return audio.ideal_ratio_mask(vocals, accompaniment)


def mask_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    mixture: torch.Tensor,
    curve_db: torch.Tensor,
    hp: HParams,
    world: World | None = None,
    are_taught: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return how wrong a mask is, as ``loss`` defines it.

    "sdr": the mean over chunks of ``log10(sum((mask - target)² |X|²) / sum((target |X|)²))``, both
    sums plus a hundredth of the mixture's energy: minus a tenth of the signal-to-distortion ratio
    of the masked spectrogram [dB], its phase being what it is. What is 20 dB below the mixture is
    good enough, so that chunks without a voice do not outweigh the others. Of the chunks that a
    teacher labelled, `are_taught` (n,), the worst ``trim`` are left out.

    "cross-entropy": binary, a bin's weight being its amplitude, as the ear weights it, to the power
    ``loss_weight``; the weights are then scaled to a mean of 1 over all ranks.

    `logits`, `target` and `mixture`, over which the mask is laid, are (n, n_bins, n_columns).
    """
    if hp.loss == "sdr":
        energy = mixture.real.square() + mixture.imag.square()
        wrong, true = (
            (share.square() * energy).sum((1, 2)) for share in (logits.sigmoid() - target, target)
        )
        least = energy.sum((1, 2)) / 100 + LEAST_ENERGY
        losses = ((wrong + least) / (true + least)).log10()
        return losses.mean() if are_taught is None else trimmed_mean(losses, are_taught, hp.trim)
    level_db = (1 - audio.features(mixture, curve_db, hp.mixture_power, hp)) * hp.min_level_db
    weights = 10 ** (level_db * hp.loss_weight / (10 * hp.mixture_power))
    mean = (world or World()).mean(weights.mean())
    return F.binary_cross_entropy_with_logits(logits, target, weights / mean)


def trimmed_mean(losses: torch.Tensor, are_taught: torch.Tensor, trim: float) -> torch.Tensor:
    """Average losses (n,) without the worst of those that a teacher labelled: there it was wrong.

    `trim` is the share of the labelled ones that is left out, rounded down.
    """
    of_taught = losses.detach().masked_fill(~are_taught, -torch.inf)
    n_left_out = (are_taught.sum() * trim).long()
    worst_kept = of_taught.sort(descending=True).values.gather(0, n_left_out[None])
    kept = ~are_taught | (of_taught <= worst_kept)
    return torch.where(kept, losses, 0).sum() / kept.sum()
