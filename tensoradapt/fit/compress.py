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
from tensoradapt.linalg import range_of
from tensoradapt.linalg.home import moved
from tensoradapt.linalg.krylov import OVERSAMPLE

WORTH = 2  # an axis is compressed where its basis has at most 1/WORTH of its size


@dataclass(frozen=True)
class Compressed:
    """A tensor in the bases of some of its axes: core[.., k, ..] = sum_a T[.., a, ..] basis[a, k].

    `total` is the tensor's squared norm, `lost` what the bases do not hold, `retried` why bases were found on the
    CPU, if any were.
    """

    core: Tensor
    diagram: Diagram
    total: float
    lost: float = 0.0
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    retried: tuple[str, ...] = ()

    def expanded(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Factors of the compressed diagram as those of the whole one."""
        return {node: self._expanded(self.diagram.nodes[node], tensor) for node, tensor in factors.items()}

    def _expanded(self, indices: tuple[str, ...], tensor: Tensor) -> Tensor:
        for dim, index in enumerate(indices):
            if index in self.bases:
                basis = self.bases[index].to(tensor.dtype)
                tensor = torch.movedim(torch.tensordot(moved(tensor, basis.device), basis, dims=([dim], [1])), -1, dim)
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
    """The same in bases of all axes that its diagram cannot use in full, one after the other (each of what is left)."""
    found = held
    while axes := [a for a in found.diagram.open if a not in found.bases and basis_size(found.diagram, a) is not None]:
        sizes = found.diagram.sizes
        found = _compressed(found, max(axes, key=lambda a: (sizes[a], found.diagram.open.index(a))), seed)
    return found if found is held else replace(found, lost=max(0.0, found.total - squares(found.core)))


def _compressed(held: Compressed, axis: str, seed: int) -> Compressed:
    """One more axis in a basis of its own."""
    dim = held.diagram.open.index(axis)
    front = held.core.movedim(dim, -1)
    found = range_of(front.reshape(-1, front.shape[-1]).mT, basis_size(held.diagram, axis) or 0, seed)
    core = found.image.reshape(*front.shape[:-1], -1).movedim(-1, dim)
    diagram = replace(held.diagram, sizes={**held.diagram.sizes, axis: found.basis.shape[1]})
    retried = (*held.retried, found.retried) if found.retried else held.retried
    return replace(held, core=core, diagram=diagram, bases={**held.bases, axis: found.basis}, retried=retried)
