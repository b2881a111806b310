"""`tensoradapt demo`: train adapters on embedded data and compare them, no network needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="The folder for tables, figures and adapter files.")
    ] = Path("tensoradapt-demo"),
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="Seed of data order and initial factors.")
    ] = 0,
) -> None:
    """Train four kinds of adapters on handwritten digits.

    A small vision transformer is fine-tuned in full and with adapters; no network, about a minute on two cores.

    Example: tensoradapt demo --out demo
    """
    from tensoradapt.cli.run.demo import run

    run(out, seed=seed)
