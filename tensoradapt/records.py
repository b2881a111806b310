"""Results that have rows: as CSV, and as a pandas DataFrame."""

from __future__ import annotations

import csv
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.errors import TensorAdaptError
from tensoradapt.textfiles import write_beside


class Tabular(ABC):
    """What has rows: `records` gives them as mappings with equal keys."""

    @abstractmethod
    def records(self) -> list[dict[str, Any]]:
        """The rows, a mapping from column to value each."""

    def to_csv(self, path: str | Path | None = None) -> str:
        """The rows as CSV, written to a path too where one is given. Raises FileError."""
        rows = self.records()
        stream = io.StringIO()
        writer = csv.DictWriter(stream, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if path is not None:
            write_beside(path, stream.getvalue())
        return stream.getvalue()

    def to_dataframe(self) -> Any:
        """The rows as a pandas DataFrame. Raises TensorAdaptError where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise TensorAdaptError("to_dataframe needs pandas", hint="pip install pandas, or use to_csv()") from None
        return pandas.DataFrame.from_records(self.records())


def flattened(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping's values as columns: `rank.noise`, `rank.energy_0.9`."""
    return {f"{name}.{key}": value for key, value in values.items()}
