"""Candidates: what every format would lose on the measured deltas, at which number of parameters.

Invariant: a candidate's parameters are those of the format's diagrams over the same sites; its error is measured on the
stacks' cores, what those do not hold counted as lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from tensoradapt.linalg import double
from tensoradapt.lower import dense

RANKS = (1, 2, 4, 8, 16, 32, 64)
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
        return (self.norms - double(self.slices).square().sum((1, 2)).cpu()).clamp(min=0)

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
class Tried:
    """How every format does on one stack: by (format, rank); `dense` counts the entries of its weights."""

    name: str
    paths: tuple[str, ...]
    axes: tuple[str, ...]
    dense: int
    norms: Tensor
    trials: Mapping[tuple[str, int], Trial]

    def times(self, level: float) -> Tried:
        """The trials on `level` times the stack."""
        if level == 1.0:
            return self
        trials = {key: replace(trial, lost=trial.lost * level**2) for key, trial in self.trials.items()}
        return replace(self, norms=self.norms * level**2, trials=trials)


@dataclass(frozen=True)
class Candidate:
    """A format at one rank on all stacks; `share` is its parameters over the entries of the weights: dense is 1."""

    label: str
    preset: str
    rank: int
    num_parameters: int
    share: float
    relative_error: float
    worst_site: Mapping[str, Any]
    by_group: Mapping[str, int]
    front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def _lora(stack: Stacked, rank: int) -> Trial:
    held = torch.tensor([float(s[:rank].double().square().sum()) for s in stack.spectra], dtype=torch.float64)
    m, n = stack.sizes["out"], stack.sizes["in"]
    return Trial(len(stack.paths) * min(rank, m, n) * (m + n), (stack.norms - held).clamp(min=0))


def _lotr(stack: Stacked, rank: int) -> Trial:
    m, n = stack.sizes["out"], stack.sizes["in"]
    p, q = min(rank, m), min(rank, n)
    held = double(stack.turned[:, :p, :q]).square().sum((1, 2))
    return Trial(p * m + q * n + len(stack.paths) * p * q, (stack.norms - held.cpu()).clamp(min=0))


def _network(format: str, order: Sequence[str], stack: Stacked, rank: int) -> Trial:
    """A format over all axes of the stack, in an order of its own, fitted to the core."""
    axes = tuple(a for a in order if a in stack.axes)
    shape = Shape(axes, {a: stack.sizes[a] for a in axes}, {})
    diagram = FORMATS[format](shape, rank, "cap")
    core = stack.core.permute([stack.axes.index(a) for a in axes])
    small = replace(diagram, sizes={**diagram.sizes, **dict(zip(axes, core.shape, strict=True))})
    made = _reconstructed(core, small, format).permute([axes.index(a) for a in stack.axes])
    left = double((stack.core - made).reshape(-1, *stack.core.shape[-2:])).square().sum((1, 2)).cpu()
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
    left = double(whole - dense(fitted.diagram, fitted.factors)).square().flatten(1).sum(1).cpu()
    return Trial(diagram.num_parameters, left)


@dataclass(frozen=True)
class Family:
    """A format: its name, what it makes of a stack at a rank, and the fields of the rule that means it."""

    label: str
    trial: Callable[[Stacked, int], Trial | None]
    rule: Callable[[tuple[str, ...]], Mapping[str, Any]]


TRAIN = ("in", "task", "layer", "role", "expert", "site", "out")  # MetaTT's order of axes
SIDES = ("out", "in")


def _train(axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(a for a in TRAIN if a in axes)


def _lotr_rule(axes: tuple[str, ...]) -> dict[str, Any]:
    return {"format": "tucker", "axes": (*(("site",) if len(axes) > 2 else ()), *SIDES), "compress": SIDES}


FAMILIES: dict[str, Family] = {
    "lora": Family("LoRA", _lora, lambda axes: {"preset": "lora"}),
    "lotr": Family("LoTR", _lotr, lambda axes: {**_lotr_rule(axes), "zero": "core"}),
    "tucker": Family(
        *("Tucker", lambda s, r: _network("tucker", s.axes, s, r)),
        lambda axes: {"format": "tucker", "axes": axes, "zero": "core"},
    ),
    "tt": Family(
        *("TT", lambda s, r: _network("tt", TRAIN, s, r)),
        lambda axes: {"format": "tt", "axes": _train(axes), "zero": "core_in"},
    ),
    "cp": Family(
        *("CP", lambda s, r: _network("cp", s.axes, s, r)),
        lambda axes: {"format": "cp", "axes": axes, "zero": "factor_out"},
    ),
    "ttm": Family(
        *("TT-matrix", _ttm),
        lambda axes: {
            **{"format": "ttm", "axes": ("site", *SIDES), "folds": dict.fromkeys(SIDES, "auto:3"), "zero": "core_0"}
        },
    ),
}


def candidates_of(stacks: Sequence[Tried]) -> list[Candidate]:
    """Every format at every rank over all stacks."""
    return [c for key in FAMILIES for c in _candidates(key, stacks)]


def _candidates(key: str, stacks: Sequence[Tried]) -> Iterator[Candidate]:
    """A format at the ranks that all stacks were tried at, up to where more rank adds nothing."""
    before = -1
    for rank in sorted(set.intersection(*({r for k, r in s.trials if k == key} for s in stacks))):
        made = _candidate(key, rank, stacks, [s.trials[key, rank] for s in stacks])
        if made.num_parameters == before:
            return
        before = made.num_parameters
        yield made


def _candidate(key: str, rank: int, stacks: Sequence[Tried], trials: Sequence[Trial]) -> Candidate:
    total = math.fsum(float(s.norms.sum()) for s in stacks)
    lost = math.fsum(float(t.lost.sum()) for t in trials)
    errors = {
        path: math.sqrt(float(left) / float(norm)) if norm > 0 else 0.0
        for stack, t in zip(stacks, trials, strict=True)
        for path, left, norm in zip(stack.paths, t.lost, stack.norms, strict=True)
    }
    worst = max(errors, key=lambda p: errors[p])
    by_group = {s.name: t.num_parameters for s, t in zip(stacks, trials, strict=True)}
    count, dense = sum(by_group.values()), sum(s.dense for s in stacks)
    return Candidate(
        *(f"{FAMILIES[key].label} r={rank}", key, rank, count, count / dense, math.sqrt(lost / total)),
        {"path": worst, "relative_error": errors[worst]},
        by_group,
    )
