"""What train.py repeats: the step, the epoch, the state of a run, its saves and its log.

A step mixes a batch of chunks on the device at random gains, learns the mask of every column at
once, and moves the averaged weights, which are the ones that are validated and shipped. Nothing in
it waits for the device (but SyncBatchNorm, with several GPUs): losses are looked at now and then.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audio
import cli
import dataset
import model as networks
from dataset import Batch, Chunks, Feed, OpenSong
from hparams import KINDS, MASK_SETTINGS, UNTUNED_MASK, HParams, InputError, differences, from_dict
from learning import targets
from learning.muon import Muon
from learning.ranks import World

OPTIMIZERS = {"muon": Muon, "adamw": torch.optim.AdamW}
CHECK_EVERY = 20  # steps between looks at the losses, as every look waits for the GPU
SAVE_EVERY = 300  # seconds between saves within an epoch
Log = Callable[[dict[str, float], int], None]  # adds a point to each named curve at a step
WARM_UP_STEPS = 4  # before a step is captured: cuDNN chooses its kernels, the optimizer its state
STATE = ("epoch", "batch", "best_db", "losses")  # of a run, beside its weights and step
# What a network keeps when it learns on: its terms, and what it had learnt from before.
INHERITED = ("licence", "sources", "learnt_before", "taught", "stereo")
DIFFERS = {  # by the names of `Run.origin`
    "data": "it was trained on other songs, or in another order",
    "valid": "it was validated on other songs",
    "shares": "its datasets had other shares",
    "processes": "it ran on another number of processes",
}
SAME_IN_A_RUN = [k for k in KINDS if k not in (*MASK_SETTINGS, "block_frames", "precision")]


class Run:
    """A training run: everything that is saved, and that resuming needs.

    `model` learns, `averaged` is the running average of its weights; `epoch`, `batch` and `step`
    say what comes next, and `scores` how good the last epoch's network was.
    """

    def __init__(
        self,
        hp: HParams,
        feed: Feed,
        valid: list[OpenSong],
        world: World | None = None,
        shares: tuple[float, ...] = (),
    ) -> None:
        self.hp, self.feed, self.valid, self.world = hp, feed, valid, world or World()
        self.songs, self.device, self.shares = feed.songs, feed.device, tuple(shares)
        device = self.device
        torch.manual_seed(hp.seed)
        self.model = networks.build_model(hp).to(device)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all steps have one shape
            torch.set_float32_matmul_precision("high")  # TF32 where float32 is asked for
        self.network = self.model  # as the steps call it
        if self.world.size > 1:
            if device.type == "cuda":
                self.network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
            self.network = torch.nn.parallel.DistributedDataParallel(
                self.network, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        self.curve_db = audio.weighting_curve_db(hp).to(device)
        # What a captured step is to read anew every time lies on the device.
        self.learning_rate = torch.tensor(hp.learning_rate, device=device)
        self.decay = torch.zeros((), device=device)  # of the averaged weights
        self.optimizer = OPTIMIZERS[hp.optimizer](
            self.model.parameters(),
            lr=self.learning_rate,
            weight_decay=hp.weight_decay,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.n_steps = hp.steps or sum(
            dataset.count_batches(self.songs, hp, epoch) for epoch in range(hp.epochs)
        )
        self.take_step = Step(self)
        self.epoch = self.batch = self.step = 0
        self.best_db = -np.inf  # of what best.pth holds
        self.mask_settings: dict[str, Any] = dict(UNTUNED_MASK)
        self.inherited: dict[str, Any] = {}
        self.scores: dict[str, float] = {}
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

    @property
    def latest_db(self) -> float:
        """How good the last epoch's network sounded; -inf where there is none or it has moved."""
        if self.batch or not self.scores:
            return -np.inf
        better = max(self.scores["soft"], self.scores["binary"])
        return -self.scores["loss"] if np.isnan(better) else better  # no held-out voice, ever

    def set_pace(self) -> None:
        """Set the next step's learning rate, and how slowly the averaged weights follow it."""
        self.learning_rate.fill_(learning_rate(self.step, self.hp, self.n_steps))
        self.decay.fill_(min(self.hp.ema_decay, (1 + self.step) / (10 + self.step)))

    def average(self) -> None:
        """Move the averaged weights towards the present ones."""
        change = torch._foreach_sub(self._learning, self._averaging)
        torch._foreach_mul_(change, 1 - self.decay)
        torch._foreach_add_(self._averaging, change)

    def finish_epoch(self, scores: dict[str, float]) -> None:
        """Note what the epoch came to."""
        self.scores = scores
        self.mask_settings["mask_at_eval"] = scores["binary"] > scores["soft"]
        self.epoch, self.batch, self.losses = self.epoch + 1, 0, []

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that goes on must share with this one, beside its settings."""
        return {
            "data": dataset.identity(self.songs),
            "valid": dataset.identity(self.valid),
            "shares": list(self.shares),
            "processes": self.world.size,
        }

    def write(self, path: Path, whole: bool = True) -> None:
        """Write a checkpoint; `whole` includes what only resuming needs."""
        taught = dataset.identity([song for song in self.songs if song.song.taught])
        extra: dict[str, Any] = {
            "curve_db": self.curve_db.cpu(),
            "mask_settings": self.mask_settings,
            "data": dataset.identity(self.songs),
            "step": self.step,
            "scores": self.scores,
            **self.inherited,
            "taught": sorted({*self.inherited.get("taught", ()), *taught}),
        }
        if whole:
            extra["resume"] = {
                "weights": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                **{name: getattr(self, name) for name in STATE},
                **self.origin,
            }
        networks.save_checkpoint(path, self.averaged, self.hp, **extra)

    def differences(self, checkpoint: dict[str, Any]) -> dict[str, str]:
        """Say in what this run differs from the one that saved a checkpoint, by name."""
        resume = checkpoint.get("resume", {})
        if "weights" not in resume:
            return {"state": "it holds no training state (a last.pth of this version does)"}
        settings = differences(self.hp, from_dict(checkpoint["hparams"]), SAME_IN_A_RUN)
        named = {name: f"its {name} is {its}, not {now}" for name, (now, its) in settings.items()}
        if checkpoint["hparams"].get("schedule", "one-cycle") != "one-cycle":
            named["schedule"] = "its learning rate was constant, which is gone"
        saved = {"shares": [], "data": checkpoint["data"], **resume}
        return named | {name: DIFFERS[name] for name, x in self.origin.items() if x != saved[name]}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint stopped."""
        state = checkpoint["resume"]
        self.averaged.load_state_dict(checkpoint["weights"])
        self.model.load_state_dict(state["weights"])
        own = self.optimizer.state_dict()["param_groups"]  # made for this device
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": own})
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate  # not the copy that was just made of it
        for name in STATE:
            setattr(self, name, state[name])
        self.step, self.scores = checkpoint["step"], checkpoint["scores"]
        if "tuned_on" not in checkpoint:  # tuned settings belong to the weights of then
            self.mask_settings = checkpoint["mask_settings"]
        self._inherit(checkpoint)

    def start_from(self, checkpoint: dict[str, Any]) -> None:
        """Take only the averaged weights of a checkpoint: a new run that has learnt before."""
        self.model.load_state_dict(checkpoint["weights"])
        self.averaged.load_state_dict(checkpoint["weights"])
        self._inherit(checkpoint)
        self.inherited["learnt_before"] = sorted(networks.learnt_songs(checkpoint))

    def _inherit(self, checkpoint: dict[str, Any]) -> None:
        self.inherited = {name: checkpoint[name] for name in INHERITED if name in checkpoint}


