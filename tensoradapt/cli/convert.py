"""`tensoradapt convert`: an adapter of one format as one of another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.numbers import count, share
from tensoradapt.cli.options import (
    AdapterArgument,
    Choice,
    ConvertedOption,
    JsonOption,
    PresetOption,
    RankOption,
    SeedOption,
    SetOption,
    SpecOption,
)


def convert(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder of the new adapter.")],
    preset: PresetOption = None,
    rank: RankOption = None,
    target: ConvertedOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    error: Annotated[
        str | None,
        typer.Option(
            "--error",
            metavar="E",
            help="The relative error that ranks are chosen for, such as 0.1 or 10%.",
        ),
    ] = None,
    max_parameters: Annotated[
        str | None,
        typer.Option(
            "--max-parameters",
            metavar="N",
            help="A budget for all groups together, 30000 or 30k; ranks are chosen for it.",
        ),
    ] = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert an adapter to another format.

    Exactly where that can hold it; the error is stated where it cannot.

    Example: tensoradapt convert lora/ --preset lotr_by_role --rank 32 --out lotr
    """
    from tensoradapt.cli.run.convert import run

    options = {
        "error": share(error, "--error"),
        "max_parameters": count(max_parameters),
        "seed": seed,
        "overwrite": overwrite,
    }
    run(adapter, out, Choice(preset, rank, target, spec, set_), options=options, as_json=as_json)
