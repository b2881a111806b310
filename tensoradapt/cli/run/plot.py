"""The work of `tensoradapt plot`."""

from __future__ import annotations

from pathlib import Path

from tensoradapt.cli.run.printing import note
from tensoradapt.errors import FileError, SpecError
from tensoradapt.paths import expand
from tensoradapt.plots import FIGURES, draw_figure, drawable, read_report
from tensoradapt.writing.folder import claimed, files_into

NAMES = ", ".join(FIGURES)


def run(report: Path, out: Path, figure: str | None, suffix: str) -> None:
    """Draw one figure to a file, or all that have data to a folder."""
    report, out = expand(report), expand(out)
    found = read_report(report / "report.json" if report.is_dir() else report)
    if figure is not None:
        target = out / f"{figure}.{suffix}" if out.is_dir() else out
        draw_figure(found, figure, target)
        return note(f"wrote {target}")
    if out.suffix and not out.is_dir():
        raise SpecError(
            f"{out} is one file, and there are {len(FIGURES)} figures",
            expected=f"--figure with one of {NAMES}",
            hint=f"tensoradapt plot {report} --figure {next(iter(FIGURES))} --out {out}, or a folder for all of them",
        )
    if out.exists() and not out.is_dir():
        raise FileError(f"{out} is a file", expected="a folder for all figures")
    names = drawable(found)
    with claimed(out), files_into(out) as folder:
        for name in names:
            draw_figure(found, name, folder / f"{name}.{suffix}")
    left = [name for name in FIGURES if name not in names]
    missing = f"; nothing to draw for {', '.join(left)}" if left else ""
    note(f"wrote {len(names)} figures to {out}{missing}")
