"""Teams of processes over torch.distributed: the ranks of one `torchrun` share sites and groups.

Invariant: a team's sums and gathered values are the same on every rank; without `torchrun` the team is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tensoradapt.linalg import SOLO, Team


@dataclass(frozen=True)
class Ranks(Team):
    """The ranks of a process group."""

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, in place."""
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return once every rank has come here."""
        dist.barrier()


@contextmanager
def team_of(device: str | None = None) -> Iterator[tuple[Team, str | None]]:
    """The team that `torchrun` started, and this rank's device; alone, a team of one and the device as it is."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        yield SOLO, device
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu and device in (None, "cuda") else device
        yield Ranks(dist.get_rank(), dist.get_world_size()), local
    finally:
        dist.destroy_process_group()
