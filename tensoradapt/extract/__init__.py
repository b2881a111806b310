"""Extraction: checkpoints + spec -> fitted, saved adapter."""

from tensoradapt.extract.preview import Preview, preview
from tensoradapt.extract.run import Extraction, extract

__all__ = ["Extraction", "Preview", "extract", "preview"]
