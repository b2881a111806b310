"""`fit`: one tensor, or a stream of its slices, to a format, by rank, by relative error, or by a parameter budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensoradapt.axes import parse
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, ShapeError, SpecError
from tensoradapt.fit.curves import squeeze
from tensoradapt.fit.door import (
    ORDER,
    Slices,
    axes_of,
    finite_norm,
    plain,
    slices_of,
    source_of,
    stack_norm,
    stack_shape,
)
from tensoradapt.fit.policy import Policy, relative, squares
from tensoradapt.fit.result import Fit
from tensoradapt.fit.solve import Options, fit_diagram
from tensoradapt.fit.stream import Stream, count_of, fit_stream, fit_stream_by, fit_stream_within, widest_rank
from tensoradapt.fit.tree import bond_spectra, linked
from tensoradapt.folds import fold
from tensoradapt.formats import FORMATS
from tensoradapt.formats.build import Ranks, Shape
from tensoradapt.formats.network import network as network_diagram
from tensoradapt.linalg import Dense, Stack, first_not_finite, level_of, settled
from tensoradapt.linalg.home import SMALL

Folds = Mapping[str, str | list[int | str]]  # by axis: sizes and names, or `auto:3`
RANK = 8  # where neither rank, error nor budget is given
OPTIONS = ("fixed", "compress", "sweeps", "restarts", "seed", "device")


@dataclass(frozen=True)
class _Format:
    """A format on a shape: its diagram at any rank, None for the limits of all bonds."""

    name: str
    text: str
    shape: Shape
    literal: Diagram | None = None

    def at(self, rank: Ranks | None) -> Diagram:
        if self.literal is not None:
            return self.literal
        excess = "cap" if rank is None or isinstance(rank, int) else "error"
        wanted = 1 << 30 if rank is None else rank
        if self.name == "network":
            return network_diagram(self.text, self.shape, wanted, excess)
        return FORMATS[self.name](self.shape, wanted, excess)


@dataclass(frozen=True)
class _Goal:
    """How large the factors are to be: by rank, by relative error, or by a budget."""

    rank: Ranks | None
    error: float | None
    max_parameters: int | None

    def checked(self, made: _Format) -> _Goal:
        """The goal, where it is one that the format can have. Raises RankError, SpecError."""
        if sum(given is not None for given in (self.rank, self.error, self.max_parameters)) > 1:
            raise RankError(
                "give one of rank, error and max_parameters", hint="each alone says how large the factors are"
            )
        if self.rank is not None and not all(type(r) is int and r > 0 for r in _listed(self.rank)):
            raise RankError("a rank is a positive whole number", got=repr(self.rank)[:80], hint="write rank=8")
        if self.error is not None:
            relative(self.error, 1.0, 1)
        if self.error is not None and not made.at(1).bonds:
            raise SpecError(
                "this network has no rank to choose", got=str(made.at(1)), hint="fit it as it is, without error="
            )
        smallest = None if self.max_parameters is None else made.at(1).num_parameters
        if smallest is not None and (type(self.max_parameters) is not int or self.max_parameters < smallest):
            raise RankError(
                "the budget is below the smallest fit", got=self.max_parameters, expected=f"at least {smallest:,}"
            )
        return self


def _listed(rank: Ranks) -> Iterable[int]:
    if isinstance(rank, Mapping):
        return rank.values()
    return rank if isinstance(rank, list | tuple) else (rank,)  # type: ignore[return-value]


def fit(
    tensor: Any,
    format: str | Diagram,
    *,
    axes: str | Sequence[str] = (),
    rank: Ranks | None = None,
    error: float | None = None,
    max_parameters: int | None = None,
    folds: Folds | None = None,
    **options: Any,
) -> Fit:
    """Fit the factors of a format to a tensor T: min |T - network(factors)|, by rank, error or parameter budget.

    `format` is tt, tucker, cp, ttm, a network such as "out a, layer a b, b in -> layer out in", or a Diagram. `axes`
    names the tensor's axes in order, `("layer", "out", "in")` or `"layer out in"`; without it they are a network's own,
    `out in` of a matrix, `axis_0 axis_1 ..` of other tensors. `folds` cuts some of them.
    `tensor` is a tensor or array, or a stream: a sequence of matrices along the first axis, or a function that returns
    a new iterator of them (read several times, not kept). `rank` is one number, a list or a mapping, as in a rule;
    `error` a relative error; `max_parameters` a budget. Further options: `fixed` (node -> tensor that stays),
    `compress` (tucker: the axes that get a factor), `sweeps`, `restarts`, `seed`, `device`. Raises RankError,
    ShapeError, SpecError.
    """
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise SpecError(f"fit has no option {unknown[0]!r}", expected=", ".join(OPTIONS))
    source = source_of(tensor, options.get("device"))
    shape = tuple(source.shape) if isinstance(source, Tensor) else stack_shape(source)
    compress = options.get("compress", ())
    made = _format(format, axes, shape, folds or {}, (compress,) if isinstance(compress, str) else tuple(compress))
    goal = _Goal(rank, error, max_parameters).checked(made)
    told = {name: options[name] for name in ("fixed", "sweeps", "restarts", "seed") if name in options}
    settings = Options(grow=made.at, format=made.name, **told)
    if isinstance(source, Tensor):
        smallest, near = made.at(1), settled(source)
        found = _fitted(near.reshape([smallest.sizes[a] for a in smallest.open]), made, goal, settings)
        return _held(found).to(source.device)
    each: Callable[[Any], Tensor] = partial(plain, device=options.get("device"))
    at = each(next(iter(slices_of(source)))).device
    if at.type != "cpu" and math.prod(shape) <= SMALL:
        source = [settled(each(part)) for part in slices_of(source)]
        each = plain
    return _held(_streamed(source, each, made, goal, settings)).to(at)


def _held(found: Fit) -> Fit:
    """The fit, where its dtype has its factors. Raises ShapeError."""
    bad = first_not_finite(found.factors)
    if bad is not None:
        raise ShapeError(
            f"the factor {bad!r} has entries beyond {str(found.factors[bad].dtype).removeprefix('torch.')}",
            got=f"a tensor of norm {math.sqrt(found.total):.3g}",
            hint="fit a part of the tensor, or give it in float64",
        )
    return found


def _fitted(tensor: Tensor, made: _Format, goal: _Goal, settings: Options) -> Fit:
    level = level_of(finite_norm(tensor), tensor.dtype)
    return _near(tensor * level if level != 1.0 else tensor, made, goal, settings).times(
        1 / level, settings.fixed or ()
    )


def _near(tensor: Tensor, made: _Format, goal: _Goal, settings: Options) -> Fit:
    """A tensor of a norm near 1 fitted to a goal."""
    if goal.error is not None:
        tree = linked(made.at(1)) is not None
        policy = _policy(goal.error)(squares(tensor), made.at(1))
        return fit_diagram(tensor, made.at(None if tree else 1), replace(settings, policy=policy))
    if goal.max_parameters is not None:
        return fit_diagram(tensor, _affordable(tensor, made, goal.max_parameters), settings)
    return fit_diagram(tensor, made.at(RANK if goal.rank is None else goal.rank), settings)


def _policy(error: float) -> Callable[[float, Diagram], Policy]:
    return lambda total, diagram: relative(error, total, len((linked(diagram) or diagram).bonds))


def _affordable(tensor: Tensor, made: _Format, budget: int) -> Diagram:
    """The best ranks of a tree by its spectra, the largest even rank elsewhere."""
    if linked(made.at(1)) is None:
        return made.at(widest_rank(made.at, budget))
    whole = made.at(None)
    points = squeeze(whole, bond_spectra(tensor, whole))
    point = next((p for p in points if p.num_parameters <= budget), points[-1])
    return replace(whole, sizes={**whole.sizes, **point.ranks})


def _streamed(source: Slices, each: Callable[[Any], Tensor], made: _Format, goal: _Goal, settings: Options) -> Fit:
    """The slices of a stream, read in passes and made tensors of one dtype and device by `each`."""
    axes = made.shape.axes
    first = each(next(iter(slices_of(source))))
    like = first.new_zeros(())
    norm = stack_norm(lambda: map(each, slices_of(source)))
    read = lambda: ((k, Dense(each(part).to(like))) for k, part in enumerate(slices_of(source)))  # noqa: E731
    cuts = [made.shape.folds.get(a, (a,)) for a in _unfolded(made.shape)]
    named = [{axis: made.shape.sizes[axis] for axis in cut} for cut in cuts]
    stack = Stack(read, count_of(named[0]), (first.shape[0], first.shape[1]), like).at(level_of(norm, like.dtype))
    stream = Stream(stack, named[0], named[1], named[2], seed=settings.seed)
    assert [axis for cut in cuts for axis in cut] == list(axes)
    if goal.error is not None:
        return fit_stream_by(stream, made.at, _policy(goal.error), settings)
    if goal.max_parameters is not None:
        return fit_stream_within(stream, made.at, goal.max_parameters, settings)
    return fit_stream(stream, made.at(RANK if goal.rank is None else goal.rank), settings)


def _unfolded(shape: Shape) -> list[str]:
    """The axes as they were before they were cut."""
    owner = {part: axis for axis, parts in shape.folds.items() for part in parts}
    return list(dict.fromkeys(owner.get(axis, axis) for axis in shape.axes))


def _format(
    format: str | Diagram,
    given: str | Sequence[str],
    shape: tuple[int, ...],
    folds: Folds,
    compress: tuple[str, ...],
) -> _Format:
    if isinstance(format, Diagram):
        return _literal(format, shape)
    if not isinstance(format, str) or ("->" not in format and format not in FORMATS):
        expected = f"{', '.join(FORMATS)}, or a network 'nodes -> axes'"
        raise SpecError(
            f"no format {str(format)[:40]!r}", expected=expected, hint=None if isinstance(format, str) else ORDER
        )
    text = format if "->" in format else ""
    axes = axes_of(given, shape, parse(text)[1] if text else ())
    _check_folds(format, axes, folds, compress)
    cut = {axis: fold(axis, size, folds[axis], {}) for axis, size in zip(axes, shape, strict=True) if axis in folds}
    sizes = dict(zip(axes, shape, strict=True)) | {a: s for parts in cut.values() for a, s in parts.items()}
    spread = tuple(part for axis in axes for part in (cut[axis] if axis in cut else (axis,)))
    if text and parse(text)[1] != spread:
        raise SpecError("the network's axes are not the tensor's", got=parse(text)[1], expected=spread)
    return _Format(
        "network" if text else format, text, Shape(spread, sizes, {a: tuple(p) for a, p in cut.items()}, compress)
    )


def _check_folds(format: str, axes: Sequence[str], folds: Folds, compress: Sequence[str]) -> None:
    """Refuse folds of other axes, and a TT-matrix that is not folded: it would be the whole matrix."""
    for what, names in (("folds", folds), ("compress", compress)):
        for name in (name for name in names if name not in axes):
            raise SpecError(f"{what} names the axis {name!r}, which the tensor lacks", expected=", ".join(axes))
    if format == "ttm" and not folds:
        raise SpecError(
            "a TT-matrix pairs folds of out with folds of in: without any it is the matrix itself",
            hint="write folds={'out': 'auto:3', 'in': 'auto:3'}",
        )


def _literal(diagram: Diagram, shape: tuple[int, ...]) -> _Format:
    sizes = {axis: diagram.sizes[axis] for axis in diagram.open}
    if torch.Size(shape).numel() != torch.Size(sizes.values()).numel():
        raise ShapeError("the tensor does not fit the diagram", got=shape, expected=sizes)
    return _Format("network", "", Shape(diagram.open, diagram.sizes, diagram.folds), diagram)
