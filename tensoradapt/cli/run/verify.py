"""The work of `tensoradapt verify`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from tensoradapt.cli.run.printing import show, told
from tensoradapt.cli.run.progress import progress
from tensoradapt.peft import open_adapter
from tensoradapt.verify import verify

MISSED = 1  # the exit code of a tolerance that was missed


def run(adapter: str, base: str, tuned: str, *, options: Mapping[str, Any], as_json: bool) -> None:
    """Compare, print the errors, and leave with an exit code that says whether they are tolerated."""
    with told(), progress("verify") as tell:
        saved = open_adapter(adapter)
        result = verify(saved, base, tuned, progress=tell, **options)
    show(result, as_json=as_json)
    if not result.passed:
        raise typer.Exit(MISSED)
