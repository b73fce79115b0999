"""What train.py repeats: the step, the epoch, validation, the state of a run and its log.

A step reads a batch of chunks from the memory-mapped dataset while the network works on the one
before, mixes it on the device at random gains, and learns the mask of every column at once.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import audio
import dataset
import metrics
import model as networks
from dataset import Chunk, OpenSong
from hparams import UNTUNED_MASK, HParams, InputError

CHECK_EVERY = 20  # steps between looks at the losses, as every look waits for the GPU
SAVE_EVERY = 300  # seconds between saves within an epoch
WORST_DB = -30.0  # a silent estimate is infinitely bad; scores are averaged from here up


class Run:
    """A training run: everything that is saved, and that resuming needs."""

    def __init__(self, hp: HParams, songs: list[OpenSong], device: torch.device) -> None:
        self.hp, self.songs, self.device = hp, songs, device
        torch.manual_seed(hp.seed)
        self.model = networks.build_model(hp).to(device)
        self.curve_db = audio.weighting_curve_db(hp).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=hp.learning_rate, weight_decay=hp.weight_decay
        )
        self.n_steps = sum(dataset.count_batches(songs, hp, e) for e in range(hp.epochs))
        self.scheduler = make_scheduler(self.optimizer, hp, self.n_steps)
        self.epoch = self.batch = self.step = 0  # what comes next
        self.best_db = -np.inf
        self.mask_settings: dict[str, Any] = dict(UNTUNED_MASK)
        self.scores: dict[str, float] = {}

    def save(self, path: Path, whole: bool = True) -> None:
        """Write a checkpoint; `whole` includes what only resuming needs."""
        extra: dict[str, Any] = {
            "curve_db": self.curve_db.cpu(),
            "mask_settings": self.mask_settings,
            "data": dataset.identity(self.songs),
            "step": self.step,
            "scores": self.scores,
        }
        if whole:
            extra["resume"] = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "best_db": float(self.best_db),
            }
        networks.save_checkpoint(path, self.model, self.hp, **extra)

    def restore(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped.

        Raises
        ------
        InputError
            If it holds only what listening needs, or was trained on other songs.
        """
        if "resume" not in checkpoint:
            raise InputError(f"{path}: holds no training state (resume from last.pth)")
        if checkpoint["data"] != dataset.identity(self.songs):
            raise InputError(
                f"{path}: was trained on other songs (give the same datasets in the same order)"
            )
        state = checkpoint["resume"]
        self.model.load_state_dict(checkpoint["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.batch, self.best_db = state["epoch"], state["batch"], state["best_db"]
        self.step, self.scores = checkpoint["step"], checkpoint["scores"]
        self.mask_settings = checkpoint["mask_settings"]


def make_scheduler(
    optimizer: torch.optim.Optimizer, hp: HParams, n_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Make the learning-rate schedule over a whole run.

    References
    ----------
    .. [1] Smith, "Cyclical learning rates for training neural networks", WACV 2017 (2015).
    .. [2] Smith, "A disciplined approach to neural network hyper-parameters", 2018 (one-cycle).
    """
    schedulers = torch.optim.lr_scheduler
    if hp.schedule == "one-cycle":
        return schedulers.OneCycleLR(optimizer, hp.learning_rate, total_steps=n_steps + 1)
    if hp.schedule == "cyclic":  # triangular; half a cycle lasts two epochs, as Smith recommends
        half = max(1, 2 * n_steps // hp.epochs)
        low = hp.learning_rate / 10
        return schedulers.CyclicLR(
            optimizer, low, hp.learning_rate, step_size_up=half, cycle_momentum=False
        )
    return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)


def train_epoch(
    run: Run,
    report: Callable[[int], None],
    log: Callable[[dict[str, float], int], None],
    stopped: Callable[[], bool],
    last: Path,
) -> float:
    """Train on the rest of the current epoch.

    Afterwards ``run.batch`` counts its batches: whoever validates then moves on to the next epoch,
    so that a run stopped in between validates when it is resumed.

    Parameters
    ----------
    run : Run
    report : callable
        Called with the number of slices after every step.
    log : callable
        Called with scalars and the step now and then.
    stopped : callable
        Asked after every step; true ends the epoch early, ready to be resumed.
    last : Path
        Where the run is saved within long epochs.

    Returns
    -------
    float
        Mean loss of the steps taken.

    Raises
    ------
    InputError
        If loss or gradient is not finite; names the step and the songs, and nothing is saved.
    """
    run.model.train()
    plan = dataset.plan_epoch(run.songs, run.hp, run.epoch)
    losses, fresh, saved = [], [], time.monotonic()
    for batch, spectrograms in _prefetch(run, plan[run.batch :]):
        gains = torch.tensor([chunk[4:] for chunk in batch], dtype=torch.float32)
        loss, grad_norm = train_step(run, spectrograms, gains)
        run.batch, run.step = run.batch + 1, run.step + 1
        fresh.append((loss, grad_norm, batch))
        report(len(batch) * run.hp.chunk_slices)
        stopping = stopped()  # asked once: what is saved after a stop has been checked
        if len(fresh) == CHECK_EVERY or stopping or run.batch == len(plan):
            losses += _finite_losses(run, fresh)
            rate = run.scheduler.get_last_lr()[0]
            log(
                {
                    "loss/train": losses[-1],
                    "learning rate": rate,
                    "gradient norm": float(grad_norm),
                },
                run.step,
            )
            fresh = []
        if stopping:
            break
        if time.monotonic() - saved > SAVE_EVERY and not fresh:
            run.save(last)
            saved = time.monotonic()
    return float(np.mean(losses)) if losses else float("nan")


def train_step(
    run: Run, spectrograms: torch.Tensor, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one optimizer step.

    Parameters
    ----------
    run : Run
    spectrograms : torch.Tensor, shape=(n, n_frames, 2, n_bins, 2), float16
    gains : torch.Tensor, shape=(n, 2)

    Returns
    -------
    loss, grad_norm : torch.Tensor
        On the device: nothing waits for them here.
    """
    features, target = make_example(run, spectrograms, gains)
    logits = run.model(features)[..., :: run.hp.stft_stride]
    loss = mask_loss(logits, target, features[:, 0, :, _centres(features, run.hp)], run.hp)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.hp.max_grad_norm)
    run.optimizer.step()
    run.scheduler.step()
    return loss.detach(), grad_norm


def mask_loss(
    logits: torch.Tensor, target: torch.Tensor, features: torch.Tensor, hp: HParams
) -> torch.Tensor:
    """Return the binary cross entropy of a mask, in which loud bins count for more.

    Parameters
    ----------
    logits, target : torch.Tensor, shape=(n, n_bins, n_columns)
    features : torch.Tensor, shape=(n, n_bins, n_columns)
        Of the mixture: a bin's weight is its amplitude, as the ear weights it, to the power
        ``loss_weight``; the weights are then scaled to a mean of 1.
    """
    level_db = (1 - features) * hp.min_level_db
    weights = 10 ** (level_db * (hp.loss_weight / (10 * hp.mixture_power)))
    return F.binary_cross_entropy_with_logits(logits, target, weights / weights.mean())


@torch.no_grad()
def make_example(
    run: Run, spectrograms: torch.Tensor, gains: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix a batch on the device: what the network hears, and what it should answer.

    Returns
    -------
    features : torch.Tensor, shape=(n, 1, n_bins, n_frames)
    target : torch.Tensor, shape=(n, n_bins, chunk_slices)
    """
    hp, device = run.hp, run.device
    both = dataset.mix(spectrograms.to(device, non_blocking=True), gains.to(device))
    vocals, accompaniment = both
    features = _hear(run, vocals + accompaniment)
    centres = _centres(features, hp)
    target = dataset.mask_target(
        vocals[..., centres], accompaniment[..., centres], run.curve_db, hp
    )
    return features[:, None].contiguous(), target


def validate(run: Run, songs: list[OpenSong]) -> dict[str, float]:
    """Score the network on held-out songs, by loss and by what is heard.

    Returns
    -------
    dict
        ``loss``; mean SI-SDR of the vocals [dB] with the soft mask and with the binary one
        (threshold 0.5), over the songs whose excerpt has vocals; NaN if there are none.
    """
    run.model.eval()
    losses, soft, binary = [], [], []
    for song in songs:
        vocals, accompaniment = _signals(run, song)
        features = _hear(run, vocals + accompaniment)
        logits = _predict(run, features)
        target = dataset.mask_target(vocals, accompaniment, run.curve_db, run.hp)
        losses.append(float(mask_loss(logits, target, features, run.hp)))
        mask = audio.quantize_mask(logits.sigmoid())
        soft.append(_score(vocals, accompaniment, mask, run.hp))
        binary.append(_score(vocals, accompaniment, (mask > 0.5).float(), run.hp))
    return {
        "loss": float(np.mean(losses)),
        "soft": _mean_db(soft),
        "binary": _mean_db(binary),
    }


def bounds(run: Run, songs: list[OpenSong]) -> dict[str, float]:
    """Score what no network changes: the mixture itself, and the ideal masks on the same STFT.

    Returns
    -------
    dict
        ``floor`` (the mixture as estimate), ``ideal_binary``, ``ideal_ratio``: mean SI-SDR of the
        vocals [dB].
    """
    found: dict[str, list[float]] = {"floor": [], "ideal_binary": [], "ideal_ratio": []}
    for song in songs:
        both = _signals(run, song)
        binary, ratio = audio.ideal_binary_mask(*both), audio.ideal_ratio_mask(*both)
        for scores, mask in zip(
            found.values(), (torch.ones_like(ratio), binary, ratio), strict=True
        ):
            scores.append(_score(*both, mask, run.hp))
    return {name: _mean_db(scores) for name, scores in found.items()}


def picture_and_sound(run: Run, song: OpenSong) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Show one validation song.

    Returns
    -------
    picture : np.ndarray, shape=(3 n_bins, n_frames), in [0, 1]
        Mixture, target and mask, low frequencies at the bottom of each.
    sounds : dict of np.ndarray, shape=(n_samples,)
        Mixture, estimate and truth.
    """
    run.model.eval()
    vocals, accompaniment = _signals(run, song)
    mixture = vocals + accompaniment
    features = _hear(run, mixture)
    mask = _predict(run, features).sigmoid()
    rows = [
        features,
        dataset.mask_target(vocals, accompaniment, run.curve_db, run.hp),
        mask,
    ]
    picture = torch.cat([row[0].flip(0) for row in rows]).cpu().numpy()
    named = {"mixture": mixture, "estimate": mixture * mask, "truth": vocals}
    return picture, {name: _waveform(spec, run.hp) for name, spec in named.items()}


class Log:
    """TensorBoard, kept from ever stopping a run: the first failure is told, then it is off."""

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn, self._folder, self._writer = warn, folder, None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside tensorboard
            from torch.utils.tensorboard import SummaryWriter  # 2 s that only training pays

        self._safely(lambda: setattr(self, "_writer", SummaryWriter(str(folder))))

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Add one point to each named curve."""
        for name, value in values.items():
            self._safely(lambda n=name, v=value: self._writer.add_scalar(n, v, step))

    def song(
        self, picture: np.ndarray, sounds: dict[str, np.ndarray], hp: HParams, step: int
    ) -> None:
        """Add the picture and the sounds of `picture_and_sound`."""
        self._safely(lambda: self._writer.add_image("masks", picture, step, dataformats="HW"))
        for name, wav in sounds.items():
            if not wav.size:  # a song of one frame; TensorBoard would fail on it
                continue
            wav = wav / max(1.0, float(np.abs(wav).max(initial=0)))
            self._safely(
                lambda n=name, w=wav: self._writer.add_audio(n, w[None], step, hp.sample_rate)
            )

    def close(self) -> None:
        """Write what is left."""
        self._safely(lambda: self._writer.close())

    def _safely(self, action: Callable[[], Any]) -> None:
        if self._folder is None:
            return
        try:
            action()
        except OSError as error:
            self._warn(f"{self._folder}: TensorBoard log stopped: {error}; training goes on")
            self._folder = None


def _prefetch(run: Run, plan: list[list[Chunk]]) -> Iterator[tuple[list[Chunk], torch.Tensor]]:
    """Read each batch while the one before is trained on."""
    with ThreadPoolExecutor(1) as reader:
        ahead = None
        for batch in [*plan, None]:
            ready, ahead = (
                ahead,
                batch and (batch, reader.submit(dataset.read_batch, run.songs, batch, run.hp)),
            )
            if ready:
                yield ready[0], ready[1].result()


def _finite_losses(
    run: Run, fresh: list[tuple[torch.Tensor, torch.Tensor, list[Chunk]]]
) -> list[float]:
    """Fetch the losses of some steps from the device; InputError if one or its gradient is bad."""
    values = torch.stack([torch.stack([loss, norm]) for loss, norm, _ in fresh]).tolist()
    for i, ((loss, norm), (_, _, batch)) in enumerate(zip(values, fresh, strict=True)):
        if not np.isfinite([loss, norm]).all():  # clipping to a norm of NaN makes all weights NaN
            ids = {run.songs[j].song.id for chunk in batch for j in (chunk[0], chunk[2])}
            raise InputError(
                f"step {run.step - len(fresh) + i + 1}: loss is {loss:g}, gradient norm {norm:g}; "
                f"songs {', '.join(sorted(ids))} "
                "(lower learning_rate; the last save is untouched)"
            )
    return [loss for loss, _ in values]


def _signals(run: Run, song: OpenSong) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a validation excerpt as it was recorded: (1, n_bins, n_frames) each."""
    raw = dataset.excerpt(song, run.hp).to(run.device)
    return dataset.mix(raw, torch.ones(1, 2, device=run.device))


def _centres(features: torch.Tensor, hp: HParams) -> slice:
    """Select the frames of a chunk on which its slices are centred."""
    return slice(hp.context, features.shape[-1] - hp.context, hp.stft_stride)


def _hear(run: Run, mixture: torch.Tensor) -> torch.Tensor:
    """Return the features of a mixture as the network gets them."""
    return audio.features(mixture, run.curve_db, run.hp.mixture_power, run.hp)


@torch.inference_mode()
def _predict(run: Run, features: torch.Tensor) -> torch.Tensor:
    """Return the logits of every frame, with silence around the excerpt."""
    padded = F.pad(features, (run.hp.context, run.hp.context))
    return run.model(padded[:, None].contiguous())


def _score(
    vocals: torch.Tensor, accompaniment: torch.Tensor, mask: torch.Tensor, hp: HParams
) -> float:
    """Return the SI-SDR of a mask's vocals on the network's own grid [dB]; NaN if silent."""
    estimate = _waveform((vocals + accompaniment) * mask, hp)
    return max(metrics.si_sdr(estimate, _waveform(vocals, hp)), WORST_DB)


def _waveform(spec: torch.Tensor, hp: HParams) -> np.ndarray:
    """Invert one spectrogram of the network's bins."""
    grid = audio.grid_at(hp.sample_rate, hp)
    n_samples = (spec.shape[-1] - 1) * grid.hop_length
    return audio.istft(spec, grid, n_samples)[0].cpu().numpy()


def _mean_db(scores: list[float]) -> float:
    """Average over the songs that have a score."""
    scores = [score for score in scores if not np.isnan(score)]
    return float(np.mean(scores)) if scores else float("nan")
