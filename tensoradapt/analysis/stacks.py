"""Stacks: the deltas of one shape over layers and roles as one tensor, and what its modes and cuts are made of.

Invariant: every number comes from the core between the stack's shared bases; `captured` says how much of the squared
norm that core holds (1 where no basis was needed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.floors import Floors, short_of
from tensoradapt.analysis.naming import stack_names
from tensoradapt.analysis.ranks import energy_rank
from tensoradapt.analysis.spectra import SiteReport
from tensoradapt.errors import TensorAdaptError
from tensoradapt.fit.compress import Compressed
from tensoradapt.grouping import Group, group_sites
from tensoradapt.linalg import double, pooled, singular_values, truncated_svd
from tensoradapt.sites import Site, SiteMap
from tensoradapt.spec import Rule

BASIS = 64  # the rank of the shared bases of stacks that are too large to be kept whole
SIMILAR = 8  # the dimension of the subspaces that are compared between sites
LISTED = 256  # singular values listed per spectrum
SHARED = (1, 2, 4, 8, 16, 32, 64)  # ranks at which shared and private bases are compared
SHARES = (0.9, 0.95, 0.99)
SIDES = ("out", "in")


@dataclass(frozen=True)
class StackReport:
    """The numbers of one stack; the keys of the JSON report are its fields."""

    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    labels: Mapping[str, list[int | str]]
    sites: tuple[str, ...]
    norm: float
    captured: float
    mode_spectra: Mapping[str, list[float]]
    noise_edges: Mapping[str, float]
    tt_spectra: Mapping[str, list[float]]
    multilinear_rank: Mapping[str, Mapping[str, int | None]]
    similarity: Mapping[str, Any] = field(default_factory=dict)
    shared_energy: Mapping[str, Any] = field(default_factory=dict)

    def times(self, level: float) -> StackReport:
        """The report of `level` times the deltas: what has the weights' units is multiplied."""
        if level == 1.0:
            return self
        modes, cuts = (
            {a: [v * level for v in s] for a, s in of.items()} for of in (self.mode_spectra, self.tt_spectra)
        )
        edges = {axis: end * level for axis, end in self.noise_edges.items()}
        return replace(self, norm=self.norm * level, mode_spectra=modes, tt_spectra=cuts, noise_edges=edges)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def stacks_of(sites: tuple[Site, ...], model: SiteMap) -> list[Group]:
    """The sites in stacks: those of one shape under one stack of layers share a tensor (layer role out in).

    Where some layers lack a role, all coordinates are one axis `site`; sites outside the layers stand alone.
    """
    buckets: dict[Any, list[Site]] = {}
    for site in sites:
        place = site.coordinates
        alone = () if "layer" in place else (site.path,)
        kind = site.kind == "conv", "expert" in place
        buckets.setdefault((place.get("stack"), site.shape, kind, alone), []).append(site)
    names = stack_names(list(buckets.values()))
    return [replace(_stack(members, model), name=name) for members, name in zip(buckets.values(), names, strict=True)]


def _stack(members: list[Site], model: SiteMap) -> Group:
    axes = [a for a in ("task", "layer", "role", "expert") if len({s.coordinates.get(a) for s in members}) > 1]
    grid = math.prod(len({s.coordinates.get(a) for s in members}) for a in axes)
    lead = tuple(axes) if grid == len(members) else ("site",)
    targets = tuple(s.path for s in members)
    axes_given = (*(lead if len(members) > 1 else ()), "out", "in")
    fields: dict[str, Any] = {"targets": targets, "axes": axes_given, "compress": ("out", "in"), "rank": BASIS}
    rule = Rule(**fields, format="tucker", excess="cap", start="nonzero")
    try:
        (group,) = group_sites(rule, members, model)
    except (TensorAdaptError, ValueError):  # coordinates that are not their own
        (group,) = group_sites(rule.model_copy(update={"axes": ("site", "out", "in")}), members, model)
    return group


