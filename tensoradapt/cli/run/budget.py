"""The work of `tensoradapt budget`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensoradapt.budget import FEW, BudgetTable, SolvedSpec, has_rank
from tensoradapt.cli.run.printing import emit, emit_json, note
from tensoradapt.cli.run.progress import Report, progress
from tensoradapt.cli.run.specs import parameters, parse_ranks
from tensoradapt.errors import SpecError
from tensoradapt.paths import expand
from tensoradapt.plots import plot_budget
from tensoradapt.presets import PRESETS
from tensoradapt.presets import preset as make_preset
from tensoradapt.scan import budget, scan, solve_rank
from tensoradapt.sites import SiteMap
from tensoradapt.spec import Spec
from tensoradapt.tables import wrapped
from tensoradapt.textfiles import write_text


def run(
    model: str,
    presets: Sequence[str],
    targets: list[str] | None,
    pairs: list[str] | None,
    *,
    ranks: str,
    max_parameters: int | None,
    out: Path | None,
    wide: bool,
    as_json: bool,
) -> None:
    """Tabulate, solve, write and print."""
    specs = {name: _spec(name, targets, pairs) for name in presets}
    out, asked = out and expand(out), parse_ranks(ranks)
    with progress("budget") as tell:
        sites = scan(model)
        table = budget(specs, sites, asked, progress=tell)
        solved = {} if max_parameters is None else _solved(specs, sites, max_parameters, tell)
    if out is not None:
        _write(table, out, max_parameters)
        note(f"wrote {out}")
    if as_json:
        solutions = {name: _solution(solution) for name, solution in solved.items()}
        return emit_json({**json.loads(table.to_json()), "solutions": solutions})
    answers = [line for name, found in solved.items() for line in wrapped(_line(name, found, max_parameters))]
    if not wide and out is None and len(asked) > FEW:
        answers.append(f"all {len(asked)} ranks: --wide, or --out table.csv")
    emit("\n".join(answers if out is not None and answers else [table.text(wide=wide), *answers]))


def _solved(specs: Mapping[str, Spec], sites: SiteMap, limit: int, tell: Report) -> dict[str, SolvedSpec]:
    """The largest ranks within the limit, of every preset that has a rank."""
    able = {name: spec for name, spec in specs.items() if has_rank(spec)}
    found: dict[str, SolvedSpec] = {}
    for name, spec in able.items():
        tell(f"{name} within {limit:,} parameters", len(found), len(able))
        found[name] = solve_rank(spec, sites, max_parameters=limit)
    return found


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
        write_text(out, text())
