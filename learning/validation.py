"""How good a network is: its loss and what is heard, on songs that it has not learnt.

The ranks of a run share the songs, and all of them return the scores of all songs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

import audio
from dataset import OpenSong
from hparams import HParams
from learning import targets
from scoring.metrics import limited_si_sdr

if TYPE_CHECKING:
    from learning.run import Run


def excerpt(run: Run, song: OpenSong) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the vocals and accompaniment of a song's middle, (1, n_bins, n_frames) each."""
    device, hp = run.device, run.hp
    n_frames = min(song.song.n_frames, round(hp.valid_seconds * hp.sample_rate / hp.hop_length))
    start = (song.song.n_frames - n_frames) // 2
    stored = torch.from_numpy(song.spectrogram[start : start + n_frames].copy()).to(device)
    return targets.mix(stored[None], torch.ones(1, 2, device=device))


@torch.inference_mode()
def logits_of(run: Run, mixture: torch.Tensor) -> torch.Tensor:
    """Return the averaged network's answer to every frame, with silence around the excerpt."""
    features = audio.features(mixture, run.curve_db, run.hp.mixture_power, run.hp)
    padded = F.pad(features, (run.hp.lookback, run.hp.lookahead))
    # cuDNN's benchmark would try all its algorithms, for every song anew: each has another length.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False):
        return run.averaged(padded[:, None].contiguous())


def validate(run: Run, songs: list[OpenSong]) -> dict[str, float]:
    """Score the averaged network on held-out songs, by loss and by SI-SDR of the vocals [dB].

    ``soft`` and ``binary`` (threshold 0.5), and ``floor``, the mixture as it is, are means over the
    songs whose excerpt has vocals; NaN if there are none.
    """
    run.world.agree(run.averaged.buffers())

    def score(song: OpenSong) -> tuple[float, ...]:
        vocals, accompaniment = excerpt(run, song)
        mixture = vocals + accompaniment
        logits = logits_of(run, mixture)
        target = targets.mask_target(vocals, accompaniment, run.curve_db, run.hp)
        mask = audio.quantize_mask(logits.sigmoid())
        pieces = (_chunks(x, run.hp) for x in (logits, target, mixture))
        loss = float(targets.mask_loss(*pieces, run.curve_db, run.hp))
        truth = _waveform(vocals, run.hp)
        masks = [mask, (mask > 0.5).float(), torch.ones_like(mask)]
        estimates = (_waveform(mixture * m, run.hp) for m in masks)
        return loss, *(limited_si_sdr(one, truth) for one in estimates)

    n_ranks = run.world.size
    shares = run.world.gather([score(song) for song in run.world.share(songs)])
    scores = np.array([shares[i % n_ranks][i // n_ranks] for i in range(len(songs))])
    sung = scores[~np.isnan(scores[:, 3]), 1:]  # of songs with a voice
    means = scores[:, 0].mean(), *(sung.mean(0) if len(sung) else [np.nan] * 3)
    return dict(zip(("loss", "soft", "binary", "floor"), map(float, means), strict=True))


def _chunks(x: torch.Tensor, hp: HParams) -> torch.Tensor:
    """Cut (1, n_bins, n_frames) into the lengths of which training takes the loss."""
    size = min(hp.chunk_slices, x.shape[-1])
    return x[0].unfold(-1, size, size).movedim(1, 0)


def _waveform(spec: torch.Tensor, hp: HParams) -> np.ndarray:
    """Invert one spectrogram of the network's bins."""
    grid = audio.grid_at(hp.sample_rate, hp)
    n_samples = (spec.shape[-1] - 1) * grid.hop_length
    return audio.istft(spec, grid, n_samples)[0].cpu().numpy()
