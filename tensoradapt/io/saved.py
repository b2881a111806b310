"""Adapters without a model: a plan and its tensors, from a file or from memory.

Invariant: `saved.delta(path)` is what the adapter adds to that weight once it is attached.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError, SiteError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.io.native import check_keys, expected, read, write
from tensoradapt.lower import chain, line
from tensoradapt.placing import Placement
from tensoradapt.plan import START, Plan


@dataclass(frozen=True)
class Saved:
    """An adapter with no model: its plan, its tensors by key (`group.node`), and the identity of the base model.

    `path` is the file that it was read from; None where it was made in memory.
    """

    plan: Plan = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    base: Mapping[str, Any] = field(default_factory=dict, repr=False)
    path: Path | None = None

    @classmethod
    def of(cls, plan: Plan, tensors: Mapping[str, Tensor], base: Mapping[str, Any] | None = None) -> Saved:
        """An adapter made in memory. Raises FileError on a key that is missing or unknown, or of another shape."""
        check_keys("the adapter", expected(plan), {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        return cls(plan, tensors, base or {})

    @property
    def where(self) -> str:
        """What to call it in an error."""
        return "the adapter" if self.path is None else str(self.path)

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The plan's groups by name."""
        return {group.name: group for group in self.plan.groups}

    @cached_property
    def sites(self) -> dict[str, tuple[Group, Placement]]:
        """Every adapted site by its path: the group that holds its delta, and where it lies in it."""
        return {placement.site.path: (group, placement) for group in self.plan.groups for placement in group.placements}

    def factors(self, group: str) -> dict[str, Tensor]:
        """A group's factors: node -> tensor, shapes as its diagram says. Raises SpecError on another group."""
        return self._tensors(group, "")

    def starts(self, group: str) -> dict[str, Tensor] | None:
        """The frozen copies that a `difference` subtracts, by node; None where the group starts otherwise."""
        held = self._tensors(group, START)
        return held if self.groups[group].rule.start == "difference" else None

    def _tensors(self, name: str, suffix: str) -> dict[str, Tensor]:
        """Every node's tensor: its copy where there is one, a bank's node cut to the group's sizes."""
        if name not in self.groups:
            raise SpecError(f"no group {name!r}", expected=", ".join(list(self.groups)[:20]))
        group = self.groups[name]
        held = {node: self.tensors.get(key + suffix, self.tensors[key]) for node, key in group.store.items()}
        return {node: tensor[tuple(map(slice, group.diagram.shape(node)))] for node, tensor in held.items()}

    def _site(self, path: str) -> tuple[Group, Placement]:
        if path not in self.sites:
            raise SiteError(f"{path} is not adapted by {self.where}", expected=", ".join(list(self.sites)[:12]))
        return self.sites[path]

    def chain(self, path: str, like: Tensor | None = None) -> Chain:
        """A site's chain without the scale, in the dtype and on the device of `like`, or of the factors.

        Raises SiteError on a path that is not adapted.
        """
        group, placement = self._site(path)
        return chain(line(group, placement), self.factors(group.name), self.starts(group.name), like)

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to one site: scale * (N(theta) - N(theta0) where the start is a difference).

        Shape: (out, in), or (out, in, kh, kw). Raises SiteError on a path that is not adapted.
        """
        group, placement = self._site(path)
        return (self.chain(path).dense() * group.scale).reshape(placement.site.shape)

    def save(self, out: str | Path, revision: str = "", *, made: str = "") -> Path:
        """Write the adapter file (a folder with `adapter.safetensors`, or that file), atomically; returns its path.

        A folder gets a card too, README.md, with the call that `made` the adapter; one that was changed stays.

        Raises FileError where the path cannot be written or a factor is not finite: an older file stays as it is.
        """
        base = {**self.base, "revision": revision} if revision else self.base
        return write(out, self.plan, self.tensors, base, made=made)

    def as_saved(self) -> Saved:
        """Itself."""
        return self

    def __str__(self) -> str:
        plan, groups = self.plan, len(self.plan.groups)
        rules = str(plan.spec).splitlines()
        lines = [
            f"adapter of {plan.num_sites} sites in {groups} group{'s' * (groups != 1)}, for {plan.model or 'a model'}"
        ]
        lines += [*rules, f"{plan.num_trainable:,} trained and {plan.num_frozen:,} frozen parameters"]
        lines += [f"and trained modules of {plan.num_extra:,} parameters"] if plan.extras else []
        return "\n".join([*lines, f"from {self.path}" if self.path else "in memory, not saved"])


@runtime_checkable
class Savable(Protocol):
    """What can be had without a model: an adapter, or one that is without a model already."""

    def as_saved(self) -> Saved:
        """The adapter without its model."""


def as_saved(source: Savable | str | Path) -> Saved:
    """The adapter that an `Adapter`, a `Saved` or a path means, its scale included. Raises FileError, AdapterError."""
    if isinstance(source, str | os.PathLike):
        found = read(source)
        return Saved(found.plan, found.tensors, found.base, found.path)
    if not isinstance(source, Savable):
        raise AdapterError(
            "this is no adapter", got=type(source).__name__, expected="an Adapter, a Saved, or the path of an adapter"
        )
    return source.as_saved()


def filled(saved: Saved, verb: str) -> Saved:
    """The adapter, if it changes anything. Raises AdapterError where it has no group and no trained module."""
    if not saved.plan.groups and not saved.plan.extras:
        raise AdapterError(f"{saved.where} adapts no weight: there is nothing to {verb}", hint="give another adapter")
    return saved
