"""`tensoradapt demo`: train adapters on embedded data and compare them, no network needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for tables, figures and adapter files.")] = Path(
        "tensoradapt-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of data order and initial factors.")] = 0,
) -> None:
    """Fine-tune a small vision transformer on handwritten digits: in full, and with four kinds of adapters.

    Example: tensoradapt demo --out demo
    """
    from tensoradapt.cli.run.demo import run

    run(out, seed=seed)
