"""The work of `tensoradapt convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.cli.options import Choice
from tensoradapt.cli.run.printing import note, show
from tensoradapt.cli.run.progress import progress
from tensoradapt.cli.run.specs import make_spec, rank_note
from tensoradapt.convert import convert


def run(adapter: str, out: Path, choice: Choice, *, options: Mapping[str, Any], as_json: bool) -> None:
    """Convert, and print what was converted."""
    note(rank_note(choice, {"error": options["error"], "max_parameters": options["max_parameters"]}))
    with progress("convert") as tell:
        result = convert(adapter, make_spec(choice), out, progress=tell, **options)
    show(result, as_json=as_json)
