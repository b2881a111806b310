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
from tensoradapt.gauge.batch import STACK
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
        return self.gathered([{node: wide(p.detach()) for node, p in owner.items()} for owner in self.owners])

    def gathered(self, held: Sequence[Nodes]) -> dict[str, Tensor]:
        """Tensors by node of every group, as the batch's."""
        if len(held) == 1:
            return dict(held[0])
        return {node: torch.stack([one[node] for one in held]) for node in held[0]}


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


def batches(
    groups: Sequence[tuple[Group, Nodes]],
    held: Collection[Tensor],
    scale: float,
    tag: Callable[[Nodes], Any] = lambda _: None,
) -> list[Batch]:
    """The groups of which parameters of `held` have gradients, equal ones of one tag together.

    `scale` multiplies each group's own.
    """
    alike: dict[Any, list[Nodes]] = {}
    for group, owner in groups:
        moving = tuple(node for node, p in owner.items() if p.grad is not None and p in held)
        size = group.scale * scale
        if moving and size:
            like = tuple((p.dtype, p.device) for p in owner.values())
            alike.setdefault((Kind(group.diagram, moving, size), tag(owner), like), []).append(owner)
    return [_batch(kind, mark, owners) for (kind, mark, _), owners in alike.items()]


def _batch(kind: Kind, tag: Any, owners: Sequence[Nodes]) -> Batch:
    held = [{node: wide(p.detach()) for node, p in owner.items()} for owner in owners]
    grads = [{node: wide(owner[node].grad) for node in kind.moving} for owner in owners]
    if len(owners) == 1:
        return Batch(kind, tag, kind.diagram, held[0], grads[0], owners)
    network = stacked(kind.diagram, held)
    together = {node: torch.stack([one[node] for one in grads]) for node in kind.moving}
    return Batch(kind, tag, network.diagram, network.factors, together, owners)


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
