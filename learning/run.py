"""What train.py repeats: the step, the epoch, the state of a run and its log.

A step mixes a batch of chunks on the device at random gains, learns the mask of every column at
once, and moves the averaged weights, which are the ones that are validated and shipped. Nothing in
it waits for the device (but SyncBatchNorm, with several GPUs): losses are looked at now and then.
"""

from __future__ import annotations

import contextlib
import copy
import os
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audio
import dataset
import model as networks
from dataset import OpenSong
from hparams import MASK_SETTINGS, UNTUNED_MASK, HParams, InputError, differences, from_dict
from learning import augmentation, sampling, validation
from learning.muon import Muon
from learning.ranks import World
from learning.sampling import Chunks

OPTIMIZERS = {"muon": Muon, "adamw": torch.optim.AdamW}
CHECK_EVERY = 20  # steps between looks at the losses, as every look waits for the GPU
SAVE_EVERY = 300  # seconds between saves within an epoch
MOST_FAILED_SAVES = 3  # in a row; a disk may be full for a while
# What a network keeps when it learns on: its terms, and what it had learnt from before.
INHERITED = ("licence", "sources", "learnt_before", "stereo")
FREE = (*MASK_SETTINGS, "block_frames", "precision", "compile")  # a resumed run may change them


class Run:
    """A training run: everything that is saved, and that resuming needs.

    Attributes
    ----------
    model, averaged : torch.nn.Module
        The network that learns, and the running average of its weights.
    epoch, batch, step : int
        What comes next.
    history : list of dict
        What became of every epoch.
    """

    def __init__(
        self,
        hp: HParams,
        feed: sampling.Feed,
        valid: list[OpenSong],
        world: World | None = None,
    ) -> None:
        self.hp, self.feed, self.valid, self.world = hp, feed, valid, world or World()
        self.songs, self.device = feed.songs, feed.device
        songs, device = self.songs, self.device
        torch.manual_seed(hp.seed)
        self.model = networks.build_model(hp).to(device)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all steps have one shape
            torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
        self.network = _as_trained(self.model, hp, device, self.world)
        self.curve_db = audio.weighting_curve_db(hp).to(device)
        self.listener = validation.Listener(self.averaged, self.curve_db, hp, self.world)
        self.optimizer = OPTIMIZERS[hp.optimizer](
            self.model.parameters(),
            lr=hp.learning_rate,
            weight_decay=hp.weight_decay,
            fused=True,
        )
        self.n_steps = hp.steps or sum(
            sampling.count_batches(songs, hp, epoch) for epoch in range(hp.epochs)
        )
        self.steps_per_epoch = sampling.count_batches(songs, hp, 0)  # others vary a little
        self.scheduler = make_scheduler(self.optimizer, hp, self.n_steps, self.steps_per_epoch)
        self.epoch = self.batch = self.step = 0
        self.best_db = -np.inf  # of what best.pth holds
        self.mask_settings: dict[str, Any] = dict(UNTUNED_MASK)
        self.inherited: dict[str, Any] = {}
        self.scores: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.losses: list[float] = []  # of the steps of this epoch
        # Lists made once: the averaging of every step goes over them.
        self._learning, self._averaging = (
            [value for value in net.state_dict().values() if value.is_floating_point()]
            for net in (self.model, self.averaged)
        )

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done and validated."""
        return self.step >= self.n_steps and self.batch == 0

    def autocast(self) -> torch.autocast:
        """Narrow the arithmetic of what runs within, where ``precision`` says so."""
        narrow = networks.is_narrow(self.hp, self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=narrow)

    def slices_left_in_epoch(self) -> int:
        """Return how many slices the rest of this epoch trains, for a progress bar."""
        n = sampling.count_batches(self.songs, self.hp, self.epoch) - self.batch
        return min(n, self.n_steps - self.step) * self.hp.batch_size * self.hp.chunk_slices

    def average(self) -> None:
        """Move the averaged weights towards the present ones, fast in the first steps."""
        decay = min(self.hp.ema_decay, (1 + self.step) / (10 + self.step))
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(self._averaging, self._learning, None)

    def save(self, path: Path, whole: bool = True) -> None:
        """Write a checkpoint on rank 0; `whole` includes what only resuming needs."""
        if self.world.rank:
            return
        extra: dict[str, Any] = {
            "curve_db": self.curve_db.cpu(),
            "mask_settings": self.mask_settings,
            "data": dataset.identity(self.songs),
            "step": self.step,
            "scores": self.scores,
            **self.inherited,
        }
        if whole:
            extra["resume"] = {
                "weights": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": self.epoch,
                "batch": self.batch,
                "best_db": float(self.best_db),
                "history": self.history,
                "losses": self.losses,
                "valid": dataset.identity(self.valid),
                "processes": self.world.size,
            }
        networks.save_checkpoint(path, self.averaged, self.hp, **extra)

    def finish_epoch(self, loss: float, scores: dict[str, float]) -> None:
        """Note what the epoch came to."""
        self.scores = scores
        self.mask_settings["mask_at_eval"] = scores["binary"] > scores["soft"]
        self.history.append({"step": self.step, "loss/train": loss, **scores})
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, []

    @property
    def latest_db(self) -> float:
        """How good the last epoch's network sounded; -inf where there is none or it has moved."""
        if self.batch or not self.history:
            return -np.inf
        latest = self.history[-1]
        better = max(latest["soft"], latest["binary"])
        return -latest["loss"] if np.isnan(better) else better  # no held-out voice, in any epoch

    def differences(self, checkpoint: dict[str, Any]) -> dict[str, str]:
        """Say in what this run differs from the one that saved a checkpoint, by name."""
        theirs = from_dict(checkpoint["hparams"])
        resume = checkpoint.get("resume", {})
        if "weights" not in resume:
            return {"state": "it holds no training state (a last.pth of this version does)"}
        bound = [field.name for field in fields(HParams) if field.name not in FREE]
        found = {
            name: f"its {name} is {its}, not {our}"
            for name, (our, its) in differences(self.hp, theirs, bound).items()
        }
        if checkpoint["data"] != dataset.identity(self.songs):
            found["data"] = "it was trained on other songs, or in another order"
        if resume["valid"] != dataset.identity(self.valid):
            found["valid"] = "it was validated on other songs"
        if resume["processes"] != self.world.size:
            found["processes"] = f"it ran on {resume['processes']} processes, not {self.world.size}"
        return found

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        state = checkpoint["resume"]
        self.averaged.load_state_dict(checkpoint["weights"])
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.epoch, self.batch, self.best_db = state["epoch"], state["batch"], state["best_db"]
        self.step, self.scores = checkpoint["step"], checkpoint["scores"]
        if "tuned_on" not in checkpoint:  # tuned settings belong to the weights of then
            self.mask_settings = checkpoint["mask_settings"]
        self.losses = state["losses"]
        self.history = state["history"]
        self._inherit(checkpoint)

    def start_from(self, checkpoint: dict[str, Any]) -> None:
        """Take only the averaged weights of a checkpoint: a new run that has learnt before."""
        self.model.load_state_dict(checkpoint["weights"])
        self.averaged.load_state_dict(checkpoint["weights"])
        self._inherit(checkpoint)
        self.inherited["learnt_before"] = sorted(networks.learnt_songs(checkpoint))

    def _inherit(self, checkpoint: dict[str, Any]) -> None:
        self.inherited = {name: checkpoint[name] for name in INHERITED if name in checkpoint}


