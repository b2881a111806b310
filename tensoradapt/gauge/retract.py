"""Retractions: back from a step along a tangent direction to where the factors, or the network, have to lie.

Invariant: a step of zero is no step, and a step of length t ends within O(t^2) of the straight one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.blocks import moved
from tensoradapt.gauge.tree import Factors, Network, positive_qr
from tensoradapt.gauge.truncate import truncated

NEWTON = 8


def stiefel_tangent(x: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient along which columns stay orthonormal: G - X sym(X^T G).  Shapes: (.., rows, r)."""
    inner = x.mT @ gradient
    return gradient - x @ (inner + inner.mT) / 2


def retract_qr(x: Tensor, step: Tensor) -> Tensor:
    """Q of X + step, R with a positive diagonal.  Shape: (.., rows, r), orthonormal columns. Source: Absil et al."""
    return positive_qr(x + step)[0]


def retract_polar(x: Tensor, step: Tensor) -> Tensor:
    """The orthonormal columns nearest to X + step: U V^T of its SVD.  Shape: (.., rows, r). Source: Absil et al."""
    if x.device.type != "cpu":
        return _nearest(x + step)
    u, _, vh = torch.linalg.svd(x + step, full_matrices=False)
    return u @ vh


def _nearest(a: Tensor) -> Tensor:
    """The same without an SVD, whose answer an accelerator is waited for: by Newton's iteration on R of A = Q R.

    Y <- (m Y + (m Y)^-T) / 2 with m that brings Y and its inverse to one size: converged after eight steps for any step
    along the tangents, whose X + step has no singular value below one. Source: Higham 1986, SIAM J. Sci. Stat. 7(4).
    """
    q, y = torch.linalg.qr(a)
    for _ in range(NEWTON):
        z = torch.linalg.inv_ex(y).inverse.mT
        size = (_bound(z) / _bound(y)).sqrt().sqrt()[..., None, None]
        y = (y * size + z / size) / 2
    return q @ y


def _bound(matrix: Tensor) -> Tensor:
    """The product of the norms by columns and by rows, at least the square of the largest singular value."""
    sizes = matrix.abs()
    return sizes.sum(-1).amax(-1) * sizes.sum(-2).amax(-1)


def retract_truncated(diagram: Diagram, factors: Factors, directions: Factors) -> Network:
    """The tree T + J d, whose bonds are twice as large, truncated to the ranks of T.

    Raises SpecError where the diagram is no tree. Source: Steinlechner 2016, SIAM J. Sci. Comput. 38(5).
    """
    wide = moved(diagram, factors, directions)
    return truncated(wide.diagram, wide.factors, {bond: diagram.sizes[bond] for bond in diagram.bonds})
