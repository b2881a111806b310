"""`tensoradapt export`: an adapter as a folder that servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tensoradapt.cli.options import JsonOption


def export(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or file, or a PEFT folder.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    *,
    to: Annotated[str, typer.Option("--to", help="The format: peft.")] = "peft",
    layout: Annotated[
        str, typer.Option("--layout", help="portable: one rank, read alike by all; compact: ranks by pattern.")
    ] = "portable",
    consumer: Annotated[
        str | None, typer.Option("--for", help="Refuse what this server does: vllm or llama.cpp.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    model: Annotated[
        str | None, typer.Option("--model", help="The base, as plan takes it: targets become suffixes.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Truncate to this rank; formats of full matrix rank need it.")
    ] = None,
    base_name: Annotated[str | None, typer.Option("--base-name", help="The base model's name in the config.")] = None,
    task: Annotated[str | None, typer.Option("--task-type", help="PEFT's task, such as CAUSAL_LM.")] = None,
    extras: Annotated[
        bool, typer.Option("--extras", help="Write modules trained whole too, as modules_to_save.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a PEFT folder that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a PEFT folder, re-opened and compared module by module before it is there.

    Example: tensoradapt export adapter --to peft --out served --for vllm
    """
    from tensoradapt.cli.run.export import run

    options = {"layout": layout, "dtype": dtype, "model": model, "consumer": consumer, "base_name": base_name}
    options |= {"task_type": task, "overwrite": overwrite, "rank": rank, "extras": extras}
    run(adapter, out, to, options=options, as_json=as_json)