def learning_rate(step: int, hp: HParams, n_steps: int) -> float:
    """Return the learning rate of a step: one cycle (Smith 2018, arXiv 1803.09820).

    It rises from a 25th over three tenths of the run and falls to almost nothing, both as a cosine.
    """
    peak = hp.learning_rate
    top = 0.3 * (n_steps + 1) - 1  # the step of the peak
    if step <= top:
        start, end, share = peak / 25, peak, step / top
    else:
        start, end, share = peak, peak / 25e4, (step - top) / (n_steps - top)
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def train_step(run: Run, batch: Batch) -> torch.Tensor:
    """Take one optimizer step at the pace that is set; `batch` is this rank's share.

    Returns the loss and the norm of the whole batch's gradient, in one tensor on the device.
    """
    run.optimizer.zero_grad(set_to_none=True)
    loss = loss_of(run, batch)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.hp.max_grad_norm)
    run.optimizer.step()
    run.average()
    return torch.stack([loss.detach(), grad_norm.detach()])


def loss_of(run: Run, batch: Batch) -> torch.Tensor:
    """Return the loss of a batch."""
    hp, narrow = run.hp, networks.is_narrow(run.hp, run.device)
    spectrograms = run.feed.spectrograms(batch)
    features, target, mixture = targets.make_example(
        spectrograms, batch.gains, batch.eq_db, run.curve_db, hp
    )
    are_taught = run.feed.are_taught[batch.songs].any(1) if hp.trim else None
    # A cache of narrowed weights would outlive the CUDA graph that it was made in.
    with torch.autocast(run.device.type, torch.bfloat16, enabled=narrow, cache_enabled=False):
        logits = run.network(features)[..., :: hp.stft_stride].float()
    return targets.mask_loss(logits, target, mixture, run.curve_db, hp, run.world, are_taught)


class Step:
    """Takes the steps of a run: `train_step` as it is, or on one GPU as a single CUDA graph.

    Launched kernel by kernel, a step of a small network takes the CPU longer than the GPU. A graph
    is launched as one; it reads and writes the same memory every time, so a batch is copied there.
    The first steps run as they are, and so does what is captured: there is one step function.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._n_taken = run, 0
        self._is_captured = run.device.type == "cuda" and run.world.size == 1
        self._batch: Batch | None = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Take a step, as `train_step` does."""
        self._run.set_pace()
        return self._captured(batch) if self._is_captured else train_step(self._run, batch)

    def _captured(self, batch: Batch) -> torch.Tensor:
        run = self._run
        if self._batch is None:
            self._batch = Batch(*(None if x is None else x.clone() for x in batch))
            self._stream = torch.cuda.Stream()  # one: what a stream has allocated, it reuses
        for fixed, new in zip(self._batch, batch, strict=True):
            if fixed is not None:
                fixed.copy_(new)
        if self._n_taken < WARM_UP_STEPS:  # on a stream of its own, as capturing demands
            self._n_taken += 1
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = train_step(run, self._batch)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # The thread that reads from disk may go on sending batches meanwhile.
            with torch.cuda.graph(self._graph, None, self._stream, "thread_local"):
                self._result = train_step(run, self._batch)
        self._graph.replay()
        return self._result.clone()


