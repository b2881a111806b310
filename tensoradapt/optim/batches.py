"""What one step moves of an adapter: the groups whose factors have gradients, equal ones as one network.

Invariant: a batch holds detached tensors, stacked along a first axis where it is of several groups; `spread` gives
tensors of its shapes back to the parameters they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge import stacked
from tensoradapt.gauge.batch import STACK, stacked_diagram
from tensoradapt.grouping import Group

Nodes = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """What groups of one batch have in common: the diagram of one, the nodes that move, the scale of its delta."""

    diagram: Diagram
    moving: tuple[str, ...]
    scale: float


@dataclass(frozen=True)
class Batch:
    """Groups of a kind as one network: its diagram, its factors, the gradients of the nodes that move.

    `tag` is what they have in common beside.
    """

    kind: Kind
    tag: Any
    diagram: Diagram
    factors: dict[str, Tensor]
    grads: dict[str, Tensor]
    owners: Sequence[Nodes]

    def spread(self, made: Nodes) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters with their parts of the batch's tensors, in the parameters' dtypes."""
        for node, tensor in made.items():
            parts = [tensor] if len(self.owners) == 1 else tensor.unbind()
            for owner, part in zip(self.owners, parts, strict=True):
                parameter = owner[node]
                yield parameter, part if part.dtype is parameter.dtype else part.to(parameter.dtype)

    def at(self, factors: Nodes) -> Batch:
        """The same with other factors."""
        return replace(self, factors=dict(factors))

    @property
    def now(self) -> dict[str, Tensor]:
        """The factors as they are at this moment."""
        return _values(self.owners)


def factors_of(adapter: Adapter) -> list[tuple[Group, dict[str, Tensor]]]:
    """Every group with the parameters of its nodes. Raises SpecError on slices of a bank, which groups share."""
    found = []
    for group in adapter.plan.groups:
        shared = [key for key in group.store.values() if sum(key in g.store.values() for g in adapter.plan.groups) > 1]
        if shared:
            raise SpecError(
                f"group {group.name!r} shares {shared[0]!r} with other groups, as slices of one bank: no group's own "
                "step is the bank's",
                hint="use shapes: separate or slots, or an optimiser of torch.optim",
            )
        found.append((group, adapter.factors(group.name)))
    return found


class Sorter:
    """Groups in batches, sorted anew only where other parameters have gradients than before."""

    def __init__(self, groups: Sequence[tuple[Group, Nodes]]) -> None:
        self.groups = groups
        self._key: Any = None
        self._lots: list[_Lot] = []

    def batches(
        self, held: Collection[Tensor], scale: float, tag: Callable[[Nodes, Sequence[str]], Any] | None = None
    ) -> list[Batch]:
        """The groups of which parameters of `held` have gradients, equal ones of one tag together.

        `scale` multiplies each group's own; `tag` sees a group's parameters and which of its nodes move.
        """
        owners = [owner for _, owner in self.groups]
        moving = [tuple([node for node, p in o.items() if p.grad is not None and p in held]) for o in owners]
        tags = [tag(*pair) for pair in zip(owners, moving, strict=True)] if tag else [None] * len(owners)
        like = [tuple([(p.dtype, p.device) for p in owner.values()]) for owner in owners]
        key = scale, moving, [tags.index(mark) for mark in tags], like
        if key != self._key:
            self._key, self._lots = key, self._sorted(*key)
        return [lot.batch(tags[lot.first]) for lot in self._lots]

    def _sorted(self, scale: float, moving: Sequence[tuple[str, ...]], *others: Sequence[Any]) -> list[_Lot]:
        alike: dict[Any, list[int]] = {}
        for k, (group, _) in enumerate(self.groups):
            kind = Kind(group.diagram, moving[k], group.scale * scale)
            if kind.moving and kind.scale:
                alike.setdefault((kind, *(other[k] for other in others)), []).append(k)
        return [_Lot(kind, places[0], [self.groups[k][1] for k in places]) for (kind, *_), places in alike.items()]


class _Lot:
    """Which groups make a batch: all of it but the tensors."""

    def __init__(self, kind: Kind, first: int, owners: Sequence[Nodes]) -> None:
        self.kind, self.first, self.owners = kind, first, owners
        self.diagram = kind.diagram if len(owners) == 1 else stacked_diagram(kind.diagram, len(owners))

    def batch(self, tag: Any) -> Batch:
        """The batch of this moment."""
        factors = _values(self.owners)
        grads = gathered([{node: wide(owner[node].grad) for node in self.kind.moving} for owner in self.owners])
        return Batch(self.kind, tag, self.diagram, factors, grads, self.owners)


def _values(owners: Sequence[Nodes]) -> dict[str, Tensor]:
    """What the parameters of every group hold, as a batch's tensors."""
    return gathered([{node: wide(p.detach()) for node, p in owner.items()} for owner in owners])


def gathered(held: Sequence[Nodes]) -> dict[str, Tensor]:
    """Tensors by node of every group, as a batch's."""
    if len(held) == 1:
        return dict(held[0])
    return {node: torch.stack([one[node] for one in held]) for node in held[0]}


def wide(tensor: Any) -> Tensor:
    """A tensor in float32 where it is of half precision: small matrices are inverted."""
    made: Tensor = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return made


def doubled(batch: Batch, grads: Nodes) -> Batch:
    """A batch and the same with other gradients, as one."""
    if len(batch.owners) == 1:
        network = stacked(batch.diagram, [batch.factors] * 2)
        both = {n: torch.stack([t, grads[n]]) for n, t in batch.grads.items()}
        return replace(batch, diagram=network.diagram, factors=network.factors, grads=both)
    sizes = {**batch.diagram.sizes, STACK: 2 * len(batch.owners)}
    factors = {n: torch.cat([t, t]) for n, t in batch.factors.items()}
    both = {n: torch.cat([t, grads[n]]) for n, t in batch.grads.items()}
    return replace(batch, diagram=replace(batch.diagram, sizes=sizes), factors=factors, grads=both)


def halves(batch: Batch, made: Nodes) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both parts of what was computed for a doubled batch."""
    size = len(batch.owners)
    if size == 1:
        return {n: t[0] for n, t in made.items()}, {n: t[1] for n, t in made.items()}
    return {n: t[:size] for n, t in made.items()}, {n: t[size:] for n, t in made.items()}
