"""`tensoradapt analyze`: what rank a fine-tuning is, by weight and across layers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import analyze as run_analysis
from tensoradapt.cli.options import (
    DeviceOption,
    JsonOption,
    NonfiniteOption,
    RowsOption,
    SeedOption,
    TargetOption,
    emit,
)
from tensoradapt.cli.progress import progress
from tensoradapt.collection import analyze_adapters
from tensoradapt.distributed import team_of
from tensoradapt.errors import FileError, SpecError
from tensoradapt.io.atomic import atomic, unwritten


def analyze(
    base: Annotated[
        str | None, typer.Argument(help="The base: a safetensors file, a folder, or a cached hub id[@revision].")
    ] = None,
    tuned: Annotated[str | None, typer.Argument(help="The fine-tuned model, likewise.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="An adapter of a set, native or PEFT, in the checkpoints' place."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A folder for report.json, report.html and report.txt.")
    ] = None,
    device: DeviceOption = None,
    target: TargetOption = None,
    values: Annotated[
        int | None, typer.Option("--values", min=1, help="Singular values per weight; as many as are cheap by default.")
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates/--no-candidates", help="Compare the formats that could hold the change.")
    ] = True,
    rows: RowsOption = "error",
    nonfinite: NonfiniteOption = "error",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure the rank of a fine-tuning: per weight, across layers and roles, and which format holds it.

    Example: tensoradapt analyze base/ tuned/ --out report

    A set of adapters of one model: tensoradapt analyze --adapter one/ --adapter two/ --adapter three/
    """
    if (base is None or tuned is None) == (not adapter):
        raise SpecError("give two checkpoints, or adapters", hint="analyze BASE TUNED, or --adapter A --adapter B")
    if out is not None:
        _check(out)
    with team_of(device) as (team, where), progress("analyze", quiet=team.rank > 0) as tell:
        options: dict[str, Any] = {"values": values, "targets": target or (), "candidates": candidates, "seed": seed}
        options |= {"device": where, "team": team, "progress": tell}
        if adapter:
            report = analyze_adapters(adapter, **options)
        else:
            report = run_analysis(base, tuned, rows=rows, nonfinite=nonfinite, **options)
        if team.rank == 0:
            _write(report, out, as_json=as_json)


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


def _write(report: Report, out: Path | None, *, as_json: bool) -> None:
    if out is not None:
        report.to_json(out / "report.json")
        report.to_html(out / "report.html")
        with atomic(out / "report.txt") as temporary:
            temporary.write_text(f"{report}\n", "utf-8")
    emit(report.to_json() if as_json else str(report))
    if out is not None and not as_json:
        emit(f"written to {out / 'report.html'}, report.json and report.txt beside it")
