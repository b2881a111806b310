"""The work of `tensoradapt info`."""

from __future__ import annotations

from pathlib import Path

from tensoradapt.cli.run.printing import emit, emit_json
from tensoradapt.io.card import maker
from tensoradapt.peft import open_adapter


def run(adapter: str, *, wide: bool, as_json: bool) -> None:
    """Read an adapter, and print it."""
    saved = open_adapter(adapter)
    plan, path = saved.plan, str(saved.path or adapter)
    made = maker(Path(path).parent if saved.path else Path(path))
    if as_json:
        return emit_json({**plan.to_dict(), "path": path, "base": {"name": plan.model, **saved.base}, "made": made})
    base = " ".join(filter(None, (plan.model or "a model without a name", saved.base.get("revision"))))
    lines = [f"{path}: an adapter of {base}", f"{plan.in_words}", *([f"made by {made}"] if made else [])]
    emit("\n".join([*lines, "", plan.text(wide=wide)]))
