"""Safetensors files with tensors more than they had: a new header, behind which the old contents stay as they are.

Invariant: a file's own tensors keep their names, their order and their bytes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.io.shards import DTYPES, Shard
from tensoradapt.sites import read_header, read_object

ALIGNED = 8  # bytes: what the format wants a header's length to be a multiple of


def is_of_another_module(path: str, names: Collection[str]) -> bool:
    """Whether no tensor is of the module that has a parameter: not even under another name, `gamma` for `weight`."""
    module = f".{path.rpartition('.')[0]}."
    return not any(module.endswith(f".{owner}.") for name in names if (owner := name.rpartition(".")[0]))


def appendable(added: Mapping[str, Tensor], where: str, dtypes: Sequence[torch.dtype]) -> dict[str, Tensor]:
    """Trained tensors that a base lacks, in the dtype of its weights. Raises FileError where they are no model's of it.

    `dtypes` are those of the weights that the base has and the adapter `where` changes.
    """
    numbered = [name for name in added if name[0].isdecimal()]
    if numbered or (added and not dtypes):
        raise FileError(
            f"{where} trains {', '.join(numbered or added)}, which the base lacks",
            got="modules beside the model in a container" if numbered else "no weight that the base has",
            hint="load the whole model, merge there (adapter.merge_and_detach()) and save it",
        )
    return {name: tensor.detach().cpu().to(dtypes[0]).contiguous() for name, tensor in added.items()}


def appended(added: Mapping[str, Tensor]) -> str:
    """What to say of tensors that a base had none of."""
    return (
        f"added, as the base has none: {', '.join(added)}; load the folder with the class that the adapter was trained "
        "on (transformers 5 or newer where that class puts a prefix before the other names)"
    )


def longer_head(shard: Shard, more: Mapping[str, Tensor]) -> bytes:
    """What stands before the tensors of a file that has `more` of them behind its own."""
    header, end = read_header(shard.file), shard.stamp.size - shard.begin
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in more.items():
        first, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // ALIGNED) * ALIGNED)
    return len(text).to_bytes(8, "little") + text


def longer_index(index: Path, file: str, more: Mapping[str, Tensor]) -> bytes:
    """An index that places `more` tensors in one of its files."""
    found = read_object(index.read_bytes())
    found["weight_map"] = {**found["weight_map"], **dict.fromkeys(more, file)}
    total = found.get("metadata", {}).get("total_size")
    if isinstance(total, int):
        found["metadata"]["total_size"] = total + sum(tensor.numel() * tensor.itemsize for tensor in more.values())
    return json.dumps(found, indent=2).encode()
