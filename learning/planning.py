"""What is found out before a run: where its data fits, its speed, which learning rate it bears.

Speed and learning rate are found by taking steps, so that the run they were found with is spoilt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import model as networks
from dataset import OpenSong
from hparams import HParams, InputError
from learning import run as training
from learning import sampling, validation
from learning.ranks import World
from learning.sampling import Chunks

FIND_LR = (1e-6, 1.0)  # learning rates of the range test, from … to
FIND_LR_STEPS = 200
WARM_UP_STEPS = 3  # before the measurement of a run's speed, which lasts
MEASURE_SECONDS, MEASURE_STEPS = 5.0, 1024  # so long, or so many steps (a power of 2) at most


def place(
    songs: list[OpenSong], hp: HParams, device: torch.device, world: World, where: str
) -> tuple[bool, str]:
    """Decide whether the dataset is loaded to the device's memory.

    Parameters
    ----------
    songs : list of OpenSong
    hp : HParams
    device : torch.device
    world : World
        The ranks of one machine share its memory, where there is no GPU.
    where : str
        "device", "disk", or "auto": on the device if it fits beside what a step needs; in the main
        memory it may take half of what is free.

    Returns
    -------
    resident : bool
    reason : str

    Raises
    ------
    InputError
        If what was asked for, or a step alone, does not fit.
    """
    n_bytes = sum(song.spectrogram.nbytes for song in songs)
    free, step = _free_bytes(device), step_bytes(hp, device, world.size)
    if device.type == "cuda":
        room = 0.9 * free - step
    else:
        free //= world.local_size
        room = free // 2 - step
    if step > free:
        raise InputError(
            f"a step takes {step / 1e9:.2f} GB, {free / 1e9:.2f} GB are free "
            f"(--set batch_size={max(1, int(hp.batch_size * free / step))})"
        )
    if where == "device" and n_bytes > free:
        raise InputError(
            f"--dataset-on device: {n_bytes / 1e9:.2f} GB do not fit {free / 1e9:.2f} GB "
            "(--dataset-on disk reads them as they are needed)"
        )
    resident = where == "device" or (where == "auto" and n_bytes < room)
    there = f"in the memory of the {'GPU' if device.type == 'cuda' else 'machine'}"
    reason = (
        f"{n_bytes / 1e9:.2f} GB, {there if resident else 'read from disk ahead of the steps'} "
        f"({free / 1e9:.2f} GB free{', as asked' if where != 'auto' else ''}; "
        f"a step takes {step / 1e9:.2f} GB)"
    )
    return resident, reason


def step_bytes(hp: HParams, device: torch.device, n_processes: int = 1) -> int:
    """Count the memory that one process needs for a training step [bytes].

    Weights, their gradient, the average and two moments (AdamW's), everything that the forward pass
    keeps for the backward one, and the gradients of the largest activations on their way.
    """
    kept: dict[int, torch.Tensor] = {}  # by storage: what is kept twice is there once

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):  # there once, and not for every chunk
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model = networks.build_model(hp)
        n_weights = sum(weight.numel() for weight in model.parameters())
        model(torch.zeros(1, 1, hp.n_bins, sampling.chunk_frames(hp)))
    n_chunks = -(-hp.batch_size // n_processes)
    sizes = [tensor.untyped_storage().nbytes() for tensor in kept.values()]
    narrow = 2 if networks.is_narrow(hp, device) else 1
    example = 64 * hp.n_bins * sampling.chunk_frames(hp)  # spectrograms, their sums, features …
    return 5 * 4 * n_weights + n_chunks * ((sum(sizes) + 3 * max(sizes)) // narrow + example)


def steps_in(run: training.Run, minutes: float) -> int:
    """Measure how many steps, with the validations between them, a number of minutes has.

    Takes steps and validates once, so `run` is spoilt by it. All ranks return the same number.
    """
    run.scheduler = torch.optim.lr_scheduler.ConstantLR(run.optimizer, 1.0, 0)  # has no end
    n_taken, started, took = 0, 0.0, 0.0
    for n, batch in enumerate(run.feed.batches(_some_batches(run, WARM_UP_STEPS + MEASURE_STEPS))):
        if n == WARM_UP_STEPS:
            wait_for(run.device)
            started = time.perf_counter()
        training.train_step(run, *batch)
        n_taken = n + 1 - WARM_UP_STEPS
        if n_taken < 1 or n_taken & (n_taken - 1):
            continue  # looked at after 1, 2, 4, 8 … steps; between looks nothing waits, as in a run
        wait_for(run.device)
        took = time.perf_counter() - started
        if run.world.any(took > MEASURE_SECONDS):
            break
    validation.validate(run.listener, run.valid)  # the first time pays for what is ready later
    started = time.perf_counter()
    validation.validate(run.listener, run.valid)
    pause = time.perf_counter() - started
    per_step = took / n_taken + pause / sampling.count_batches(run.songs, run.hp, 0)
    steps = max(1, int((60 * minutes - pause) / per_step))
    return run.world.gather(steps)[0]


def find_lr(
    run: training.Run, report: Callable[[int], None]
) -> tuple[list[tuple[float, float]], float]:
    """Raise the learning rate exponentially over some steps and watch the loss.

    Ends early where the smoothed loss is above its least by three times that, at least by 1; `run`
    is spoilt by it.

    Returns
    -------
    curve : list of (float, float)
        Learning rate and smoothed loss of every step.
    suggestion : float
        The learning rate at which the smoothed loss has come nine tenths of the way down from the
        mean of the first steps, as a peak for the schedules: with a higher one the network learnt
        hardly faster, or forgot.

    Raises
    ------
    InputError
        If the first loss is not finite already.

    References
    ----------
    .. [1] Smith, "Cyclical learning rates for training neural networks", WACV 2017 (2015), 3.3.
    """
    low, high = FIND_LR
    run.optimizer.param_groups[0]["lr"] = low
    growth = (high / low) ** (1 / (FIND_LR_STEPS - 1))
    run.scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, growth)
    curve, losses, smooth = [], [], 0.0
    for n, batch in enumerate(run.feed.batches(_some_batches(run, FIND_LR_STEPS)), 1):
        rate = run.scheduler.get_last_lr()[0]
        loss = float(np.mean(run.world.gather(float(training.train_step(run, *batch)[0]))))
        losses.append(loss)
        smooth = 0.9 * smooth + 0.1 * loss  # divided by what the weights sum to so far
        curve.append((rate, smooth / (1 - 0.9**n)))
        report(1)
        best = min(value for _, value in curve)
        if not curve[-1][1] < best + max(1, 3 * abs(best)):
            break
    if not np.isfinite(losses[0]):
        raise InputError(
            f"the first loss is {losses[0]:g}; no learning rate helps (check the dataset)"
        )
    # One batch is easier than another: where the way down begins, the mean of some steps tells.
    first = np.mean([loss for loss in losses[: FIND_LR_STEPS // 10] if np.isfinite(loss)])
    least = min(loss for _, loss in curve)  # never NaN: the first is none
    return curve, next(rate for rate, loss in curve if loss <= least + 0.1 * (first - least))


def _some_batches(run: training.Run, n: int) -> list[Chunks]:
    """Return this rank's share of the first batches of a run, over as many epochs as it takes."""
    hp, batches, epoch = run.hp, [], 0
    while len(batches) < n:
        batches += sampling.batches_of(sampling.plan_epoch(run.songs, hp, epoch), hp)
        epoch += 1
    return [run.world.share(batch) for batch in batches[:n]]


def _free_bytes(device: torch.device) -> int:
    """Return how much memory can still be taken [bytes]."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
