"""The work of `tensoradapt export`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.cli.run.printing import note, show
from tensoradapt.cli.run.progress import progress
from tensoradapt.errors import SpecError
from tensoradapt.peft import export_peft


def run(adapter: str, out: Path, to: str, *, options: Mapping[str, Any], as_json: bool) -> None:
    """Export, and print what was written; warnings are lines on stderr."""
    if to != "peft":
        raise SpecError(f"no format {to!r} to export to", expected="peft")
    with warnings.catch_warnings(record=True) as caught, progress("export") as tell:
        warnings.simplefilter("always", UserWarning)
        result = export_peft(adapter, out, progress=tell, **options)
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            note(f"warning: {warning.message}")
    show(result, as_json=as_json)
