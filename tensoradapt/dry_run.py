"""Dry runs: which sites of an adapter one forward pass reaches.

Invariant: modes, buffers and random states are afterwards what they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tensoradapt.errors import AdapterError
from tensoradapt.passes import NEXT, Source, listed


@dataclass(frozen=True)
class Reach:
    """What one forward pass reached: sites whose delta was delivered, and those where it was not.

    `past` are those among the unreached, or among the reached, whose weight another module read without the delta.
    """

    reached: tuple[str, ...]
    unreached: tuple[str, ...]
    past: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.reached)} of {len(self.reached) + len(self.unreached)} sites reached"]
        lines += [f"not reached: {listed(self.unreached)}"] if self.unreached else []
        lines += [f"read by another module without the delta: {listed(self.past)}; {NEXT}"] if self.past else []
        return "\n".join(lines)


@contextmanager
def _as_it_was(model: nn.Module, *, train: bool, grad: bool) -> Iterator[None]:
    """Run a model in one mode; afterwards modes, buffers and random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if train else []
    with _forked(model), torch.set_grad_enabled(grad):
        try:
            model.train(train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextmanager
def _forked(model: nn.Module) -> Iterator[None]:
    """Leave the random states of the CPU, and of the GPUs that hold the model, as they were; no other one is woken."""
    used = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for kind in ("cuda", "xpu"):  # those that have a generator for each index
            if indices := sorted(device.index for device in used if device.type == kind):
                stack.enter_context(torch.random.fork_rng(indices, device_type=kind))
        yield


def dry_run(model: nn.Module, source: Source, batch: Any, *, train: bool, grad: bool) -> Reach:
    """What a forward pass on a batch reaches.  Raises AdapterError where the adapter adds nothing."""
    if not source.active:
        raise AdapterError(f"adapter {source.name!r} is merged or switched off", hint="unmerge() or enable it first")
    passes = source.passes
    with _as_it_was(model, train=train, grad=grad):
        counting = passes.begin(model)
        try:
            _call(model, batch)
        finally:
            passes.stop(counting)
    unread = {path for path in passes.weighted if not counting.reads[f"{passes.weighted[path]} at use"]}
    reached = tuple(p for p in passes.paths if counting.calls[p] and p not in unread)
    return Reach(reached, tuple(p for p in passes.paths if p not in reached), passes.judge(counting))


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