def stack_report(
    group: Group,
    held: Compressed,
    floors: Floors,
    spectra: Sequence[Sequence[float]],
    tell: Callable[[str], None] = lambda _: None,
) -> StackReport:
    """Mode spectra, TT cuts, similarity of subspaces and shared energy of one stack, from its core.

    `spectra` are the leading singular values of its sites, as far as they are known; `tell` is called with what begins.
    """
    axes, full = group.diagram.open, group.diagram.sizes
    core = held.core.permute([held.diagram.open.index(a) for a in axes])
    slices = core.reshape(-1, *core.shape[len(axes) - 2 :])
    modes = {f"mode {axis}": partial(_listed, core, (k,)) for k, axis in enumerate(axes)}
    cuts = {f"cut {' '.join(axes[:k])}": partial(_listed, core, tuple(range(k))) for k in range(2, len(axes) - 1)}
    other = {
        "similarity": partial(_similarity, slices, [p.site.path for p in group.placements]),
        "shared energy": partial(_shared, slices, spectra, held.total),
    }
    tasks: dict[str, Callable[[], Any]] = {**modes, **cuts, **other}
    made = pooled(tasks, tell)
    spectra_of = {axis: made[f"mode {axis}"] for axis in axes}
    ends = {axis: floors.whole.edge((axis,)) for axis in axes}
    return StackReport(
        axes=axes,
        sizes={a: full[a] for a in axes},
        labels={a: list(values) for a, values in group.labels.items()},
        sites=group.paths,
        norm=math.sqrt(held.total),
        captured=1 - held.lost / held.total if held.total else 1.0,
        mode_spectra=spectra_of,
        noise_edges={axis: floors.edge((axis,)) for axis in axes},
        tt_spectra={" ".join(axes[:k]): made[_cut(axes, k)] for k in range(1, len(axes))},
        multilinear_rank=_multilinear(spectra_of, ends, {a: full[a] for a in axes}, held.total),
        similarity=made["similarity"],
        shared_energy=made["shared energy"],
    )


def alone_report(group: Group, site: SiteReport) -> StackReport:
    """A weight that stands alone: its modes and its cut have its own spectrum, and there is nothing to share."""
    listed = list(site.singular_values[:LISTED])
    held = torch.tensor(site.singular_values, dtype=torch.float64).square().cumsum(0)
    ranks = [r for r in SHARED if r <= min(BASIS, *site.shape)]
    own = [float(held[min(r, len(held)) - 1]) / site.norm**2 if site.norm else 0.0 for r in ranks]
    rules = {rule: {axis: site.ranks[rule] for axis in SIDES} for rule in ("noise", *(f"energy_{x}" for x in SHARES))}
    return StackReport(
        axes=group.diagram.open,
        sizes={a: group.diagram.sizes[a] for a in group.diagram.open},
        labels={a: list(values) for a, values in group.labels.items()},
        sites=group.paths,
        norm=site.norm,
        captured=1.0,
        mode_spectra=dict.fromkeys(SIDES, listed),
        noise_edges=dict.fromkeys(SIDES, site.noise["edge"]),
        tt_spectra={SIDES[0]: listed},
        multilinear_rank=rules,
        shared_energy={"rank": ranks, "shared": own, "private": own},
    )


def _unfolded(core: Tensor, dims: tuple[int, ...]) -> Tensor:
    rest = [k for k in range(core.dim()) if k not in dims]
    return core.permute(*dims, *rest).reshape(math.prod(core.shape[k] for k in dims), -1)


def _cut(axes: Sequence[str], k: int) -> str:
    """What is computed for the cut behind the first k axes: those of one axis on a side are its mode's."""
    return f"mode {axes[0 if k == 1 else -1]}" if k in (1, len(axes) - 1) else f"cut {' '.join(axes[:k])}"


