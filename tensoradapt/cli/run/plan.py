"""The work of `tensoradapt plan`."""

from __future__ import annotations

from tensoradapt.cli.options import Choice
from tensoradapt.cli.run.printing import show
from tensoradapt.cli.run.progress import progress
from tensoradapt.cli.run.specs import make_spec
from tensoradapt.scan import plan


def run(model: str, choice: Choice, *, as_json: bool) -> None:
    """Plan, and print the plan."""
    with progress("plan"):
        made = plan(make_spec(choice), model)
    show(made, as_json=as_json)
