"""What a change made: the adapter, the error, the ranks before and after.

Invariant: a `Change` can stand wherever an adapter without a model can.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.io.saved import Saved


@dataclass(frozen=True)
class Change:
    """An adapter after a change of its ranks: the attached adapter itself, or a new one without a model.

    `relative_error` is sqrt(sum ||D - D'||^2 / sum ||D||^2) over all sites, after rounding to the stored dtype;
    `ranks_before` and `ranks_after` map groups to the sizes of their bonds.
    """

    adapter: Adapter | Saved
    relative_error: float
    ranks_before: Mapping[str, Mapping[str, int]]
    ranks_after: Mapping[str, Mapping[str, int]]

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to one site. Raises SiteError on a path that is not adapted."""
        return self.adapter.delta(path)

    def as_saved(self) -> Saved:
        """The adapter without a model."""
        return self.adapter.as_saved()

    def save(self, path: str | Path) -> Path:
        """Write the adapter file, atomically; returns its path. Raises FileError."""
        return self.as_saved().save(path)
