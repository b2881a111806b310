"""Presets that share factors over a stack of weights: layers, roles, heads, slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensoradapt.errors import SpecError
from tensoradapt.presets.sides import HEADS


def lotr(rank: int = 8) -> dict[str, Any]:
    """Tucker-2 over the stack of all weights of a shape: D[s,o,i] = sum_ab L[o,a] G[s,a,b] R[i,b]."""
    return {
        **{"format": "tucker", "axes": ("site", "out", "in"), "compress": ("out", "in"), "rank": rank, "excess": "cap"},
        **{"scale": "alpha/rank", "alpha": 1.0},
        "init": {"core": "zero", "factor_out": "normal(1)", "factor_in": "normal(1)"},
    }


def lotr_by_role(rank: int = 8) -> dict[str, Any]:
    """Tucker-2 over the layers of each role, L and R orthonormal: D[l,m,o,i] = sum_ab L[m,o,a] G[l,m,a,b] R[m,i,b].

    Grouping, start and scale are those that scored best among LoTR's variants on held-out rows (docs/benchmarks.md).
    """
    return {
        **lotr(rank),
        **{"axes": ("layer", "out", "in"), "scale": "alpha", "alpha": 4.0},
        "init": {"core": "zero", "factor_out": "orthogonal", "factor_in": "orthogonal"},
    }


def lorta(rank: int = 8, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """One CP for all layers, roles and heads: D[l,m,(h j),i] = sum_r A[i,r] B[j,r] H[h,r] L[l,r] M[m,r]."""
    return {
        **{"format": "cp", "axes": ("in", "head", "head_dim", "layer", "role"), "folds": HEADS, "rank": rank},
        **{
            "excess": "keep",
            "scale": "alpha/rank",
            "alpha": 8.0,
            "heads": heads,
            "kv_heads": kv_heads,
            "default": "attention",
        },
        "init": {"factor_head_dim": "zero", "factor_in": "uniform(1/sqrt(r))"}
        | dict.fromkeys(("factor_head", "factor_layer", "factor_role"), "uniform(sqrt(6/r))"),
    }


def fact_tt(rank: int = 16) -> dict[str, Any]:
    """Tucker-2 over square slots of all weights: D[t,o,i] = sum_ab V[o,a] S[t,a,b] U[i,b]."""
    return {
        **{
            "format": "tucker",
            "axes": ("site", "out", "in"),
            "compress": ("out", "in"),
            "rank": rank,
            "shapes": "slots",
        },
        **{"excess": "cap", "scale": 1.0, "dropout_at": "code", "default": "block"},
        "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", "core": "uniform(1/sqrt(r_in))"},
    }


def fact_tk(rank: int = 16) -> dict[str, Any]:
    """Tucker-3 over square slots of all weights: D[t,o,i] = sum_abc C[c,a,b] P[t,c] V[o,a] U[i,b]."""
    laws = {"core": "uniform(sqrt(3)/r_in)", "factor_site": "uniform(sqrt(6/(r_site+site)))"}
    return {**fact_tt(rank), "compress": (), "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", **laws}}


def metatt_4d(rank: int = 8) -> dict[str, Any]:
    """One tensor train over (in, layer, role, out): D[l,m,o,i] = sum G1[i,a] G2[a,l,b] G3[b,m,c] G4[c,o]."""
    return {
        **{"format": "tt", "axes": ("in", "layer", "role", "out"), "rank": rank, "scale": "alpha", "alpha": 1.0},
        "init": {"core_in": "zero", "*": "eye"},
    }


def metatt_5d(rank: int = 8, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    """One tensor train over (in, layer, role, head, head_dim): the same, with G4[c,h,d] G5[d,j] for o = (h j)."""
    return {**metatt_4d(rank), "folds": HEADS, "heads": heads, "kv_heads": kv_heads}


def _tenslora(rank: Any, form: str, *axes: str) -> dict[str, Any]:
    if form not in ("tucker", "cp"):
        raise SpecError(f"tenslora has no form {form!r}", expected="tucker or cp", hint="write form='tucker'")
    out = ("head_dim", "head") if "head" in axes else ("out",)
    zero = "core" if form == "tucker" else "factor_in"
    row = {"format": form, "axes": ("in", *out, *(a for a in axes if a != "head")), "rank": rank, "excess": "keep"}
    return {
        **row,
        "folds": HEADS if "head" in axes else {},
        "scale": 1.0,
        "default": "qkv",
        "init": {zero: "zero", "*": "orthogonal"},
    }


def tenslora_heads(*axes: str) -> Callable[..., dict[str, Any]]:
    """TensLoRA over heads and the axes named."""

    def build(
        rank: Any = 4, form: str = "tucker", heads: int | None = None, kv_heads: int | None = None
    ) -> dict[str, Any]:
        return {**_tenslora(rank, form, "head", *axes), "heads": heads, "kv_heads": kv_heads}

    return build


def tenslora_plain(*axes: str) -> Callable[..., dict[str, Any]]:
    """TensLoRA over the axes named, heads left whole."""

    def build(rank: Any = 4, form: str = "tucker") -> dict[str, Any]:
        return _tenslora(rank, form, *axes)

    return build


def cara(
    rank: int = 32, heads: int | None = None, kv_heads: int | None = None, projections: Sequence[str] = ()
) -> tuple[dict[str, Any], ...]:
    """A CP for attention, D[k,(h j),i] = sum_r lam[r] A1[k,r] A2[i,r] A3[h,r] A4[j,r], and one for the rest's slots."""
    both = {"format": "network", "rank": rank, "excess": "keep", "scale": 1.0}
    laws = {"lam": "constant(1)", "factor_site": "normal(sqrt(2/(site+r)))", "factor_in": "zero", "*": "orthogonal"}
    nodes = "lam: r, factor_site: site r, factor_in: in r"
    attention = f"{nodes}, factor_head: head r, factor_head_dim: head_dim r -> site in head head_dim"
    blocks = f"{nodes}, factor_out: out r -> site in out"
    rest = {"targets": tuple(projections)} if projections else {"default": "block", "exclude": ("qkv",)}
    return (
        {
            **both,
            "network": attention,
            "folds": HEADS,
            "heads": heads,
            "kv_heads": kv_heads,
            "default": "qkv",
            "init": laws,
        },
        {**both, "network": blocks, "shapes": "slots", **rest, "init": laws},
    )
