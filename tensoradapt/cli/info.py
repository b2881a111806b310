"""`tensoradapt info`: what an adapter is, and what it is of."""

from __future__ import annotations

from typing import Annotated

import typer

from tensoradapt.cli.options import JsonOption, WideOption


def info(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter's folder or file, a checkpoint, or a PEFT folder.")
    ],
    wide: WideOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an adapter is, what it is of, and what made it.

    Example: tensoradapt info my-adapter
    """
    from tensoradapt.cli.run.info import run

    run(adapter, wide=wide, as_json=as_json)
