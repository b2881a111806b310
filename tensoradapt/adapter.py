"""The adapter: the module that owns the factors of one plan on one model. The only thing with state.

Invariant: the base model keeps every parameter name and value; `detach` leaves no trace; each factor exists once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn

from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError, SiteError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.host import Bank, Host, carrier, copied, slashed, sources
from tensoradapt.interchange import subtracted, to_tensorly, values_for
from tensoradapt.io.saved import Saved
from tensoradapt.lower import Line
from tensoradapt.lower import chain as lowered
from tensoradapt.merging import (
    Merged,
    Rows,
    Target,
    Untied,
    check_last,
    laid_out,
    merge,
    restore_all,
    rows_of,
    targets_of,
    with_copies,
)
from tensoradapt.passes import Passes, Reach, dry_run
from tensoradapt.plan import START, Plan
from tensoradapt.quantised import gathered
from tensoradapt.scan import owner_of
from tensoradapt.sites import Site


class Adapter(nn.Module):
    """The factors of one plan on one model, and what they do to it: add, merge, be switched, be saved.

    `scale` multiplies every group's own scale; `enabled` switches the adapter on and off. Neither can be set while the
    adapter is merged.
    """

    def __init__(self, plan: Plan, name: str, model: nn.Module) -> None:
        super().__init__()
        self.plan, self.name = plan, name
        self.stored = Bank()
        self.extra = Bank()
        self._model = [model]  # in a list: no registered reference to the model, which would recurse
        self._handles: list[Any] = []
        self._merged: list[Merged | Untied] | None = None
        self._kept: str | None = None
        self._scale, self._enabled = 1.0, True
        self._lines: dict[str, tuple[Group, Site, Line]] = {}
        self._weighted: dict[str, list[str]] = {}  # parameters delivered by weight, and the sites on them
        self._callers: dict[str, list[str]] = {}  # replaced parameters, and the modules around whose calls
        self._sources = sources(plan)
        self.passes = Passes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapter:
        """A copy, on the model's copy where that is made too; else of the tensors, with no hook on the same model."""
        return copied(self, memo)

    def replan(self, plan: Plan, lines: Mapping[str, tuple[Group, Site, Line]]) -> None:
        """Take a plan of the same sites, and the lines made from it; its tensors are the caller's to put."""
        self.plan, self._sources, self._lines = plan, sources(plan), dict(lines)

    @property
    def groups(self) -> dict[str, Group]:
        """The plan's groups by name."""
        return {group.name: group for group in self.plan.groups}

    @property
    def scale(self) -> float:
        """What every delta is multiplied by, beside its group's own scale; 1 after attach."""
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._check_unmerged()
        if not isinstance(value, SupportsFloat) or not math.isfinite(value):
            raise AdapterError("a scale is a finite number", got=repr(value)[:40])
        self._scale = float(value)

    @property
    def enabled(self) -> bool:
        """Whether the adapter adds anything."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._check_unmerged()
        self._enabled = bool(value)

    @property
    def active(self) -> bool:
        """Whether hooks add anything: enabled, and not merged into the weights."""
        return self._enabled and self._merged is None

    @property
    def merged(self) -> bool:
        """Whether the deltas stand in the base's weights."""
        return self._merged is not None

    @property
    def stalled(self) -> bool:
        """Whether training would change nothing: merged, and no other parameter of the model is trained."""
        return self.merged and not self._host().trains_on(self._model[0])

    def _tensors(self, group: str, suffix: str = "") -> dict[str, Tensor]:
        """Every node's tensor; a bank's node cut to the group's sizes, a copy (`suffix`) where there is one."""
        found = {}
        for node, owner, leaf, shape, banked in self._sources[group]:
            held = self.stored[owner]._parameters
            tensor = held.get(leaf + suffix) if suffix else None
            tensor = held[leaf] if tensor is None else tensor
            found[node] = tensor[tuple(slice(0, n) for n in shape)] if banked else tensor  # type: ignore[index]
        return found  # type: ignore[return-value]

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
        held = self.factors(group, start=start)
        for node, tensor in values_for(group, held, tensors).items():
            held[node].copy_(tensor)

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise SpecError(f"no group {name!r}", expected=", ".join(list(self.groups)[:20]))
        return self.groups[name]

    def _check_unmerged(self) -> None:
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} is merged into the weights", hint="unmerge() first")

    def chain(self, path: str, like: Tensor | None = None) -> Chain:
        """A site's chain without the scale, in the dtype and on the device of `like`, or of the factors."""
        group, _, made = self._lines[path]
        starts = self._tensors(group.name, START) if group.rule.start == "difference" else None
        return lowered(made, self._tensors(group.name), starts, like)

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

    def in_place_of(self, key: str, parameter: Tensor) -> Tensor:
        """What a call reads in a parameter's place: it, or its trained copy, and the deltas of its sites."""
        if key in self.plan.extras:
            parameter = self.extra[slashed(key)].to(parameter.dtype)
        if key not in self._weighted:
            return parameter
        paths = self._weighted[key]
        self.passes.reach(*paths)
        changed = parameter + laid_out([(self._lines[path][1], self.delta(path)) for path in paths], parameter)
        return self.passes.made(key, changed)

    def check(self, batch: Any, *, train: bool = False, grad: bool = False) -> Reach:
        """What a pass on a batch (a mapping, a tuple, one argument) reaches; the model's state is kept.

        Raises AdapterError where nothing is added.
        """
        return dry_run(self._model[0], self, batch, train=train, grad=grad)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside a `with` block. Raises AdapterError where it is merged."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def to_tensorly(self) -> dict[str, Any]:
        """Every group as a TensorLy tensor, detached and without the scale. Raises SpecError on other networks."""
        return {name: to_tensorly(group, self.factors(name)) for name, group in self.groups.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its key in the file: `group.node`, `group.node__start`, `extra.<parameter>`."""
        banks = self.stored._modules.items()
        held = {f"{group}.{leaf}": t for group, bank in banks for leaf, t in bank._parameters.items()}  # type: ignore[union-attr]
        return held | {f"extra.{path}": self.extra[slashed(path)] for path in self.plan.extras}  # type: ignore[return-value]

    def save(self, path: str | Path) -> Path:
        """Write the adapter file (a folder with `adapter.safetensors`, or that file), atomically; returns its path.

        The scale that was set is written into every group's own, so that a loaded adapter has the same deltas.
        Raises FileError where the path cannot be written or a factor is not finite: an older file stays as it is;
        AdapterError where a forward pass read weights past the adapter.
        """
        self.passes.check(self.name)
        return self.as_saved().save(path, made="ta.attach(model, spec), and training")

    def as_saved(self) -> Saved:
        """The adapter without its model: its tensors, gathered where they are sharded, and the scale in every group."""
        revision = getattr(getattr(self._model[0], "config", None), "_commit_hash", None) or ""
        groups = tuple(replace(group, scale=group.scale * self._scale) for group in self.plan.groups)
        tensors = {key: gathered(tensor.detach()) for key, tensor in self.tensors().items()}
        return Saved(replace(self.plan, groups=groups), tensors, {"revision": revision})

    # -- merging ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, keep: str | None = "cpu", *, untie: bool = False) -> None:
        """Write W + delta into the base: float32 arithmetic in row blocks; `keep` says where the originals are kept.

        Raises AdapterError when merged already or switched off, on results that are not finite (nothing is changed
        then), on weights that are quantised or on the meta device, and on tied weights without `untie=True`.
        """
        host = self._host()
        self._check_unmerged()
        if not self.enabled:
            raise AdapterError(f"adapter {self.name!r} is switched off", hint="set adapter.enabled = True first")
        self.passes.check(self.name)
        self._merged = merge(self._model[0], self._targets(), keep, untie=untie)
        self._kept = keep
        host.merged.append(self.name)

    def _targets(self) -> list[Target]:
        """The parameters that a merge changes, each with all of its sites."""
        model, sites = self._model[0], {path: site for path, (_, site, _) in self._lines.items()}
        planned = [sites[path] for group in self.plan.groups for path in group.paths]
        extras = {path: self.extra[slashed(path)] for path in self.plan.extras}
        found = targets_of(model, planned, sites, lambda path: partial(self._rows, path))
        return with_copies(found, {path: (owner_of(model, path), copy) for path, copy in extras.items()})

    def _rows(self, path: str) -> Rows:
        """Blocks of rows of a site's delta, computed in float32 at least."""
        group, _, made = self._lines[path]
        wide = [
            {n: t.to(torch.promote_types(t.dtype, torch.float32)) for n, t in self._tensors(group.name, suffix).items()}
            for suffix in ("", START)
        ]
        return rows_of(
            lowered(made, wide[0], wide[1] if group.rule.start == "difference" else None), self._factor(path)
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept originals back, bit for bit. Raises AdapterError where nothing was merged or kept."""
        if self._merged is None:
            raise AdapterError(f"adapter {self.name!r} is not merged", hint="merge() first")
        check_last(self.name, self._kept, self._host().merged[-1])
        restore_all(self._merged)
        self._merged = None
        self._host().merged.remove(self.name)

    def merge_and_detach(self, *, untie: bool = False) -> nn.Module:
        """Make the deltas, and the modules trained with them, part of the base for good; returns the plain model.

        W <- W + delta. Raises AdapterError as `merge` does; nothing is changed then.
        """
        if not self.merged:
            self.merge(keep=None, untie=untie)
        self._kept = None
        self.detach()
        return self._model[0]

    def detach(self) -> None:
        """Take the adapter off the model: hooks, registration and frozen flags go, merged weights are restored."""
        host = self._host()
        if self._merged is not None and self._kept is not None:
            self.unmerge()
            warnings.warn(
                f"detach() of the merged adapter {self.name!r} takes its change out of the weights again: "
                "adapter.merge_and_detach() leaves it in; unmerge() first says that this is meant",
                stacklevel=2,
            )
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        host.dismiss(self._model[0], self.name)

    def _host(self) -> Host:
        return carrier(self._model[0], self.name, self)

    def __str__(self) -> str:
        state = "merged" if self.merged else "attached" if self.enabled else "switched off"
        head = f"adapter {self.name!r} on {type(self._model[0]).__name__}: {state}\n"
        return f"{head}{self.plan.in_words}\n{self.plan.trained}"

    def extra_repr(self) -> str:
        """What `print(model)` shows of the adapter."""
        return f"{self.name!r}, {self.plan.num_sites} sites, {self.plan.num_trainable:,} trainable"
