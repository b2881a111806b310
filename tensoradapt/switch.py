"""The switch of an adapter: on or off for all, and off in the contexts (threads, tasks) that say so.

Invariant: what one context says is neither seen nor undone by another one. A part of a pass that is computed again in a
backward pass, as checkpointing does, sees what the pass saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tensoradapt.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Off:
    """What a context holds within `off`: the backward pass, by number, in which the block was entered; -1 for none."""

    task: int


class Switch:
    """`on` is for all. In a copy no context is off."""

    def __init__(self, *, on: bool = True) -> None:
        self.on = on
        self._context: ContextVar[Off | None] = ContextVar("off", default=None)
        # a compiler reads what a property in C gives, and compiles again where it differs
        self._here: Any = type("Here", (), {"state": property(self._context.get)})()

    def __reduce__(self) -> Any:
        return _made, (self.on,)

    @property
    def adds(self) -> bool:
        """Whether the adapter adds anything, in this context."""
        if not self.on:
            return False
        state = self._here.state  # `_here` itself where the context says nothing
        off = isinstance(state, Off)
        if torch.compiler.is_compiling():
            return not off
        task = torch._C._current_graph_task_id()
        if task == -1 or (off and state.task == task):
            return not off
        node: Any = torch._C._current_autograd_node()
        return node is None or self not in node.metadata

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off for this context. Raises AdapterError where another context leaves the block."""
        before, mark = self._context.get(), Off(torch._C._current_graph_task_id())
        try:
            self._context.set(mark)
            yield
        finally:
            if self._context.get() is not mark:
                raise AdapterError(
                    "a disabled() block is left in another thread or task than it was entered in",
                    hint="enter and leave it in one, or set adapter.enabled, which is for all of them",
                )
            self._context.set(before)

    def stamp(self, outputs: Any, inputs: Any) -> None:
        """Mark the graph that a pass has made, where this context is off and not all: what is computed again in its
        backward pass is off too.
        """
        if not self.on or self.adds or not torch.is_grad_enabled():
            return
        seen, left = set(_nodes(inputs)), _nodes(outputs)
        while left:
            node = left.pop()
            if node is not None and node not in seen:
                seen.add(node)
                node.metadata[self] = True
                left += [other for other, _ in node.next_functions]


def _nodes(tree: Any) -> list[Any]:
    """The nodes of autograd's graph that made the tensors of a tree; `None` for one that nothing made."""
    return [tensor.grad_fn for tensor in tree_leaves(tree) if isinstance(tensor, Tensor)]


def _made(on: bool) -> Switch:
    return Switch(on=on)
