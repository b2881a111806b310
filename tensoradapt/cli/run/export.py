"""The work of `tensoradapt export`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.cli.run.printing import show, told
from tensoradapt.cli.run.progress import progress
from tensoradapt.errors import SpecError
from tensoradapt.peft import export_peft


def run(adapter: str, out: Path, to: str, *, options: Mapping[str, Any], as_json: bool) -> None:
    """Export, and print what was written; warnings are lines on stderr."""
    if to != "peft":
        raise SpecError(f"no format {to!r} to export to", expected="peft")
    with told(), progress("export") as tell:
        result = export_peft(adapter, out, progress=tell, **options)
    show(result, as_json=as_json)
