"""Passes: which sites of an adapter the forward passes of its host reached, and which weights were read past it.

A pass is watched until one in training and one in evaluation have ended well: every function of PyTorch that takes an
adapted weight is counted, and so is every delivery. Where a weight was read more often than the adapter delivered its
delta, another module read it. Invariant: a watched pass computes what any other does; a compiled one is not watched.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._pytree import tree_map_only

from tensoradapt.errors import AdapterError
from tensoradapt.quantised import is_plain
from tensoradapt.readers import ASKS, LIKE
from tensoradapt.running import Lock, Running, runs
from tensoradapt.scan import owner_of
from tensoradapt.switch import Switch
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
    switch: Switch

    @property
    def active(self) -> bool:
        """Whether anything is added."""


NEXT = "attach with delivery='weight', or delivery={target: 'weight'}, in the spec, or exclude these weights"


def listed(paths: Sequence[str]) -> str:
    """Paths, the first of many."""
    return first_of(paths, SHOWN)


class Counting(TorchFunctionMode):
    """Counts the functions that take a watched tensor, but for those that ask for its dtype, device or shape.

    `calls` are the deliveries by site in the same thread and time.
    """

    def __init__(self, watched: Mapping[int, str]) -> None:
        super().__init__()
        self.watched, self.reads = dict(watched), Counter[str]()
        self.calls = Counter[str]()
        self.kept: list[Tensor] = []  # so that no identity is used twice
        self.outer: Counting | None = None

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


class Watching(threading.local):
    """What counts the pass that runs in this thread. A copy of it counts nothing."""

    def __init__(self) -> None:
        self.counting: Counting | None = None

    def __reduce__(self) -> Any:
        return type(self), ()


@dataclass
class Pass:
    """A forward pass of the model that runs: its frame, and what counts it where it is watched."""

    frame: FrameType
    counting: Counting | None = None


def frame_of(one: Pass) -> FrameType:
    """The frame of the call that a pass is."""
    return one.frame


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
        self.running: Running[Pass] = Running(frame_of)
        self._watching = Watching()

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

    @property
    def watched(self) -> bool:
        """Whether a pass in this thread is watched."""
        return self._watching.counting is not None

    def reach(self, *paths: str) -> None:
        """Count a delivery."""
        if not torch.compiler.is_compiling():
            counting = self._watching.counting
            for path in paths:
                self.calls[path] += 1
                if counting is not None:
                    counting.calls[path] += 1

    def made(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor that stands in the place of a parameter, watched where the pass is."""
        if not torch.compiler.is_compiling() and self._watching.counting is not None:
            self._watching.counting.watched[id(tensor)] = f"{key} at use"
            self._watching.counting.kept.append(tensor)
        return tensor

    def begin(self, model: nn.Module) -> Counting:
        """Watch the pass that begins in this thread."""
        watched = [
            (owner._parameters.get(leaf), h.key)
            for h in self.held
            if h.alone
            for owner, leaf in [owner_of(model, h.key)]
        ]
        counting = Counting({id(p): key for p, key in watched if p is not None and is_plain(p) and not p.is_meta})
        counting.outer, self._watching.counting = self._watching.counting, counting
        counting.__enter__()
        return counting

    def stop(self, counting: Counting, *, whole: bool = True) -> None:
        """End the watching of a pass, or (not `whole`) that of its reads: what is delivered by a hook still counts."""
        self._watching.counting = counting.outer if whole else counting
        if _get_current_function_mode() is counting:
            counting.__exit__(None, None, None)

    def judge(self, counting: Counting) -> tuple[str, ...]:
        """The sites whose weight was read more often than their delta was delivered, in the pass that was watched."""
        past = []
        for each in self.held:
            groups = each.sites.values()
            own = sum(max(counting.calls[path] for path in paths) for paths in groups)
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
    """The hooks on the model itself: they watch a pass, and arm its output where weights were read past the adapter.

    A pass begins only while nobody writes the model, by `lock`.
    """

    def __init__(self, source: Source, lock: Lock) -> None:
        self.source, self.lock = source, lock
        self.counted: Running[Counting] = Running(id)  # by passes that have ended and are not judged

    def before(self, module: nn.Module, args: Any) -> None:
        """Watch, unless such a pass has been watched, or a compiler runs."""
        if torch.compiler.is_compiling():
            return
        passes = self.source.passes
        for left in self.counted.pop(threading.get_ident(), ()):  # of a pass that failed after its forward
            passes.stop(left)
        blind = bool(self._outer()) or passes.watched or (passes.fused and not torch.is_grad_enabled())
        one = Pass(sys._getframe(1))
        with self.lock.held:
            passes.running.here().append(one)
        if self.source.active and not blind and self.source.training not in passes.settled:
            one.counting = passes.begin(module)

    def _outer(self) -> list[Pass]:
        """The passes that run in this thread; what an interrupt has left of others is ended."""
        here = self.source.passes.running.here()
        while here and not runs(here[-1].frame):
            left = here.pop().counting
            if left is not None:
                self.source.passes.stop(left)
        return here

    def stop(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the watching, also when the call has failed."""
        if torch.compiler.is_compiling():
            return
        here = self._outer()
        if here and here[-1].frame is sys._getframe(1):
            counting = here.pop().counting
            if counting is not None:
                self.source.passes.stop(counting, whole=False)
                self.counted.here().append(counting)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """Judge a pass that has ended, and arm the output."""
        if torch.compiler.is_compiling() or self._outer():
            return None
        passes, counted = self.source.passes, self.counted.pop(threading.get_ident(), None)
        if counted:
            passes.stop(counted[-1])
        if not self.source.active:
            self.source.switch.stamp(output, (args, kwargs))
            return None
        if counted:
            passes.past = passes.judge(counted[-1]) or passes.past
            passes.settled.add(self.source.training)
            passes.ended += 1
        if not (torch.is_grad_enabled() and self.source.training):
            return None
        if passes.past:
            return armed(output, past_error(self.source.name, passes.past))
        if counted:
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
