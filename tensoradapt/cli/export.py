"""`tensoradapt export`: an adapter as a folder that servers read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tensoradapt.cli.options import AdapterArgument, JsonOption

ZerosOption = Annotated[
    bool, typer.Option("--zeros", help="Write unchanged modules and their siblings too, with zero factors.")
]


def export(
    adapter: AdapterArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    *,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="The format: peft.")] = "peft",
    layout: Annotated[
        str,
        typer.Option(
            "--layout", metavar="CHOICE", help="portable: one rank, read alike by all; compact: ranks by pattern."
        ),
    ] = "portable",
    consumer: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="SERVER", help="Refuse what this server does: vllm, llama.cpp, sglang, tgi, lorax."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="DTYPE", help="float32, bfloat16 or float16.")] = "float32",
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="The base, as plan takes it: targets become suffixes."),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", help="Truncate to this rank; formats of full matrix rank need it."),
    ] = None,
    base_name: Annotated[
        str | None, typer.Option("--base-name", metavar="NAME", help="The base model's name in the config.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task-type", metavar="TASK", help="PEFT's task, such as CAUSAL_LM.")
    ] = None,
    extras: Annotated[
        bool, typer.Option("--extras", help="Write modules trained whole too, as modules_to_save.")
    ] = False,
    zeros: ZerosOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a PEFT folder that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write an adapter as a PEFT folder, for the servers that read it.

    Re-opened and compared module by module before it is there.

    Example: tensoradapt export adapter --out served --for vllm
    """
    from tensoradapt.cli.run.export import run

    options: dict[str, Any] = {
        "layout": layout,
        "dtype": dtype,
        "model": model,
        "consumer": consumer,
        "base_name": base_name,
    }
    options |= {"task_type": task, "overwrite": overwrite, "rank": rank, "extras": extras, "zeros": zeros}
    run(adapter, out, to, options=options, as_json=as_json)
