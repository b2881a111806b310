"""`tensoradapt convert`: an adapter of one format as one of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import (
    Choice,
    JsonOption,
    PresetOption,
    RankOption,
    SeedOption,
    SetOption,
    SpecOption,
    TargetOption,
)


def convert(
    adapter: Annotated[str, typer.Argument(help="A native adapter's folder or file, or a PEFT folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the new adapter.")],
    preset: PresetOption = None,
    rank: RankOption = None,
    target: TargetOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    error: Annotated[
        float | None, typer.Option("--error", help="The relative error that ranks are chosen for.")
    ] = None,
    max_parameters: Annotated[
        int | None, typer.Option("--max-parameters", help="A budget for all groups together; ranks are chosen for it.")
    ] = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert an adapter to another format, exactly where that can hold it; the error is stated where it cannot.

    Without --target all weights of the adapter are converted.

    Example: tensoradapt convert lora/ --preset lotr --rank 32 --out lotr
    """
    from tensoradapt.cli.run.convert import run

    options = {"error": error, "max_parameters": max_parameters, "seed": seed, "overwrite": overwrite}
    run(adapter, out, Choice(preset, rank, target, spec, set_), options=options, as_json=as_json)
