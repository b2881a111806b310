"""PEFT's families as presets: the tensors of one module become the factors of one rule.

Invariant: the rule's delta is PEFT's own, scale included; factors that a preset has no node for are contracted exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import FileError
from tensoradapt.peft.config import MERGE_FIRST, Config

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Found:
    """One module: its shape and kind, the preset with its parameters and further fields, and its factors by node."""

    shape: tuple[int, ...]
    kind: str
    preset: str
    parameters: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    factors: Tensors = field(default_factory=dict)
    dims: int = 0  # of a convolution's kernel, as it is stored; 0 where that is flat
    layout: str = ""  # how the model stores the weight; empty where no model tells
    joined: tuple[str, ...] = ()  # linear modules that are tied to it, and adapted with it


def lora(config: Config, path: str, held: Tensors) -> Found:
    """D = alpha/r B A, or alpha/sqrt(r) B A; an embedding has (B A)^T of its rows, a convolution a kernel in A."""
    embedding = "lora_embedding_A" in held
    a, b = (held["lora_embedding_A"], held["lora_embedding_B"]) if embedding else _sides(held)
    rank = _rank(config, path, a.shape[0])
    if b.dim() != a.dim() or b.shape[1] != rank or math.prod(b.shape[2:]) != 1:
        raise _misfit(config, path, f"A {tuple(a.shape)}, B {tuple(b.shape)}", "B (out, r) and A (r, in); no groups")
    kernel = {2: (), 3: (1, *a.shape[2:]), 4: tuple(a.shape[2:])}.get(a.dim())
    if kernel is None:
        raise _misfit(config, path, tuple(a.shape), "a matrix, or a kernel of one or two dimensions")
    kind = "embedding" if embedding else "conv" if kernel else "linear"
    scale = "alpha/sqrt(rank)" if config.values.get("use_rslora") else "alpha/rank"
    fields = {"scale": scale, "alpha": config.alpha(path), **_dropout(config, "lora_dropout", kind)}
    factors = {"core_out": b.flatten(1), "core_in": a.flatten(1)}
    return Found((b.shape[0], a.shape[1], *kernel), kind, "lora", {"rank": rank}, fields, factors, a.dim() - 2)


def _sides(held: Tensors) -> tuple[Tensor, Tensor]:
    return held["lora_A.weight"], held["lora_B.weight"]


def loha(config: Config, path: str, held: Tensors) -> Found:
    """D = alpha/r (w1_a w1_b) * (w2_a w2_b), entrywise; a core t[i,j,k] of a convolution goes into w_b."""
    factors: dict[str, Tensor] = {}
    kernel: tuple[int, ...] = ()
    inputs = 0
    rank = _rank(config, path, held["hada_w1_b"].shape[0])
    for side in ("w1", "w2"):
        a, b, core = held[f"hada_{side}_a"], held[f"hada_{side}_b"], held.get(f"hada_t{side[1]}")
        inputs = b.shape[-1]
        if core is not None:
            a, b, kernel = a.mT, _cored(config, path, core, b), tuple(core.shape[2:])
        _product(config, path, a, b)
        factors |= {f"{side}_a": a, f"{side}_b": b}
    if len({(factors[f"{s}_a"].shape, factors[f"{s}_b"].shape) for s in ("w1", "w2")}) > 1:
        raise _misfit(config, path, {k: tuple(t.shape) for k, t in factors.items()}, "two products of one shape")
    shape = (factors["w1_a"].shape[0], inputs, *kernel)
    fields = {"scale": "alpha/rank", "alpha": config.alpha(path)}
    return Found(shape, "conv" if kernel else "linear", "loha", {"rank": rank}, fields, factors)


def lokr(config: Config, path: str, held: Tensors) -> Found:
    """D = alpha/r W1 (x) W2, each whole or a product; a core of W2, and W1's product, are contracted."""
    one = held["lokr_w1"] if "lokr_w1" in held else _product(config, path, held["lokr_w1_a"], held["lokr_w1_b"])
    second, inputs, kernel = _second(config, path, held)
    if len(kernel) == 1:
        raise FileError(
            f"the LoKr of {path} beside {config.file} is no Kronecker product of its weight",
            got="W1 (a, c) and the W2 (b, d, k) of a Conv1d, which PEFT takes as (b, a d, c k) for a kernel",
            hint=MERGE_FIRST,
        )
    if one.dim() != 2 or len(kernel) not in (0, 2):
        raise _misfit(
            config, path, {k: tuple(t.shape) for k, t in held.items()}, "W1 (a, c), W2 (b, d) or (b, d, kh, kw)"
        )
    rows, cols = next(iter(second.values())).shape[0], list(second.values())[-1].shape[1]
    folds = {"out": [one.shape[0], rows], "in": [one.shape[1], cols]}
    fields = {"scale": config.alpha(path) / config.rank(path), "alpha": 1.0, "folds": folds}
    own = {"decompose": False} if "W2" in second else {"rank": _rank(config, path, second["W2b"].shape[0])}
    shape = (one.shape[0] * rows, one.shape[1] * inputs, *kernel)
    return Found(shape, "conv" if kernel else "linear", "lokr", own, fields, {"W1": one, **second})


