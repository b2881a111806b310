"""Presets that cut both sides into folds: tensor trains, TT-matrices, gate circuits."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from tensoradapt.errors import SpecError
from tensoradapt.presets.sides import (
    Folds,
    both_sides,
    count_of,
)


def tt_lora(rank: int = 5, folds: Folds = "auto:4") -> dict[str, Any]:
    """A tensor train over the folds of in, then of out, for every weight: D = G1[i1] .. Gp[ip] K1[o1] .. Kq[oq]."""
    return {
        **{"format": "tt", "axes": ("in", "out"), "folds": both_sides(folds), "rank": rank, "start": "nonzero"},
        **{"scale": "alpha", "alpha": 16.0, "init": {"*": "unit_norm"}},
    }


def loretta(rank: int = 8, tt_rank: int = 5, folds: Folds = "auto:3") -> dict[str, Any]:
    """LoRA whose two factors are tensor trains: D[o,i] = sum_r B[o,r] A[r,i], A and B trains over folds and r."""
    sides = both_sides(folds)
    count_in, count_out = count_of(sides["in"]), count_of(sides["out"])
    ins = [f"A_{k}: {f'a_{k - 1} ' if k else ''}in_{k} a_{k}" for k in range(count_in)]
    outs = [f"B_{k}: b_{k} out_{k}{f' b_{k + 1}' if k < count_out - 1 else ''}" for k in range(count_out)]
    nodes = [*ins, f"A_rank: a_{count_in - 1} rank", "B_rank: rank b_0", *outs]
    bonds = (
        {f"a_{k}": tt_rank for k in range(count_in)} | {"rank": rank} | {f"b_{k}": tt_rank for k in range(count_out)}
    )
    axes = [f"in_{k}" for k in range(count_in)] + [f"out_{k}" for k in range(count_out)]
    laws = {f"A_{k}": f"normal((in + rank)**(-0.5/{count_in + 1})/sqrt(a_{k}))" for k in range(count_in)}
    laws |= {f"B_{k}": _loretta_law(k, count_out) for k in range(count_out)}
    laws |= {
        "A_rank": f"normal((in + rank)**(-0.5/{count_in + 1}))",
        "B_rank": f"normal((rank + out)**(-0.5/{count_out + 1})/sqrt(b_0))",
    }
    return {
        **{"format": "network", "network": f"{', '.join(nodes)} -> {' '.join(axes)}", "folds": sides, "rank": bonds},
        **{"excess": "cap", "start": "nonzero", "scale": 16.0 / rank, "init": laws},
    }


def _loretta_law(k: int, count: int) -> str:
    right = f"/sqrt(b_{k + 1})" if k < count - 1 else ""
    return f"normal((rank + out)**(-0.5/{count + 1}){right})"


def quanta(folds: Folds = "auto:3") -> dict[str, Any]:
    """A circuit of two-axis gates over the folds of a weight: D = prod_(i<j) T_ij - prod_(i<j) T0_ij."""
    sides = both_sides(folds)
    count = count_of(sides["in"])
    if count != count_of(sides["out"]) or count < 2:
        raise SpecError("quanta needs as many folds of out as of in, at least two", got=sides)
    gates = list(combinations(range(count - 1, -1, -1), 2))
    wire = [f"in_{k}" for k in range(count)]
    nodes: list[str] = []
    laws: dict[str, str] = {}
    bonds: dict[str, str] = {}
    for step, pair in enumerate(gates):
        before = [wire[k] for k in pair]
        for k in pair:
            last = all(k not in later for later in gates[step + 1 :])
            wire[k] = f"out_{k}" if last else f"w_{step}_{k}"
            bonds |= {} if last else {wire[k]: f"in_{k}"}
        nodes.append(f"gate_{pair[1]}{pair[0]}: {' '.join(wire[k] for k in pair)} {' '.join(before)}")
        laws[f"gate_{pair[1]}{pair[0]}"] = f"uniform(1/sqrt({'*'.join(before)}))"
    axes = " ".join([f"out_{k}" for k in range(count)] + [f"in_{k}" for k in range(count)])
    return {
        **{
            "format": "network",
            "network": f"{', '.join(nodes)} -> {axes}",
            "folds": sides,
            "rank": bonds,
            "excess": "keep",
        },
        **{"start": "difference", "scale": "one", "init": laws},
    }


def dota(rank: int = 8, folds: Folds = "auto:3") -> dict[str, Any]:
    """The change of a TT-matrix that starts as the weight's own: D = TTM(G) - TTM(G0)."""
    return {
        **{"format": "ttm", "axes": ("out", "in"), "folds": both_sides(folds), "rank": rank, "excess": "cap"},
        **{"start": "difference", "scale": "one", "init": {"*": "weight"}},
    }


def mpo_shared(rank: int = 8, folds: Folds = "auto:3") -> dict[str, Any]:
    """A TT-matrix per layer with one central core for all: D[l] = G1[l] .. Gc .. Gn[l]."""
    sides = both_sides(folds)
    count = count_of(sides["in"])
    if count != count_of(sides["out"]) or count < 3:
        raise SpecError("mpo_shared needs as many folds of out as of in, at least three", got=sides)
    nodes = []
    for k in range(count):
        left, right = f"r_{k - 1} " if k else "", f" r_{k}" if k < count - 1 else ""
        nodes.append(f"core_{k}: {'' if k == count // 2 else 'layer '}{left}out_{k} in_{k}{right}")
    axes = " ".join([f"out_{k}" for k in range(count)] + [f"in_{k}" for k in range(count)])
    laws = {f"core_{k}": f"uniform(1/sqrt(in_{k}{f'*r_{k - 1}' if k else ''}))" for k in range(count - 1)}
    return {
        **{"format": "network", "network": f"{', '.join(nodes)} -> layer {axes}", "folds": sides, "rank": rank},
        **{"excess": "cap", "scale": "one", "init": {**laws, f"core_{count - 1}": "zero"}},
    }
