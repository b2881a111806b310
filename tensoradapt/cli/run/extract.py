"""The work of `tensoradapt extract`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensoradapt.cli.options import Choice
from tensoradapt.cli.run.printing import emit, emit_json, show
from tensoradapt.cli.run.progress import progress
from tensoradapt.cli.run.specs import make_spec
from tensoradapt.distributed import team_of
from tensoradapt.errors import RankError
from tensoradapt.extract import extract, preview


def run(
    base: str,
    tuned: str,
    out: Path,
    choice: Choice,
    *,
    error: str | None,
    device: str | None,
    options: Mapping[str, Any],
    dry_run: bool,
    wide: bool,
    as_json: bool,
) -> None:
    """Extract and print what was extracted, or print the plan of it."""
    spec, goal = make_spec(choice), _error(error)
    if dry_run:
        return show(preview(base, tuned, spec, out, error=goal, device=device, **options), as_json=as_json)
    with team_of(device) as (team, where), progress("extract", quiet=team.rank > 0) as tell:
        shared: dict[str, Any] = {"device": where, "team": team, "progress": tell}
        result = extract(base, tuned, spec, out, error=goal, **options, **shared)
        if team.rank == 0:
            if as_json:
                emit_json(result.to_dict())
            else:
                emit(result.text(wide=wide))


def _error(text: str | None) -> float | str | None:
    if text is None or text == "noise":
        return text
    try:
        return float(text)
    except ValueError:
        raise RankError(f"--error {text!r} is no error", expected="a number such as 0.1, or noise") from None
