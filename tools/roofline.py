"""What a network must take on a machine: the larger of its arithmetic and its memory traffic.

For every layer the larger of its operations over the rate of a large matrix product and its bytes
over the rate of a large copy, both measured; ReLUs, additions and whatever else could be fused into
a layer count as free.

References
----------
.. [1] Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
   multicore architectures", Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import model as networks
from hparams import HParams


class Rates(NamedTuple):
    """What a device was measured to do at best."""

    operations: float  # [1/s], of a large matrix product
    copied: float  # [bytes/s], read and written by a large copy
    value_bytes: int  # of the numbers the network computes in


def measure_rates(device: torch.device, is_narrow: bool) -> Rates:
    """Measure the rates of a large matrix product and of a large copy, in float32 or bfloat16."""
    size = 2048 if device.type == "cpu" else 8192
    matrix = torch.rand(size, size, device=device)
    matrix = matrix.bfloat16() if is_narrow else matrix
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as training and cuDNN have it
    values = torch.zeros(2**26 if device.type == "cpu" else 2**28, device=device)
    target = torch.empty_like(values)
    took = best_seconds(
        {"matrix": lambda: matrix @ matrix, "copy": lambda: target.copy_(values)}, 10, device
    )
    n_bytes = 2 * values.numel() * values.element_size()
    return Rates(2 * size**3 / took["matrix"], n_bytes / took["copy"], matrix.element_size())


def least_seconds(
    hp: HParams, rates: Rates, n_columns: int, n_chunks: int = 1, training: bool = False
) -> float:
    """Return the least time of a pass over some chunks, or of a training step on them [s].

    Parameters
    ----------
    hp : HParams
    rates : Rates
    n_columns : int
        Mask columns (or slices) of a chunk.
    n_chunks : int
    training : bool
        A convolution or linear layer makes three passes of as many operations, each over two of
        its input, output and weights to the third; a batch norm reads its input twice and writes
        it once, and backwards reads it and the gradient twice and writes one. Otherwise there is
        one pass, and batch norms are folded.
    """
    seconds, n_layers = 0.0, 0

    def count(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        nonlocal seconds, n_layers
        n_in, n_out = n_chunks * inputs[0].numel(), n_chunks * output.numel()
        if isinstance(module, torch.nn.BatchNorm2d):
            seconds += training * 8 * n_in * rates.value_bytes / rates.copied
        elif isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            n_operations = 2 * n_out * module.weight[0].numel()
            n_bytes = rates.value_bytes * (n_in + n_out + module.weight.numel())
            n_passes = (3 if n_layers else 2) if training else 1  # the picture needs no gradient
            seconds += n_passes * max(n_operations / rates.operations, n_bytes / rates.copied)
            n_layers += 1

    with torch.device("meta"), torch.no_grad():  # shapes without arithmetic
        net = networks.build_model(hp)
        for module in net.modules():
            module.register_forward_hook(count)
        stride = hp.stft_stride if training else 1
        net(torch.zeros(1, 1, hp.n_bins, (n_columns - 1) * stride + hp.stft_frames))
    if training:  # the optimizer, with AdamW's two moments, and the average
        n_weights = sum(weight.numel() for weight in net.parameters())
        seconds += 9 * 4 * n_weights / rates.copied
    return seconds


def best_seconds(
    work: dict[Any, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[Any, float]:
    """Run pieces of work in alternation; return the shortest time of each [s]."""
    best = dict.fromkeys(work, float("inf"))
    for piece in work.values():
        piece()  # first calls pay for what the later ones find ready
    for _ in range(rounds):
        for name, piece in work.items():
            wait_for(device)
            started = time.perf_counter()
            piece()
            wait_for(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
