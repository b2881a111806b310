"""Putting changed networks in the place of an adapter's own: on a live model, in a file's contents, in an optimiser.

Invariant: everything that can fail is computed before the first tensor is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.attach import lines_of
from tensoradapt.change.ranks import replanned
from tensoradapt.errors import AdapterError
from tensoradapt.gauge import Carry, Network
from tensoradapt.grouping import Group
from tensoradapt.io.saved import Saved
from tensoradapt.plan import START, Plan

FIRST = ("exp_avg", "momentum_buffer", "gradient_avg")  # states that change as gradients do
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")  # those that change as their squares


@dataclass(frozen=True)
class Turn:
    """What becomes of one group: the network it had, the one in another gauge or of smaller ranks, the one it gets.

    `middle` is `before` itself where nothing but wider bonds is asked for; `start` is the frozen copy of a difference.
    """

    group: Group
    before: Network
    middle: Network
    after: Network
    start: Network | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors of the group by key."""
        found = {self.group.store[node]: tensor for node, tensor in self.after.factors.items()}
        copies = {n: t for n, t in (self.start.factors if self.start else {}).items() if n in self.group.trainable}
        return found | {f"{self.group.store[node]}{START}": tensor for node, tensor in copies.items()}

    @cached_property
    def _carry(self) -> Carry:
        return Carry(self.before, self.middle)

    def moments(self, held: Mapping[str, Tensor], *, squared: bool) -> dict[str, Tensor]:
        """Moments of all factors, carried over to the new ones; zero where a bond is wider."""
        if self.middle is not self.before:
            held = self._carry(held, squared=squared)
        found = {}
        for node, tensor in held.items():
            whole = tensor.new_zeros(self.after.factors[node].shape)
            whole[tuple(map(slice, tensor.shape))] = tensor
            found[node] = whole
        return found


def changed_plan(plan: Plan, turns: Sequence[Turn]) -> Plan:
    """The plan with the diagrams that groups get."""
    return replanned(plan, {turn.group.name: turn.after.diagram for turn in turns})


def in_saved(saved: Saved, turns: Sequence[Turn]) -> Saved:
    """A new adapter without a model, from one."""
    tensors = dict(saved.tensors)
    for turn in turns:
        tensors |= turn.tensors
    return Saved.of(changed_plan(saved.plan, turns), tensors, saved.base)


def in_place(adapter: Adapter, turns: Sequence[Turn], optimizer: Any = None) -> None:
    """Replace what changed of an attached adapter: values in place, parameters where shapes differ, plan and lines.

    Raises AdapterError where the optimiser holds none of the adapter's factors; nothing is changed then.
    """
    states = _states(adapter, turns, optimizer) if optimizer is not None else {}
    plan = changed_plan(adapter.plan, turns)
    live = {(site.owner, site.index): site for _, site, _ in adapter._lines.values()}
    lines = lines_of(plan, live)
    swapped: dict[nn.Parameter, nn.Parameter] = {}
    with ExitStack() as stack:
        stack.enter_context(adapter.alone("a change of ranks or gauge"))
        stack.enter_context(adapter.kept(adapter.stored.parameters()))
        stack.enter_context(_kept(optimizer))
        for turn in turns:
            for key, tensor in turn.tensors.items():
                old, new = _put(adapter, key, tensor)
                swapped[old] = new
        adapter.replan(plan, lines)
        if optimizer is not None:
            _follow(optimizer, swapped, states)


@contextmanager
def _kept(optimizer: Any) -> Iterator[None]:
    """Let a block change what an optimiser holds, or nothing of it where the block fails."""
    groups = [[*group["params"]] for group in getattr(optimizer, "param_groups", ())]
    state = {**getattr(optimizer, "state", {})}
    try:
        yield
    except BaseException:  # Ctrl-C too
        for group, held in zip(getattr(optimizer, "param_groups", ()), groups, strict=True):
            group["params"] = held
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(state)
        raise


def _parameter(adapter: Adapter, key: str) -> nn.Parameter:
    owner, _, leaf = key.rpartition(".")
    held: nn.Parameter = adapter.stored[owner][leaf]
    return held


def _put(adapter: Adapter, key: str, tensor: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """A stored tensor with new values: the same parameter where the shape is the same, else a new one in its place."""
    old = _parameter(adapter, key)
    old.grad = None  # it is the gradient of other factors
    if old.shape == tensor.shape:
        with torch.no_grad():
            old.copy_(tensor)
        return old, old
    owner, _, leaf = key.rpartition(".")
    new = nn.Parameter(tensor.detach().to(old).clone(), requires_grad=old.requires_grad)
    adapter.stored[owner][leaf] = new
    return old, new


# -- the optimiser ------------------------------------------------------------------------------------------------


def parameters_of(optimizer: Any) -> set[nn.Parameter]:
    """What an optimiser holds; nothing where it is none."""
    return {parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}


def require_trainer(adapter: Adapter, optimizer: Any) -> None:
    """Raise AdapterError where an optimiser holds none of the adapter's factors."""
    if parameters_of(optimizer).isdisjoint(adapter.stored.parameters()):
        raise AdapterError(
            f"the optimiser holds none of the factors of {adapter.name!r}",
            got=type(optimizer).__name__,
            hint="pass the one that trains it",
        )


def _states(adapter: Adapter, turns: Sequence[Turn], optimizer: Any) -> dict[nn.Parameter, dict[str, Any]]:
    """The new states of the old parameters that the optimiser has a state of."""
    require_trainer(adapter, optimizer)
    mine = [{node: _parameter(adapter, key) for node, key in turn.group.store.items()} for turn in turns]
    found: dict[nn.Parameter, dict[str, Any]] = {}
    for turn, parameters in zip(turns, mine, strict=True):
        old = {node: dict(optimizer.state[p]) for node, p in parameters.items() if p in optimizer.state}
        found |= {parameters[node]: state for node, state in _turned(turn, old).items()}
    return found


def _turned(turn: Turn, old: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states of one group's nodes: moments carried over, counters kept; empty (begun anew) where one is unknown."""
    new = {node: dict(state) for node, state in old.items()}
    shaped = {
        node: {name for name, value in state.items() if getattr(value, "shape", ()) == turn.before.factors[node].shape}
        for node, state in old.items()
    }
    for name in (*FIRST, *SECOND):
        moments = {node: old[node][name] for node in old if name in shaped[node]}
        for node, value in turn.moments(moments, squared=name in SECOND).items() if moments else ():
            new[node][name] = value
    return {node: {} if shaped[node] - {*FIRST, *SECOND} else new[node] for node in new}


def _follow(
    optimizer: Any, swapped: Mapping[nn.Parameter, nn.Parameter], states: Mapping[nn.Parameter, dict[str, Any]]
) -> None:
    """Give an optimiser the new parameters in the old ones' places, with their states."""
    for group in optimizer.param_groups:
        group["params"] = [swapped.get(p, p) for p in group["params"]]
    for old, state in states.items():
        del optimizer.state[old]
        if state:
            optimizer.state[swapped[old]] = state
