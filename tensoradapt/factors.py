"""Factors: the tensors of one plan, by group and node, and the deltas that they are.

Invariant: each factor exists once; sites, groups and banks are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError, SiteError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.host import Bank, slashed, sources
from tensoradapt.init import WEIGHT, draw
from tensoradapt.interchange import subtracted, to_tensorly, values_for
from tensoradapt.lower import Line
from tensoradapt.lower import chain as lowered
from tensoradapt.merging import Rows, rows_of
from tensoradapt.plan import START, Plan
from tensoradapt.sharded import gathered, is_here, local, put
from tensoradapt.sites import Site
from tensoradapt.tables import first_of


class Factors(nn.Module):
    """The factors of one plan, in banks by group, and copies of the parameters that are trained whole.

    `scale` multiplies every group's own.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        super().__init__()
        self.plan, self.name = plan, name
        self.stored = Bank()
        self.extra = Bank()
        self._scale = 1.0
        self._seed: int | None = None  # None where values come from a file
        self._blank: set[str] = set()  # keys of tensors that were on the meta device and have no values yet
        self._lines: dict[str, tuple[Group, Site, Line]] = {}
        self._sources = sources(plan)

    def replan(self, plan: Plan, lines: Mapping[str, tuple[Group, Site, Line]]) -> None:
        """Take a plan of the same sites, and the lines made from it; its tensors are the caller's to put."""
        self.plan, self._sources, self._lines = plan, sources(plan), dict(lines)

    @property
    def groups(self) -> dict[str, Group]:
        """The plan's groups by name."""
        return {group.name: group for group in self.plan.groups}

    def _tensors(self, group: str, suffix: str = "") -> dict[str, Tensor]:
        """Every node's tensor; a bank's node cut to the group's sizes, a copy (`suffix`) where there is one."""
        found = {}
        for node, owner, leaf, shape, banked in self._sources[group]:
            held = self.stored[owner]._parameters
            tensor = held.get(leaf + suffix) if suffix else None
            tensor = held[leaf] if tensor is None else tensor
            found[node] = tensor[tuple(slice(0, n) for n in shape)] if banked else tensor  # type: ignore[index]
        return found  # type: ignore[return-value]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        """Move the tensors; what leaves the meta device (`to_empty`) is drawn by its law, or waits for values."""
        absent = [key for key, tensor in self.tensors().items() if tensor.is_meta]
        super()._apply(fn, recurse)
        now = self.tensors()
        self._draw({key: now[key] for key in absent if not now[key].is_meta})
        return self

    @torch.no_grad()
    def _draw(self, empty: Mapping[str, Tensor]) -> None:
        for key, tensor in empty.items():
            factor = self.plan.factors.get(key.removesuffix(START))
            if factor is None or factor.law == WEIGHT or self._seed is None:
                tensor.fill_(math.nan)  # until a state dictionary, say, has values
                self._blank.add(key)
            else:
                put(tensor, draw(factor, self._seed))

    def check_drawn(self) -> None:
        """Raise AdapterError where a tensor has no values since the model came from the meta device."""
        held = self.tensors() if self._blank else {}
        self._blank = {key for key in self._blank if bool(local(held[key]).isnan().any())}
        if self._blank:
            raise AdapterError(
                f"adapter {self.name!r} has no values for {first_of(sorted(self._blank), 4)}: the model was on the "
                "meta device when it was attached, and came to another without them",
                hint="load a state dictionary that has them; or attach, or load, once the model has its weights",
            )

    def _whole(self, group: str, suffix: str = "") -> dict[str, Tensor]:
        """Every node's tensor, as `_tensors` has them, gathered where they are sharded."""
        if self._blank:
            self.check_drawn()
        found = self._tensors(group, suffix)
        if all(map(is_here, found.values())):  # as in nearly every pass, in which this is asked at every site
            return found
        return {node: gathered(tensor, f"{group}.{node}") for node, tensor in found.items()}

    def factors(self, group: str, *, start: bool = False) -> dict[str, Tensor]:
        """A group's factors: node -> tensor, shapes as its diagram says; shared memory, not copies.

        With `start` the frozen copies theta0 that a difference subtracts. Raises SpecError where there are none.
        """
        nodes = subtracted(self._group(group)) if start else tuple(self._group(group).diagram.nodes)
        return {node: tensor for node, tensor in self._tensors(group, START if start else "").items() if node in nodes}

    @torch.no_grad()
    def set_factors(self, group: str, tensors: Mapping[str, Any], *, start: bool = False) -> None:
        """Copy values (tensors, or numpy arrays) into a group's factors; the others stay as they are.

        With `start` into the frozen copies theta0: delta = scale * (N(theta) - N(theta0)). Warns where the factors'
        dtype rounds the values. Raises SpecError on unknown nodes and where there is no frozen start, ShapeError on
        other shapes, on what is no tensor and on numbers that the dtype cannot hold.
        """
        self._settle()
        held = self.factors(group, start=start)
        values = values_for(group, held, tensors)
        with self.kept([held[node] for node in values]):
            for node, tensor in values.items():
                put(held[node], tensor)

    @contextmanager
    def kept(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Let a block change these tensors, the banks and the plan: all of it, or nothing where it fails."""
        values = [(tensor, tensor.detach().clone()) for tensor in tensors]
        banks = [(bank, {**bank._parameters}) for bank in self.stored.children()]
        plan, lines, source = self.plan, self._lines, self._sources
        try:
            yield
        except BaseException:  # Ctrl-C too
            with torch.no_grad():
                for tensor, value in values:
                    tensor.copy_(value)
            for bank, held in banks:
                bank.__dict__["_parameters"] = held
            self.plan, self._lines, self._sources = plan, lines, source
            raise

    def _settle(self) -> None:
        """Make the tensors ready to be written to, where others hold copies of them."""

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise SpecError(f"no group {name!r}", expected=", ".join(list(self.groups)[:20]))
        return self.groups[name]

    def chain(self, path: str, like: Tensor | None = None) -> Chain:
        """A site's chain without the scale, in the dtype and on the device of `like`, or of the factors."""
        group, _, made = self._lines[path]
        starts = self._whole(group.name, START) if group.rule.start == "difference" else None
        return lowered(made, self._whole(group.name), starts, like)

    def _factor(self, path: str) -> float:
        return self._lines[path][0].scale * self._scale

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to one site: scale * (N(theta) - N(theta0) where the start is a difference).

        Shape: (out, in), or (out, in, kh, kw). Without dropout, with gradients. Raises SiteError on other paths.
        """
        site = self._site(path)
        return (self.chain(path).dense() * self._factor(path)).reshape(site.shape)

    def _site(self, path: str) -> Site:
        found = self._lines.get(path)
        if found is None:
            raise SiteError(f"{path} is not adapted by {self.name!r}", expected=", ".join(list(self._lines)[:12]))
        return found[1]

    def _rows(self, path: str) -> Rows:
        """Blocks of rows of a site's delta, computed in float32 at least."""
        group, _, made = self._lines[path]
        wide = [
            {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in self._whole(group.name, suffix).items()}
            for suffix in ("", START)
        ]
        return rows_of(
            lowered(made, wide[0], wide[1] if group.rule.start == "difference" else None), self._factor(path)
        )

    def to_tensorly(self) -> dict[str, Any]:
        """Every group as a TensorLy tensor, detached and without the scale. Raises SpecError on other networks."""
        return {name: to_tensorly(group, self._whole(name)) for name, group in self.groups.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its key in the file: `group.node`, `group.node__start`, `extra.<parameter>`."""
        banks = self.stored._modules.items()
        held = {f"{group}.{leaf}": t for group, bank in banks for leaf, t in bank._parameters.items()}  # type: ignore[union-attr]
        return held | {f"extra.{path}": self.extra[slashed(path)] for path in self.plan.extras}  # type: ignore[return-value]
