"""`tensoradapt presets`: the table of adapter families."""

from __future__ import annotations

from tensoradapt.cli.options import JsonOption


def presets(as_json: JsonOption = False) -> None:
    """List the presets: formula, parameters, start, source.

    Example: tensoradapt presets --json
    """
    from tensoradapt.cli.run.presets import run

    run(as_json=as_json)