def _listed(core: Tensor, dims: tuple[int, ...]) -> list[float]:
    found: list[float] = singular_values(_unfolded(core, dims))[:LISTED].tolist()
    return found


def _multilinear(
    modes: Mapping[str, list[float]], edges: Mapping[str, float], sizes: Mapping[str, int], total: float
) -> dict[str, Any]:
    noise = {axis: _above(s, edges[axis], sizes, axis) if total else 0 for axis, s in modes.items()}
    energies = {f"energy_{x}": {a: energy_rank(torch.tensor(s), total, x) for a, s in modes.items()} for x in SHARES}
    return {"noise": noise, **energies}


def _above(s: list[float], floor: float, sizes: Mapping[str, int], axis: str) -> int | None:
    """How many values of a mode rise above the noise; None where all those listed do, and there are more."""
    found = sum(v > max(floor, s[0] * short_of(sizes, (axis,))) for v in s)
    most = min(sizes[axis], math.prod(sizes.values()) // sizes[axis])
    return None if found == len(s) < most else found


def _similarity(slices: Tensor, labels: list[str]) -> dict[str, Any]:
    """The mean squared cosine of the principal angles between every two sites' leading subspaces, by side.

    None where a delta is zero and has no subspace.
    """
    rank = max(1, min(SIMILAR, min(slices.shape[1:]) // 4))
    found = truncated_svd(slices, rank)
    zero = (found.s[:, 0] == 0).tolist()
    return {
        axis: {"rank": rank, "labels": labels, "matrix": _defined(_cosines(basis).tolist(), zero)}
        for axis, basis in (("out", found.u), ("in", found.v))
    }


def _cosines(basis: Tensor) -> Tensor:
    count, size, rank = basis.shape
    flat = basis.permute(1, 0, 2).reshape(size, count * rank)
    squares = (flat.mT @ flat).square().reshape(count, rank, count, rank)
    return double((squares.sum((1, 3)) / rank).clamp(0, 1))


def _defined(matrix: list[list[float]], zero: list[bool]) -> list[list[float | None]]:
    return [[None if zero[k] or zero[j] else value for j, value in enumerate(row)] for k, row in enumerate(matrix)]


def _shared(slices: Tensor, spectra: Sequence[Sequence[float]], total: float) -> dict[str, Any]:
    """The share of the squared norm held by one pair of bases of rank r for all sites, and by a pair for each."""
    limit = min(min(slices.shape[1:]), BASIS)
    ranks = [r for r in SHARED if r <= limit]
    if total == 0.0:
        return {"rank": ranks, "shared": [0.0] * len(ranks), "private": [0.0] * len(ranks)}
    own = leading(slices, spectra, ranks[-1]).square().sum(0).cumsum(0)
    turned = rotated(slices, ranks[-1])
    squares = double(turned).square().sum(0).cumsum(0).cumsum(1).diagonal().tolist()  # of the first r x r entries
    shared = [squares[min(r, len(squares)) - 1] / total for r in ranks]
    return {"rank": ranks, "shared": shared, "private": [float(own[r - 1]) / total for r in ranks]}


def leading(slices: Tensor, spectra: Sequence[Sequence[float]], rank: int) -> Tensor:
    """The singular values of every slice: those known where they are enough, else computed.  Shape: (site, rank)."""
    rank = min(rank, *slices.shape[1:])
    if min(map(len, spectra)) >= rank:
        return torch.tensor([s[:rank] for s in spectra], dtype=torch.float64)
    return truncated_svd(slices, rank).s.cpu().double()


def rotated(slices: Tensor, rank: int = BASIS) -> Tensor:
    """The slices in the leading singular bases of both of their modes: the first r x r entries are the best shared
    ones.  Shape: (site, m, n) -> (site, k, k), k at most `rank`.
    """
    sides = [truncated_svd(torch.movedim(slices, dim, 0).flatten(1), rank).u for dim in (1, 2)]
    return sides[0].mT @ slices @ sides[1]
