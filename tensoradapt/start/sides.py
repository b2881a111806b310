"""The two sides of a group: the nodes that carry `out` and `in`, and bases put into them.

Invariant: a basis has the side's entries as rows and orthonormal directions, the leading one first, as columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.errors import RankError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.linalg import Dense, Slice, Stack, find_ranges
from tensoradapt.linalg.lapack import svd


@dataclass(frozen=True)
class Side:
    """A node that carries a whole side of the weights, and its one bond."""

    node: str
    axis: str
    bond: str
    indices: tuple[str, ...]

    def put(self, group: Group, basis: Tensor) -> Tensor:
        """The node's tensor with a basis between its axis and its bond, equal at all coordinates."""
        basis = self.narrowed(group, basis)
        order = [self.axis, self.bond]
        kept = [i for i in self.indices if i in order]
        found = basis if kept == order else basis.mT
        shape = [group.diagram.sizes[i] if i in order else 1 for i in self.indices]
        return found.reshape(shape).expand(group.diagram.shape(self.node)).contiguous()

    def narrowed(self, group: Group, basis: Tensor) -> Tensor:
        """As many directions as the bond has. Raises RankError where there are fewer."""
        rank = group.diagram.sizes[self.bond]
        if basis.shape[1] < rank:
            raise RankError(
                f"group {group.name!r} has rank {rank} at bond {self.bond!r}, and there are fewer directions",
                got=basis.shape[1],
                hint="use a smaller rank, or more data",
            )
        return basis[:, :rank]


def side(group: Group, axis: str, what: str) -> Side:
    """The node that carries `out` or `in` whole, with one bond. Raises SpecError where there is none."""
    nodes = group.diagram.nodes
    found = [node for node, indices in nodes.items() if axis in indices]
    bonds = [i for node in found for i in nodes[node] if i in group.diagram.bonds]
    if len(found) != 1 or len(bonds) != 1 or set(nodes[found[0]]) & {"out", "in", "kernel"} != {axis}:
        raise SpecError(
            f"{what} needs a node that carries {axis!r} whole, with one bond, and group {group.name!r} has none",
            got=str(group.diagram),
            hint="use lora, lotr or another format without folds of that side",
        )
    if found[0] in group.rule.frozen:
        raise SpecError(f"{what} chooses node {found[0]!r} of group {group.name!r}, which is frozen")
    return Side(found[0], axis, bonds[0], nodes[found[0]])


def is_matrix(group: Group) -> bool:
    """Whether a group is one matrix of two trained factors, (out, rank) and (rank, in)."""
    nodes = group.diagram.nodes
    free = not group.rule.frozen and not group.diagram.fold("kernel") and not group.diagram.coordinates
    return free and len(nodes) == 2 and len(group.diagram.bonds) == 1 and all(len(i) == 2 for i in nodes.values())


def spaces(group: Group, stack: Stack, rank: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """The leading left and right singular vectors of a stack's unfoldings.  Shapes: (out, k), (in, k)."""
    stack = _channels(stack, group.diagram.extent("kernel")) if group.diagram.fold("kernel") else stack
    found = find_ranges(stack, rank, seed=seed)
    core = found.core
    left = svd(core.permute(1, 0, 2).flatten(1))[0]
    right = svd(core.flatten(0, 1))[2].mT
    left = left if found.out is None else found.out @ left
    right = right if found.inp is None else found.inp @ right
    return _signed(left), _signed(right)


def _signed(basis: Tensor) -> Tensor:
    """Columns whose largest entry is positive."""
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * torch.where(largest < 0, -1.0, 1.0).to(basis)


def _channels(stack: Stack, kernel: int) -> Stack:
    """A stack whose slices (out, in kernel) are cut into one for every position of the kernel."""

    def passes() -> Iterator[tuple[int, Slice]]:
        for position, part in stack.passes():
            cut = part.dense().unflatten(1, (-1, kernel))
            for k in range(kernel):
                yield position * kernel + k, Dense(cut[..., k].contiguous())

    return Stack(passes, stack.count * kernel, (stack.shape[0], stack.shape[1] // kernel), stack.like)
