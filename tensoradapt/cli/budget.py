"""`tensoradapt budget`: parameters of several presets over a range of ranks, and the largest ranks within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tensoradapt.budget import BudgetTable, SolvedSpec, has_rank
from tensoradapt.cli.options import (
    JsonOption,
    ModelOption,
    SetOption,
    TargetOption,
    emit,
    parameters,
    parse_ranks,
    progress_console,
)
from tensoradapt.errors import SpecError
from tensoradapt.io.atomic import atomic
from tensoradapt.plots import plot_budget
from tensoradapt.presets import PRESETS
from tensoradapt.presets import preset as make_preset
from tensoradapt.scan import budget as tabulate
from tensoradapt.scan import scan, solve_rank
from tensoradapt.spec import Spec


def budget(
    model: ModelOption,
    preset: Annotated[list[str], typer.Option("--preset", help="A preset's name; may be given several times.")],
    target: TargetOption = None,
    ranks: Annotated[str, typer.Option("--ranks", help="1:64 (inclusive), 1:64:4 in steps, or 1,2,4.")] = "1:16",
    set_: SetOption = None,
    max_parameters: Annotated[
        int | None, typer.Option("--max-parameters", help="Also solve for the largest ranks within it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A figure (.png, .svg, .pdf) or a table (.csv, .json).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tabulate parameters, bytes and FLOP per token of presets over ranks; draw them; solve for ranks under a budget.

    Example: tensoradapt budget --model config.json --preset lora --preset lotr --target query --out budget.png
    """
    specs = {name: _spec(name, target, set_) for name in preset}
    asked = parse_ranks(ranks)
    sites = scan(model)
    table = tabulate(specs, sites, asked)
    solved = (
        {}
        if max_parameters is None
        else {
            name: solve_rank(spec, sites, max_parameters=max_parameters)
            for name, spec in specs.items()
            if has_rank(spec)
        }
    )
    if out is not None:
        _write(table, out, max_parameters)
        progress_console().print(f"wrote {out}", markup=False, highlight=False)
    if as_json:
        return emit(
            json.dumps({**json.loads(table.to_json()), "solutions": {name: _solution(s) for name, s in solved.items()}})
        )
    emit("\n".join([str(table), *(_line(name, s, max_parameters) for name, s in solved.items())]))


def _spec(name: str, targets: list[str] | None, pairs: list[str] | None) -> Spec:
    """A preset with those of the parameters set that it has; one that no preset has is an error."""
    given = parameters(None, targets, pairs)
    own = {key for row in PRESETS.values() for key in row.parameters} - set(
        PRESETS[name].parameters if name in PRESETS else ()
    )
    return make_preset(name, **{key: value for key, value in given.items() if key not in own})


def _solution(solution: SolvedSpec) -> dict[str, Any]:
    return {"rank": solution.rank, "ranks": dict(solution.ranks), "num_trainable": solution.num_trainable}


def _line(name: str, solution: SolvedSpec, limit: int | None) -> str:
    spread = sorted(set(solution.ranks.values()))
    groups = "" if len(spread) == 1 else f"; by group {spread[0]} to {spread[-1]}"
    return f"{name}: rank {solution.rank}{groups}: {solution.num_trainable:,} of {limit:,} parameters"


def _write(table: BudgetTable, out: Path, max_parameters: int | None) -> None:
    text = {".csv": table.to_csv, ".json": table.to_json}.get(out.suffix)
    if text is None:
        plot_budget(table, out, max_parameters=max_parameters)
    elif out.is_dir():
        raise SpecError(f"{out} is a folder", hint="give a file")
    else:
        with atomic(out) as temporary:
            temporary.write_text(text(), encoding="utf-8")
