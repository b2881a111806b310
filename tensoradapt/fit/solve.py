"""Fitting one diagram to one tensor: the closed algorithm where there is one, alternating least squares elsewhere.

Invariant: the error that a fit reports is that of the factors it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, SpecError
from tensoradapt.fit.als import als
from tensoradapt.fit.compress import Compressed, compress
from tensoradapt.fit.cp import CP_SWEEPS, fit_cp, is_cp
from tensoradapt.fit.policy import Given, Policy, Within, squares
from tensoradapt.fit.polish import polished
from tensoradapt.fit.reach import EFFORT, effort, reach_of
from tensoradapt.fit.result import Fit, spread
from tensoradapt.fit.tree import TreeFit, linked, tree_svd
from tensoradapt.fit.tucker import GAIN, SWEEPS, evened, hooi, tucker_core
from tensoradapt.linalg import energy, level_of, norm_of, settled
from tensoradapt.lower import dense

TRUSTED = 1e-2  # a squared relative error below this is measured, not subtracted: float32 sums lose it
SLICE = 1 << 20  # entries of the tensor that are measured at a time
NEARLY = 1.001  # a basis loses at most so many times what the best one loses
LADDER = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclass(frozen=True)
class Options:
    """What a fit may be told: ranks by policy, fixed nodes, the sweeps and restarts of iterative methods, a seed.

    `grow` gives the diagram with another rank, for networks whose ranks no spectrum shows.
    """

    policy: Policy | None = None
    fixed: Mapping[str, Tensor] | None = None
    grow: Callable[[int], Diagram] | None = None
    sweeps: int | None = None
    restarts: int | None = None
    seed: int = 0
    format: str = "network"


def fit_diagram(tensor: Tensor, diagram: Diagram, options: Options | None = None) -> Fit:
    """The factors of a diagram closest to a tensor T[open]: min |T - network|.  Shape: the sizes of `diagram.open`.

    Trees by truncated SVDs (with the sweeps of HOOI for Tucker), CP by TensorLy's `parafac`, all else by alternating
    least squares. Raises RankError where ranks are to be chosen and no spectrum or ladder shows them.
    """
    options = options or Options()
    near = settled(tensor)
    if near.device != tensor.device:
        return fit_diagram(near, diagram, options).to(tensor.device)
    norm = norm_of(tensor)
    level = level_of(norm, tensor.dtype)
    if level != 1.0:
        policy = options.policy and options.policy.at(level)
        return fit_diagram(tensor * level, diagram, replace(options, policy=policy)).times(
            1 / level, options.fixed or ()
        )
    whole = Compressed(tensor, diagram, norm * norm)
    if options.policy is not None and linked(diagram) is None:
        return _climbed(whole, diagram, options)
    held = whole if options.fixed else compress(whole, seed=options.seed)
    return fit_compressed(held, diagram, options, tensor)


def fit_compressed(held: Compressed, diagram: Diagram, options: Options, tensor: Tensor | None = None) -> Fit:
    """A diagram fitted to a compressed tensor; the error is that of the core and what the bases lost.

    `tensor` is the whole one, where it is at hand to measure small errors on.
    """
    core = settled(held.core)
    if core.device != held.core.device:
        found = fit_compressed(replace(held, core=core), diagram, options, tensor)
        return found.to(held.core.device)
    if held.total == 0.0:
        return _nothing(diagram, held, options)
    if not options.fixed and linked(held.diagram) is not None:
        return _finished(_tree(held, options), held, diagram, tensor, options.seed)
    if options.policy is not None:
        return _climbed(held, diagram, options)
    if not options.fixed and is_cp(held.diagram):
        return _finished(_cp(held, options), held, diagram, tensor, options.seed)
    return _finished(_swept(held, options), held, diagram, tensor, options.seed)


def _tree(held: Compressed, options: Options) -> Fit:
    found = tree_svd(held.core, held.diagram, options.policy or Given(held.diagram.sizes), seed=options.seed)
    square = (found.lost + held.lost) / held.total
    least = max(found.discarded.values(), default=0.0) / held.total
    count = max(1, len(found.discarded))
    fit = Fit(
        *(found.diagram, found.factors, math.sqrt(square), held.total, "svd", options.format),
        bound=math.sqrt(square + torch.finfo(held.core.dtype).eps / 10),
        optimal=math.sqrt(max(least, square / count / NEARLY**2)),
        spectra=found.spectra,
        retried=found.retried,
    )
    core = tucker_core(found.diagram) if len(found.diagram.bonds) > 1 and _worth_sweeps(found, options) else None
    return fit if core is None else _improved(fit, found, held, core, options)


def _worth_sweeps(found: TreeFit, options: Options) -> bool:
    """Whether sweeps may gain what was asked for: not where ranks were chosen to be within an error, and are.

    No network of these ranks loses less than what was discarded at one bond alone.
    """
    if options.sweeps == 0 or isinstance(options.policy, Within):
        return False
    return found.lost - max(found.discarded.values(), default=0.0) > GAIN * found.lost


def _improved(fit: Fit, found: TreeFit, held: Compressed, core: str, options: Options) -> Fit:
    """A Tucker fit after the sweeps of HOOI, if they made it better."""
    factors, lost = hooi(held.core, found.diagram, core, found.factors, sweeps=options.sweeps or SWEEPS)
    error = math.sqrt((lost + held.lost) / held.total)
    if error >= fit.relative_error:
        return fit
    return replace(fit, factors=evened(factors), relative_error=error, method="svd, hooi")


def _cp(held: Compressed, options: Options) -> Fit:
    factors, history = fit_cp(held.core, held.diagram, sweeps=options.sweeps or CP_SWEEPS, seed=options.seed)
    factors = {node: tensor.to(held.core) for node, tensor in factors.items()}
    lost = squares(held.core - dense(held.diagram, factors))
    share = squares(held.core) / held.total
    steps = tuple(math.sqrt(e * e * share + held.lost / held.total) for e in history)
    settled = len(history) < (options.sweeps or CP_SWEEPS)
    error = math.sqrt((lost + held.lost) / held.total)
    return Fit(held.diagram, factors, error, held.total, "parafac", options.format, history=steps, converged=settled)


def _finished(fit: Fit, held: Compressed, diagram: Diagram, tensor: Tensor | None, seed: int) -> Fit:
    """The fit in the whole tensor's axes, polished where that is at hand, and a small error measured on it."""
    sizes = {i: diagram.sizes[i] if i in diagram.open else fit.diagram.sizes[i] for i in diagram.sizes}
    whole = replace(diagram, sizes=sizes)
    retried = (*held.retried, *fit.retried)
    made = replace(fit, diagram=whole, factors=held.expanded(fit.factors), retried=retried)
    if tensor is None:
        return made
    made = made.to(tensor.device)
    made = polished(made, held.lost, tensor, seed)
    if made.relative_error**2 > TRUSTED:
        return made
    return replace(made, relative_error=math.sqrt(missed(tensor, whole, made.factors) / held.total))


