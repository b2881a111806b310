"""`tensoradapt verify`: an adapter against the two checkpoints that it stands for."""

from __future__ import annotations

from typing import Annotated

import typer

from tensoradapt.cli.numbers import share
from tensoradapt.cli.options import (
    AdapterArgument,
    BaseArgument,
    JsonOption,
    NonfiniteOption,
    PrefixOption,
    RowsOption,
    TellingOption,
    TunedArgument,
)


def verify(
    adapter: AdapterArgument,
    base: BaseArgument,
    tuned: TunedArgument,
    tolerance: Annotated[
        str | None,
        typer.Option(
            "--tolerance",
            metavar="E",
            help="The error over the whole change that is allowed, 0.1 or 10%; exit code 1 above it.",
        ),
    ] = None,
    within_targets: Annotated[
        bool, typer.Option("--within-targets", help="The tolerance is for the adapter's own weights alone.")
    ] = False,
    rows: RowsOption = "error",
    prefix: PrefixOption = "auto",
    nonfinite: NonfiniteOption = "error",
    model: TellingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare an adapter with all that differs between two checkpoints.

    The error over the whole change, and that over its own weights.

    Example: tensoradapt verify adapter base/ tuned/ --tolerance 0.1
    """
    from tensoradapt.cli.run.verify import run

    options = {
        "tolerance": share(tolerance, "--tolerance"),
        "within_targets": within_targets,
        "rows": rows,
        "prefix": prefix,
        "nonfinite": nonfinite,
        "model": model,
    }
    run(adapter, base, tuned, options=options, as_json=as_json)
