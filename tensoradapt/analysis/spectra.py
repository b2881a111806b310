"""Spectra: what one delta is made of.

Invariant: a site's numbers come from its own delta, one delta in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tensoradapt.analysis.noise import EPS, Noise, edge
from tensoradapt.analysis.ranks import effective_rank, participation_ratio, ranks_of
from tensoradapt.linalg import Product, Slice, Values, double, level_of, slice_values
from tensoradapt.sites import Site

WHOLE = 1024  # up to this side all singular values are computed
VALUES = 128  # so many leading ones beyond it
SPARE = 32  # values beyond those that are expected above the noise


class Source(Protocol):
    """Where deltas come from: two checkpoints, or a set of adapters."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that differ, or may."""

    def slice(self, site: Site) -> Slice:
        """One delta, its kernel flattened into `in`."""

    @property
    def like(self) -> Tensor:
        """The dtype and the device of deltas."""

    def noise(self, site: Site) -> Noise:
        """The rounding noise of one delta."""

    def described(self, site: Site) -> dict[str, Any]:
        """`dtypes` of both sides, and `base_norm`, the norm of the base's weight (0 where there is none)."""


@dataclass(frozen=True)
class SiteReport:
    """One site's numbers, norms and singular values in the weight's units.

    `residual` is what `singular_values` leaves out; `complete` says that they are all there. A rank of None is above
    the number of values computed; so is a `relative_change` of None above any number: the base is zero, or unknown. A
    weight that did not change has no `group`.
    """

    shape: tuple[int, int]
    coordinates: Mapping[str, int | str]
    dtypes: tuple[str, str]
    norm: float
    relative_change: float | None
    spectral_norm: float
    singular_values: tuple[float, ...]
    complete: bool
    residual: float
    method: str
    stable_rank: float
    effective_rank: float
    participation_ratio: float
    noise: Mapping[str, Any]
    ranks: Mapping[str, int | None]
    group: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def site_report(source: Source, site: Site, values: int | None = None, seed: int = 0) -> SiteReport:
    """Norms, singular values and ranks of one site's delta; `values` of them, or as many as are cheap."""
    found = source.slice(site)
    shape, norm, noise = found.shape, math.sqrt(found.square), source.noise(site)
    level = level_of(norm, found.like.dtype)
    near, total = found if level == 1.0 else found.times(level), found.square * level**2
    known = _values(near, values, seed)
    s = known.s
    described = source.described(site)
    first, limit = (float(s[0]) if len(s) else 0.0), min(shape)
    left = 0.0 if len(s) >= limit else math.sqrt(max(0.0, total - float(s.double().square().sum())))
    return SiteReport(
        shape=shape,
        coordinates=dict(site.coordinates),
        dtypes=described["dtypes"],
        norm=norm,
        relative_change=norm / described["base_norm"] if described["base_norm"] else None,
        spectral_norm=first / level,
        singular_values=tuple((s if level == 1.0 else s.double() / level).tolist()),
        complete=len(s) >= limit,
        residual=left / level,
        method=known.method,
        stable_rank=total / first**2 if first else 0.0,
        effective_rank=effective_rank(s, total, limit),
        participation_ratio=participation_ratio(s, total, limit),
        noise={"sigma": noise.sigma, "edge": noise.edge, "scaled": noise.uneven},
        ranks=ranks_of(s, total, shape, noise_rank(near, known, noise.at(level), values, seed)),
    )


def _values(found: Slice, values: int | None, seed: int, start: Tensor | None = None) -> Values:
    """The leading singular values, and how they were found."""
    limit = min(found.shape)
    if isinstance(found, Product) and found.outer.shape[1] < limit:
        outer, inner = torch.linalg.qr(double(found.outer))[1], torch.linalg.qr(double(found.inner).mT)[1]
        s = torch.linalg.svdvals(outer @ inner.mT)
        return Values(torch.cat([s, s.new_zeros(limit - len(s))])[: values or limit].cpu(), "factors")
    wanted = values or (limit if limit <= WHOLE else VALUES)
    made = slice_values(found, None if limit <= WHOLE else wanted, seed=seed, start=start)
    return replace(made, s=made.s[:wanted].cpu())


def noise_rank(found: Slice, known: Values, noise: Noise, values: int | None, seed: int) -> int | None:
    """How many singular values rise above the rounding noise of the stored dtypes, and above that of float32.

    Where rows or columns are unevenly noisy, those of the delta after its noise has been brought to one everywhere.
    """
    s, limit = known.s, min(found.shape)
    if not len(s) or s[0] == 0.0:
        return 0
    above = int((s > noise.floor(float(s[0]))).sum())
    if not noise.uneven:
        return None if above == len(s) < limit else above
    return _even_rank(found, known, noise, (values, min(SPARE + 2 * above, values or VALUES)), seed)


def _even_rank(found: Slice, known: Values, noise: Noise, counts: tuple[int | None, int], seed: int) -> int | None:
    """The rank above even noise: of a large weight first by a few values, near the directions that are known."""
    (values, few), limit = counts, min(found.shape)
    rows, cols = (side.to(found.like) for side in noise.inverse)
    scaled = found.scaled(rows, cols)
    start = known.directions
    if start is not None:
        start = start * (rows if found.shape[0] <= found.shape[1] else cols)[:, None]
    for count in (few, values) if start is not None and few != values else (values,):
        s = _values(scaled, count, seed, start).s
        floor = max(edge(1.0, *found.shape), float(s[0]) * max(found.shape) * EPS)
        above = int((s > floor).sum())
        if above < len(s) or len(s) == limit:
            return above
    return None


def rank_above(found: Slice, noise: Noise, seed: int = 0) -> int:
    """The rank above the noise, of as many singular values as it takes to know it."""
    values = None
    while True:
        known = _values(found, values, seed)
        rank = noise_rank(found, known, noise, values, seed)
        if rank is not None:
            return rank
        values = 2 * len(known.s)
