"""Replicas: processes that `DistributedDataParallel` keeps equal by summing every gradient once in a backward pass.

Reentrant checkpointing runs the backward pass of every checkpointed part on its own. The gradient of a factor that
several parts share then comes in several pieces: the sum is formed when the first has come, and the others stay on
their process. Invariant: a gradient in pieces is an error, unless `static_graph` says that the last is waited for; so
is one that is never summed, of a factor that came after the model was wrapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tensoradapt.errors import AdapterError


class Source(Protocol):
    """What is asked of an adapter."""

    name: str

    @property
    def active(self) -> bool:
        """Whether anything is added."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Every stored tensor by its key."""


def watch_pieces(source: Source) -> None:
    """Watch an adapter's gradients from here on, where replicas are trained and a site runs without gradients.

    Under reentrant checkpointing that is what every site does first; evaluation is told from it by what comes after.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    wrapper = DistributedDataParallel._active_ddp_module  # set while its forward runs
    if wrapper is None or wrapper.static_graph or dist.get_world_size(wrapper.process_group) == 1:
        return
    if any(isinstance(hook, _Passes) and hook.source is source for hook in wrapper._forward_pre_hooks.values()):
        return
    passes = _Passes(source, summing=wrapper.require_backward_grad_sync)
    wrapper.register_forward_pre_hook(passes)
    for key, tensor in source.tensors().items():
        if tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(_Once(key, passes))


class Known:
    """A hook on the model: refuses a pass whose gradients are summed, where the wrapper does not know all factors."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __call__(self, model: Any, args: Any) -> None:
        """Raise AdapterError where one is not known."""
        wrapper = None if torch.compiler.is_compiling() else DistributedDataParallel._active_ddp_module
        if wrapper is None or not torch.is_grad_enabled() or not self.source.active:
            return
        if dist.get_world_size(wrapper.process_group) == 1:
            return
        known = {id(parameter) for parameter in (*wrapper._module_parameters, *wrapper._delay_all_reduce_params)}
        for key, tensor in self.source.tensors().items():
            if tensor.requires_grad and id(tensor) not in known and not hasattr(tensor, "_ddp_ignored"):
                raise _unknown(self.source.name, key)


def _unknown(adapter: str, key: str) -> AdapterError:
    return AdapterError(
        f"DistributedDataParallel does not know the factors of adapter {adapter!r}: every process would train its own",
        got=f"{key}, which came after the model was wrapped",
        hint="attach, load or change the ranks first, then wrap the model",
    )


class _Passes:
    """A hook on the wrapper: counts its passes, and knows whether the last sums gradients (not within `no_sync`)."""

    def __init__(self, source: Source, *, summing: bool) -> None:
        self.source, self.summing = source, summing
        self.count = 1

    def __call__(self, wrapper: Any, args: Any) -> None:
        if torch.is_grad_enabled():
            self.count += 1
            self.summing = wrapper.require_backward_grad_sync


class _Once:
    """A hook on a factor whose gradient was added to: refuses the second time in one pass that sums gradients."""

    def __init__(self, key: str, passes: _Passes) -> None:
        self.key, self.passes = key, passes
        self.last = 0

    def __call__(self, tensor: Tensor) -> None:
        passes = self.passes
        if passes.summing and self.last == passes.count:
            raise _split(passes.source.name, self.key)
        self.last = passes.count


def _split(adapter: str, key: str) -> AdapterError:
    return AdapterError(
        f"the processes of DistributedDataParallel would train different factors of adapter {adapter!r}: it sums the "
        "gradient of each when its first piece has come, and reentrant checkpointing gives more",
        got=f"{key}, which several checkpointed parts share",
        expected="a gradient that comes once in a backward pass",
        hint="checkpoint with use_reentrant=False (transformers: gradient_checkpointing_kwargs={'use_reentrant': "
        "False}), or wrap with DistributedDataParallel(..., static_graph=True), which no_sync() does not go with",
    )
