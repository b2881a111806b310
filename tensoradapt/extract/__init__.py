"""Extraction: checkpoints + spec -> fitted, saved adapter."""

from tensoradapt.extract.preview import Preview, preview
from tensoradapt.extract.result import Extraction
from tensoradapt.extract.run import extract

__all__ = ["Extraction", "Preview", "extract", "preview"]
