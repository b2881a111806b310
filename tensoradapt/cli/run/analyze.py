"""The work of `tensoradapt analyze`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import analyze
from tensoradapt.analysis.sharing import claimed_by
from tensoradapt.cli.run.printing import emit, told
from tensoradapt.cli.run.progress import progress
from tensoradapt.collection import analyze_adapters
from tensoradapt.distributed import team_of
from tensoradapt.errors import FileError, SpecError
from tensoradapt.paths import expand
from tensoradapt.plots.unmatched import apart
from tensoradapt.textfiles import write_text
from tensoradapt.writing.folder import files_into
from tensoradapt.writing.hidden import unwritten

UNSEEN = 1  # the exit code where nothing that was compared differs, and much was not compared


def run(
    base: str | None,
    tuned: str | None,
    adapters: Sequence[str],
    out: Path | None,
    *,
    device: str | None,
    options: Mapping[str, Any],
    reading: Mapping[str, Any],
    wide: bool,
    as_json: bool,
) -> None:
    """Analyse two checkpoints or a set of adapters; write and print the report."""
    if (base is None or tuned is None) == (not adapters):
        raise SpecError("give two checkpoints, or adapters", hint="analyze BASE TUNED, or --adapter A --adapter B")
    out = out and expand(out)
    if out is not None:
        _check(out)
    with told(), team_of(device) as (team, where), progress("analyze", quiet=team.rank > 0) as tell:
        shared: dict[str, Any] = {"device": where, "team": team, "progress": tell}
        with claimed_by(team, out):
            if adapters:
                report = analyze_adapters(adapters, **options, **shared)
            else:
                report = analyze(base, tuned, **options, **reading, **shared)
            if team.rank == 0:
                _write(report, out, wide=wide, as_json=as_json)
    if report.answer is None and apart(report.match):
        raise typer.Exit(UNSEEN)


def _check(out: Path) -> None:
    """Raise SpecError or FileError where no report can be written: before the work, not after it."""
    try:
        nearest = next(folder for folder in (out.absolute(), *out.absolute().parents) if os.path.lexists(folder))
    except OSError as error:
        raise unwritten(out, error) from None
    if not nearest.is_dir():
        raise SpecError(f"--out {out}: {nearest} is a file", expected="a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise FileError(f"{out} cannot be written", got=f"{nearest} is read-only", hint="choose another folder")


def _write(report: Report, out: Path | None, *, wide: bool, as_json: bool) -> None:
    text = report.text(wide=wide)
    if out is not None:
        with files_into(out) as folder:
            report.to_json(folder / "report.json")
            report.to_html(folder / "report.html")
            write_text(folder / "report.txt", f"{text}\n")
    emit(report.to_json() if as_json else text)
    if out is not None and not as_json:
        emit(f"written to {out / 'report.html'}, report.json and report.txt beside it")
