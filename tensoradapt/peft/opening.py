"""Any adapter that is on disk or in memory, without its model."""

from __future__ import annotations

import os
from pathlib import Path

from tensoradapt.io.native import file_of
from tensoradapt.io.saved import Savable, Saved, as_saved
from tensoradapt.paths import expand
from tensoradapt.peft.config import CONFIG, WEIGHTS
from tensoradapt.peft.imports import import_peft
from tensoradapt.scan import Model


def open_adapter(source: Savable | str | Path, model: Model | None = None) -> Saved:
    """The adapter that an `Adapter`, a `Saved`, an adapter's file or folder, or a PEFT folder means.

    Raises FileError where a path holds no adapter, or one that cannot be imported.
    """
    if isinstance(source, str | os.PathLike):
        path = expand(source)
        folder = path.parent if path.name in (CONFIG, WEIGHTS) else path
        if (folder / CONFIG).is_file() and not (path.is_dir() and file_of(path).is_file()):
            return import_peft(folder, model=model)
    return as_saved(source)
