"""The answer to "what rank is it?": median ranks, and the parameters that an adapter needs for an error.

Invariant: every number follows from the sites' spectra and the candidates; what they do not show is said to be a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tensoradapt.analysis.candidates import Candidate
from tensoradapt.analysis.spectra import SiteReport

ERRORS = (0.1, 0.01)
ENERGY = "energy_0.95"


@dataclass(frozen=True)
class Ranks:
    """The ranks of some weights by one rule: their median, the lowest, the highest.

    None is above `computed`, the least number of singular values computed for a weight of unknown rank.
    """

    median: int | None
    lowest: int | None
    highest: int | None
    computed: int | None = None


@dataclass(frozen=True)
class Needed:
    """The smallest adapter within a relative error, of all formats tried and of LoRA with a rank for each weight.

    `rank` is None where it is not one for all; `share` is its part of the changed weights' entries, `reached` the
    error that it leaves. Where `at_least`, nothing tried is within the error, and `num_parameters` is what LoRA needs
    at least: the values computed show no more.
    """

    relative_error: float
    label: str
    preset: str
    rank: int | None
    num_parameters: int
    share: float
    reached: float | None
    at_least: bool = False


@dataclass(frozen=True)
class Answer:
    """What rank a change is, over the weights within the layers that differ (over all that do, where there are none).

    `ranks` by rule: `noise` (above the rounding noise of the stored dtypes; absent where there is none), `exact` (above
    float32's own rounding; only where that is low) and `energy_0.95`. `dense` counts the weights' entries;
    `noise_share` is up to how much of the change's norm may be rounding noise.
    """

    weights: int
    layers: bool
    dense: int
    ranks: Mapping[str, Ranks]
    noise_share: float | None
    needed: tuple[Needed, ...]

    @property
    def typical(self) -> tuple[str, Ranks]:
        """The rule that says most of the rank, with what it says."""
        return next((rule, self.ranks[rule]) for rule in ("noise", "exact", ENERGY) if rule in self.ranks)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def changed(sites: Mapping[str, SiteReport]) -> dict[str, SiteReport]:
    """The weights that the answer is about: those within the layers that differ, or all that do."""
    differing = {path: row for path, row in sites.items() if row.norm}
    within = {path: row for path, row in differing.items() if "layer" in row.coordinates}
    return within or differing


def answered(sites: Mapping[str, SiteReport], candidates: Sequence[Candidate]) -> Answer | None:
    """The answer from all sites and the candidates, which are of the same weights; None where no weight differs."""
    rows = list(changed(sites).values())
    if not rows:
        return None
    dense = sum(math.prod(row.shape) for row in rows)
    noisy = [row for row in rows if row.noise["edge"]]
    ranks = {"noise": _ranks(noisy, "noise")} if noisy else _exact(rows)
    share = math.fsum(row.noise["sigma"] ** 2 * math.prod(row.shape) for row in noisy)
    return Answer(
        weights=len(rows),
        layers="layer" in rows[0].coordinates,
        dense=dense,
        ranks={**ranks, ENERGY: _ranks(rows, ENERGY)},
        noise_share=min(1.0, math.sqrt(share / _total(rows))) if noisy else None,
        needed=tuple(_needed(rows, candidates, error, dense) for error in ERRORS),
    )


def _total(rows: Sequence[SiteReport]) -> float:
    return math.fsum(row.norm**2 for row in rows)


def _exact(rows: Sequence[SiteReport]) -> dict[str, Ranks]:
    """The ranks above float32's rounding, where most weights are of at most half their full rank."""
    low = sum(row.ranks["noise"] is not None and row.ranks["noise"] <= min(row.shape) // 2 for row in rows)
    return {"exact": _ranks(rows, "noise")} if 2 * low > len(rows) else {}


def _ranks(rows: Sequence[SiteReport], rule: str) -> Ranks:
    found = [math.inf if (rank := row.ranks[rule]) is None else rank for row in rows]
    unknown = [len(row.singular_values) for row in rows if row.ranks[rule] is None]
    ordered = sorted(found)
    median, low, high = (
        None if rank == math.inf else int(rank) for rank in (ordered[len(ordered) // 2], ordered[0], ordered[-1])
    )
    return Ranks(median, low, high, min(unknown, default=None))


def _needed(rows: Sequence[SiteReport], candidates: Sequence[Candidate], error: float, dense: int) -> Needed:
    found = [
        Needed(error, c.label, c.preset, c.rank, c.num_parameters, c.num_parameters / dense, c.relative_error)
        for c in candidates
        if c.relative_error <= error
    ]
    lora = lora_needed(rows, error)
    options = found if found and lora.at_least else [*found, lora]
    return min(options, key=lambda one: one.num_parameters)


def lora_needed(rows: Sequence[SiteReport], error: float) -> Needed:
    """LoRA with a rank for each weight within a relative error, by the spectra, or the least that it can take.

    A step from rank i to i + 1 of a weight holds s_i^2 more and costs m + n: those that hold most per parameter are
    taken first. Of the values beyond those computed it is known that none is above the last of these.
    """
    steps = [_steps(row) for row in rows]
    gains, known = (np.concatenate([step[k] for step in steps]) for k in (0, 1))
    costs = np.concatenate([np.full(len(step[0]), sum(row.shape)) for step, row in zip(steps, rows, strict=True)])
    owners = np.concatenate([np.full(len(step[0]), k) for k, step in enumerate(steps)])
    total = _total(rows)
    order = np.argsort(-gains / costs, kind="stable")
    held = np.cumsum(gains[order])
    many = min(int(np.searchsorted(held, (1 - error**2) * total)) + 1, len(order))
    taken = order[:many]
    bound = not known[taken].all()
    ranks = np.bincount(owners[taken], minlength=len(rows))
    count = int(costs[taken[:-1] if bound else taken].sum())  # the last step may hold more than what is asked for
    share = count / sum(math.prod(row.shape) for row in rows)
    reached = None if bound else math.sqrt(max(0.0, total - float(held[many - 1])) / total)
    low, high = int(ranks.min()), int(ranks.max())
    label = f"LoRA r={low}" if low == high else f"LoRA r={low}-{high}"
    return Needed(error, label, "lora", low if low == high else None, count, share, reached, bound)


def _steps(row: SiteReport) -> tuple[np.ndarray, np.ndarray]:
    """What every rank of a weight adds to the squared norm held, at most, and whether that is known."""
    squares = np.square(np.asarray(row.singular_values, dtype=np.float64))
    beyond, last = min(row.shape) - len(squares), float(squares[-1])
    rest = np.clip(row.residual**2 - last * np.arange(beyond), 0.0, last) if last else np.zeros(beyond)
    return np.concatenate([squares, rest]), np.arange(len(squares) + beyond) < len(squares)
