"""`tensoradapt merge`: a model folder with an adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import AdapterArgument, BaseArgument, JsonOption, TellingOption


def merge(
    base: BaseArgument,
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a merged folder that is there.")] = False,
    tied: Annotated[
        bool, typer.Option("--tied", help="Merge into tensors that other modules share: both change.")
    ] = False,
    model: TellingOption = None,
    as_json: JsonOption = False,
) -> None:
    """Merge an adapter into the weights of a model folder.

    A new folder, shard by shard, one tensor in memory at a time.

    Example: tensoradapt merge base/ adapter --out merged
    """
    from tensoradapt.cli.run.merge import run

    run(base, adapter, out, overwrite=overwrite, tied=tied, model=model, as_json=as_json)
