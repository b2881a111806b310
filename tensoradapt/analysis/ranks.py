"""Ranks: how many singular values of a delta count, by every rule in use.

Invariant: a rule that needs values beyond those computed answers None, never a guess.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENERGIES = (0.9, 0.95, 0.99)


def ranks_of(s: Tensor, total: float, shape: tuple[int, int], floor: int | None) -> dict[str, int | None]:
    """The rank by every rule, given the leading singular values (descending), the squared norm and the shape.

    `noise` is `floor`, what rises above the rounding noise; `energy_x` the first r with sum_(i<=r) s_i^2 >= x total;
    `gavish_donoho` what rises above the optimal hard threshold at unknown noise (arXiv:1305.5870);
    `marchenko_pastur` what rises above the edge of a noise that is fitted to the median value.
    """
    complete = len(s) >= min(shape)
    by_energy = {f"energy_{x}": energy_rank(s, total, x) for x in ENERGIES}
    median = float(s.median()) if complete and len(s) else _tail_median(s, total, shape)
    return {
        "noise": floor,
        **by_energy,
        "gavish_donoho": _count(s, gavish_donoho(shape) * median, complete=complete),
        "marchenko_pastur": _count(s, median * _edge_over_median(shape), complete=complete),
    }


def energy_rank(s: Tensor, total: float, share: float) -> int | None:
    """The smallest r whose leading values hold a share of the squared norm; None where more are needed."""
    if total == 0.0:
        return 0
    held = s.double().square().cumsum(0)
    enough = (held >= share * total * (1 - 1e-12)).nonzero()
    return int(enough[0]) + 1 if len(enough) else None


def _count(s: Tensor, threshold: float, *, complete: bool) -> int | None:
    """How many values rise above a threshold that is itself above rounding; None where all those computed do."""
    first = float(s[0]) if len(s) else 0.0
    found = int((s > max(threshold, first * 1e-6)).sum())
    return None if found == len(s) and not complete else found


def gavish_donoho(shape: tuple[int, int]) -> float:
    """The optimal hard threshold over the median singular value, at unknown noise: omega(beta), beta = m / n <= 1."""
    beta = min(shape) / max(shape)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    return known / math.sqrt(median_of_noise(beta))


def _edge_over_median(shape: tuple[int, int]) -> float:
    """The largest singular value of noise over its median one."""
    beta = min(shape) / max(shape)
    return (1 + math.sqrt(beta)) / math.sqrt(median_of_noise(beta))


def median_of_noise(beta: float) -> float:
    """The median of the Marchenko-Pastur law of ratio beta and unit variance."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    middle = (t[1:] + t[:-1]) / 2
    x = low + (high - low) * middle**2  # finer where the density of a square matrix is infinite
    mass = (((high - x) * (x - low)).clamp(min=0).sqrt() / x * middle).cumsum(0)
    return float(x[int(torch.searchsorted(mass, mass[-1] / 2))])


def _tail_median(s: Tensor, total: float, shape: tuple[int, int]) -> float:
    """The median value if what lies beyond those computed is noise of even variance."""
    rest = max(0.0, total - float(s.double().square().sum()))
    beta = min(shape) / max(shape)
    left = max(1, (shape[0] - len(s)) * (shape[1] - len(s)))
    return math.sqrt(rest / left * max(shape) * median_of_noise(beta))


def effective_rank(s: Tensor, total: float, limit: int) -> float:
    """The exponential of the entropy of p_i = s_i^2 / total (Roy and Vetterli 2007).

    Energy beyond the values given is spread evenly over the rest of them.
    """
    if total == 0.0:
        return 0.0
    p = s.double().square() / total
    entropy = -float((p * p.clamp(min=1e-300).log()).sum())
    rest, left = max(0.0, 1 - float(p.sum())), limit - len(s)
    if left > 0 and rest > 1e-12:
        entropy -= rest * math.log(rest / left)
    return math.exp(entropy)


def participation_ratio(s: Tensor, total: float, limit: int) -> float:
    """(sum s_i^2)^2 / sum s_i^4; energy beyond the values is spread evenly."""
    if total == 0.0:
        return 0.0
    fourth = float(s.double().pow(4).sum())
    rest, left = max(0.0, total - float(s.double().square().sum())), limit - len(s)
    return total**2 / (fourth + (rest**2 / left if left > 0 else 0.0))
