"""PEFT folders in and out."""

from tensoradapt.peft.card import Exported
from tensoradapt.peft.export import export_peft
from tensoradapt.peft.imports import import_peft
from tensoradapt.peft.opening import open_adapter

__all__ = ["Exported", "export_peft", "import_peft", "open_adapter"]
