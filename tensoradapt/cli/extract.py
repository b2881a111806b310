"""`tensoradapt extract`: the adapter that holds a fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tensoradapt.cli.options import (
    DeviceOption,
    JsonOption,
    NonfiniteOption,
    PresetOption,
    RankOption,
    RowsOption,
    SeedOption,
    SetOption,
    SpecOption,
    TargetOption,
    emit,
    make_spec,
)
from tensoradapt.cli.progress import progress
from tensoradapt.distributed import team_of
from tensoradapt.errors import RankError
from tensoradapt.extract import extract as run_extraction
from tensoradapt.extract import preview


def extract(
    base: Annotated[str, typer.Argument(help="The base: a safetensors file, a folder, or a cached hub id[@revision].")],
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model, likewise.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the adapter.")],
    preset: PresetOption = None,
    rank: RankOption = None,
    target: TargetOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    error: Annotated[
        str | None,
        typer.Option(
            "--error",
            help="Ranks chosen for a relative error of every group, such as 0.1 (the spec's are no ceiling then); "
            "or noise: all that rises above the rounding of the stored dtypes.",
        ),
    ] = None,
    max_parameters: Annotated[
        int | None, typer.Option("--max-parameters", help="Ranks chosen for a budget of all groups together.")
    ] = None,
    device: DeviceOption = None,
    rows: RowsOption = "error",
    nonfinite: NonfiniteOption = "error",
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an adapter that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and the memory it will need.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Extract an adapter of any format from two checkpoints, with the error of every weight.

    Example: tensoradapt extract base/ tuned/ --preset lotr --rank 16 --target query --target value --out adapter

    Interrupted work goes on where it stopped when the same command is given again. On several GPUs or processes:
    torchrun --nproc-per-node 4 -m tensoradapt extract ...
    """
    made = make_spec(preset, rank, target, spec, set_)
    goal: dict[str, Any] = {"error": _error(error), "max_parameters": max_parameters}
    reading: dict[str, Any] = {"rows": rows, "nonfinite": nonfinite, "seed": seed}
    if dry_run:
        seen = preview(base, tuned, made, out, device=device, overwrite=overwrite, **goal, **reading)
        emit(json.dumps(seen.to_dict()) if as_json else str(seen))
        return
    with team_of(device) as (team, where), progress("extract", quiet=team.rank > 0) as tell:
        shared: dict[str, Any] = {"device": where, "overwrite": overwrite, "team": team, "progress": tell}
        result = run_extraction(base, tuned, made, out, **goal, **reading, **shared)
        if team.rank == 0:
            emit(json.dumps(result.to_dict()) if as_json else str(result))


def _error(text: str | None) -> float | str | None:
    if text is None or text == "noise":
        return text
    try:
        return float(text)
    except ValueError:
        raise RankError(f"--error {text!r} is no error", expected="a number such as 0.1, or noise") from None
