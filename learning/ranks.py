"""One run on several processes, as torchrun starts them: who does what, and do all agree.

Without torchrun there is one process, rank 0 of 1, and everything here costs nothing. Numbers on
GPUs travel through NCCL, all else through gloo.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from hparams import InputError


@dataclass(frozen=True)
class World:
    """The processes of this run, and which of them this one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine

    def share(self, items: Any) -> Any:
        """Return every size-th item, beginning with this rank's own; of whatever can be sliced."""
        return items[self.rank :: self.size]

    def gather(self, item: Any) -> list[Any]:
        """Return what every rank gave, in the order of ranks; waits for all of them."""
        if self.size == 1:
            return [item]
        items = [None] * self.size
        dist.all_gather_object(items, item)
        return items

    def any(self, flag: bool) -> bool:
        """Return whether any rank gave true; the same answer on all of them."""
        if self.size == 1:
            return flag
        flags = torch.tensor([float(flag)])
        dist.all_reduce(flags)
        return bool(flags.item())

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Average a tensor over the ranks, on its device."""
        if self.size == 1:
            return value
        value = value / self.size
        dist.all_reduce(value)
        return value

    def agree(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors with those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def world() -> World:
    """Read from the environment what torchrun wrote there."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextlib.contextmanager
def joined(here: World, device: str = "cpu") -> Iterator[None]:
    """Connect the processes of the run, and with "cuda" their GPUs, while the block lasts.

    InputError if the others cannot be reached, or one of them ends while this one needs it.
    """
    if here.size == 1:
        yield
        return
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        yield
        dist.destroy_process_group()  # not after an error: NCCL would wait for the others
    except RuntimeError as error:
        # Gloo reports a lost peer as a plain RuntimeError; others of them are bugs of ours.
        signs = ("gloo", "Connection", "Timed out", "NCCL", "Socket")
        if not (isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)):
            raise
        raise InputError(
            f"rank {here.rank} of {here.size}: lost the others: {str(error).splitlines()[0]} "
            "(what ended the first of them stands above; resume from the last checkpoint)"
        ) from error
