"""The work of `tensoradapt demo`."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from tensoradapt.demo.run import run_demo
from tensoradapt.paths import expand


def run(out: Path, *, seed: int) -> None:
    """Run the demo, and print its table."""
    results = run_demo(expand(out), seed=seed, console=Console(stderr=True))
    console = Console()
    # in a file or a pipe there is no width to fit, and a wrapped table is hard to read
    (console if console.is_terminal else Console(width=110)).print(results.table())
