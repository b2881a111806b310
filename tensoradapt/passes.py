"""Passes: which sites of an adapter the forward passes of its host reached, and which weights were read past it.

A pass is watched until one in training and one in evaluation have ended well: every function of PyTorch that takes an
adapted weight is counted, and so is every delivery. Where a weight was read more often than the adapter delivered its
delta, another module read it. Invariant: a watched pass computes what any other does; a compiled one is not watched.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from tensoradapt.errors import AdapterError
from tensoradapt.quantised import is_plain
from tensoradapt.readers import ASKS, LIKE
from tensoradapt.scan import owner_of
from tensoradapt.tables import first_of

SHOWN = 6  # paths in a message


@dataclass(frozen=True)
class Held:
    """An adapted tensor: the sites on it, by the name of the parameter that delivers them.

    `weighted` are the names of those that are replaced at use; `alone` says that no other module holds the tensor.
    """

    sites: Mapping[str, Sequence[str]]
    weighted: frozenset[str] = frozenset()
    alone: bool = True

    @property
    def key(self) -> str:
        """The first of its names."""
        return next(iter(self.sites))


class Source(Protocol):
    """What is asked of an adapter."""

    name: str
    training: bool
    passes: Passes

    @property
    def active(self) -> bool:
        """Whether anything is added."""


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


NEXT = "attach with delivery='weight', or delivery={target: 'weight'}, in the spec, or exclude these weights"


def listed(paths: Sequence[str]) -> str:
    """Paths, the first of many."""
    return first_of(paths, SHOWN)


class _Counting(TorchFunctionMode):
    """Counts the functions that take a watched tensor, but for those that ask for its dtype, device or shape."""

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched, self.reads = dict(watched), Counter[str]()
        self.kept: list[Tensor] = []  # so that no identity is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, and run the function."""
        if not _asks(func):
            for value in (*args, *(kwargs or {}).values()):
                for each in value if type(value) in (list, tuple) else (value,):
                    if id(each) in self.watched:
                        self.reads[self.watched[id(each)]] += 1
        return func(*args, **(kwargs or {}))


def _asks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
    return name in ASKS or name in LIKE - {"to"} or name.startswith(("is_", "new_", "__set__"))


