"""Stand-ins: what a running call reads in a parameter's place, in its own thread.

Invariant: a module's table holds its parameters themselves, always. What stands in for one is read by the call that put
it there and by what that calls, and is gone when the call is, however it ended.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tensoradapt.running import runs


class StandIn(NamedTuple):
    """What a call reads, and the call: by its frame, which a compiler has none of.

    `by` is who put it there, `where` whether that added anything, and in which part that is computed again.
    """

    by: Any
    value: Tensor
    where: Any
    frame: FrameType | None


class _Local(threading.local):
    """Stand-ins by name, the innermost call's last."""

    def __init__(self) -> None:
        self.read: dict[str, tuple[StandIn, ...]] = {}

    def __reduce__(self) -> Any:
        return type(self), ()


class _Standing:
    """A table of parameters that reads otherwise within calls; what is written there is for the call too."""

    local: _Local

    def held(self, name: str) -> Any:
        """The parameter itself."""
        return super().__getitem__(name)  # type: ignore[misc]

    def standing(self, name: str) -> tuple[StandIn, ...]:
        """What stands in for a parameter in this thread."""
        found = self.local.read.get(name, ())
        if torch.compiler.is_compiling():
            return found
        while found and found[-1].frame is not None and not runs(found[-1].frame):
            found = self.put(name, found[:-1])
        return found

    def put(self, name: str, found: tuple[StandIn, ...]) -> tuple[StandIn, ...]:
        """Say what stands in for a parameter in this thread."""
        if found:
            self.local.read[name] = found
        else:
            self.local.read.pop(name, None)
        return found

    def __getitem__(self, name: str) -> Any:
        if name in self.local.read:
            found = self.standing(name)
            if found:
                return found[-1].value
        return super().__getitem__(name)  # type: ignore[misc]

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self.local.read:
            found = self.standing(name)
            if found:
                self.put(name, (*found[:-1], found[-1]._replace(value=value)))
                return
        super().__setitem__(name, value)  # type: ignore[misc]

    def get(self, name: str, default: Any = None) -> Any:
        """As of any mapping."""
        return self[name] if name in self else default  # type: ignore[operator]

    def items(self) -> Any:
        """As of any mapping."""
        return super().items() if not self.local.read else {name: self[name] for name in self}.items()  # type: ignore

    def values(self) -> Any:
        """As of any mapping."""
        return super().values() if not self.local.read else [self[name] for name in self]  # type: ignore


class Parameters(_Standing, dict[str, Any]):
    """A module's own table, while parameters of it are replaced at use."""

    def __init__(self, held: Iterable[tuple[str, Any]] = ()) -> None:
        super().__init__(held)
        self.local = _Local()
        self.users: list[Any] = []  # who replaces what is in it

    def __reduce__(self) -> Any:
        return type(self), ([(name, self.held(name)) for name in self],), {"users": self.users}


def table_of(owner: nn.Module) -> Any:
    """A module's table of parameters, made one that can read otherwise."""
    held: Any = owner._parameters
    if isinstance(held, _Standing):
        return held
    if type(held).__module__ in ("builtins", "collections"):
        owner.__dict__["_parameters"] = made = Parameters(held.items())
        return made
    held.__class__ = type(type(held).__name__, (_Standing, type(held)), {})  # DeepSpeed's, which gathers what it gives
    held.local, held.users = _Local(), []
    return held


def release(owner: nn.Module, by: Any) -> None:
    """Give a module its plain table back, where nobody but `by` replaces what is in it."""
    table: Any = owner._parameters
    if isinstance(table, Parameters):
        table.users[:] = [user for user in table.users if user is not by]
        if not table.users:
            owner.__dict__["_parameters"] = {name: table.held(name) for name in table}


def caller() -> FrameType | None:
    """The frame of who called the function that asks; None where a compiler reads it."""
    return None if torch.compiler.is_compiling() else sys._getframe(2)
