"""The work of `tensoradapt merge`."""

from __future__ import annotations

from pathlib import Path

from tensoradapt.cli.run.printing import show, told
from tensoradapt.cli.run.progress import progress
from tensoradapt.folders import merge_folder
from tensoradapt.peft import open_adapter


def run(base: str, adapter: str, out: Path, *, overwrite: bool, tied: bool, model: str | None, as_json: bool) -> None:
    """Merge, and print what was written."""
    with told(), progress("merge") as tell:
        saved = open_adapter(adapter)
        result = merge_folder(base, saved, out, overwrite=overwrite, tied=tied, model=model, progress=tell)
    show(result, as_json=as_json)
