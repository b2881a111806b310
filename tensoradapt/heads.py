"""Heads: how many of them the rows of a weight are, told by the attention around it or by the config of its tower.

Two towers of a model (encoder and decoder, vision and text), and stages of one, may have unlike numbers of heads.
Invariant: what is said of a weight comes from the nearest module around it that says anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import nn

from tensoradapt.io.names import upwards
from tensoradapt.paths import origin
from tensoradapt.sites import Heads

COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "num_q_heads")
KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
Read = Callable[[str], Any]
SIZES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")


def heads_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What a model's config says of heads, and its name; and what stands around its modules, by their paths."""
    config = _read(model, "config")
    config = _read(config, "text_config") or config
    said = _read(_read(model, "config"), "_name_or_path")
    name = str(origin(said)) if isinstance(said, str) and said else type(model).__name__
    count, kv, size = _said(partial(_read, config))
    whole = {"heads": count, "kv_heads": kv, "head_dim": size, "name": name}
    return {**whole, "heads_at": _around(modules)}


def _around(modules: Mapping[str, nn.Module]) -> dict[str, Heads]:
    """The heads of every module's attention: its own, or the one of all attentions under the nearest module around."""
    said = {path: found for path, module in modules.items() if any(found := _own(module))}
    under: dict[str, set[Heads]] = {}
    for path, found in said.items():
        for above in upwards(path):
            under.setdefault(above, set()).add(found)
    result = {}
    for path in modules:
        near = next((above for above in upwards(path) if above in under), None)
        if near in said:
            result[path] = said[near]
        elif near is not None and len(under[near]) == 1:
            (result[path],) = under[near]
    return result


def _own(module: nn.Module) -> Heads:
    """What a module says of its heads: by its attributes, beside them by the config that it keeps."""
    count, kv, size = _said(vars(module).get)
    if count is None and size is None:
        return None, None, None
    config = _said(partial(_read, vars(module).get("config")))
    return (count or config[0], kv or (config[1] if count in (None, config[0]) else None), size or config[2])


def _said(read: Read) -> Heads:
    count, kv, size = (next(_numbers(read, names), None) for names in (COUNTS, KV_COUNTS, SIZES))
    return count, kv, size


def _numbers(read: Read, names: tuple[str, ...]) -> Iterator[int]:
    return (value for value in map(read, names) if type(value) is int and value > 0)


def _read(holder: Any, name: str) -> Any:
    """An attribute; None where there is none, or where a config refuses to say (it differs from layer to layer)."""
    with suppress(Exception):
        return getattr(holder, name, None)
    return None
