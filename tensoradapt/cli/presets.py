"""`tensoradapt presets`: the table of adapter families."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from tensoradapt.cli.options import JsonOption, emit
from tensoradapt.presets import PRESETS


def row(name: str) -> dict[str, Any]:
    """What there is to know of one preset."""
    found = PRESETS[name]
    rule = found.rules[0]
    return {
        **{"name": name, "formula": found.formula, "cite": found.cite, "parameters": list(found.parameters)},
        **{"start": rule.start, "scale": rule.scale, "alpha": rule.alpha, "init": rule.init, "note": found.note},
    }


def presets(as_json: JsonOption = False) -> None:
    """List the presets: formula, parameters, start, source.

    Example: tensoradapt presets --json
    """
    rows = [row(name) for name in PRESETS]
    if as_json:
        return emit(json.dumps({"presets": rows}))
    table = Table("preset", "delta of a site", "parameters", "start", "source", box=None, pad_edge=False)
    for r in rows:
        table.add_row(r["name"], r["formula"], " ".join(r["parameters"]), r["start"], r["cite"])
    console = Console()
    console.print(table if console.is_terminal else table, soft_wrap=not console.is_terminal, markup=False)
