"""`tensoradapt plot`: the figures of a report, drawn again from its JSON."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import progress_console
from tensoradapt.errors import FileError, SpecError
from tensoradapt.plots import FIGURES, draw_figure, drawable, read_report

NAMES = ", ".join(FIGURES)


class Suffix(Enum):
    """What a figure can be written as."""

    png = "png"
    svg = "svg"
    pdf = "pdf"


def plot(
    report: Annotated[Path, typer.Argument(help="The report.json that `tensoradapt analyze` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="A .png, .svg or .pdf file; a folder for all figures.")],
    figure: Annotated[str | None, typer.Option("--figure", help=f"One of {NAMES}; all of them without it.")] = None,
    suffix: Annotated[
        Suffix, typer.Option("--format", help="What the figures of a folder are written as.")
    ] = Suffix.png,
) -> None:
    """Draw the figures of a report as PNG, SVG or PDF, for print and screen.

    Example: tensoradapt plot report.json --figure front --out front.pdf
    """
    found = read_report(report)
    if figure is not None:
        target = out / f"{figure}.{suffix.value}" if out.is_dir() else out
        draw_figure(found, figure, target)
        return progress_console().print(f"wrote {target}", markup=False, highlight=False)
    if out.suffix and not out.is_dir():
        raise SpecError(
            f"{out} is one file, and there are {len(FIGURES)} figures",
            expected=f"--figure with one of {NAMES}",
            hint=f"tensoradapt plot {report} --figure {next(iter(FIGURES))} --out {out}, or a folder for all of them",
        )
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file", expected="a folder for all figures")
    names = drawable(found)
    for name in names:
        draw_figure(found, name, out / f"{name}.{suffix.value}")
    left = [name for name in FIGURES if name not in names]
    note = f"; nothing to draw for {', '.join(left)}" if left else ""
    progress_console().print(f"wrote {len(names)} figures to {out}{note}", markup=False, highlight=False)