class Passes:
    """The deliveries of one adapter, counted by site, and what its host's passes showed.

    `past` are the sites whose weights were read past the adapter in the last pass that was watched.
    """

    def __init__(self) -> None:
        self.held: tuple[Held, ...] = ()
        self.calls = Counter[str]()
        self.past: tuple[str, ...] = ()
        self.ended = 0
        self.fused = False  # whether PyTorch takes another kernel for a pass without gradients that is watched
        self.settled: set[bool] = set()
        self.told = False
        self._counting: _Counting | None = None
        self._before = Counter[str]()

    @property
    def paths(self) -> tuple[str, ...]:
        """All sites, in the order of the plan."""
        return tuple(path for held in self.held for paths in held.sites.values() for path in paths)

    @property
    def weighted(self) -> dict[str, str]:
        """The sites that are delivered by weight, and the parameters that they change."""
        return {path: key for held in self.held for key in held.weighted for path in held.sites[key]}

    @property
    def unreached(self) -> tuple[str, ...]:
        """Sites whose delta was never delivered."""
        return tuple(path for path in self.paths if not self.calls[path])

    def reach(self, *paths: str) -> None:
        """Count a delivery."""
        if not torch.compiler.is_compiling():
            for path in paths:
                self.calls[path] += 1

    def made(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that stands in the place of a parameter, watched where the pass is."""
        if not torch.compiler.is_compiling() and self._counting is not None:
            self._counting.watched[id(tensor)] = f"{key} at use"
            self._counting.kept.append(tensor)
        return tensor

    def begin(self, model: nn.Module) -> None:
        """Watch the pass that begins."""
        watched = [
            (owner._parameters.get(leaf), h.key)
            for h in self.held
            if h.alone
            for owner, leaf in [owner_of(model, h.key)]
        ]
        self._before = Counter(self.calls)
        self._counting = _Counting(
            {id(p): key for p, key in watched if p is not None and is_plain(p) and not p.is_meta}
        )
        self._counting.__enter__()

    def stop(self) -> _Counting | None:
        """End the watching; returns what was counted."""
        counting, self._counting = self._counting, None
        if counting is not None:
            counting.__exit__(None, None, None)
        return counting

    def judge(self, counting: _Counting) -> tuple[str, ...]:
        """The sites whose weight was read more often than their delta was delivered, in the pass that was watched."""
        past = []
        for each in self.held:
            groups = each.sites.values()
            own = sum(max(self.calls[path] - self._before[path] for path in paths) for paths in groups)
            past += [path for paths in groups for path in paths] if counting.reads[each.key] > own else []
        return tuple(past)

    def check(self, name: str) -> None:
        """Raise AdapterError where weights are read past the adapter; warn, once, of sites that no pass reached."""
        if self.past:
            raise past_error(name, self.past)
        if self.ended and self.unreached and not self.told:
            self.told = True
            warnings.warn(
                f"no forward pass has reached {len(self.unreached)} of {len(self.paths)} sites of adapter {name!r}, "
                f"which are not trained: {listed(self.unreached)}. Exclude them where the model never runs them; "
                "adapter.check(batch) says what a batch reaches",
                stacklevel=3,
            )


def past_error(name: str, paths: Sequence[str]) -> AdapterError:
    """The error on weights that another module reads, past every hook."""
    return AdapterError(
        f"another module reads weights that adapter {name!r} changes without calling their modules: what it adds is "
        "not in what was read",
        got=listed(paths),
        expected="modules that are called, or a weight that is replaced at use",
        hint=NEXT,
    )


class PassHook:
    """The hooks on the model itself: they watch a pass, and arm its output where weights were read past the adapter."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.depth, self.watching = 0, False
        self.counted: _Counting | None = None

    def before(self, module: nn.Module, args: Any) -> None:
        """Watch, unless such a pass has been watched, or a compiler runs."""
        if torch.compiler.is_compiling():
            return
        self.depth += 1
        passes = self.source.passes
        blind = passes.fused and not torch.is_grad_enabled()
        if self.depth == 1 and self.source.active and not blind and self.source.training not in passes.settled:
            self.watching = True
            passes.begin(module)

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the watching, also when the call has failed."""
        if torch.compiler.is_compiling():
            return
        self.depth -= 1
        if self.depth == 0 and self.watching:
            self.watching, self.counted = False, self.source.passes.stop()

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Judge a pass that has ended, and arm the output."""
        if torch.compiler.is_compiling() or self.depth or not self.source.active:
            return None
        passes, counted, self.counted = self.source.passes, self.counted, None
        if counted is not None:
            passes.past = passes.judge(counted) or passes.past
            passes.settled.add(self.source.training)
            passes.ended += 1
        if not (torch.is_grad_enabled() and self.source.training):
            return None
        if passes.past:
            return armed(output, past_error(self.source.name, passes.past))
        if counted is not None:
            passes.check(self.source.name)
        return None


def armed(output: Any, error: AdapterError) -> Any:
    """An output whose backward pass raises an error; the error itself where it has no tensor to put that on."""
    found: list[Tensor] = []

    def refuse(gradient: Tensor) -> None:
        raise error

    def arm(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        watched = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        watched.register_hook(refuse)
        found.append(watched)
        return tensor if tensor.requires_grad else watched.clone()  # which may be changed in place

    made = tree_map_only(Tensor, arm, output)
    if not found:
        raise error
    return made


@contextmanager
def _as_it_was(model: nn.Module, *, train: bool, grad: bool) -> Iterator[None]:
    """Run a model in one mode; afterwards modes, buffers and random states are what they were."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if train else []
    used = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.device.type not in ("cpu", "meta")}
    with torch.random.fork_rng(sorted(used)), torch.set_grad_enabled(grad):  # every one there is would be woken
        try:
            model.train(train)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


def dry_run(model: nn.Module, source: Source, batch: Any, *, train: bool, grad: bool) -> Reach:
    """What a forward pass on a batch reaches.  Raises AdapterError where the adapter adds nothing."""
    if not source.active:
        raise AdapterError(f"adapter {source.name!r} is merged or switched off", hint="unmerge() or enable it first")
    passes = source.passes
    kept, passes.settled = passes.settled, {True, False}
    counting = None
    try:
        with _as_it_was(model, train=train, grad=grad):
            passes.begin(model)
            try:
                _call(model, batch)
            finally:
                counting = passes.stop()
        assert counting is not None
        past, before = passes.judge(counting), passes._before
        unread = {path for path in passes.weighted if not counting.reads[f"{passes.weighted[path]} at use"]}
        reached = tuple(p for p in passes.paths if passes.calls[p] > before[p] and p not in unread)
        return Reach(reached, tuple(p for p in passes.paths if p not in reached), past)
    finally:
        passes.settled = kept


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
