"""Hooks: how a delta reaches a module's output. Objects, not closures, so that models can be copied and pickled.

`OutputHook` adds to what a module returns. `WeightHook` lets the sum of weight and delta stand in for the parameter
while one call of the module that uses it runs; the parameter itself, its name and its value stay as they are.
Invariant: a hook holds no tensor: it asks its adapter at every call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks

from tensoradapt.calls import computed
from tensoradapt.chain import Chain, Convolved, staged
from tensoradapt.errors import AdapterError
from tensoradapt.passes import Passes
from tensoradapt.replicas import watch_pieces
from tensoradapt.standins import StandIn, caller, release, table_of


class Source(Protocol):
    """What a hook needs of its adapter."""

    name: str
    training: bool
    passes: Passes

    @property
    def scale(self) -> float:
        """What every delta is multiplied by, beside its site's own scale."""

    @property
    def active(self) -> bool:
        """Whether anything is added."""

    @property
    def stalled(self) -> bool:
        """Whether it is merged and nothing else of the model is trained."""

    def chain(self, key: str, like: Tensor | None = None) -> Chain:
        """The chain of a site, in the dtype of `like`."""

    def in_place_of(self, key: str, parameter: Tensor) -> Tensor:
        """What is read in a parameter's place."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Every stored tensor by its key."""


@dataclass(frozen=True)
class Site:
    """What an output hook knows of its site: fixed at attach."""

    path: str
    kind: str
    scale: float
    dropout: float
    dropout_at: str
    rows: tuple[int, int] | None


def watch(source: Source, value: Tensor) -> Tensor | None:
    """A tensor's values with an error for a backward pass that reaches them, where no training is left to be done.

    None where there is: gradients flow, evaluation needs none, and a compiler would run the error.
    """
    if not (torch.is_grad_enabled() and source.training and value.is_floating_point()) or value.requires_grad:
        return None
    if torch.compiler.is_compiling() or not source.stalled:
        return None
    watched = value.detach().requires_grad_()
    watched.register_hook(_refuse)
    return watched


def _refuse(gradient: Tensor) -> None:
    raise AdapterError(
        "the adapter is merged into the weights: a backward pass would train nothing",
        hint="adapter.unmerge() before training goes on; model.eval() to evaluate",
    )


