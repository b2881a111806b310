"""`tensoradapt analyze`: what rank a fine-tuning is, by weight and across layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import (
    CHECKPOINT,
    AnalysedOption,
    DeviceOption,
    JsonOption,
    NonfiniteOption,
    PrefixOption,
    RowsOption,
    SeedOption,
    TellingOption,
)


def analyze(
    base: Annotated[str | None, typer.Argument(metavar="BASE", help=f"The base: {CHECKPOINT}")] = None,
    tuned: Annotated[str | None, typer.Argument(metavar="TUNED", help="The fine-tuned model, likewise.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="ADAPTER", help="An adapter of a set, native or PEFT, in the checkpoints' place."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="A folder for report.json, report.html and report.txt."),
    ] = None,
    device: DeviceOption = None,
    target: AnalysedOption = None,
    values: Annotated[
        int | None,
        typer.Option(
            "--values", metavar="N", min=1, help="Singular values per weight; as many as are cheap by default."
        ),
    ] = None,
    candidates: Annotated[
        bool, typer.Option("--candidates/--no-candidates", help="Compare the formats that could hold the change.")
    ] = True,
    rows: RowsOption = "error",
    prefix: PrefixOption = "auto",
    nonfinite: NonfiniteOption = "error",
    model: TellingOption = None,
    seed: SeedOption = 0,
    wide: Annotated[
        bool, typer.Option("--wide", help="A row for every weight with all of its numbers, wider than 80 columns.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what rank a fine-tuning is, and which format holds it.

    By weight and across layers and roles, above the rounding noise; with figures where --out is given.

    Example: tensoradapt analyze base/ tuned/ --out report

    A set of adapters of one model is compared likewise.

    Example: tensoradapt analyze --adapter one/ --adapter two/ --adapter three/
    """
    from tensoradapt.cli.run.analyze import run

    options = {"values": values, "targets": target or (), "candidates": candidates, "seed": seed}
    reading = {"rows": rows, "prefix": prefix, "nonfinite": nonfinite, "model": model}
    run(base, tuned, adapter or (), out, device=device, options=options, reading=reading, wide=wide, as_json=as_json)