def _second(config: Config, path: str, held: Tensors) -> tuple[dict[str, Tensor], int, tuple[int, ...]]:
    """W2, or its factors, with the kernel in their columns; how many inputs it has, and its kernel."""
    if "lokr_w2" in held:
        whole = held["lokr_w2"]
        return {"W2": whole.flatten(1)}, whole.shape[1], tuple(whole.shape[2:])
    a, b, core = held["lokr_w2_a"], held["lokr_w2_b"], held.get("lokr_t2")
    inputs, kernel = b.shape[1], () if core is None else tuple(core.shape[2:])
    a, b = (a, b) if core is None else (a.mT, _cored(config, path, core, b))
    _product(config, path, a, b)
    return {"W2a": a, "W2b": b}, inputs, kernel


def _product(config: Config, path: str, a: Tensor, b: Tensor) -> Tensor:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise _misfit(config, path, f"{tuple(a.shape)}, {tuple(b.shape)}", "(out, r) and (r, in)")
    return a @ b


def vera(config: Config, path: str, held: Tensors) -> Found:
    """D = diag(b) B diag(d) A with B and A shared: a module's own b and d; the number of inputs is not in the file."""
    b, d = held["vera_lambda_b"], held["vera_lambda_d"]
    if b.dim() != 1 or d.dim() != 1:
        raise _misfit(config, path, f"b {tuple(b.shape)}, d {tuple(d.shape)}", "b (out,) and d (r,)")
    rank = _rank(config, path, d.shape[0])
    fields = _dropout(config, "vera_dropout", "linear")
    return Found((b.shape[0], 0), "linear", "vera", {"rank": rank}, fields, {"b": b, "d": d})


FAMILIES: Mapping[str, Callable[[Config, str, Tensors], Found]] = {
    **{"LORA": lora, "LOHA": loha, "LOKR": lokr, "VERA": vera},
}


def projections(config: Config, held: Tensors, out: int, inp: int) -> dict[str, Tensor]:
    """VeRA's shared A (r, in) and B (out, r): those of the file, or drawn from its seed as PEFT draws them."""
    rank = int(config.values["r"])
    if held:
        a, b = held["vera_A"], held["vera_B"]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise _misfit(config, "vera_A and vera_B", f"{tuple(a.shape)}, {tuple(b.shape)}", f"rank {rank}")
        if a.shape[1] < inp or b.shape[0] < out:
            raise _misfit(config, "vera_A and vera_B", f"{tuple(a.shape)}, {tuple(b.shape)}", f"at least {out} x {inp}")
        return {"A": a[:, :inp], "B": b[:out]}
    generator = torch.Generator().manual_seed(int(config.values.get("projection_prng_key") or 0))
    bounds = {"A": (rank, inp), "B": (out, rank)}  # in this order, as PEFT draws them: kaiming uniform of the columns
    return {
        name: torch.empty(shape).uniform_(-math.sqrt(6 / shape[1]), math.sqrt(6 / shape[1]), generator=generator)
        for name, shape in bounds.items()
    }


def _cored(config: Config, path: str, core: Tensor, b: Tensor) -> Tensor:
    """sum_j t[i,j,k] b[j,in], as a matrix (i, in * kernel)."""
    if core.dim() != 4 or b.dim() != 2 or core.shape[1] != b.shape[0]:
        raise _misfit(config, path, f"{tuple(core.shape)}, {tuple(b.shape)}", "(r, r, kh, kw) and (r, in)")
    return torch.einsum("ijkl,jr->irkl", core, b).flatten(1)


def _rank(config: Config, path: str, found: int) -> int:
    """The rank of the tensors, which has to be the one that the config gives the module."""
    wanted = config.rank(path)
    if found != wanted:
        raise FileError(
            f"{path} has rank {found} in its tensors, and {wanted} in {config.file}",
            hint="PEFT would refuse it: mend r or rank_pattern",
        )
    return found


def _dropout(config: Config, key: str, kind: str) -> dict[str, float]:
    value = config.values.get(key) or 0.0
    return {"dropout": float(value)} if type(value) is float and 0 < value < 1 and kind != "embedding" else {}


def _misfit(config: Config, path: str, got: object, expected: str) -> FileError:
    return FileError(f"the tensors of {path} beside {config.file} do not fit together", got=got, expected=expected)
