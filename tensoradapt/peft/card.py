"""What became of an export: as a value, as text, and as the folder's README.

Invariant: the card names nothing of the machine that it was written on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensoradapt.extract.words import counted, wrapped
from tensoradapt.io.card import front_matter


@dataclass(frozen=True)
class Exported:
    """A folder that was written: its modules with their rank and relative error, what was left out, what to know.

    `rank` is the largest one, which a server has to allow; `dropped` names parameters that the folder does not have.
    """

    path: Path
    layout: str
    dtype: str
    rank: int
    modules: Mapping[str, Mapping[str, float]]
    reader: str = ""
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """The largest relative error of a module: ||exported - delta|| / ||delta||."""
        return max(module["error"] for module in self.modules.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {**asdict(self), "path": str(self.path), "max_error": self.max_error}

    def __str__(self) -> str:
        lines = [f"not in the folder: {', '.join(self.dropped)}"] if self.dropped else []
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{counted(len(self.modules), 'module')}, rank {self.rank}, {self.layout}, {self.dtype}"]
        how = "re-opened with" if self.reader.startswith("PEFT") else "only the file was checked, on"
        lines += [f"{how} {self.reader}: relative error at most {self.max_error:.1e}"]
        return "\n".join([*wrapped(lines), f"written to {self.path}"])


def card(result: Exported, config: Mapping[str, Any]) -> str:
    """The folder's README: what it is, and every module with its rank and error."""
    base = config["base_model_name_or_path"]
    head = front_matter("peft", base or "")
    says = (
        f"A LoRA of rank {result.rank} in {result.dtype}, exported by tensoradapt ({result.layout} layout: its scale "
        f"is in the factors, `lora_alpha` equals the rank)."
    )
    rows = [f"| {path} | {m['rank']} | {m['error']:.1e} |" for path, m in result.modules.items()]
    table = ["| module | rank of the delta | relative error |", "|---|---|---|", *rows]
    notes = [f"- {note}" for note in result.notes]
    return "\n".join([*head, "# Adapter", "", says, "", *table, "", *notes, ""])
