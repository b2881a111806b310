"""`tensoradapt extract`: the adapter that holds a fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.numbers import count, share_or_noise
from tensoradapt.cli.options import (
    BaseArgument,
    Choice,
    DeviceOption,
    ExtractedOption,
    JsonOption,
    NonfiniteOption,
    PrefixOption,
    PresetOption,
    RankOption,
    RowsOption,
    SeedOption,
    SetOption,
    SpecOption,
    TellingOption,
    TunedArgument,
)


def extract(
    base: BaseArgument,
    tuned: TunedArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder of the adapter.")],
    preset: PresetOption = None,
    rank: RankOption = None,
    target: ExtractedOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    error: Annotated[
        str | None,
        typer.Option(
            "--error",
            metavar="E",
            help="Ranks chosen for a relative error of every group, such as 0.1 or 10% (the spec's are no ceiling "
            "then); or noise: all that rises above the rounding of the stored dtypes.",
        ),
    ] = None,
    max_parameters: Annotated[
        str | None,
        typer.Option(
            "--max-parameters",
            metavar="N",
            help="Ranks chosen for a budget of all groups together: 30000, or 30k.",
        ),
    ] = None,
    device: DeviceOption = None,
    rows: RowsOption = "error",
    prefix: PrefixOption = "auto",
    nonfinite: NonfiniteOption = "error",
    model: TellingOption = None,
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the memory it will need.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="One line for every group of weights.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Extract the adapter that holds a fine-tuning.

    With its error over the whole change. Interrupted work goes on where it stopped, given the same command again.

    Example: tensoradapt extract base tuned --preset lora --error 0.1 --out lora

    On several GPUs or processes: torchrun --nproc-per-node 4 -m tensoradapt extract ...
    """
    from tensoradapt.cli.run.extract import run

    reading = {"rows": rows, "prefix": prefix, "nonfinite": nonfinite, "model": model}
    options = {"max_parameters": count(max_parameters), "seed": seed, "overwrite": overwrite, **reading}
    choice = Choice(preset, rank, target, spec, set_)
    shown = {"dry_run": dry_run, "wide": wide, "as_json": as_json}
    run(base, tuned, out, choice, error=share_or_noise(error), device=device, options=options, **shown)
