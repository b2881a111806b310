"""The subspaces that gradients are projected on: which axes get a basis, of what rank, and how it is found.

Every projector is one thing, orthonormal bases for some axes of a weight: of one axis or both for a matrix, of all axes
for a convolution's tensor, shared by all weights of one shape for a stack. Invariant: the axes are chosen once, from
the shape of the weight; going back asks the bases, never the shape of what is to be taken back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError
from tensoradapt.fit.tucker import hooi
from tensoradapt.linalg import double, orthonormal, truncated_svd

PROJECTORS = ("svd", "rsvd", "tucker", "group")
SIDES = ("std", "reverse_std", "left", "right", "full")


@dataclass(frozen=True)
class Subspace:
    """Orthonormal bases U_k[n_k, r_k] of some axes k of a tensor."""

    bases: Mapping[int, Tensor]

    def project(self, tensor: Tensor) -> Tensor:
        """R = G x_k U_k^T over the axes that have a basis.  Shape: (.., n_k, ..) -> (.., r_k, ..)."""
        for axis, basis in self.bases.items():
            tensor = _contracted(tensor.to(basis.dtype), axis, basis)
        return tensor

    def back(self, tensor: Tensor) -> Tensor:
        """G = R x_k U_k over the axes that have a basis, linear in R.  Shape: (.., r_k, ..) -> (.., n_k, ..)."""
        for axis, basis in self.bases.items():
            tensor = _contracted(tensor, axis, basis.mT)
        return tensor


def _contracted(tensor: Tensor, axis: int, matrix: Tensor) -> Tensor:
    return torch.tensordot(tensor, matrix, dims=([axis], [0])).movedim(-1, axis)


def axes_of(shape: Sequence[int], side: str) -> tuple[int, ...]:
    """The axes of a weight that get a basis: of a matrix by its side, of other tensors all.

    `std` projects the shorter axis (the second of a square), `reverse_std` the other one.
    """
    if len(shape) > 2:
        return tuple(range(len(shape)))
    tall = shape[0] >= shape[1]
    return {"left": (0,), "right": (1,), "full": (0, 1), "std": (int(tall),), "reverse_std": (int(not tall),)}[side]


def ranks_of(shape: Sequence[int], axes: Sequence[int], rank: int | Sequence[int], count: int = 1) -> dict[int, int]:
    """The rank of every axis that gets a basis: what is asked for, or the most that `count` tensors of a shape can use.

    An axis cannot use more than its size, nor more than the product of what is left of all the others; an axis of a
    tensor beyond matrices that would keep its size gets no basis. Raises RankError on a list of another length.
    """
    asked = list(rank) if isinstance(rank, Sequence) else [rank] * len(shape)
    if len(asked) != len(shape):
        raise RankError("the ranks do not fit a weight's axes", got=asked, expected=f"one for each of {tuple(shape)}")
    sizes = [min(r, n) if k in axes else n for k, (r, n) in enumerate(zip(asked, shape, strict=True))]
    for k in axes:  # once is enough: an axis cut to the product of the others leaves them below theirs
        sizes[k] = min(sizes[k], count * math.prod(sizes[:k] + sizes[k + 1 :]))
    return {k: sizes[k] for k in axes if len(shape) == 2 or sizes[k] < shape[k]}


def find(tensors: Sequence[Tensor], ranks: Mapping[int, int], method: str = "exact") -> Subspace:
    """The bases that hold most of some tensors of one shape, by `truncated_svd` of a method.

    For one matrix the leading singular vectors, else the partial Tucker decomposition of the stack: the truncated
    HOSVD, improved by orthogonal iteration. Signs are fixed, so that one machine and thread count gives the same bytes
    each time. Raises ShapeError where a tensor is not finite.
    """
    if len(tensors) == 1 and tensors[0].dim() == 2:
        found = truncated_svd(tensors[0], max(ranks.values()), method=method)
        return Subspace({k: _clean((found.u, found.v)[k]) for k in ranks})  # of both axes they are equal
    stack = torch.stack(list(tensors))
    stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
    bases = {k: truncated_svd(stack.movedim(k + 1, 0).flatten(1), r, method=method).u for k, r in ranks.items()}
    bases = {k: _clean(u) for k, u in bases.items()}
    return Subspace(_improved(stack, bases) if len(bases) > 1 else bases)


def _clean(basis: Tensor) -> Tensor:
    """Orthonormal to the last digit, also where singular values are zero and their vectors are not defined."""
    return orthonormal(double(basis)).to(basis)


def _improved(stack: Tensor, bases: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Bases of several axes after sweeps of higher-order orthogonal iteration."""
    axes = ["stack", *(f"n{k}" for k in range(stack.dim() - 1))]
    nodes = {f"u{k}": (f"n{k}", f"r{k}") for k in bases}
    sizes = dict(zip(axes, stack.shape, strict=True)) | {f"r{k}": u.shape[1] for k, u in bases.items()}
    core = ("stack", *(f"r{k}" if k in bases else f"n{k}" for k in range(stack.dim() - 1)))
    diagram = Diagram(sizes, {"core": core, **nodes}, tuple(axes))
    found, _ = hooi(stack, diagram, "core", {f"u{k}": u for k, u in bases.items()})
    return {k: found[f"u{k}"] for k in bases}