class OutputHook:
    """Adds scale * chain(x) to a module's output, in the output's dtype."""

    def __init__(self, source: Source, site: Site) -> None:
        self.source, self.site = source, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """The module's output with the delta's added; None (nothing changed) where the adapter is off."""
        if not self.source.active:
            watched = watch(self.source, output) if isinstance(output, Tensor) else None
            return None if watched is None else watched.clone()  # which may be changed in place
        if not isinstance(output, Tensor):
            raise AdapterError(
                f"{self.site.path} returns no single tensor, so nothing can be added to it",
                got=type(output).__name__,
                hint="exclude this module",
            )
        watch_pieces(self.source)
        self.source.passes.reach(self.site.path)
        x = args[0] if args else next(iter(kwargs.values()))
        device = output.device.type
        cast = not output.is_meta and torch.is_autocast_enabled(device)  # which knows no meta device
        with torch.autocast(device, enabled=False) if cast else nullcontext():
            if output.is_nested:  # what nn.TransformerEncoder makes of a padding mask
                rows = [self.add(module, a, b) for a, b in zip(x.unbind(), output.unbind(), strict=True)]
                return torch.nested.as_nested_tensor(rows, layout=output.layout)
            return self.add(module, x, output)

    def add(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The sum y + scale * delta(x), on the rows of the output that the site has."""
        site = self.site
        chain = self.source.chain(site.path, y)
        scale = site.scale * self.source.scale
        at_in, at_code = self._dropout()
        x = x if x.device == y.device else x.to(y.device)  # accelerate moves it within the call
        if x.is_floating_point():
            x = x.to(y.dtype)
            x = F.dropout(x, at_in) if at_in else x
        if site.kind == "linear" and site.rows is None:
            return chain.add(x, y, scale, at_code)
        delta = chain(x, Convolved(module) if site.kind == "conv" else staged, at_code) * scale  # type: ignore[arg-type]
        padding = getattr(module, "padding_idx", None)
        if padding is not None:  # its row is not trained
            delta = torch.where(x.eq(padding)[..., None], delta.detach(), delta)
        if site.rows is None:
            return y + delta
        dim = -3 if site.kind == "conv" else -1  # the axis of the output channels
        above, mine, below = y.tensor_split(site.rows, dim)
        return torch.cat((above, mine + delta, below), dim)

    def _dropout(self) -> tuple[float, float]:
        p = self.site.dropout if self.source.training else 0.0
        return (p, 0.0) if self.site.dropout_at == "in" else (0.0, p)


class WeightHook:
    """Within a call, `owner.name` reads as the sum with the deltas or as a trained copy, in the thread of the call.

    The calls of several modules may do so, one within another, and a module may call itself: the parameter itself is
    what is added to, once.
    """

    def __init__(self, source: Source, key: str, owner: nn.Module, name: str, *, loaded: bool = False) -> None:
        self.source, self.key, self.name = source, key, name
        self.owner = [owner]  # in a list: a hook is no module, and must not look like one
        self.loaded = loaded  # for the length of a call: outside it there is nothing to add to

    def before(self, module: nn.Module, args: Any) -> None:
        """Put what the adapter makes of the parameter in its place, for this call."""
        table = table_of(self.owner[0])
        if self.name not in table:
            if self.source.active:
                raise self._gone()
            return
        parameter = table.held(self.name)
        if self.loaded and parameter.is_meta:
            return
        self._check_copied(module)
        found, frame = table.standing(self.name), caller()
        where = None if frame is None else (self.source.active, _top_saved_tensors_default_hooks(True))
        mine = [each for each in found if each.by is self]
        known = frame is not None and all(each.frame is not None for each in found)
        if known and mine and mine[-1].where == where:
            value = found[-1].value
        elif known and not mine:
            value = self.made(found[-1].value if found else parameter)
        else:
            value = parameter
            for hook in (*dict.fromkeys(each.by for each in found if each.by is not self), self):
                value = hook.made(value)
        table.put(self.name, (*found, StandIn(self, value, where, frame)))

    def made(self, value: Tensor) -> Tensor:
        """What the adapter makes of what is read without it."""
        if self.source.active:
            watch_pieces(self.source)
            return self.source.in_place_of(self.key, value)
        watched = watch(self.source, value)
        return value if watched is None else watched

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Take it away again, also when the call has failed."""
        table = table_of(self.owner[0])
        found, frame = table.standing(self.name), caller()
        mine = [k for k, each in enumerate(found) if each.by is self and frame in (None, each.frame)]
        mine = mine or [k for k, each in enumerate(found) if each.by is self and each.frame is None]
        if mine:
            table.put(self.name, found[: mine[-1]] + found[mine[-1] + 1 :])

    def _gone(self) -> AdapterError:
        buffers = self.owner[0]._buffers
        how, end = computed(self.owner[0], self.name) or (
            "a buffer, as PyTorch leaves of a frozen weight that was parametrised"
            if self.name in buffers
            else "removed",
            "",
        )
        return AdapterError(
            f"{self.key} is no parameter any more, and adapter {self.source.name!r} adds to it at use",
            got=how,
            expected="the parameter that it was when the adapter was attached",
            hint=f"{end} makes a parameter of it; or detach() first" if end else "detach() first",
        )

    def _check_copied(self, module: nn.Module) -> None:
        if "_is_replica" in module.__dict__:
            raise AdapterError(
                f"nn.DataParallel copies modules without their parameters: what adapts {self.key} does not reach it",
                hint="use DistributedDataParallel, or one device",
            )


def unhook(model: nn.Module, source: Source) -> None:
    """Take every hook of an adapter off a model, whether or not somebody keeps its handle."""
    for module in model.modules():
        beside: Any = (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in [*hooks.items()]:
                if getattr(getattr(hook, "__self__", hook), "source", None) is source:
                    del hooks[key]
                    for more in beside:
                        more.pop(key, None)
        release(module, source)


def hooking(model: nn.Module) -> Iterator[Any]:
    """The adapters behind the hooks on a model's modules."""
    for module in model.modules():
        for hook in module._forward_hooks.values():
            hook = getattr(hook, "__self__", hook)
            if isinstance(hook, OutputHook | WeightHook):
                yield hook.source
