"""Rounding noise: what the stored dtypes of two checkpoints add to their difference.

A weight w stored in a dtype with p significant bits is off by up to half a unit in its last place,
ulp(w) = 2^(floor(log2 |w|) - p + 1); uniformly distributed that is a variance of ulp^2 / 12. A difference of two stored
weights carries that of both: sigma^2 = mean(ulp_base^2 + ulp_tuned^2) / 12. Singular values of such noise end at about
sigma (sqrt(m) + sqrt(n)). Invariant: float32 and float64 count as exact; what float32 does round is told apart, as
`single`, for changes so small that it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tensoradapt.linalg import LARGE, home_of, mapped

# dtype -> its integers, the bits of its exponent, significant bits less one, and its smallest normal number
_STORED = {
    torch.bfloat16: (torch.int16, 0x7F80, 7, 2.0**-126),
    torch.float16: (torch.int16, 0x7C00, 10, 2.0**-14),
    torch.float32: (torch.int32, 0x7F800000, 23, 2.0**-126),
}
BLOCK = 1 << 18  # entries that a core looks at at a time: with their copies they stay in the cache
SHARE = 1 << 22  # entries that it looks at one after the other
UNEVEN = 2.0  # from this ratio of the largest to the mean variance of rows or columns on, they are scaled first
TRACY_WIDOM = 2.02  # its 99 % quantile
FAINT = 1e-30  # sums of float32 squares below it have lost some of them
FLOOR = 1e-3  # the share of the median variance that a row or column is given at least
TURNS = 3
_HALVES = (torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Noise:
    """The variance of the rounding noise of one delta, by row and by column.  Shapes: (m), (n), float64.

    `single` is the variance that sides stored in float32 add, which is left out of all else. `balance` holds, where the
    noise is uneven, r (m) and c (n) such that var[i, j] / (r[i] c[j]) is about one over every row and column.
    """

    rows: Tensor
    cols: Tensor
    single: float = 0.0
    balance: tuple[Tensor, Tensor] | None = None

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
        """Where the noise's singular values end, at the latest: by its noisiest row and its noisiest column."""
        row, col = (math.sqrt(float(side.max())) if side.numel() else 0.0 for side in (self.rows, self.cols))
        return uneven_edge(row, col, self.sigma, len(self.rows), len(self.cols))

    @property
    def whole(self) -> Noise:
        """The noise with that of float32 in it."""
        return replace(self, rows=self.rows + self.single, cols=self.cols + self.single, single=0.0)

    def at(self, level: float) -> Noise:
        """The noise of a delta that is multiplied by a level."""
        rows, cols = (side * level**2 for side in (self.rows, self.cols))
        balance = self.balance and (self.balance[0] * level**2, self.balance[1])
        return replace(self, rows=rows, cols=cols, single=self.single * level**2, balance=balance)

    @property
    def uneven(self) -> bool:
        """Whether some rows or columns are so much noisier that the edge must be sought after scaling them."""
        return self.variance > 0 and max(float(self.rows.max()), float(self.cols.max())) > UNEVEN * self.variance

    def floor(self, first: float) -> float:
        """What a singular value must rise above, where the largest is `first`: all rounding, that of float32 too."""
        return max(self.whole.edge, first * max(len(self.rows), len(self.cols)) * EPS)

    @property
    def inverse(self) -> tuple[Tensor, Tensor]:
        """1 / sqrt(r[i]) and 1 / sqrt(c[j]): what brings the noise of every row and column to one."""
        rows, cols = self.balance or (self.rows, self.cols / self.variance)
        return 1 / rows.sqrt(), 1 / cols.sqrt()


def edge(sigma: float, rows: int, cols: int) -> float:
    """The end of the noise's spectrum, sigma (sqrt(m) + sqrt(n)), plus the 99 % quantile of its fluctuation.

    Source: Marchenko and Pastur 1967 for the edge, Johnstone 2001 for the fluctuation (Tracy-Widom of order 1).
    """
    return uneven_edge(sigma, sigma, sigma, rows, cols)


def uneven_edge(row: float, col: float, sigma: float, rows: int, cols: int) -> float:
    """The edge of noise of root mean square `row` in its noisiest row, `col` in its noisiest column, `sigma` overall.

    max_i sqrt(sum_j var[i, j]) + max_j sqrt(sum_i var[i, j]), equal to `edge` where the noise is even.
    Source: arXiv:1408.6185.
    """
    if not rows or not cols:
        return 0.0
    width = (1 / math.sqrt(rows) + 1 / math.sqrt(cols)) ** (1 / 3) / 2
    return row * math.sqrt(cols) + col * math.sqrt(rows) + sigma * TRACY_WIDOM * width


