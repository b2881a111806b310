"""`tensoradapt demo`: train adapters on embedded data and compare them, no network needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tensoradapt.cli.options import progress_console
from tensoradapt.demo.run import run_demo


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder for tables, figures and adapter files.")] = Path(
        "tensoradapt-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of data order and initial factors.")] = 0,
) -> None:
    """Fine-tune a small vision transformer on handwritten digits: in full, and with four kinds of adapters.

    Example: tensoradapt demo --out demo
    """
    results = run_demo(out, seed=seed, console=progress_console())
    console = Console()
    # in a file or a pipe there is no width to fit, and a wrapped table is hard to read
    (console if console.is_terminal else Console(width=110)).print(results.table())