def missed(tensor: Tensor, diagram: Diagram, factors: Mapping[str, Tensor]) -> float:
    """The squared error |T - network|^2, a few slices along the first axis at a time."""
    first, found = diagram.open[0], []
    height = max(1, diagram.sizes[first] * SLICE // tensor.numel())
    for start in range(0, diagram.sizes[first], height):
        part = tensor[start : start + height]
        cut = {
            n: t.narrow(diagram.nodes[n].index(first), start, len(part)) if first in diagram.nodes[n] else t
            for n, t in factors.items()
        }
        found.append(energy(part - dense(replace(diagram, sizes={**diagram.sizes, first: len(part)}), cut)))
    return float(torch.stack(found).sum())


def _nothing(diagram: Diagram, held: Compressed, options: Options) -> Fit:
    """The fit of zero: rank 1 where ranks are to be chosen, every factor zero."""
    sizes = {i: s if i in diagram.open or options.policy is None else 1 for i, s in diagram.sizes.items()}
    small = replace(diagram, sizes=sizes)
    factors = {n: torch.zeros(small.shape(n), dtype=held.core.dtype, device=held.core.device) for n in small.nodes}
    return Fit(small, factors, 0.0, 0.0, "zero", options.format, bound=0.0, optimal=0.0)


def _swept(held: Compressed, options: Options) -> Fit:
    """Alternating least squares, nodes that are fixed brought near 1 too."""
    given = dict(options.fixed or {})
    levels = {node: level_of(norm_of(tensor), tensor.dtype) for node, tensor in given.items()}
    fixed = {node: tensor if levels[node] == 1.0 else tensor * levels[node] for node, tensor in given.items()}
    more = {k: v for k in ("sweeps", "restarts") if (v := getattr(options, k)) is not None}
    found = als(held.core, held.diagram, start=fixed, fixed=fixed, seed=options.seed, **more)
    error = math.sqrt((squares(held.core - dense(held.diagram, found.factors)) + held.lost) / held.total)
    factors = {**spread(found.factors, math.prod(levels.values()), fixed), **given}
    fit = Fit(held.diagram, factors, error, held.total, "als", options.format)
    return replace(fit, history=found.history, converged=found.converged, agreed=found.agreed)


def _climbed(held: Compressed, diagram: Diagram, options: Options) -> Fit:
    """The smallest rank whose fit is within the error that is allowed: up a ladder, then by halves."""
    if not isinstance(options.policy, Within):
        raise RankError(
            "this network has no spectrum to choose its ranks by", got=str(diagram), hint="give rank=, or error="
        )
    if not diagram.bonds or _grown(diagram, 1, options).sizes == _grown(diagram, 2, options).sizes:
        raise SpecError("this network has no rank to choose", got=str(diagram), hint="fit it as it is, without error=")
    allowed = options.policy.allowed * max(1, len(diagram.bonds)) * (1 + 1e-9)
    close = lambda fit: fit.relative_error**2 * fit.total <= allowed  # noqa: E731
    reach = reach_of(held.core, held.diagram)
    low, fit, grown = 0, None, diagram
    for rank in (r for r in LADDER if low < enough(diagram)):
        before, grown = grown, _grown(diagram, rank, options)
        if low and (grown.sizes == before.sizes or effort(grown) > EFFORT):
            grown = before
            break
        if reach.lost(grown) <= allowed:  # else no fit of this rank is close
            fit = _at(held, grown, options)
            if close(fit):
                return _halved(held, diagram, options, (low, rank), fit, close)
        low = rank
    return replace(fit or _at(held, grown, options), converged=False)


def enough(diagram: Diagram) -> int:
    """A rank above which a bond is of no use: so many terms, each along the longest axis, are any tensor."""
    sizes = [diagram.sizes[axis] for axis in diagram.open]
    return math.prod(sizes) // max(sizes)


def _halved(
    held: Compressed,
    diagram: Diagram,
    options: Options,
    between: tuple[int, int],
    fit: Fit,
    close: Callable[[Fit], bool],
) -> Fit:
    """The smallest rank between one that is too small and one whose fit serves."""
    low, high = between
    while high - low > 1:
        middle = (low + high) // 2
        tried = _at(held, _grown(diagram, middle, options), options)
        if close(tried):
            high, fit = middle, tried
        else:
            low = middle
    return fit


def _at(held: Compressed, grown: Diagram, options: Options) -> Fit:
    """The fit of a network at one rank."""
    sizes = {i: held.diagram.sizes[i] if i in grown.open else grown.sizes[i] for i in grown.sizes}
    small = replace(held, diagram=replace(grown, sizes=sizes))
    narrow = small if options.fixed or small.bases else compress(small, seed=options.seed)
    return fit_compressed(narrow, grown, replace(options, policy=None), None if small.bases else held.core)


def _grown(diagram: Diagram, rank: int, options: Options) -> Diagram:
    """The diagram with a rank for all bonds, or its own where that is smaller."""
    if options.grow is not None:
        return options.grow(rank)
    return replace(diagram, sizes={**diagram.sizes, **{b: min(rank, diagram.sizes[b]) for b in diagram.bonds}})
