"""Reach: ranks that cannot be within an error, known from the tensor's spectra before anything is fitted.

Nodes that are cut off from the others by bonds of size K give an unfolding of rank K at most, whatever they hold; by
Eckart and Young it leaves at least sum_(k > K) s[k]^2 of the tensor. Invariant: a rank that is ruled out has no fit
within the error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.fit.frames import batch, cut, private
from tensoradapt.linalg.svd import singular_values

SIDE = 2048  # rows of an unfolding whose spectrum is computed
EFFORT = 4e11  # multiplications of one fit that are worth their time
SWEEPS = 100  # that such a fit may take


@dataclass(frozen=True)
class Reach:
    """What is at least lost across every cut: its bonds, and by their rank what lies beyond it."""

    cuts: tuple[tuple[tuple[str, ...], Tensor], ...]

    def lost(self, diagram: Diagram) -> float:
        """The least squared error of a network with these ranks."""
        found = 0.0
        for bonds, beyond in self.cuts:
            rank = math.prod(diagram.sizes[bond] for bond in bonds)
            found = max(found, float(beyond[min(rank, len(beyond) - 1)]))
        return found


def reach_of(tensor: Tensor, diagram: Diagram) -> Reach:
    """The spectra of a tensor T[open] across the cuts of a network."""
    return Reach(tuple(_cuts(tensor, diagram)))


def _cuts(tensor: Tensor, diagram: Diagram) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The cuts around every node, and around all nodes of an axis."""
    for part in dict.fromkeys(_parts(diagram)):
        rows, shared, bonds = private(diagram, part), batch(diagram, part), cut(diagram, part)
        cols = [a for a in diagram.open if a not in (*rows, *shared)]
        sides = [math.prod(diagram.sizes[a] for a in side) for side in (rows, cols)]
        if bonds and 1 < min(sides) <= SIDE:
            order = [diagram.open.index(a) for a in (*shared, *rows, *cols)]
            s = singular_values(tensor.permute(order).reshape(-1, *sides)).square().sum(0)
            beyond = s.flip(0).cumsum(0).flip(0).cpu()
            yield tuple(bonds), torch.cat([beyond, beyond.new_zeros(1)])


def _parts(diagram: Diagram) -> Iterator[tuple[str, ...]]:
    yield from ((node,) for node in diagram.nodes)
    for axis in diagram.open:
        yield tuple(node for node, indices in diagram.nodes.items() if axis in indices)


def effort(diagram: Diagram) -> float:
    """About the multiplications of a fit by alternating least squares: the tensor's, and the normal equations'."""
    bonds = sorted((diagram.sizes[bond] for bond in diagram.bonds), reverse=True)
    axes = [diagram.sizes[axis] for axis in diagram.open]
    look, solve = math.prod(axes) * max(bonds[:1], default=1), math.prod(bonds[:2]) ** 2 * max(axes)
    return float(look + solve) * len(diagram.nodes) * SWEEPS
