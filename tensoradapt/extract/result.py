"""The result of an extraction: its numbers, as JSON and in a few lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tensoradapt.extract.holding import Holding
from tensoradapt.extract.table import table
from tensoradapt.extract.words import apart, counted, few, little, percent, wrapped
from tensoradapt.plan import Plan


@dataclass(frozen=True)
class Extraction:
    """What was extracted: the adapter's file (None where there was nothing), its plan, and the errors.

    `relative_error` = sqrt(sum_s |D_s - D^_s|^2 / sum_s |D_s|^2) over all targeted sites, after rounding to the stored
    dtype; `change` has the error over every tensor that differs, and what the adapter leaves out of it; `report` has
    the errors by site and by group: what was requested, what the fit left before rounding (`fitted_error`, at most
    `bound` where a bound is known), and what the stored factors leave (`relative_error`).
    """

    path: Path | None
    relative_error: float
    num_parameters: int
    plan: Plan
    report: Mapping[str, Any] = field(repr=False)
    change: Holding = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def whole_error(self) -> float | None:
        """The relative error over every tensor that differs; None where none does."""
        return self.change.whole_error

    @property
    def dense_share(self) -> float | None:
        """The adapter's parameters over the entries of the weights that it changes; None where it changes none."""
        return self.num_parameters / self.change.dense_parameters if self.change.dense_parameters else None

    @property
    def model_share(self) -> float | None:
        """The adapter's parameters over those of the model."""
        return self.num_parameters / self.change.model_parameters if self.change.model_parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "path": None if self.path is None else str(self.path),
            **{key: getattr(self, key) for key in ("relative_error", "whole_error", "num_parameters")},
            **{key: getattr(self, key) for key in ("dense_share", "model_share")},
            "change": self.change.to_dict(),
            **self.report,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, *, wide: bool = False) -> str:
        """A few lines; with `wide` one line for every group, in place of one for all that play the same roles."""
        notes = [f"note: {note}" for note in self.notes]
        if self.path is None:
            return "\n".join(wrapped([*self._beside(), *notes]))
        lines = wrapped([*notes, *self._beside(), *self._held()])
        return "\n".join([*table(self.report["groups"], wide=wide), *lines, f"written to {self.path}"])

    def _beside(self) -> Iterator[str]:
        """What of the change is not held: by reason, and what is in no number."""
        change = self.change
        reasons: dict[str, list[str]] = {}
        for name, row in change.not_held.items():
            reasons.setdefault(row["reason"], []).append(name)
        for reason, names in reasons.items():
            share = sum(change.not_held[name]["share"] for name in names)
            yield f"not held: {counted(len(names), 'tensor')} ({percent(share)}), {reason}{few(names)}"
        yield from apart(change.only_base, change.only_tuned, change.unmeasured)

    def _held(self) -> Iterator[str]:
        """What the adapter holds of the whole change, and at which cost."""
        change = self.change
        if change.held_share is None or change.whole_error is None:
            return
        of = f"{change.held_tensors:,} of {counted(change.changed_tensors, 'changed tensor')}"
        yield f"held: {of}, {percent(change.held_share)} of the squared change"
        whole = all(row["kept"] or not row["norm"] for row in self.report["groups"].values())
        these = "these" if whole else "all targets"
        yield f"relative error: {self.relative_error:.4g} over {these}, {change.whole_error:.4g} over the whole change"
        yield from little(self.relative_error)
        yield from self._size()

    def _size(self) -> Iterator[str]:
        """The parameters, as shares of what they stand for."""
        dense, model = self.dense_share or 0.0, percent(self.model_share or 0.0)
        if dense <= 1:
            yield f"{self.num_parameters:,} parameters: {percent(dense)} of the dense change, {model} of the model"
            return
        entries = f"{self.change.dense_parameters:,} entries"
        yield f"{self.num_parameters:,} parameters, {model} of the model's"
        yield f"this change has no low rank: {dense:.1f} times its dense size ({entries})"
