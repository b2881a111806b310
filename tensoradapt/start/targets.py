"""Targets: what the networks of an adapter are to equal at first, site by site, and the fit of a group to them.

Invariant: one site's target is in memory at a time, unless all of a group are small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.analysis.slices import Slices
from tensoradapt.diagram import Diagram
from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.fit.solve import Options
from tensoradapt.fit.stream import Stream, fit_stream
from tensoradapt.gauge import orthogonalized
from tensoradapt.grouping import Group
from tensoradapt.linalg import Dense, Slice
from tensoradapt.parts import plain_weight
from tensoradapt.sites import Site
from tensoradapt.start.sides import is_matrix

Fetch = Callable[[Site], Slice]
Turn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Job:
    """One group of an adapter that is to be given first factors, and the seed of what is drawn for it."""

    adapter: Adapter
    group: Group
    seed: int

    @property
    def like(self) -> Tensor:
        """The dtype of the computation, float32 at least, and the device of the factors."""
        held = next(iter(self.adapter.factors(self.group.name).values()))
        return torch.empty(0, dtype=torch.promote_types(held.dtype, torch.float32), device=held.device)

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The nodes that stay as they are."""
        held = self.adapter.factors(self.group.name)
        return {node: held[node].detach().to(self.like) for node in self.group.rule.frozen}

    @property
    def single(self) -> Site | None:
        """The site of a group that is one matrix of two trained factors; None for any other group."""
        return self.group.placements[0].site if is_matrix(self.group) else None

    def stream(self, fetch: Fetch, turn: Turn | None = None) -> Stream:
        """The slices of the group (a site in slots is several), each after a turn: a projection or a weighting."""
        slices = Slices(self.group, lambda site: Dense(fetch(site).dense().to(self.like)), self.like)
        norm = math.sqrt(math.fsum(slices.slice(placement).square for placement in slices.mine))
        found = slices.stream(self.seed, norm)
        return found if turn is None else turned(found, turn)

    def weight(self, site: Site) -> Slice:
        """The weight of a site.  Shape: (out, in kernel). Raises AdapterError where it is not at hand."""
        return Dense(weight_of(self.adapter, site).to(self.like))

    def fit(self, stream: Stream, share: float, *, form: str = "symmetric") -> dict[str, Tensor]:
        """Factors with network(factors) closest to share * target, in a form of their network where it has one."""
        fixed = self.frozen
        options = Options(fixed=fixed or None, seed=self.seed, format=self.group.rule.format)
        found = fit_stream(stream, self.group.diagram, options)
        if found.total == 0.0:
            raise AdapterError(
                f"group {self.group.name!r} cannot start from zeros: no factor would ever be trained",
                hint="use start: zero, or leave these sites out",
            )
        factors = dict(found.factors)
        if not fixed:
            factors = _formed(found.diagram, factors, form)
        return scaled(self.group, factors, share)


def turned(stream: Stream, turn: Turn) -> Stream:
    """A stream whose every slice D[out, in] is replaced by turn(D), of the same shape, as it is read."""
    stack = stream.stack
    after = lambda read: lambda: ((k, Dense(turn(part.dense()))) for k, part in read())  # noqa: E731
    return replace(stream, stack=replace(stack, passes=after(stack.passes), reads=[after(r) for r in stack.reads]))


def _formed(diagram: Diagram, factors: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    try:
        return dict(orthogonalized(diagram, factors, form).factors)
    except SpecError:  # a network without such a form: the fit's own is as good
        return factors


def scaled(group: Group, factors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Factors of share times the tensor, the share spread evenly over the trained nodes and its sign on the first."""
    free = [node for node in group.diagram.nodes if node in group.trainable]
    by = abs(share) ** (1 / len(free))
    return {
        node: tensor * (by * (-1.0 if share < 0 and node == free[0] else 1.0)) if node in free else tensor
        for node, tensor in factors.items()
    }


def weight_of(adapter: Adapter, site: Site) -> Tensor:
    """A site's part of the base's weight.  Shape: (out, in kernel).

    Raises AdapterError on the meta device, and on weights that are quantised, sharded or computed from others.
    """
    return plain_weight(adapter._model[0], adapter._lines[site.path][1])