def noise_of(base: Tensor, tuned: Tensor, device: torch.device | None = None) -> Noise:
    """The rounding noise of tuned - base, from both stored dtypes.  Shape: (m, n, ..), flattened to (m, n).

    Where one side has fewer rows or columns, the other alone is noisy beyond them. What is summed over entries is
    summed on the device; the sums are the CPU's.
    """
    sides = [side.flatten(1).to(device) if side.dtype in _STORED else side.flatten(1) for side in (base, tuned)]
    shape = max(side.shape[0] for side in sides), max(side.shape[1] for side in sides)
    halves = [side for side in sides if side.dtype in _HALVES]
    rows, cols = _means(halves, shape)
    single, _ = _means([side for side in sides if side.dtype == torch.float32], shape)
    found = Noise(rows, cols, float(single.mean()) if len(single) else 0.0)
    return replace(found, balance=_balance(halves, rows, shape)) if found.uneven else found


def _balance(sides: list[Tensor], rows: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Sinkhorn's iteration on the variances, by turns c[j] = mean_i var[i, j] / r[i], r[i] = mean_j var[i, j] / c[j]"""
    r, c = _bounded(rows), torch.ones(shape[1], dtype=torch.float64)
    for _ in range(TURNS):
        c = _bounded(_means(sides, shape, r, torch.ones_like(c))[1])
        r = _bounded(_means(sides, shape, torch.ones_like(r), c)[0])
    return r, c


def _bounded(side: Tensor) -> Tensor:
    """Variances of which none is next to nothing: rows of zeros are not blown up."""
    return side.clamp(min=FLOOR * float(side[side > 0].median())) if bool((side > 0).any()) else torch.ones_like(side)


def _means(
    sides: list[Tensor], shape: tuple[int, int], r: Tensor | None = None, c: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The means of var[i, j] / (r[i] c[j]) over every row, and over every column; some rows at a time."""
    rows, cols = torch.zeros(shape[0], dtype=torch.float64), torch.zeros(shape[1], dtype=torch.float64)
    left, right = (_weights(side, size) for side, size in zip((r, c), shape, strict=True))
    for side in (side for side in sides if side.numel()):
        along = (rows[: side.shape[0]], left[: side.shape[0]]), (cols[: side.shape[1]], right[: side.shape[1]])
        if side.stride(0) < side.stride(1):  # an embedding is stored with its columns as rows
            _add_sums(side.mT, *along[::-1])
        else:
            _add_sums(side, *along)
    return rows / (12 * shape[1]), cols / (12 * shape[0])


def _weights(side: Tensor | None, size: int) -> Tensor:
    return torch.ones(size) if side is None else (1 / side).float()


def _add_sums(side: Tensor, rows: tuple[Tensor, Tensor], cols: tuple[Tensor, Tensor]) -> None:
    """Add ulp[i, j]^2 w[i] v[j], summed over j to rows[0] and over i to cols[0], where w and v are rows[1] and cols[1].

    Without the kernel's axes, some rows at a time, as many at once as there are cores.  Shapes: (m, n), (m), (n).
    """
    on_cpu = side.device.type == "cpu"
    left, right = (weights.to(side.device) for _, weights in (rows, cols))
    height = max(1, (SHARE if on_cpu else LARGE) // side.shape[1])
    parts = [slice(start, min(start + height, len(side))) for start in range(0, len(side), height)]
    one = lambda at: _sums(side[at], left[at], right)  # noqa: E731
    for part, sums in zip(parts, mapped(one, parts) if on_cpu else map(one, parts), strict=True):
        rows[0][part] += sums[0].double()
        cols[0].add_(sums[1].double())


def _sums(side: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sums of some rows, over columns and over rows: in float64 where float32 has no such squares."""
    rows, cols = _sums_in(torch.float32, side, left, right).cpu().split([len(left), len(right)])
    largest = float(rows.max()) if len(rows) else 1.0
    if FAINT < largest < math.inf:
        return rows, cols
    home = home_of(side.device)
    found = _sums_in(torch.float64, side.to(home), left.to(home).double(), right.to(home).double())
    rows, cols = found.cpu().split([len(left), len(right)])
    return rows, cols


def _sums_in(dtype: torch.dtype, side: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Those over columns, and then those over rows."""
    size = BLOCK if side.device.type == "cpu" else LARGE
    rows, cols, height = [], torch.zeros_like(right), max(1, size // side.shape[1])
    for start in range(0, len(side), height):
        squares, weights = _ulp_squares(side[start : start + height], dtype), left[start : start + height]
        rows.append((squares @ right) * weights)
        cols += weights @ squares
    return torch.cat([*rows, cols * right])


def _ulp_squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The square of a unit in the last place of every entry, in a dtype."""
    integers, mask, bits, smallest = _STORED[values.dtype]
    power = (values.contiguous().view(integers) & mask).view(values.dtype).to(dtype)  # 2^floor(log2 |w|)
    if smallest > 2.0**-64 or dtype == torch.float64:  # the squares of smaller ones are none
        power = torch.where(values == 0, power, power.clamp(min=smallest))
    return power.mul_(2.0**-bits).square_()
