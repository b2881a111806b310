"""`tensoradapt budget`: parameters of several presets over a range of ranks, and the largest ranks within a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.numbers import count
from tensoradapt.cli.options import JsonOption, ModelOption, PlannedOption, PresetsOption, SetOption, WideOption


def budget(
    model: ModelOption,
    preset: PresetsOption,
    target: PlannedOption = None,
    ranks: Annotated[
        str, typer.Option("--ranks", metavar="RANKS", help="1:64 (inclusive), 1:64:4 in steps, or 1,2,4.")
    ] = "1:16",
    set_: SetOption = None,
    max_parameters: Annotated[
        str | None,
        typer.Option(
            "--max-parameters",
            metavar="N",
            help="Also solve for the largest ranks within it: 30000, or 30k.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="A figure (.png, .svg, .pdf, .pgf) or a table (.csv, .json)."),
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tabulate parameters over ranks; find the ranks for a budget.

    A line for a rank, a column for a preset; --json and a table that is written hold bytes and FLOP per token too.

    Example: tensoradapt budget --model bert --preset lora --preset lotr_by_role

    Example: tensoradapt budget --model bert --preset lora --max-parameters 30k
    """
    from tensoradapt.cli.run.budget import run

    limit = count(max_parameters)
    run(model, preset, target, set_, ranks=ranks, max_parameters=limit, out=out, wide=wide, as_json=as_json)
