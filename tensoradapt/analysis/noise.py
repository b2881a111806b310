"""Rounding noise: what the stored dtypes of two checkpoints add to their difference.

A weight w stored in a dtype with p significant bits is off by up to half a unit in its last place,
ulp(w) = 2^(floor(log2 |w|) - p + 1); uniformly distributed that is a variance of ulp^2 / 12. A difference of two stored
weights carries that of both: sigma^2 = mean(ulp_base^2 + ulp_tuned^2) / 12. Singular values of such noise end at about
sigma (sqrt(m) + sqrt(n)). Invariant: float32 and float64 count as exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# dtype -> the bits of its sign-less exponent, significant bits less one, and its smallest normal number
_HALVES = {torch.bfloat16: (0x7F80, 7, 2.0**-126), torch.float16: (0x7C00, 10, 2.0**-14)}
BLOCK = 1 << 20
UNEVEN = 2.0  # from this ratio of the largest to the mean variance of rows or columns on, they are scaled first
TRACY_WIDOM = 2.02  # its 99 % quantile
FLOOR = 1e-3  # the share of the mean variance that a row or column is given at least


@dataclass(frozen=True)
class Noise:
    """The variance of the rounding noise of one delta, by row and by column.  Shapes: (m), (n), float64."""

    rows: Tensor
    cols: Tensor

    @cached_property
    def variance(self) -> float:
        """sigma^2, the mean over all entries."""
        return float(self.rows.mean()) if self.rows.numel() else 0.0

    @property
    def sigma(self) -> float:
        """The root mean square of the noise of an entry, in the weight's units."""
        return math.sqrt(self.variance)

    @property
    def edge(self) -> float:
        """Where the noise's singular values end."""
        return edge(self.sigma, len(self.rows), len(self.cols))

    @property
    def uneven(self) -> bool:
        """Whether some rows or columns are so much noisier that the edge must be sought after scaling them."""
        return self.variance > 0 and max(float(self.rows.max()), float(self.cols.max())) > UNEVEN * self.variance

    def scaled(self, delta: Tensor) -> Tensor:
        """The delta with the noise of every row and column brought to one, D[i, j] sqrt(mean / (rows[i] cols[j]))."""
        least = FLOOR * self.variance
        rows, cols = (side.clamp(min=least).to(delta.device) for side in (self.rows, self.cols))
        left = (math.sqrt(self.variance) / rows.sqrt()).to(delta.dtype)
        return delta * left[:, None] * (1 / cols.sqrt()).to(delta.dtype)


def edge(sigma: float, rows: int, cols: int) -> float:
    """The end of the noise's spectrum, sigma (sqrt(m) + sqrt(n)), plus the 99 % quantile of its fluctuation.

    Source: Marchenko and Pastur 1967 for the edge, Johnstone 2001 for the fluctuation (Tracy-Widom of order 1).
    """
    if not rows or not cols:
        return 0.0
    width = (1 / math.sqrt(rows) + 1 / math.sqrt(cols)) ** (1 / 3) / 2
    return sigma * (math.sqrt(rows) + math.sqrt(cols) + TRACY_WIDOM * width)


def noise_of(base: Tensor, tuned: Tensor) -> Noise:
    """The rounding noise of tuned - base, from both stored dtypes.  Shape: (m, n, ..), flattened to (m, n)."""
    rows = torch.zeros(base.shape[0], dtype=torch.float64)
    cols = torch.zeros(base[0].numel() if len(base) else 0, dtype=torch.float64)
    height = max(1, BLOCK // max(1, cols.numel()))
    for side in (base, tuned):
        if side.dtype not in _HALVES:
            continue
        for start in range(0, len(side), height):
            squares = _ulp_squares(side[start : start + height]).flatten(1)
            rows[start : start + len(squares)] += squares.sum(1).double().cpu() / (12 * max(1, cols.numel()))
            cols += squares.sum(0).double().cpu() / (12 * max(1, len(side)))
    return Noise(rows, cols)


def _ulp_squares(values: Tensor) -> Tensor:
    """The square of a unit in the last place of every entry, in float32."""
    mask, bits, smallest = _HALVES[values.dtype]
    power = (values.contiguous().view(torch.int16) & mask).view(values.dtype).float()  # 2^floor(log2 |w|)
    power = torch.where(values == 0, torch.zeros_like(power), power.clamp(min=smallest))
    return power.square() * 4.0**-bits
