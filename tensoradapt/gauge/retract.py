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


def stiefel_tangent(x: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient along which columns stay orthonormal: G - X sym(X^T G).  Shapes: (.., rows, r)."""
    inner = x.mT @ gradient
    return gradient - x @ (inner + inner.mT) / 2


def retract_qr(x: Tensor, step: Tensor) -> Tensor:
    """Q of X + step, R with a positive diagonal.  Shape: (.., rows, r), orthonormal columns. Source: Absil et al."""
    return positive_qr(x + step)[0]


def retract_polar(x: Tensor, step: Tensor) -> Tensor:
    """The orthonormal columns nearest to X + step: U V^T of its SVD.  Shape: (.., rows, r). Source: Absil et al."""
    u, _, vh = torch.linalg.svd(x + step, full_matrices=False)
    return u @ vh


def retract_truncated(diagram: Diagram, factors: Factors, directions: Factors) -> Network:
    """The tree T + J d, whose bonds are twice as large, truncated to the ranks of T.

    Raises SpecError where the diagram is no tree. Source: Steinlechner 2016, SIAM J. Sci. Comput. 38(5).
    """
    wide = moved(diagram, factors, directions)
    return truncated(wide.diagram, wide.factors, {bond: diagram.sizes[bond] for bond in diagram.bonds})
