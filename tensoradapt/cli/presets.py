"""`tensoradapt presets`: the table of adapter families, and one of them whole."""

from __future__ import annotations

from typing import Annotated

import typer

from tensoradapt.cli.options import JsonOption, WideOption, complete_presets


def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One preset, shown whole.", autocompletion=complete_presets)
    ] = None,
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """List the adapter families, or show one whole.

    Example: tensoradapt presets lotr_by_role
    """
    from tensoradapt.cli.run.presets import run

    run(name, wide=wide, as_json=as_json)
