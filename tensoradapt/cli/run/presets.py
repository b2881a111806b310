"""The work of `tensoradapt presets`."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tensoradapt.cli.run.printing import emit_json
from tensoradapt.presets import PRESETS


def row(name: str) -> dict[str, Any]:
    """What there is to know of one preset."""
    found = PRESETS[name]
    rule = found.rules[0]
    return {
        **{"name": name, "formula": found.formula, "cite": found.cite, "parameters": list(found.parameters)},
        **{"start": rule.start, "scale": rule.scale, "alpha": rule.alpha, "init": rule.init, "note": found.note},
    }


def run(*, as_json: bool) -> None:
    """Print the table."""
    rows = [row(name) for name in PRESETS]
    if as_json:
        return emit_json({"presets": rows})
    table = Table("preset", "delta of a site", "parameters", "start", "source", box=None, pad_edge=False)
    for r in rows:
        table.add_row(r["name"], r["formula"], " ".join(r["parameters"]), r["start"], r["cite"])
    console = Console()
    console.print(table if console.is_terminal else table, soft_wrap=not console.is_terminal, markup=False)