def train_epoch(run: Run, log: Log, stopped: Callable[[], bool], save: Callable[[], None]) -> float:
    """Train on the rest of the current epoch, or up to the last step; returns its mean loss so far.

    Afterwards ``run.batch`` counts its batches: whoever validates then moves on to the next epoch,
    so that a run stopped in between validates when it is resumed. `stopped`, true on any rank, ends
    the epoch early. InputError, naming the step and its songs, if loss or gradient is not finite.
    """
    hp, world = run.hp, run.world
    run.model.train()
    plan = dataset.plan_epoch(run.songs, hp, run.epoch, run.shares)
    batches = dataset.batches_of(plan, hp)[: run.batch + run.n_steps - run.step]
    shares = [world.share(batch) for batch in batches[run.batch :]]
    fresh, saved, checked = [], time.monotonic(), time.perf_counter()
    n_slices = hp.batch_size * hp.chunk_slices
    with cli.progress(len(shares) * n_slices, " slices") as bar:
        for batch in run.feed.batches(shares):
            fresh.append((run.take_step(batch), batches[run.batch]))
            run.batch, run.step = run.batch + 1, run.step + 1
            bar.update(n_slices)
            # Asked once, as what is saved after a stop has been checked.
            stopping = world.any(stopped())
            if len(fresh) == CHECK_EVERY or stopping or run.batch == len(batches):
                values = _finite_values(run, fresh)
                run.losses += [loss for loss, _ in values]
                now = time.perf_counter()
                log(
                    {
                        "loss/train": values[-1][0],
                        "learning rate": float(run.learning_rate),
                        "gradient norm": values[-1][1],
                        "slices per second": len(fresh) * n_slices / (now - checked),
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


def _finite_values(run: Run, fresh: list[tuple[torch.Tensor, Chunks]]) -> list[list[float]]:
    """Fetch loss and gradient norm of some steps from the device; InputError if one is bad."""
    values = run.world.mean(torch.stack([result for result, _ in fresh])).tolist()
    for i, ((loss, norm), (_, batch)) in enumerate(zip(values, fresh, strict=True)):
        if not np.isfinite([loss, norm]).all():  # clipping to a norm of NaN makes all weights NaN
            ids = {run.songs[index].song.id for index in batch.songs.flat}
            raise InputError(
                f"step {run.step - len(fresh) + i + 1}: loss is {loss:g}, gradient norm {norm:g}; "
                f"songs {', '.join(sorted(ids))} (lower learning_rate; the last save is untouched)"
            )
    return values


def save(run: Run, folder: Path, name: str, warn: Callable[[str], None] | None = None) -> bool:
    """Write a run's last.pth or best.pth.

    Returns whether it is there now; with `warn`, a full disk is no InputError.
    """
    if run.world.rank:
        return True
    try:
        run.write(folder / name, whole=name == "last.pth")
    except InputError as error:
        if warn is None:
            raise InputError(f"{error}; what was saved before is untouched") from error
        warn(f"{error}; training goes on with what was saved before")
        return False
    return True


@contextlib.contextmanager
def open_log(folder: Path | None, warn: Callable[[str], None]) -> Iterator[Log]:
    """Give the function that adds a point to each named curve of a log for TensorBoard.

    It never ends a run: the first failure is one warning, and nothing more is logged. Points are
    written at once, by this thread: that of torch's SummaryWriter fails with a traceback.
    """
    writer, goes_on = None, folder is not None  # else another rank writes it
    with contextlib.ExitStack() as files:

        def write(**what: Any) -> None:
            nonlocal writer
            with warnings.catch_warnings(action="ignore"):  # deprecations inside tensorboard
                from tensorboard.compat.proto.event_pb2 import Event
                from tensorboard.summary.writer.record_writer import RecordWriter
            if writer is None:
                name = f"events.out.tfevents.{time.time():.6f}.{os.getpid()}"
                writer = RecordWriter(files.enter_context(open(folder / name, "wb", buffering=0)))
                write(file_version="brain.Event:2")
            writer.write(Event(wall_time=time.time(), **what).SerializeToString())

        def add(values: dict[str, float], step: int) -> None:
            nonlocal goes_on
            if goes_on:
                points = [{"tag": name, "simple_value": value} for name, value in values.items()]
                try:
                    write(step=step, summary={"value": points})
                except Exception as error:  # beside another protobuf it raises whatever it likes
                    goes_on = False
                    warn(f"TensorBoard log stopped: {error}; training goes on")

        yield add
