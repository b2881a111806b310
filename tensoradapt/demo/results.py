"""What the demo found: rows of a table, for people (rich) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    `num_trainable` counts all that was trained, the new head included; `num_adapter` the adapter's factors alone, as
    its plan has it. The accuracies are one number per seed; `from_file` is the test accuracy of the first seed's
    adapter, loaded from `path` onto a fresh base. A budget that is too small for a family leaves a row without numbers,
    whose `note` says why. An adapter extracted from the first seed's full fine-tuning was not trained: it has a
    `relative_error`, and its accuracy is that from the file.
    """

    method: str
    budget: int | None = None
    rank: str = ""
    num_trainable: int | None = None
    num_adapter: int | None = None
    accuracy: tuple[float, ...] = ()
    validation_accuracy: tuple[float, ...] = ()
    from_file: float | None = None
    path: str | None = None
    note: str = ""
    relative_error: float | None = None


@dataclass(frozen=True)
class Results:
    """The rows, and what they were made with: seeds, base, versions, seconds, and the folder of the files.

    `analysis` is the short answer to what rank the full fine-tuning was.
    """

    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    base: dict[str, Any]
    versions: dict[str, str]
    seconds: float
    folder: Path
    analysis: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The results as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder)}

    def table(self) -> Table:
        """Accuracy against trainable parameters, a line per method and budget."""
        table = Table(
            title=f"Digits 5 to 9 in the mirror: test accuracy in %, mean of {len(self.seeds)} seeds",
            caption="trained: adapter and new head; from file: the saved adapter, first seed, on a fresh base; "
            "extracted: from the first seed's full fine-tuning, all but the projections as tuned; error: of the change",
        )
        table.add_column("method")
        for name in ("budget", "rank", "adapter", "trained", "accuracy", "per seed", "from file"):
            table.add_column(name, justify="right")
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            table.add_row(*_cells(row), end_section=following is None or following.budget != row.budget)
        return table


def _cells(row: Row) -> tuple[str, ...]:
    counts = (_number(row.budget), row.rank, _number(row.num_adapter), _number(row.num_trainable))
    if row.note:
        return (row.method, *counts, "-", row.note, "")
    each = " ".join(percent([value]) for value in row.accuracy)
    if row.relative_error is not None:
        each = f"error {row.relative_error:.2f}"
    return (row.method, *counts, percent(row.accuracy), each, percent([row.from_file]) if row.from_file else "")


def _number(count: int | None) -> str:
    return "" if count is None else f"{count:,}"


def percent(accuracies: Sequence[float]) -> str:
    """The mean of some accuracies, in per cent."""
    return f"{100 * mean(accuracies):.1f}"
