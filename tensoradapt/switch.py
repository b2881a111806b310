"""The switch of an adapter: on or off for all, and off in the contexts (threads, tasks) that say so.

Invariant: what one context says is neither seen nor undone by another one. A part of a pass that is computed again in a
backward pass, as checkpointing does, sees what the pass saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tensoradapt.errors import AdapterError


@dataclass(eq=False)
class Block:
    """An `off` block: the backward pass, by number, in which it was entered, -1 for none.

    `over` says that it was left by another context than entered it, as a generator's is that nobody ran to its end.
    """

    task: int
    over: bool = False


class Switch:
    """`on` is for all. In a copy no context is off."""

    def __init__(self, *, on: bool = True) -> None:
        self.on = on
        self._context: ContextVar[tuple[Block, ...]] = ContextVar("off", default=())
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
        off = isinstance(state, tuple) and not all(block.over for block in state)
        if torch.compiler.is_compiling():
            return not off
        task = torch._C._current_graph_task_id()
        if task == -1 or (off and state[-1].task == task):
            return not off
        node: Any = torch._C._current_autograd_node()
        return node is None or self not in node.metadata

    @contextmanager
    def off(self) -> Iterator[None]:
        """Off for this context, until it leaves the block. Raises AdapterError where another one does."""
        block = Block(torch._C._current_graph_task_id())
        entered = self._context.set((*self._context.get(), block))
        try:
            yield
        finally:
            self._leave(block, entered)

    def _leave(self, block: Block, entered: Token[tuple[Block, ...]]) -> None:
        """Generators may leave their blocks in any order."""
        here = self._context.get()
        try:
            self._context.reset(entered)
        except ValueError:  # of another context
            block.over = True
        self._context.set(tuple(each for each in here if each is not block))
        if block not in here:
            raise AdapterError(
                "a disabled() block is left in another thread or task than it was entered in",
                hint="enter and leave it in one, or set adapter.enabled, which is for all of them",
            )

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
