"""Places: one node's least squares problem, all others held.

A network is linear in every node. Invariant: a step from where a node was never makes the error larger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tensoradapt.fit.frames import Frame, Seen, batch, cut, primed
from tensoradapt.linalg import double

DIRECT = 2048  # the largest system of normal equations that is solved directly
RIDGE = 1e-10


@dataclass(frozen=True)
class Place:
    """One node's least squares problem: its indices as batch (open, also on others), cols (bonds), rows (its own)."""

    frame: Frame
    node: str

    @cached_property
    def others(self) -> list[str]:
        """The nodes beside this one that the frame does not hold."""
        return [n for n in self.frame.diagram.nodes if n != self.node and n not in self.frame.held]

    @cached_property
    def parts(self) -> tuple[list[str], list[str], list[str]]:
        """Batch, cols, rows."""
        nodes, opened = self.frame.diagram.nodes, self.frame.diagram.open
        mine = nodes[self.node]
        elsewhere = {i for n, indices in nodes.items() if n != self.node for i in indices}
        shared = [i for i in mine if i in opened and i in elsewhere]
        rows = [i for i in mine if i in opened and i not in elsewhere]
        return shared, [i for i in mine if i not in opened], rows

    @cached_property
    def order(self) -> list[str]:
        """The node's indices: batch, cols, rows."""
        return [i for part in self.parts for i in part]

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """The products of the sizes of batch, cols and rows."""
        sizes = self.frame.diagram.sizes
        first, cols, rows = (math.prod(sizes[i] for i in part) for part in self.parts)
        return first, cols, rows

    def solved(self, seen: Seen, factors: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """The node that is best for the others, and what the network then explains of |T|^2: 2 <T, N> - |N|^2."""
        node, explained = self.best(seen, factors)
        return node, float(explained)

    def best(self, seen: Seen, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The same, the number as a tensor: nothing waits for it."""
        mine, sizes = self.frame.diagram.nodes[self.node], self.frame.diagram.sizes
        others = [factors[n] for n in self.others]
        right = double(self.right(seen.image, *[t.to(seen.image) for t in others]).reshape(self.sizes))
        before = factors[self.node].permute([mine.index(i) for i in self.order]).reshape(self.sizes)
        twice = [*(t for t in others for _ in range(2)), *seen.grams]
        if self.separate:
            found = before + self._apart(right - self.normal(before, twice), seen.grams)
            image = self.normal(found, twice)
        elif self.sizes[1] <= DIRECT:
            gram = self.gram(*twice).reshape(*self.sizes[:2], self.sizes[1])
            found = before + _least_squares(gram, right - gram @ before)
            image = gram @ found
        else:
            found = before + _conjugate(lambda x: self.normal(x, twice), right - self.normal(before, twice))
            image = self.normal(found, twice)
        shaped = found.reshape([sizes[i] for i in self.order])
        return shaped.permute([self.order.index(i) for i in mine]), (found * (2 * right - image)).sum()

    @cached_property
    def separate(self) -> bool:
        """Whether the normal equations are a Kronecker product, one factor for every held part."""
        bonds = [bond for part in self.frame.parts for bond in cut(self.frame.diagram, part)]
        shared = [axis for part in self.frame.parts for axis in batch(self.frame.diagram, part)]
        return not self.others and not shared and sorted(bonds) == sorted(self.parts[1])

    def _apart(self, right: Tensor, grams: tuple[Tensor, ...]) -> Tensor:
        """The solution, one part's bonds after the other's."""
        shaped = right.reshape([self.frame.diagram.sizes[i] for i in self.order])
        for part, gram in zip(self.frame.parts, grams, strict=True):
            dims = [self.order.index(bond) for bond in cut(self.frame.diagram, part)]
            front = shaped.movedim(dims, tuple(range(len(dims))))
            size = math.prod(front.shape[: len(dims)])
            solved = _least_squares(gram.reshape(size, size), front.reshape(size, -1))
            shaped = solved.reshape(front.shape).movedim(tuple(range(len(dims))), dims)
        return shaped.reshape(right.shape)

    @cached_property
    def right(self) -> Callable[..., Tensor]:
        """What is seen of the tensor contracted with the other nodes."""
        nodes = self.frame.diagram.nodes
        return self.frame.expression([self.frame.axes, *(nodes[n] for n in self.others)], self.order)

    @cached_property
    def gram(self) -> Callable[..., Tensor]:
        """The other nodes contracted with themselves over all open axes but the batch: bonds once and once primed."""
        shared, cols, _ = self.parts
        return self.frame.expression(self._doubled, [*shared, *cols, *map(primed, cols)])

    def normal(self, x: Tensor, twice: list[Tensor]) -> Tensor:
        """The normal equations' matrix times x, without the matrix."""
        shaped = x.reshape([self.frame.diagram.sizes[i] for i in self.order])
        return self._applied(shaped, *twice).reshape(x.shape)

    @cached_property
    def _applied(self) -> Callable[..., Tensor]:
        return self.frame.expression([[self._primed(i) for i in self.order], *self._doubled], self.order)

    @cached_property
    def _doubled(self) -> list[list[str]]:
        """The other nodes' indices, each node once plain and once primed, and those of the held ones' Gram matrices."""
        plain = [list(self.frame.diagram.nodes[n]) for n in self.others]
        return [*(i for one in plain for i in (one, [self._primed(k) for k in one])), *self.frame.doubled]

    def _primed(self, index: str) -> str:
        return index if index in self.frame.diagram.open else primed(index)


def _least_squares(gram: Tensor, right: Tensor) -> Tensor:
    """The solution of gram x = right, up to a ridge of 1e-10 of the mean eigenvalue: as a step from where a node was,
    it cannot make the error larger, and repeated it has no bias.
    """
    size = gram.shape[-1]
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + RIDGE * scale * eye)
    if bool(info.any() | ~(scale > 0).all()):
        return torch.linalg.pinv(gram, hermitian=True, rtol=RIDGE) @ right
    return torch.cholesky_solve(right, factor)


def _conjugate(matrix: Callable[[Tensor], Tensor], right: Tensor, steps: int = 200, tolerance: float = 1e-8) -> Tensor:
    """Conjugate gradients from zero."""
    x = torch.zeros_like(right)
    residual = right.clone()
    direction = residual.clone()
    size = first = float(residual.square().sum())
    for _ in range(steps):
        if size <= tolerance**2 * first or size == 0:
            break
        image = matrix(direction)
        step = size / float((direction * image).sum())
        x += step * direction
        residual -= step * image
        after = float(residual.square().sum())
        direction = residual + (after / size) * direction
        size = after
    return x
