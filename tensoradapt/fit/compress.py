"""Compression: shared bases for the axes that a diagram cannot use in full, and the small core between them.

An axis that sits on one node spans at most as many directions as that node's other indices; whatever the diagram
can hold of the tensor lies, up to rounding, in a basis of a few more. Invariant: what is lost is known exactly,
|T|^2 - |core|^2, since the bases are orthonormal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.policy import squares
from tensoradapt.linalg import Dense, Ranges, Stack, find_ranges, truncated_svd
from tensoradapt.linalg.krylov import OVERSAMPLE

WORTH = 2  # an axis is compressed where its basis has at most 1/WORTH of its size


@dataclass(frozen=True)
class Compressed:
    """A tensor in the bases of some of its axes: core[.., k, ..] = sum_a T[.., a, ..] basis[a, k].

    `total` is the tensor's squared norm, `lost` what the bases do not hold.
    """

    core: Tensor
    diagram: Diagram
    total: float
    lost: float = 0.0
    bases: Mapping[str, Tensor] = field(default_factory=dict)

    def expanded(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of the compressed diagram as those of the whole one."""
        return {node: self._expanded(self.diagram.nodes[node], tensor) for node, tensor in factors.items()}

    def _expanded(self, indices: tuple[str, ...], tensor: Tensor) -> Tensor:
        for dim, index in enumerate(indices):
            if index in self.bases:
                basis = self.bases[index].to(tensor.dtype)
                tensor = torch.movedim(torch.tensordot(tensor, basis, dims=([dim], [1])), -1, dim)
        return tensor.contiguous()


def useful(diagram: Diagram, axis: str) -> int:
    """How many directions of an axis a diagram can use: the other indices of the one node that carries it."""
    carriers = [indices for indices in diagram.nodes.values() if axis in indices]
    if len(carriers) != 1:
        return diagram.sizes[axis]
    return min(diagram.sizes[axis], math.prod(diagram.sizes[i] for i in carriers[0] if i != axis))


def basis_size(diagram: Diagram, axis: str) -> int | None:
    """The rank of a basis for an axis; None where a basis would be no saving."""
    rank = useful(diagram, axis)
    return rank if WORTH * (rank + OVERSAMPLE) <= diagram.sizes[axis] else None


def compress(held: Compressed, *, seed: int = 0) -> Compressed:
    """The same in bases of all axes that its diagram cannot use in full."""
    found = held
    while axes := [a for a in found.diagram.open if a not in found.bases and basis_size(found.diagram, a) is not None]:
        two = sorted(axes, key=lambda a: -found.diagram.sizes[a])[:2]
        found = _compressed(found, two[0], two[1] if len(two) > 1 else None, seed)
    return found if found is held else replace(found, lost=max(0.0, found.total - squares(found.core)))


def _compressed(held: Compressed, one: str, two: str | None, seed: int) -> Compressed:
    """One or two more axes in bases of their own."""
    diagram = held.diagram
    dims = [diagram.open.index(axis) for axis in (one, two) if axis is not None]
    rest = [k for k in range(len(diagram.open)) if k not in dims]
    rank = [basis_size(diagram, axis) or 0 for axis in (one, two) if axis is not None]
    front = held.core.permute(*rest, *dims)
    if two is None:
        flat = front.reshape(-1, front.shape[-1])
        bases = [truncated_svd(flat.mT, rank[0] + OVERSAMPLE, seed=seed).u]
    else:
        bases = list(_pair(front.reshape(-1, *front.shape[-2:]), (rank[0], rank[1]), seed))
    core = held.core
    for dim, basis in zip(dims, bases, strict=True):
        core = torch.movedim(torch.tensordot(core, basis, dims=([dim], [0])), -1, dim)
    named = dict(zip([a for a in (one, two) if a is not None], bases, strict=True))
    sizes = {**diagram.sizes, **{axis: basis.shape[1] for axis, basis in named.items()}}
    return replace(held, core=core, diagram=replace(diagram, sizes=sizes), bases={**held.bases, **named})


def _pair(slices: Tensor, rank: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Bases of both sides of a stack of slices in memory."""
    shape = (slices.shape[1], slices.shape[2])
    stack = Stack(lambda: ((k, Dense(part)) for k, part in enumerate(slices)), len(slices), shape, slices)
    return bases_of(find_ranges(stack, rank, seed=seed), rank)


def bases_of(found: Ranges, rank: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The bases cut to the leading directions of the core, a few more than the rank."""
    assert found.out is not None and found.inp is not None
    return narrowed(found.core, 1, found.out, rank[0]), narrowed(found.core, 2, found.inp, rank[1])


def narrowed(core: Tensor, dim: int, basis: Tensor, rank: int) -> Tensor:
    """The leading directions, by the core's own spectrum, of the basis of one of its modes."""
    unfolded = torch.movedim(core, dim, 0).flatten(1)
    gram = (unfolded @ unfolded.mT).double()
    vectors = torch.linalg.eigh(gram)[1].flip(-1)[:, : rank + OVERSAMPLE]
    return basis @ vectors.to(basis.dtype)
