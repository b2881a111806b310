"""`tensoradapt plot`: the figures of a report, drawn again from its JSON."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

FIGURES = ("front", "budget", "ranks", "spectra", "modes", "similarity")


class Suffix(Enum):
    """What a figure can be written as."""

    png = "png"
    svg = "svg"
    pdf = "pdf"
    pgf = "pgf"


def plot(
    report: Annotated[
        Path, typer.Argument(metavar="REPORT", help="The folder that `tensoradapt analyze` wrote, or its report.json.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="PATH", help="A .png, .svg, .pdf or .pgf file; a folder for all figures.")
    ],
    figure: Annotated[
        str | None,
        typer.Option("--figure", metavar="NAME", help=f"One of {', '.join(FIGURES)}; all of them without it."),
    ] = None,
    suffix: Annotated[
        Suffix, typer.Option("--format", help="What the figures of a folder are written as.")
    ] = Suffix.png,
) -> None:
    """Draw the figures of a report again, for print and screen.

    Example: tensoradapt plot report --figure front --out front.pdf
    """
    from tensoradapt.cli.run.plot import run

    run(report, out, figure, suffix.value)
