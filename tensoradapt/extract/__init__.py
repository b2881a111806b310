"""Extraction: checkpoints + spec -> fitted, saved adapter."""

from tensoradapt.extract.run import Extraction, extract

__all__ = ["Extraction", "extract"]
