"""The work of `tensoradapt plan`."""

from __future__ import annotations

from pathlib import Path

from tensoradapt.cli.options import Choice
from tensoradapt.cli.run.printing import note, show
from tensoradapt.cli.run.progress import progress
from tensoradapt.cli.run.specs import make_spec
from tensoradapt.paths import expand
from tensoradapt.scan import plan


def run(model: str, choice: Choice, *, out: Path | None, wide: bool, as_json: bool) -> None:
    """Plan, print the plan, and write its spec."""
    with progress("plan") as tell:
        made = plan(make_spec(choice), model, progress=tell)
    if out is not None:
        made.spec.save(expand(out))
        note(f"wrote {expand(out)}")
    show(made, as_json=as_json, text=made.text(wide=wide))
