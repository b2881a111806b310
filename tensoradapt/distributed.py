"""Teams of processes over torch.distributed: the ranks of one `torchrun` share sites and groups.

Invariant: a team's sums and gathered values are the same on every rank; without `torchrun` the team is one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tensoradapt.errors import TensorAdaptError
from tensoradapt.linalg import SOLO, Team

PATIENCE = timedelta(hours=6)  # one rank may fit a large group while the others wait


@dataclass(frozen=True)
class Ranks(Team):
    """The ranks of a process group."""

    group: Any = None

    def add(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, in place."""
        with _others():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks."""
        found: list[Any] = [None] * self.size
        with _others():
            dist.all_gather_object(found, value, group=self.group)
        return found

    def wait(self) -> None:
        """Return once every rank has come here."""
        with _others():
            dist.barrier(group=self.group)


@contextmanager
def _others() -> Iterator[None]:
    """Say plainly that another process is gone, or cannot be waited for any longer."""
    try:
        yield
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise TensorAdaptError(
            "another process of the team has stopped, or takes too long", got=reason, hint="its own message says why"
        ) from None


@contextmanager
def team_of(device: str | None = None) -> Iterator[tuple[Team, str | None]]:
    """The team that `torchrun` started, and this rank's device; alone, a team of one and the device as it is.

    On `cuda` every rank has a GPU of its own, or shares one where there are fewer than processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2:
        yield SOLO, device
        return
    count = torch.cuda.device_count() if device == "cuda" else 0
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", size)) > count  # NCCL wants a GPU for every process
    backend = "cpu:gloo,cuda:gloo" if shared else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        local = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else device
        if count:
            torch.cuda.set_device(local)
        group = dist.new_group(backend=backend, timeout=PATIENCE)
        yield Ranks(dist.get_rank(), dist.get_world_size(), group), local
    finally:
        dist.destroy_process_group()
