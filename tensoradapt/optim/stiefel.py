"""Orthonormal factors: any optimiser's step along the Stiefel manifold, with the retraction in the optimiser.

delta = s U G V^T with U^T U = 1 = V^T V: lengths are the core's alone. Invariant: the factors keep their names, shapes
and dtype, so that adapter files and all that reads factors know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.change.install import parameters_of
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge import retract_polar, retract_qr, stiefel_tangent
from tensoradapt.interchange import rounded
from tensoradapt.optim.frames import Alike, Frame, alike, frames_of, is_orthonormal, orthonormal
from tensoradapt.optim.wrapper import Wrapper

Stamp = tuple[Tensor, int, int]

RETRACTIONS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"polar": retract_polar, "qr": retract_qr}


class Stiefel(Wrapper):
    """An optimiser that keeps factors orthonormal: U[.., b] with sum_rows U[rows, b] U[rows, c] = delta[b, c].

    `nodes` are factors with one bond and at least as many rows (all other axes) as the bond has values, in every tree
    that has them; by default all that can be: U and V of `polar` and `lotr`, and the factor on `out` of a LoRA, which
    has no core (Stiefel-LoRA). A batch axis has a matrix of its own for each of its values. At the start factors are
    made orthonormal and their neighbours take up the rest, so no delta changes; directions that a zero or
    rank-deficient factor lacks are drawn from `seed`.

    A step: P(Z) = Z - U sym(U^T Z); the gradient becomes P(gradient), `base` makes its step, of the change of U only
    P(U' - U) is kept, and the retraction leads U + P(U' - U) back: `polar` to the nearest orthonormal columns, `qr` to
    those of a QR decomposition. Both in float64, rounded to the factor's dtype: max |U^T U - 1| is below 1e-6 in
    float32, and about 1e-2 in bfloat16. Moments are `base`'s own, of tangents at earlier points; they are not
    transported, but what they have along the normal of today's point moves nothing. Weight decay would act along that
    normal: these factors have parameter groups of their own, with weight_decay 0. Factors that are not orthonormal any
    more, after `ta.resize` or `ta.truncate`, make one step of `base` as it is, and are made so again after it. With
    `polar` and SGD the change of the delta does not depend on a rotation of the bonds; with `qr` it does, by the square
    of the step. Write to these factors by `adapter.set_factors`, `load_state_dict` or in place: on an accelerator what
    is written into their `.data` is taken for orthonormal, unless `orthonormalize` is called.

    Raises SpecError on networks that are no trees (a CP has no such factors), on nodes that are frozen, have several
    bonds, fewer rows than the bond has values or a frozen neighbour, and on differences whose factors are not
    orthonormal; AdapterError on a merged adapter. Nothing is changed then.
    Source: PoLAR, arXiv:2506.03133; StelLA, arXiv:2510.01938; Stiefel-LoRA, arXiv:2508.17901.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        params: Iterable[Any] | None = None,
        *,
        nodes: str | Iterable[str] | None = None,
        retraction: str = "polar",
        seed: int = 0,
        **options: Any,
    ) -> None:
        if retraction not in RETRACTIONS:
            raise SpecError(f"there is no retraction {retraction!r}", expected=", ".join(RETRACTIONS))
        super().__init__(adapter, base, params, **options)
        self.frames = frames_of(adapter, nodes, parameters_of(self.base))
        self.retraction = retraction
        self._tight: dict[Frame, Stamp] = {}  # the factors that are orthonormal, as last written to
        self._before: list[tuple[Alike, Tensor]] = []  # of one step: those that are led back, from where they were
        self._loose = False  # and whether there are others, which are not orthonormal
        self.orthonormalize(seed)
        _undecayed(self.base, {self._factor(frame) for frame in self.frames})

    @torch.no_grad()
    def orthonormalize(self, seed: int = 0) -> None:
        """Make the factors orthonormal where they are not, no delta changed: after `ta.resize` or `set_factors`, say.

        Raises AdapterError on a merged adapter, SpecError on differences; nothing is changed then.
        """
        self.adapter.check_unmerged()
        for group, tensors in orthonormal(self.adapter, self.frames, seed).items():
            self.adapter.set_factors(group, rounded(self.adapter.factors(group), tensors))
        self._tight = {frame: _stamp(self._factor(frame)) for frame in self.frames}

    def _factor(self, frame: Frame) -> Tensor:
        return self.adapter.factors(frame.group)[frame.edge.child]

    def directions(self) -> dict[Tensor, Tensor]:
        """The gradients of the orthonormal factors without their part along the normal."""
        factors = {frame: self._factor(frame) for frame in self.frames}
        diagrams = {name: group.diagram for name, group in self.adapter.groups.items()}
        tight = [f for f in self.frames if self._is_tight(f, factors[f], diagrams[f.group])]
        self._before, self._loose = [], len(tight) < len(self.frames)
        grads = {frame: grad for frame in tight if (grad := factors[frame].grad) is not None}
        found = {}
        for lot in alike(list(grads), factors, diagrams):
            x = lot.matrices(factors)
            self._before.append((lot, x))
            for frame, direction in lot.tensors(stiefel_tangent(x, lot.matrices(grads)), factors):
                found[factors[frame]] = direction
        return found

    def _is_tight(self, frame: Frame, factor: Tensor, diagram: Diagram) -> bool:
        """Whether a factor is orthonormal. An accelerator, which has to be waited for, is asked after a write alone.

        The stamp knows no writes into `.data`, so that on a CPU, which answers at once, every factor is looked at.
        """
        held, *written = self._tight.get(frame, (None, 0, 0))
        known = held is factor and written == [factor.data_ptr(), factor._version] and factor.device.type != "cpu"
        return known or is_orthonormal(frame.matrix(diagram, factor), factor.dtype)

    @torch.no_grad()
    def finish(self) -> None:
        """Lead the factors that moved back to orthonormal columns; make those so that were not before the step."""
        factors = {frame: self._factor(frame) for frame in self.frames}
        before, self._before = self._before, []
        for lot, x in before:
            after = lot.matrices(factors)
            for frame, made in lot.tensors(_led_back(x, after, RETRACTIONS[self.retraction]), factors):
                factors[frame].copy_(made)
                self._tight[frame] = _stamp(factors[frame])
        if self._loose:
            self.orthonormalize()


def _led_back(x: Tensor, after: Tensor, retract: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Orthonormal columns from X along the tangential part of X' - X; X' where that is not finite.

    The NaN of a gradient stays to be seen, as in any optimiser.  Shapes: (frame, batch.., rows, bond).
    """
    step = stiefel_tangent(x, after - x)
    sound = step.flatten(1).isfinite().all(1).reshape(-1, *[1] * (x.dim() - 1))
    return torch.where(sound, retract(torch.where(sound, x, 0.0), torch.where(sound, step, 0.0)), after)


def _stamp(factor: Tensor) -> Stamp:
    """A factor, where it lies, and how often it was written to."""
    return factor, factor.data_ptr(), factor._version


def _undecayed(base: Optimizer, factors: Collection[Tensor]) -> None:
    """Give the orthonormal factors parameter groups of their own, without weight decay."""
    for group in list(base.param_groups):
        group.pop("param_names", None)  # they would have to be cut too, and torch asks for all groups' or none
        own = [p for p in group["params"] if p in factors]
        if len(own) == len(group["params"]):
            group["weight_decay"] = 0.0
        elif own:
            group["params"] = [p for p in group["params"] if p not in factors]
            base.add_param_group({**group, "params": own, "weight_decay": 0.0})
