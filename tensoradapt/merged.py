"""Merged: what a merge changes of a model, recorded before it is changed, and how it is undone or ended.

Invariant: whenever an interrupt comes, every original that is kept is in the record or in the model, and the record
says what is left to be done: `undo` may be called again and again, `run` goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.errors import AdapterError
from tensoradapt.merging import Place, Target, held_at, holders_of
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.sharded import local

PLACES = ("cpu", "same", None)
FOR_GOOD = "merge_and_detach() before that keeps the deltas for good; or load the base again"


@dataclass
class Changed:
    """One parameter that a merge changes: where it stands, and what stood there.

    `own` is the copy that modules get that were tied to others.
    """

    places: tuple[Place, ...]
    original: Tensor | None
    tied: nn.Parameter | None = None
    own: nn.Parameter | None = None

    def part(self) -> None:
        """Give the modules a parameter of their own, where they were tied to others."""
        for owner, leaf in self.places if self.own is not None else ():
            owner._parameters[leaf] = self.own

    def restore(self) -> None:
        """Put the original back, or the parameter that others hold too."""
        for owner, leaf in self.places:
            if self.tied is not None:
                owner._parameters[leaf] = self.tied
            elif self.original is not None:
                local(held_at(owner, leaf)).copy_(self.original)  # type: ignore[arg-type]


@dataclass
class Merge:
    """A merge of one adapter: `complete` once all deltas stand in the base, `order` among those of its model.

    Where no originals are kept, `at` says how far it has come: the steps that are done, the rows of the next one, and
    the block after these as it was, while that is written. It is replaced as a whole.
    """

    name: str
    keep: str | None
    order: int
    complete: bool = False
    records: dict[str, Changed] = field(default_factory=dict)
    untied: list[Any] = field(default_factory=list)  # configs that said that embeddings are tied
    at: tuple[int, int, Tensor | None] = (0, 0, None)

    def run(self, model: nn.Module, targets: Sequence[Target], apart: Mapping[str, bool]) -> None:
        """Write every target's deltas into its parameter, or what is left of them."""
        done = 0
        for target in targets:
            self._take(target, apart=apart[target.name])
            for part, sums in target.steps:
                if done == self.at[0] and self.at[2] is not None:
                    part[self.at[1] : self.at[1] + len(self.at[2])] = self.at[2]
                for stop, block, result in sums(self.at[1]) if done >= self.at[0] else ():
                    self._write(done, stop, block, result)
                done += 1
                self.at = max(self.at, (done, 0, None), key=lambda at: at[0])
        if any(isinstance(owner, nn.Embedding) for record in self.records.values() for owner in _parted(model, record)):
            self._untie(model)

    def _take(self, target: Target, *, apart: bool) -> None:
        """Record a parameter before it is changed; a tied one is replaced by a copy of its own."""
        if target.name not in self.records:
            parameter: Any = target.parameter
            if apart:
                own = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
                self.records[target.name] = Changed(target.places, None, tied=parameter, own=own)
            else:
                self.records[target.name] = Changed(target.places, _original(local(parameter), self.keep))
        self.records[target.name].part()

    def _write(self, done: int, stop: int, block: Tensor, result: Tensor) -> None:
        if self.keep is None and stop:
            self.at = (done, self.at[1], block.clone())
        block.copy_(result.view_as(block))
        if stop:
            self.at = (done, stop, None)

    def _untie(self, model: nn.Module) -> None:
        """Clear `tie_word_embeddings` in the configs of a model: loaders tie what was parted, where it says so.

        Not where other modules are still tied by it (the embeddings of an encoder and a decoder): loaders part what a
        file has under two names with other values, and do not find what it has under one.
        """
        if any(len({id(module) for _, (module, _) in places}) > 1 for places in holders_of(model).values()):
            return
        configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
        self.untied += [c for c in configs.values() if getattr(c, "tie_word_embeddings", None) is True]
        for config in self.untied:
            config.tie_word_embeddings = False

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what is changed, the last parameter first."""
        self.complete = False
        for config in self.untied:
            config.tie_word_embeddings = True
        for record in reversed(self.records.values()):
            record.restore()

    def check_ended(self) -> None:
        """Raise AdapterError where it was interrupted: the base holds a part of the deltas."""
        if not self.complete:
            raise AdapterError(
                f"a merge of adapter {self.name!r} was interrupted, and the base holds a part of what it adds",
                hint="unmerge() restores the base, merge() merges anew"
                if self.keep
                else "merge(keep=None) goes on where it was",
            )

    def check_kept(self) -> None:
        """Raise AdapterError where it cannot be undone: no original was kept."""
        if self.keep is None:
            self.check_ended()
            raise AdapterError(
                "the original weights were not kept",
                got="merge(keep=None)",
                hint="merge with keep='cpu', or load the base again",
            )

    def check_plain(self) -> None:
        """Raise AdapterError where a weight was quantised or resized since: it has no place for its original."""
        for name, record in self.records.items():
            held, kept = held_at(*record.places[0]), record.original if record.tied is None else record.tied
            if record.tied is None and not is_plain(None if held is None else local(held)):
                raise AdapterError(
                    f"{name} was quantised after the merge: its original cannot be put back",
                    got=kind_of(held),
                    hint=FOR_GOOD,
                )
            if held is not None and kept is not None and local(held).shape != local(kept).shape:
                raise AdapterError(
                    f"{name} was resized after the merge: its original cannot be put back",
                    got=tuple(local(held).shape),
                    expected=tuple(local(kept).shape),
                    hint=FOR_GOOD,
                )

    def check_last(self, last: str) -> None:
        """Raise AdapterError where it cannot be undone yet: another merge came after it."""
        if last != self.name:
            raise AdapterError(f"{last!r} was merged after {self.name!r}", hint=f"unmerge {last!r} first")


def check_place(keep: str | None) -> None:
    """Raise AdapterError where `keep` is no place for originals."""
    if keep not in PLACES:
        raise AdapterError(f"keep={keep!r} is no place", expected="'cpu', 'same' or None")


def _original(parameter: Tensor, keep: str | None) -> Tensor | None:
    """A copy of a parameter to restore it from: on the CPU, on its own device, or none."""
    return None if keep is None else parameter.detach().to("cpu" if keep == "cpu" else parameter.device, copy=True)


def _parted(model: nn.Module, record: Changed) -> list[nn.Module]:
    """The modules that held a parameter that was parted."""
    if record.tied is None:
        return []
    return [m for m in model.modules() for p in m._parameters.values() if p is record.tied or p is record.own]
