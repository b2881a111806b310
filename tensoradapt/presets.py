"""Presets: a paper is a row. Functions from their declared parameters to the rules of a spec, and one table of them.

Invariant: a preset says nothing that the user could not write as a rule, and takes no parameter without using it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations
from typing import Any

from tensoradapt.errors import SpecError
from tensoradapt.spec import Fold, Rule, Spec

Folds = Mapping[str, Fold] | Fold
QUERY_VALUE = (r"re:(.*\.)?(query|value|q_proj|v_proj|q_lin|v_lin|q|v)",)
ATTENTION = (
    r"re:(.*\.)?(query|key|value|q_proj|k_proj|v_proj|o_proj|q_lin|k_lin|v_lin|out_lin|q|k|v|o|attention\.output\.dense)",
)
QKV = (r"re:(.*\.)?(query|key|value|q_proj|k_proj|v_proj|q_lin|k_lin|v_lin|q|k|v)",)
FEED_FORWARD = (
    r"re:(.*\.)?(output\.dense|intermediate\.dense|o_proj|up_proj|down_proj|gate_proj|fc1|fc2|proj|lin1|lin2|out_lin|wi|wo|o)",
)
BLOCK = (QKV[0], FEED_FORWARD[0])
CONVOLUTIONS = (r"re:(.*\.)?[^.]*(conv|downsample|shortcut)[^.]*(\.\d+)?",)
HEADS: dict[str, Fold] = {"out": ["head", "head_dim"]}
# What every preset takes beside its own parameters: fields that change neither its network nor its sharing.
COMMON = (
    *(
        "name",
        "targets",
        "exclude",
        "pattern",
        "parts",
        "layout",
        "ranks",
        "excess",
        "shapes",
        "slot",
        "scale",
        "alpha",
    ),
    *("dropout", "dropout_at", "start", "init", "frozen", "train", "dtype"),
)


def lora(rank: int = 8) -> dict[str, Any]:
    return {
        **{"format": "tt", "axes": ("out", "in"), "rank": rank, "scale": "alpha/rank", "alpha": 8.0},
        "init": {"core_out": "zero", "core_in": "uniform(1/sqrt(in))"},
    }


def lotr(rank: int = 8) -> dict[str, Any]:
    return {
        **{"format": "tucker", "axes": ("site", "out", "in"), "compress": ("out", "in"), "rank": rank, "excess": "cap"},
        **{"scale": "alpha/rank", "alpha": 1.0},
        "init": {"core": "zero", "factor_out": "normal(1)", "factor_in": "normal(1)"},
    }


def lorta(rank: int = 8, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
    return {
        **{"format": "cp", "axes": ("in", "head", "head_dim", "layer", "role"), "folds": HEADS, "rank": rank},
        **{
            "excess": "keep",
            "scale": "alpha/rank",
            "alpha": 8.0,
            "heads": heads,
            "kv_heads": kv_heads,
            "targets": ATTENTION,
        },
        "init": {"factor_head_dim": "zero", "factor_in": "uniform(1/sqrt(r))"}
        | dict.fromkeys(("factor_head", "factor_layer", "factor_role"), "uniform(sqrt(6/r))"),
    }


def tt_lora(rank: int = 5, folds: Folds = "auto:4") -> dict[str, Any]:
    return {
        **{"format": "tt", "axes": ("in", "out"), "folds": _both(folds), "rank": rank, "start": "nonzero"},
        **{"scale": "alpha", "alpha": 16.0, "init": {"*": "unit_norm"}},
    }


def loretta(rank: int = 8, tt_rank: int = 5, folds: Folds = "auto:3") -> dict[str, Any]:
    sides = _both(folds)
    count_in, count_out = _count(sides["in"]), _count(sides["out"])
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


def fact_tt(rank: int = 16) -> dict[str, Any]:
    return {
        **{
            "format": "tucker",
            "axes": ("site", "out", "in"),
            "compress": ("out", "in"),
            "rank": rank,
            "shapes": "slots",
        },
        **{"excess": "cap", "scale": 1.0, "dropout_at": "code", "targets": BLOCK},
        "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", "core": "uniform(1/sqrt(r_in))"},
    }


def fact_tk(rank: int = 16) -> dict[str, Any]:
    laws = {"core": "uniform(sqrt(3)/r_in)", "factor_site": "uniform(sqrt(6/(r_site+site)))"}
    return {**fact_tt(rank), "compress": (), "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", **laws}}


def metatt_4d(rank: int = 8) -> dict[str, Any]:
    return {
        **{"format": "tt", "axes": ("in", "layer", "role", "out"), "rank": rank, "scale": "alpha", "alpha": 1.0},
        "init": {"core_in": "zero", "*": "eye"},
    }


def metatt_5d(rank: int = 8, heads: int | None = None, kv_heads: int | None = None) -> dict[str, Any]:
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
        "targets": QKV,
        "init": {zero: "zero", "*": "orthogonal"},
    }


def _tenslora_heads(*axes: str) -> Callable[..., dict[str, Any]]:
    def build(
        rank: Any = 4, form: str = "tucker", heads: int | None = None, kv_heads: int | None = None
    ) -> dict[str, Any]:
        return {**_tenslora(rank, form, "head", *axes), "heads": heads, "kv_heads": kv_heads}

    return build


def _tenslora_plain(*axes: str) -> Callable[..., dict[str, Any]]:
    def build(rank: Any = 4, form: str = "tucker") -> dict[str, Any]:
        return _tenslora(rank, form, *axes)

    return build


def cara(
    rank: int = 32, heads: int | None = None, kv_heads: int | None = None, projections: Sequence[str] = FEED_FORWARD
) -> tuple[dict[str, Any], ...]:
    both = {"format": "network", "rank": rank, "excess": "keep", "scale": 1.0}
    laws = {"lam": "constant(1)", "factor_site": "normal(sqrt(2/(site+r)))", "factor_in": "zero", "*": "orthogonal"}
    nodes = "lam: r, factor_site: site r, factor_in: in r"
    attention = f"{nodes}, factor_head: head r, factor_head_dim: head_dim r -> site in head head_dim"
    blocks = f"{nodes}, factor_out: out r -> site in out"
    return (
        {
            **both,
            "network": attention,
            "folds": HEADS,
            "heads": heads,
            "kv_heads": kv_heads,
            "targets": QKV,
            "init": laws,
        },
        {**both, "network": blocks, "shapes": "slots", "targets": tuple(projections), "init": laws},
    )


def lokr(rank: int = 8, factor: int = -1, decompose: bool = True) -> dict[str, Any]:
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
    return {
        **{"format": "network", "network": "W1: out_0 in_0, W2: out_1 in_1 -> out_0 out_1 in_0 in_1"},
        **{"folds": _both(folds), "scale": 1.0, "init": {"W1": "zero", "W2": "uniform(1/sqrt(in_1))"}},
    }


def loha(rank: int = 8) -> dict[str, Any]:
    laws = {"w1_a": "uniform(1/sqrt(r))", "w2_a": "uniform(1/sqrt(s))", "w1_b": "uniform(1/sqrt(in))", "w2_b": "zero"}
    return {
        **{"format": "network", "network": "w1_a: out r, w1_b: r in, w2_a: out s, w2_b: s in -> out in"},
        **{"rank": rank, "excess": "cap", "scale": "alpha/rank", "alpha": 8.0, "init": laws},
    }


def vera(rank: int = 256) -> dict[str, Any]:
    laws = {"A": "uniform(sqrt(6/in))", "B": "uniform(sqrt(6/r))", "d": "constant(0.1)", "b": "zero"}
    return {
        **{"format": "network", "network": "b: site out, B: out r, d: site r, A: r in -> site out in", "rank": rank},
        **{"excess": "keep", "shapes": "slices", "scale": "one", "frozen": ("A", "B"), "init": laws},
    }


def lora_xs(rank: int = 16) -> dict[str, Any]:
    return {
        **{"format": "network", "network": "B: out a, R: a b, A: b in -> out in", "rank": rank, "excess": "cap"},
        **{"scale": "alpha/rank", "alpha": 16.0, "start": "nonzero", "frozen": ("A", "B")},
        "init": {"A": "weight", "B": "weight", "R": "normal(0.00001)"},
    }


def quanta(folds: Folds = "auto:3") -> dict[str, Any]:
    sides = _both(folds)
    count = _count(sides["in"])
    if count != _count(sides["out"]) or count < 2:
        raise SpecError("quanta needs as many folds of out as of in, at least two", got=sides)
    gates = list(combinations(range(count - 1, -1, -1), 2))
    wire = [f"in_{k}" for k in range(count)]
    nodes, laws, bonds = [], {}, {}
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
    return {
        **{"format": "ttm", "axes": ("out", "in"), "folds": _both(folds), "rank": rank, "excess": "cap"},
        **{"start": "difference", "scale": "one", "init": {"*": "weight"}},
    }


def mpo_shared(rank: int = 8, folds: Folds = "auto:3") -> dict[str, Any]:
    sides = _both(folds)
    count = _count(sides["in"])
    if count != _count(sides["out"]) or count < 3:
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


def locon(rank: int = 8) -> dict[str, Any]:
    return {
        **{
            "format": "tucker",
            "axes": ("out", "in", "kernel"),
            "compress": ("out", "in"),
            "rank": rank,
            "excess": "cap",
        },
        **{"scale": "alpha/rank", "alpha": 8.0, "targets": CONVOLUTIONS},
        "init": {"factor_out": "zero", "factor_in": "uniform(1/sqrt(in))", "core": "uniform(1/sqrt(r_in*kernel))"},
    }


def _both(folds: Folds) -> dict[str, Fold]:
    """Folds of both sides, from a mapping or from one fold for both."""
    if not isinstance(folds, Mapping):
        return {"out": folds, "in": folds}
    if set(folds) != {"out", "in"}:
        raise SpecError("folds name both sides", got=sorted(folds), expected="out and in")
    return dict(folds)


def _count(fold: Fold) -> int:
    """The number of axes a fold makes, known before any size is."""
    if not isinstance(fold, str):
        return len(fold)
    return 2 if fold.startswith("factor") else int(fold.partition(":")[2] or 3)


@dataclass(frozen=True)
class Preset:
    """One row: the function, the formula, the source, and what to know before using it."""

    build: Callable[..., Any]
    formula: str
    cite: str
    note: str = ""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The preset's own parameters."""
        return tuple(inspect.signature(self.build).parameters)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules with every parameter at its default."""
        return _rules(self.build())


_HEAD_NOTE = "out = head * head_dim + j, big-endian"
_TENSLORA = "arXiv:2509.19391"
PRESETS: dict[str, Preset] = {
    "lora": Preset(lora, "D = B A", "arXiv:2106.09685"),
    "lotr": Preset(lotr, "D[s] = L G[s] R^T", "arXiv:2402.01376", "L and R shared by all sites of one shape"),
    "lorta": Preset(lorta, "D[l,m][h j, i] = sum_r A[i,r] B[j,r] H[h,r] L[l,r] M[m,r]", "arXiv:2410.04060", _HEAD_NOTE),
    "tt_lora": Preset(
        tt_lora,
        "D[o1..oq, i1..ip] = G1[i1] .. Gp[ip] K1[o1] .. Kq[oq]",
        "arXiv:2408.01008",
        "unit-norm cores: does not start at zero",
    ),
    "loretta": Preset(
        loretta,
        "D = B A, A = TT(i1..ip, rank), B = TT(rank, o1..oq)",
        "arXiv:2402.11417",
        "folds aligned to the factors; the published counts of unaligned folds do not apply; does not start at zero",
    ),
    "fact_tt": Preset(
        fact_tt,
        "D[t] = V S[t] U^T, t over d x d slots",
        "arXiv:2212.03145",
        "the paper trains with dropout=0.1 (at the code)",
    ),
    "fact_tk": Preset(
        fact_tk,
        "D[t] = V (sum_c C[:,:,c] P[t,c]) U^T",
        "arXiv:2212.03145",
        "the paper trains with dropout=0.1 (at the code)",
    ),
    "metatt_4d": Preset(metatt_4d, "D[l,m]^T = G1 G2[l] G3[m] G4", "arXiv:2506.09105"),
    "metatt_5d": Preset(metatt_5d, "D[l,m]^T[:, h j] = G1 G2[l] G3[m] G4[h] G5[:, j]", "arXiv:2506.09105", _HEAD_NOTE),
    "tenslora_att": Preset(_tenslora_heads(), "Tucker-3 or CP of (in, head_dim, head)", _TENSLORA, _HEAD_NOTE),
    "tenslora_qkv": Preset(_tenslora_plain("role"), "Tucker-3 or CP of (in, out, role)", _TENSLORA),
    "tenslora_depth": Preset(_tenslora_plain("layer"), "Tucker-3 or CP of (in, out, layer)", _TENSLORA),
    "tenslora_att_qkv": Preset(
        _tenslora_heads("role"), "Tucker-4 or CP of (in, head_dim, head, role)", _TENSLORA, _HEAD_NOTE
    ),
    "tenslora_att_depth": Preset(
        _tenslora_heads("layer"), "Tucker-4 or CP of (in, head_dim, head, layer)", _TENSLORA, _HEAD_NOTE
    ),
    "tenslora_qkv_depth": Preset(
        _tenslora_plain("role", "layer"), "Tucker-4 or CP of (in, out, role, layer)", _TENSLORA
    ),
    "tenslora_att_qkv_depth": Preset(
        _tenslora_heads("role", "layer"), "Tucker-5 or CP of (in, head_dim, head, role, layer)", _TENSLORA, _HEAD_NOTE
    ),
    "cara": Preset(
        cara,
        "D[k][h j, i] = sum_r lam[r] A1[k,r] A2[i,r] A3[h,r] A4[j,r]; feed-forward in d x d slots",
        "github.com/BonnBytes/CaRA",
        "`targets` are the attention's, `projections` the slots'; the paper's shared biases are no weight deltas and are left out",
    ),
    "lokr": Preset(lokr, "D = W1 (x) (W2a W2b)", "arXiv:2309.14859", "decompose=False keeps W2 whole"),
    "krona": Preset(krona, "D = W1 (x) W2", "arXiv:2212.10650"),
    "loha": Preset(loha, "D = (w1_a w1_b) * (w2_a w2_b), entrywise", "arXiv:2108.06098"),
    "vera": Preset(
        vera, "D[s] = diag(b[s]) B diag(d[s]) A", "arXiv:2310.11454", "A and B frozen, shared, slices of the largest"
    ),
    "lora_xs": Preset(
        lora_xs,
        "D = B R A, B and A from the SVD of the weight",
        "arXiv:2405.17604",
        "R ~ N(0, 1e-5): almost, not exactly, zero at the start",
    ),
    "quanta": Preset(quanta, "D = prod_(i<j) T_ij - prod_(i<j) T0_ij", "arXiv:2406.00132"),
    "dota": Preset(dota, "D = TTM(G) - TTM(G0), G0 from the weight", "arXiv:2412.20891"),
    "mpo_shared": Preset(
        mpo_shared, "D[l] = G1[l] .. Gc .. Gn[l], TT-matrix with a shared central core", "arXiv:2203.01104"
    ),
    "locon": Preset(locon, "D[o,i,k] = sum_ab up[o,a] mid[a,b,k] down[i,b]", "arXiv:2309.14859"),
}


def _rules(rows: Any) -> tuple[Rule, ...]:
    rows = rows if isinstance(rows, tuple) else (rows,)
    return tuple(Rule(**{"targets": QUERY_VALUE, **{k: v for k, v in row.items() if v is not None}}) for row in rows)


def preset(name: str, /, **parameters: Any) -> Spec:
    """The spec of a named adapter family: its own parameters, and further fields of the rule as keywords.

    Raises SpecError on a name or a parameter that does not exist, listing those that do.
    """
    if name not in PRESETS:
        close = get_close_matches(str(name), PRESETS, n=3)
        raise SpecError(
            f"no preset {name!r}",
            expected=", ".join(PRESETS),
            hint=f"did you mean {' or '.join(close)}?" if close else None,
        )
    row = PRESETS[name]
    unknown = sorted(set(parameters) - set(row.parameters) - set(COMMON))
    if unknown:
        raise SpecError(
            f"preset {name!r} has no parameter {unknown[0]!r}",
            got=f"{unknown[0]}={parameters[unknown[0]]!r}",
            expected=f"its own: {', '.join(row.parameters) or 'none'}; of every rule: {', '.join(COMMON)}",
        )
    own = {key: value for key, value in parameters.items() if key in row.parameters}
    extra = {key: value for key, value in parameters.items() if key not in row.parameters}
    return Spec(
        rules=tuple(_override(rule, extra, name, first=k == 0) for k, rule in enumerate(_rules(row.build(**own))))
    )


def _override(rule: Rule, extra: Mapping[str, Any], family: str, *, first: bool) -> Rule:
    """The rule with the user's fields; laws are merged, targets and trained modules go to a preset's first rule."""
    changed = {key: value for key, value in extra.items() if first or key not in ("targets", "train")}
    init = {**rule.init, **changed.get("init", {})}
    return Rule(**{**rule.model_dump(exclude_defaults=True), **changed, "init": init, "family": family})


def expand(spec: Spec) -> Spec:
    """The spec with every rule that names a preset replaced by that preset's rules."""
    rules: list[Rule] = []
    for rule in spec.rules:
        given = {key: getattr(rule, key) for key in rule.model_fields_set - {"preset", "options"}}
        rules += preset(rule.preset, **rule.options, **given).rules if rule.preset else [rule]
    return Spec(rules=tuple(rules))
