"""Levels: the powers of two that bring tensors near one, where squares and products neither overflow nor vanish.

A weight may hold any number of its dtype, 1e25 or 1e-25; the square of either is none of float32's. Invariant: numbers
that are multiplied by a level and divided by it again are what they were, bit for bit, unless they are so much smaller
than the largest that no sum sees them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tensoradapt.linalg.home import double, has_float64

PLAIN = 2.0**20  # tensors with norms from 1/PLAIN to PLAIN are worked on as they are
FAINT = 1e-24  # a sum of squares below it may have lost some of them
MOST = {torch.float64: 1000}  # the largest exponent of a level: its inverse is a number of the dtype too
USUAL = 126


def level_of(norm: float, dtype: torch.dtype = torch.float32, plain: float = PLAIN) -> float:
    """What a tensor of a norm is multiplied by to have one near 1: a power of two, 1 for norms of 1/plain to plain."""
    if norm == 0.0 or not math.isfinite(norm) or 1 / plain <= norm <= plain:
        return 1.0
    most = MOST.get(dtype, USUAL)
    return math.ldexp(1.0, max(-most, min(most, -math.frexp(norm)[1])))


def norms(a: Tensor, dim: int = -1) -> Tensor:
    """The norms along a dimension, in float64: on a CPU of float32's sums, unless those may have lost squares.

    An accelerator sums in float64 at once, which costs it less than the answer to whether it has to.
    """
    if a.dtype != torch.float64 and a.device.type != "cpu" and has_float64(a.device):
        return torch.linalg.vector_norm(a, dim=dim, dtype=torch.float64)
    found = double(torch.linalg.vector_norm(a, dim=dim))
    if a.dtype == torch.float64 or bool(((found.square().sum(-1) > FAINT) & found.isfinite().all(-1)).all()):
        return found
    return torch.linalg.vector_norm(a.to(found.device), dim=dim, dtype=torch.float64)


def _rows(a: Tensor) -> Tensor:
    """A tensor as one matrix, of no numbers too."""
    return a.flatten(0, -2) if a.dim() > 1 else a.reshape(1, -1)


def energy(a: Tensor) -> Tensor:
    """The squared norm, accumulated in float64: nothing waits for it."""
    return norms(_rows(a)).square().sum()


def norm_of(a: Tensor) -> float:
    """The Frobenius norm, also of numbers whose squares no dtype has."""
    flat = _rows(a)
    found = float(torch.linalg.vector_norm(norms(flat)))
    summed = a.dtype != torch.float64 and a.device.type != "cpu" and has_float64(a.device)  # which has all squares
    if not a.numel() or (math.isfinite(found) and (summed or found > math.sqrt(FAINT))):
        return found
    largest = float(flat.abs().max())
    if not largest or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(norms(double(flat) / largest)))
