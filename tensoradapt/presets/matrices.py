"""Presets that give every weight a network of its own: low rank, Kronecker, Hadamard, frozen bases, convolutions."""

from __future__ import annotations

from typing import Any

from tensoradapt.errors import SpecError
from tensoradapt.presets.sides import Folds, both_sides


def lora(rank: int = 8) -> dict[str, Any]:
    """Two factors for every weight: D[o,i] = sum_r B[o,r] A[r,i]."""
    return {
        **{"format": "tt", "axes": ("out", "in"), "rank": rank, "scale": "alpha/rank", "alpha": 8.0},
        "init": {"core_out": "zero", "core_in": "uniform(1/sqrt(in))"},
    }


def lokr(rank: int = 8, factor: int = -1, decompose: bool = True) -> dict[str, Any]:
    """A Kronecker product, its second factor of low rank: D[(a b),(c d)] = W1[a,c] sum_r W2a[b,r] W2b[r,d]."""
    if not decompose and rank != 8:
        raise SpecError(
            "lokr with decompose=False keeps W2 whole: it has no rank", got=f"rank={rank}", hint="leave rank out"
        )
    second = "W2a: out_1 r, W2b: r in_1" if decompose else "W2: out_1 in_1"
    laws = (
        {"W2a": "uniform(1/sqrt(r))", "W2b": "uniform(1/sqrt(in_1))"} if decompose else {"W2": "uniform(1/sqrt(in_1))"}
    )
    return {
        **{
            "format": "network",
            "network": f"W1: out_0 in_0, {second} -> out_0 out_1 in_0 in_1",
            "rank": rank,
            "excess": "cap",
        },
        **{"folds": dict.fromkeys(("out", "in"), f"factor:{factor}"), "scale": "alpha/rank" if decompose else "one"},
        **{"alpha": 8.0 if decompose else 1.0, "init": {"W1": "zero", **laws}},
    }


def krona(folds: Folds = "auto:2") -> dict[str, Any]:
    """A Kronecker product for every weight: D[(a b),(c d)] = W1[a,c] W2[b,d]."""
    return {
        **{"format": "network", "network": "W1: out_0 in_0, W2: out_1 in_1 -> out_0 out_1 in_0 in_1"},
        **{"folds": both_sides(folds), "scale": 1.0, "init": {"W1": "zero", "W2": "uniform(1/sqrt(in_1))"}},
    }


def loha(rank: int = 8) -> dict[str, Any]:
    """The entrywise product of two matrices of low rank: D[o,i] = (sum_r a1[o,r] b1[r,i]) (sum_s a2[o,s] b2[s,i])."""
    laws = {"w1_a": "uniform(1/sqrt(r))", "w2_a": "uniform(1/sqrt(s))", "w1_b": "uniform(1/sqrt(in))", "w2_b": "zero"}
    return {
        **{"format": "network", "network": "w1_a: out r, w1_b: r in, w2_a: out s, w2_b: s in -> out in"},
        **{"rank": rank, "excess": "cap", "scale": "alpha/rank", "alpha": 8.0, "init": laws},
    }


def vera(rank: int = 256) -> dict[str, Any]:
    """Frozen random factors shared by all weights, trained scalings: D[s,o,i] = b[s,o] sum_r B[o,r] d[s,r] A[r,i]."""
    laws = {"A": "uniform(sqrt(6/in))", "B": "uniform(sqrt(6/r))", "d": "constant(0.1)", "b": "zero"}
    return {
        **{"format": "network", "network": "b: site out, B: out r, d: site r, A: r in -> site out in", "rank": rank},
        **{"excess": "keep", "shapes": "slices", "scale": "one", "frozen": ("A", "B"), "init": laws},
    }


def lora_xs(rank: int = 16) -> dict[str, Any]:
    """A small trained matrix between frozen bases of the weight's own SVD: D[o,i] = sum_ab B[o,a] R[a,b] A[b,i]."""
    return {
        **{"format": "network", "network": "B: out a, R: a b, A: b in -> out in", "rank": rank, "excess": "cap"},
        **{"scale": "alpha/rank", "alpha": 16.0, "start": "nonzero", "frozen": ("A", "B")},
        "init": {"A": "weight", "B": "weight", "R": "normal(0.00001)"},
    }


def polar(rank: int = 8) -> dict[str, Any]:
    """A trained matrix between two factors that start orthonormal: D[o,i] = sum_ab U[o,a] G[a,b] V[i,b]."""
    return {
        **{"format": "tucker", "axes": ("out", "in"), "rank": rank, "excess": "cap"},
        **{"scale": "alpha/rank", "alpha": 8.0},
        "init": {"core": "zero", "factor_out": "orthogonal", "factor_in": "orthogonal"},
    }


def locon(rank: int = 8) -> dict[str, Any]:
    """Tucker-2 over the channels of a convolution: D[o,i,k] = sum_ab up[o,a] mid[a,b,k] down[i,b]."""
    return {
        **{
            "format": "tucker",
            "axes": ("out", "in", "kernel"),
            "compress": ("out", "in"),
            "rank": rank,
            "excess": "cap",
        },
        **{"scale": "alpha/rank", "alpha": 8.0, "default": "convolutions"},
        "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", "core": "uniform(1/sqrt(r_in*kernel))"},
    }
