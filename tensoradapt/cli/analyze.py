"""`tensoradapt analyze`: what rank a fine-tuning is, by weight and across layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import (
    DeviceOption,
    JsonOption,
    NonfiniteOption,
    PrefixOption,
    RowsOption,
    SeedOption,
    TargetOption,
)


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
    prefix: PrefixOption = "auto",
    nonfinite: NonfiniteOption = "error",
    seed: SeedOption = 0,
    wide: Annotated[
        bool, typer.Option("--wide", help="A row for every weight with all of its numbers, wider than 80 columns.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the rank of a fine-tuning: per weight, across layers and roles, and which format holds it.

    Example: tensoradapt analyze base/ tuned/ --out report

    A set of adapters of one model: tensoradapt analyze --adapter one/ --adapter two/ --adapter three/
    """
    from tensoradapt.cli.run.analyze import run

    options = {"values": values, "targets": target or (), "candidates": candidates, "seed": seed}
    reading = {"rows": rows, "prefix": prefix, "nonfinite": nonfinite}
    run(base, tuned, adapter or (), out, device=device, options=options, reading=reading, wide=wide, as_json=as_json)
