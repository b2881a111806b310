"""Names that the shell completes."""

from __future__ import annotations

from tensoradapt.presets import PRESETS


def preset_names(start: str) -> list[str]:
    """The presets whose names begin so."""
    return [name for name in PRESETS if name.startswith(start)]
