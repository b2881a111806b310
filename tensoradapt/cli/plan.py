"""`tensoradapt plan`: what a spec costs on a model, before any tensor exists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import (
    Choice,
    JsonOption,
    ModelOption,
    PlannedOption,
    PresetOption,
    RankOption,
    SetOption,
    SpecOption,
    WideOption,
)


def plan(
    model: ModelOption,
    preset: PresetOption = None,
    rank: RankOption = None,
    target: PlannedOption = None,
    spec: SpecOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", metavar="FILE", help="Write the spec, its targets as the plan found them (.yaml, .json)."
        ),
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter costs on a model, before any is made.

    Groups of weights, trainable parameters, bytes and FLOP per token. Without --target the preset's own set of weights
    is adapted, told by the names of the model's modules, such as q_proj and v_proj of every layer.

    Example: tensoradapt plan --model config.json --preset lotr_by_role --rank 8
    """
    from tensoradapt.cli.run.plan import run

    run(model, Choice(preset, rank, target, spec, set_), out=out, wide=wide, as_json=as_json)
