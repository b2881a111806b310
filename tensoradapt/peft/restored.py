"""The base's own weights that PEFT saves beside its factors and puts back when it loads them: resized embeddings, say.

Invariant: a weight is left out only where it was compared with the model's and is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import open_checkpoint
from tensoradapt.scan import Model
from tensoradapt.sites import SiteMap


def kept(held: Mapping[str, Tensor], model: Model | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Those of the weights that are not the model's, which replace them, and what to say of all of them."""
    own = {} if model is None else _weights(model, held)
    same = [path for path, tensor in held.items() if path in own and _equal(own[path], tensor)]
    found = {path: tensor for path, tensor in held.items() if path not in same}
    notes = [f"{path} in the folder is the model's own, and was not imported" for path in same]
    for path in found:
        why = (
            "it is not the model's"
            if path in own
            else "it was not compared: model= (--model) tells whether it is the model's"
        )
        notes.append(f"{path} in the folder replaces the model's weight, as PEFT restores it; {why}")
    return found, tuple(notes)


def _weights(model: Model, paths: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's weights by name: of a module in memory, or of the files of a folder; none where it has no values."""
    if isinstance(model, nn.Module):
        live: Any = dict(model.named_parameters(remove_duplicate=False))
        return {path: live[path].detach().cpu() for path in paths if path in live and not live[path].is_meta}
    found: dict[str, Tensor] = {}
    if isinstance(model, SiteMap | Mapping):
        return found
    with suppress(FileError, KeyError), open_checkpoint(model) as source:
        found |= {path: source.read(path).clone() for path in paths if path in source.entries}
    return found


def _equal(own: Tensor, tensor: Tensor) -> bool:
    """Whether two weights are one, in the dtype of either."""
    if own.shape != tensor.shape:
        return False
    return torch.equal(own.to(tensor.dtype), tensor) or torch.equal(own, tensor.to(own.dtype))
