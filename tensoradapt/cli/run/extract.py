"""The work of `tensoradapt extract`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.cli.options import Choice
from tensoradapt.cli.run.printing import note, show, told
from tensoradapt.cli.run.progress import progress
from tensoradapt.cli.run.specs import make_spec, rank_note
from tensoradapt.distributed import team_of
from tensoradapt.extract import extract, preview


def run(
    base: str,
    tuned: str,
    out: Path,
    choice: Choice,
    *,
    error: float | str | None,
    device: str | None,
    options: Mapping[str, Any],
    dry_run: bool,
    wide: bool,
    as_json: bool,
) -> None:
    """Extract and print what was extracted, or print the plan of it."""
    spec, goal = make_spec(choice), error
    said = rank_note(choice, {"error": goal, "max_parameters": options["max_parameters"]})
    if dry_run:
        note(said)
        with told():
            found = preview(base, tuned, spec, out, error=goal, device=device, **options)
        return show(found, as_json=as_json)
    with told(), team_of(device) as (team, where), progress("extract", quiet=team.rank > 0) as tell:
        note(said if team.rank == 0 else "")
        shared: dict[str, Any] = {"device": where, "team": team, "progress": tell}
        result = extract(base, tuned, spec, out, error=goal, **options, **shared)
        if team.rank == 0:
            show(result, as_json=as_json, text=result.text(wide=wide))
