"""Candidates: what every format would lose on the measured deltas, at which number of parameters, and which to take.

Invariant: a candidate's parameters are those of the format's diagrams over the same sites; its error is measured on the
stacks' cores, what those do not hold counted as lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.stacks import rotated
from tensoradapt.diagram import Diagram
from tensoradapt.fit.compress import Compressed, compress
from tensoradapt.fit.policy import Given, squares
from tensoradapt.fit.solve import Options, fit_compressed
from tensoradapt.fit.tree import tree_svd
from tensoradapt.folds import fold
from tensoradapt.formats import FORMATS
from tensoradapt.formats.build import Shape
from tensoradapt.lower import dense

RANKS = (1, 2, 4, 8, 16, 32, 64)
REFERENCE = 8  # the largest LoRA rank that the others are compared with
CP_SWEEPS = 12


@dataclass(frozen=True)
class Stacked:
    """One stack as candidates see it: the core between its shared bases, and the full sizes of its axes.

    By slice, in the order of the core's: `paths`, squared `norms`, `spectra` (singular values), and in `lost` the
    squared norm that the core does not hold. `deltas` are the slices themselves, where they fit into memory.
    """

    name: str
    axes: tuple[str, ...]
    sizes: Mapping[str, int]
    paths: tuple[str, ...]
    core: Tensor
    norms: Tensor
    spectra: tuple[Tensor, ...]
    deltas: Tensor | None = None

    @cached_property
    def slices(self) -> Tensor:
        """The core as a list of slices.  Shape: (site, p, q)."""
        return self.core.reshape(-1, *self.core.shape[-2:])

    @cached_property
    def lost(self) -> Tensor:
        """The squared norm of every slice that the core does not hold."""
        return (self.norms - self.slices.double().square().sum((1, 2)).cpu()).clamp(min=0)

    @cached_property
    def turned(self) -> Tensor:
        """The slices in the singular bases of both of their modes."""
        return rotated(self.slices)


@dataclass(frozen=True)
class Trial:
    """A format on one stack at one rank: parameters, and the squared error of every slice."""

    num_parameters: int
    lost: Tensor


@dataclass(frozen=True)
class Candidate:
    """A format at one rank on all stacks."""

    label: str
    preset: str
    rank: int
    num_parameters: int
    relative_error: float
    worst_site: Mapping[str, Any]
    by_group: Mapping[str, int]
    front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """The candidates, which of them to take, and why."""

    candidates: tuple[Candidate, ...]
    choice: Mapping[str, Any] | None = None
    comparisons: Mapping[str, Any] = field(default_factory=dict)


def _lora(stack: Stacked, rank: int) -> Trial:
    held = torch.tensor([float(s[:rank].double().square().sum()) for s in stack.spectra], dtype=torch.float64)
    m, n = stack.sizes["out"], stack.sizes["in"]
    return Trial(len(stack.paths) * min(rank, m, n) * (m + n), (stack.norms - held).clamp(min=0))


def _lotr(stack: Stacked, rank: int) -> Trial:
    m, n = stack.sizes["out"], stack.sizes["in"]
    p, q = min(rank, m), min(rank, n)
    held = stack.turned[:, :p, :q].double().square().sum((1, 2))
    return Trial(p * m + q * n + len(stack.paths) * p * q, (stack.norms - held.cpu()).clamp(min=0))


def _network(format: str, order: Sequence[str], stack: Stacked, rank: int) -> Trial:
    """A format over all axes of the stack, in an order of its own, fitted to the core."""
    axes = tuple(a for a in order if a in stack.axes)
    shape = Shape(axes, {a: stack.sizes[a] for a in axes}, {})
    diagram = FORMATS[format](shape, rank, "cap")
    core = stack.core.permute([stack.axes.index(a) for a in axes])
    small = replace(diagram, sizes={**diagram.sizes, **dict(zip(axes, core.shape, strict=True))})
    made = _reconstructed(core, small, format).permute([axes.index(a) for a in stack.axes])
    left = (stack.core - made).reshape(-1, *stack.core.shape[-2:]).double().square().sum((1, 2)).cpu()
    return Trial(diagram.num_parameters, left + stack.lost)


def _reconstructed(core: Tensor, diagram: Diagram, format: str) -> Tensor:
    if format == "cp":
        held = compress(Compressed(core, diagram, squares(core)))
        found = fit_compressed(held, diagram, Options(sweeps=CP_SWEEPS, format="cp"))
        return found.dense()
    fitted = tree_svd(core, diagram, Given(diagram.sizes))
    return dense(fitted.diagram, fitted.factors)


def _ttm(stack: Stacked, rank: int) -> Trial | None:
    """A TT-matrix of three folds for every site: it needs the deltas themselves."""
    if stack.deltas is None:
        return None
    cut = {axis: fold(axis, stack.sizes[axis], "auto:3", {}) for axis in ("out", "in")}
    spread = tuple(part for axis in ("out", "in") for part in cut[axis])
    count = len(stack.paths)
    sizes = {"site": count, **cut["out"], **cut["in"]}
    shape = Shape(("site", *spread), sizes, {axis: tuple(parts) for axis, parts in cut.items()})
    diagram = FORMATS["ttm"](shape, rank, "cap")
    whole = stack.deltas.reshape([sizes[a] for a in diagram.open])
    fitted = tree_svd(whole, diagram, Given(diagram.sizes))
    left = (whole - dense(fitted.diagram, fitted.factors)).double().square().flatten(1).sum(1).cpu()
    return Trial(diagram.num_parameters, left)


FAMILIES: dict[str, tuple[str, Callable[[Stacked, int], Trial | None]]] = {
    "lora": ("LoRA", _lora),
    "lotr": ("LoTR", _lotr),
    "tucker": ("Tucker", lambda s, r: _network("tucker", s.axes, s, r)),
    "fact_tt": ("TT", lambda s, r: _network("tt", ("out", "task", "layer", "role", "expert", "site", "in"), s, r)),
    "cp": ("CP", lambda s, r: _network("cp", s.axes, s, r)),
    "ttm": ("TT-matrix", _ttm),
}


def compared(stacks: Sequence[Stacked], typical: int | None = None, ranks: Sequence[int] = RANKS) -> Choice:
    """Every family at every rank over all stacks, the front of error against parameters, and the winner with why.

    The others are compared with LoRA of the `typical` rank of a site, at most 8.
    """
    if not stacks or not sum(float(s.norms.sum()) for s in stacks):
        return Choice(())
    found = [c for key, row in FAMILIES.items() for c in _family(key, row, stacks, ranks)]
    marked = tuple(replace(c, front=_undominated(c, found)) for c in found)
    reference = min(REFERENCE, typical or REFERENCE)
    return Choice(marked, _winner(marked, reference), _comparisons(marked, reference))


def _family(
    key: str, row: tuple[str, Callable[[Stacked, int], Trial | None]], stacks: Sequence[Stacked], ranks: Sequence[int]
) -> Iterator[Candidate]:
    label, trial = row
    before = -1
    for rank in ranks:
        trials = [trial(stack, rank) for stack in stacks]
        if any(t is None for t in trials):
            return
        made = _candidate(f"{label} r={rank}", key, rank, stacks, [t for t in trials if t is not None])
        if made.num_parameters == before:
            return
        before = made.num_parameters
        yield made


def _candidate(label: str, key: str, rank: int, stacks: Sequence[Stacked], trials: Sequence[Trial]) -> Candidate:
    total = math.fsum(float(s.norms.sum()) for s in stacks)
    lost = math.fsum(float(t.lost.sum()) for t in trials)
    errors = {
        path: math.sqrt(float(left) / float(norm)) if norm > 0 else 0.0
        for stack, t in zip(stacks, trials, strict=True)
        for path, left, norm in zip(stack.paths, t.lost, stack.norms, strict=True)
    }
    worst = max(errors, key=lambda p: errors[p])
    by_group = {s.name: t.num_parameters for s, t in zip(stacks, trials, strict=True)}
    return Candidate(
        *(label, key, rank, sum(by_group.values()), math.sqrt(lost / total)),
        {"path": worst, "relative_error": errors[worst]},
        by_group,
    )


def _undominated(one: Candidate, found: Sequence[Candidate]) -> bool:
    better = lambda c: c.num_parameters <= one.num_parameters and c.relative_error <= one.relative_error  # noqa: E731
    return not any(better(c) and c != one for c in found)


def _winner(found: Sequence[Candidate], rank: int) -> dict[str, Any] | None:
    """The cheapest candidate that is no worse than LoRA of the reference rank, and by how much."""
    loras = [c for c in found if c.preset == "lora"]
    if not loras:
        return None
    reference = next((c for c in loras if c.rank >= rank), loras[-1])
    good = [c for c in found if c.relative_error <= reference.relative_error * (1 + 1e-6)]
    best = min(good, key=lambda c: (c.num_parameters, c.relative_error))
    said = f"{reference.label} leaves a relative error of {reference.relative_error:.3g}"
    said += f" with {reference.num_parameters:,} parameters"
    if best == reference:
        cheaper = "no other candidate is as close with fewer"
        return {"label": best.label, "reason": f"{said}: {cheaper}; sharing between layers does not pay here."}
    times = reference.num_parameters / max(1, best.num_parameters)
    does = f"{best.label} is as close ({best.relative_error:.3g}) with {best.num_parameters:,}, {times:.2g} times fewer"
    return {"label": best.label, "reason": f"{said}; {does}."}


def _comparisons(found: Sequence[Candidate], rank: int) -> dict[str, Any]:
    """The cheapest of every family at equal error, and the closest at equal budget."""
    loras = [c for c in found if c.preset == "lora"]
    near = next((c.rank for c in loras if c.rank >= rank), 1)
    errors = [c.relative_error for c in loras if c.rank in (1, near, 4 * near)]
    budgets = sorted({n for c in loras if c.rank in (1, near) for n in (c.num_parameters // 10, c.num_parameters)})
    at_error = [{"relative_error": e, "rows": list(_cheapest(found, e))} for e in errors]
    at_budget = [{"max_parameters": n, "rows": list(_closest(found, n))} for n in budgets]
    return {"at_error": at_error, "at_budget": at_budget}


def _cheapest(found: Sequence[Candidate], error: float) -> Iterator[dict[str, Any]]:
    for key in FAMILIES:
        good = [c for c in found if c.preset == key and c.relative_error <= error * (1 + 1e-6)]
        if good:
            best = min(good, key=lambda c: c.num_parameters)
            yield {"label": best.label, "num_parameters": best.num_parameters}


def _closest(found: Sequence[Candidate], budget: int) -> Iterator[dict[str, Any]]:
    for key in FAMILIES:
        good = [c for c in found if c.preset == key and c.num_parameters <= budget]
        if good:
            best = min(good, key=lambda c: c.relative_error)
            yield {"label": best.label, "relative_error": best.relative_error}