def _as_trained(
    model: torch.nn.Module, hp: HParams, device: torch.device, world: World
) -> torch.nn.Module:
    """Wrap the network as the steps call it: shared among processes, compiled; same weights."""
    if world.size > 1:
        if device.type == "cuda":
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    if hp.compile != "off":
        if world.size > 1 and device.type == "cuda":
            raise InputError(
                f"compile is {hp.compile}: batch norms shared among GPUs cannot be compiled "
                "(--set compile=off)"
            )
        model = torch.compile(model, mode=hp.compile)
    return model


class Saves:
    """The checkpoints in a run's folder; a disk that is full for a while does not end the run."""

    def __init__(self, run: Run, folder: Path, warn: Callable[[str], None]) -> None:
        self._run, self._folder, self._warn, self._n_failed = run, folder, warn, 0

    def last(self, is_final: bool = False) -> None:
        """Write last.pth and keep the one before as previous.pth.

        Raises
        ------
        InputError
            If it could not be written three times in a row, or now that `is_final`.
        """
        self._attempt("last.pth", True, 1 if is_final else MOST_FAILED_SAVES)

    def best(self, is_final: bool = False) -> bool:
        """Write best.pth; returns whether it is there now. InputError as in `last`."""
        return self._attempt("best.pth", False, 1 if is_final else MOST_FAILED_SAVES)

    @property
    def is_behind(self) -> bool:
        """Whether the newest state is not on the disk."""
        return self._n_failed > 0

    def _attempt(self, name: str, whole: bool, n_allowed: int) -> bool:
        path, before = self._folder / name, self._folder / ".before.tmp"
        keeps = name == "last.pth" and not self._run.world.rank
        try:
            if keeps:
                before.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # the first, or a disk that knows no links
                    os.link(path, before)
            self._run.save(path, whole)
            # Only now: if last.pth is damaged, previous.pth is all there is until a save succeeds.
            if keeps and before.exists():
                os.replace(before, path.with_name("previous.pth"))
            self._n_failed = 0
            return True
        except (InputError, OSError) as error:
            self._n_failed += 1
            if self._n_failed >= n_allowed:
                what = f"step {self._run.step}" if whole else "the best network so far"
                raise InputError(
                    f"{error}; {what} is not saved; what was saved before is untouched"
                ) from error
            self._warn(f"{error}; training goes on with what was saved before")
            return False
        finally:
            if keeps:
                with contextlib.suppress(OSError):
                    before.unlink(missing_ok=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, hp: HParams, n_steps: int, steps_per_epoch: int
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
        low, half = hp.learning_rate / 10, 2 * steps_per_epoch
        return schedulers.CyclicLR(
            optimizer, low, hp.learning_rate, step_size_up=half, cycle_momentum=False
        )
    return schedulers.ConstantLR(optimizer, factor=1.0, total_iters=0)


def train_epoch(
    run: Run,
    report: Callable[[int], None],
    log: Callable[[dict[str, float], int], None],
    stopped: Callable[[], bool],
    save: Callable[[], None],
) -> float:
    """Train on the rest of the current epoch, or up to the last step of the run.

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
        Asked after every step; true, on any rank, ends the epoch early, ready to be resumed.
    save : callable
        Called now and then within long epochs.

    Returns
    -------
    float
        Mean loss of the epoch's steps so far, over all ranks.

    Raises
    ------
    InputError
        If loss or gradient is not finite, or the device's memory does not hold a step; names the
        step and the songs, and nothing is saved.
    """
    hp, world = run.hp, run.world
    run.model.train()
    batches = sampling.batches_of(sampling.plan_epoch(run.songs, hp, run.epoch), hp)
    batches = batches[: run.batch + run.n_steps - run.step]
    ours = [world.share(batch) for batch in batches[run.batch :]]
    fresh, saved, checked = [], time.monotonic(), time.perf_counter()
    for batch in run.feed.batches(ours):
        fresh.append((*train_step(run, *batch), batches[run.batch]))
        run.batch, run.step = run.batch + 1, run.step + 1
        report(hp.batch_size * hp.chunk_slices)
        stopping = world.any(stopped())  # asked once: what is saved after a stop has been checked
        if len(fresh) == CHECK_EVERY or stopping or run.batch == len(batches):
            run.losses += _finite_losses(run, fresh)
            now = time.perf_counter()
            log(
                {
                    "loss/train": run.losses[-1],
                    "learning rate": run.scheduler.get_last_lr()[0],
                    "gradient norm": float(fresh[-1][1]),
                    "slices per second": len(fresh)
                    * hp.batch_size
                    * hp.chunk_slices
                    / (now - checked),
                },
                run.step,
            )
            fresh, checked = [], now
        if stopping:
            break
        if time.monotonic() - saved > SAVE_EVERY and not fresh:
            save()
            saved = time.monotonic()
    return float(np.mean(run.losses)) if run.losses else float("nan")


def train_step(
    run: Run,
    spectrograms: torch.Tensor,
    gains: torch.Tensor,
    effects: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one optimizer step.

    Parameters
    ----------
    run : Run
    spectrograms : torch.Tensor, shape=(n, n_frames, 2 or 4, n_bins, 2), float16
        This rank's share of the batch, on the device, as `sampling.Feed` gives it.
    gains : torch.Tensor, shape=(n, 2 or 4)
    effects : torch.Tensor, shape=(n, n_draws), optional

    Returns
    -------
    loss, grad_norm : torch.Tensor
        On the device: nothing waits for them here. The gradient is that of the whole batch.

    Raises
    ------
    InputError
        If the device is out of memory.
    """
    try:
        run.optimizer.zero_grad(set_to_none=True)
        loss = forward(run, *make_example(run, spectrograms, gains, effects))
        loss.backward()
        return loss.detach(), update(run)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"step {run.step + 1}: out of memory with batch_size={run.hp.batch_size} "
            f"(try --set batch_size={max(1, run.hp.batch_size // 2)})"
        ) from error


@torch.no_grad()
def make_example(
    run: Run,
    spectrograms: torch.Tensor,
    gains: torch.Tensor,
    effects: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mix a batch on the device: what the network hears, and what it should answer.

    Returns
    -------
    features : torch.Tensor, shape=(n, 1, n_bins, n_frames)
    target : torch.Tensor, shape=(n, n_bins, chunk_slices)
    mixture : torch.Tensor, shape=(n, n_bins, chunk_slices), complex64
        What the target is the mask of.
    """
    hp = run.hp
    vocals, accompaniment = sampling.mix(spectrograms, gains)
    if effects is not None:
        vocals, accompaniment = augmentation.apply(vocals, accompaniment, effects, hp)
    mixture = vocals + accompaniment
    features = run.listener.hear(mixture)
    centres = slice(hp.lookback, features.shape[-1] - hp.lookahead, hp.stft_stride)
    target = sampling.mask_target(
        vocals[..., centres], accompaniment[..., centres], run.curve_db, hp
    )
    return features[:, None].contiguous(), target, mixture[..., centres]


def forward(
    run: Run, features: torch.Tensor, target: torch.Tensor, mixture: torch.Tensor
) -> torch.Tensor:
    """Return the loss of an example that `make_example` gave."""
    with run.autocast():
        logits = run.network(features)[..., :: run.hp.stft_stride]
    return sampling.mask_loss(logits.float(), target, mixture, run.curve_db, run.hp, run.world)


def update(run: Run) -> torch.Tensor:
    """Move the weights by their gradient, and the averaged ones; return the gradient's norm."""
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.hp.max_grad_norm)
    run.optimizer.step()
    run.scheduler.step()
    run.average()
    return grad_norm


class Log:
    """TensorBoard, kept from ever stopping a run: the first failure is told, then it is off."""

    def __init__(self, folder: Path | None, warn: Callable[[str], None]) -> None:
        self._warn, self._folder, self._writer = warn, folder, None
        if folder is None:  # another rank writes it
            return
        threading.excepthook = _but_for_tensorboard(threading.excepthook)
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


def _but_for_tensorboard(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Keep TensorBoard's thread from printing a traceback: the next `add` raises its error."""

    def told(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            hook(args)

    return told


def _finite_losses(run: Run, fresh: list[tuple[torch.Tensor, torch.Tensor, Chunks]]) -> list[float]:
    """Fetch the losses of some steps from the device; InputError if one or its gradient is bad."""
    values = torch.stack([torch.stack([loss, norm]) for loss, norm, _ in fresh])
    values = run.world.mean(values).tolist()
    for i, ((loss, norm), (_, _, batch)) in enumerate(zip(values, fresh, strict=True)):
        if not np.isfinite([loss, norm]).all():  # clipping to a norm of NaN makes all weights NaN
            ids = {run.songs[index].song.id for index in batch.songs.flat}
            raise InputError(
                f"step {run.step - len(fresh) + i + 1}: loss is {loss:g}, gradient norm {norm:g}; "
                f"songs {', '.join(sorted(ids))} "
                "(lower learning_rate; the last save is untouched)"
            )
    return [loss for loss, _ in values]
