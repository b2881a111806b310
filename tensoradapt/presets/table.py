"""Presets: a paper is a row. Functions from their declared parameters to the rules of a spec, and one table of them.

Invariant: a preset says nothing that the user could not write as a rule, and takes no parameter without using it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from tensoradapt.axes import parse
from tensoradapt.errors import SpecError
from tensoradapt.foreign import PEFT_WORDS, peft_word
from tensoradapt.presets.advice import ADVICE
from tensoradapt.presets.matrices import krona, locon, loha, lokr, lora, lora_xs, polar, vera
from tensoradapt.presets.operators import dota, loretta, mpo_shared, quanta, tt_lora
from tensoradapt.presets.stacks import (
    cara,
    fact_tk,
    fact_tt,
    lorta,
    lotr,
    lotr_by_role,
    metatt_4d,
    metatt_5d,
    tenslora_heads,
    tenslora_plain,
)
from tensoradapt.spec import Rule, Spec

# What every preset takes beside its own parameters: fields that change neither its network nor its sharing.
COMMON = (
    *(
        "name",
        "targets",
        "default",
        "exclude",
        "pattern",
        "parts",
        "layout",
        "delivery",
        "ranks",
        "excess",
        "shapes",
        "slot",
        "scale",
        "alpha",
    ),
    *("dropout", "dropout_at", "start", "zero", "init", "frozen", "train", "dtype"),
)


@dataclass(frozen=True)
class Preset:
    """One row: the function, the formula, the source, and what to know before using it.

    `build` returns the fields of a rule, or several rules' in a tuple, from its own parameters, all of which have a
    default. `family` is what files and tables call it: the function's name where it is not given. `use` says when to
    take it, `rate` is the learning rate to begin with.
    Raises SpecError on a function that is none, or has a parameter without a default.
    """

    build: Callable[..., Any]
    formula: str = ""
    cite: str = ""
    note: str = ""
    family: str = ""
    use: str = ""
    rate: float | None = None

    def __post_init__(self) -> None:
        needed = [p.name for p in _signature(self.build) if p.default is p.empty]
        if needed:
            raise SpecError(
                f"a preset's parameters have defaults, and {needed[0]!r} has none",
                hint=f"write {needed[0]}=... in the function's signature",
            )
        name = self.family or getattr(self.build, "__name__", type(self.build).__name__)
        if not isinstance(name, str) or not name.isidentifier():
            raise SpecError("a preset needs a name for files and tables", got=repr(name), hint="family='my_adapter'")
        object.__setattr__(self, "family", name)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The preset's own parameters."""
        return tuple(parameter.name for parameter in _signature(self.build))

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules with every parameter at its default."""
        return _rules(self.build())


def _signature(build: Any) -> list[inspect.Parameter]:
    """The parameters of a preset's function. Raises SpecError where it is none."""
    try:
        return list(inspect.signature(build).parameters.values())
    except (TypeError, ValueError):
        raise SpecError(
            "a preset's build is a function", got=repr(build)[:80], hint="write ta.Preset(build=my_function)"
        ) from None


_HEAD_NOTE = "out = head * head_dim + j, big-endian"


_TENSLORA = "arXiv:2509.19391"


_ROWS: dict[str, Preset] = {
    "lora": Preset(lora, "D = B A", "arXiv:2106.09685"),
    "lotr": Preset(lotr, "D[s] = L G[s] R^T", "arXiv:2402.01376", "L and R shared by all sites of one shape"),
    "lotr_by_role": Preset(
        lotr_by_role,
        "D[l,m] = L[m] G[l,m] R[m]^T",
        "arXiv:2402.01376",
        "LoTR with the sharing, start and scale that were best in our measurements",
    ),
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
    "tenslora_att": Preset(tenslora_heads(), "Tucker-3 or CP of (in, head_dim, head)", _TENSLORA, _HEAD_NOTE),
    "tenslora_qkv": Preset(tenslora_plain("role"), "Tucker-3 or CP of (in, out, role)", _TENSLORA),
    "tenslora_depth": Preset(tenslora_plain("layer"), "Tucker-3 or CP of (in, out, layer)", _TENSLORA),
    "tenslora_att_qkv": Preset(
        tenslora_heads("role"), "Tucker-4 or CP of (in, head_dim, head, role)", _TENSLORA, _HEAD_NOTE
    ),
    "tenslora_att_depth": Preset(
        tenslora_heads("layer"), "Tucker-4 or CP of (in, head_dim, head, layer)", _TENSLORA, _HEAD_NOTE
    ),
    "tenslora_qkv_depth": Preset(
        tenslora_plain("role", "layer"), "Tucker-4 or CP of (in, out, role, layer)", _TENSLORA
    ),
    "tenslora_att_qkv_depth": Preset(
        tenslora_heads("role", "layer"), "Tucker-5 or CP of (in, head_dim, head, role, layer)", _TENSLORA, _HEAD_NOTE
    ),
    "cara": Preset(
        cara,
        "D[k][h j, i] = sum_r lam[r] A1[k,r] A2[i,r] A3[h,r] A4[j,r]; feed-forward in d x d slots",
        "github.com/BonnBytes/CaRA",
        "`targets` are the attention's, `projections` the slots'; the paper's shared biases, no deltas, are left out",
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
    "polar": Preset(
        polar,
        "D = U G V^T, U and V with orthonormal columns",
        "arXiv:2506.03133",
        "`tensoradapt.optim.Stiefel` keeps U and V orthonormal; StelLA (arXiv:2510.01938) trains the same network",
    ),
    "quanta": Preset(quanta, "D = prod_(i<j) T_ij - prod_(i<j) T0_ij", "arXiv:2406.00132"),
    "dota": Preset(dota, "D = TTM(G) - TTM(G0), G0 from the weight", "arXiv:2412.20891"),
    "mpo_shared": Preset(
        mpo_shared, "D[l] = G1[l] .. Gc .. Gn[l], TT-matrix with a shared central core", "arXiv:2203.01104"
    ),
    "locon": Preset(locon, "D[o,i,k] = sum_ab up[o,a] mid[a,b,k] down[i,b]", "arXiv:2309.14859"),
}

PRESETS: dict[str, Preset] = {name: replace(row, **ADVICE[name]._asdict()) for name, row in _ROWS.items()}


def _rules(rows: Any) -> tuple[Rule, ...]:
    rows = rows if isinstance(rows, tuple) else (rows,)
    wrong = next((row for row in rows if not isinstance(row, Mapping)), None)
    if wrong is not None or not rows:
        raise SpecError(
            "a preset's build returns the fields of a rule, or a tuple of them",
            got=repr(wrong)[:80],
            expected="{'format': 'network', 'network': 'out r, r in -> out in', 'rank': rank}",
        )
    return tuple(Rule(**{"default": "query-value", **row}) for row in rows)


def preset(name: str | Preset, /, **parameters: Any) -> Spec:
    """The spec of a named adapter family: its own parameters, and further fields of the rule as keywords.

    `name` is one of `PRESETS`, or a `Preset` of your own. Raises SpecError on a name or a parameter that does not
    exist, listing those that do.
    """
    family, row = (name.family, name) if isinstance(name, Preset) else (str(name), _named(name))
    unknown = sorted(set(parameters) - set(row.parameters) - set(COMMON))
    if unknown and unknown[0] in PEFT_WORDS:
        raise peft_word(unknown[0], parameters[unknown[0]])
    if unknown:
        raise SpecError(
            f"preset {family!r} has no parameter {unknown[0]!r}",
            got=f"{unknown[0]}={parameters[unknown[0]]!r}",
            expected=f"its own: {', '.join(row.parameters) or 'none'}; of every rule: {', '.join(COMMON)}",
            hint="it would be another network: write a rule with a format of its own"
            if unknown[0] in Rule.model_fields
            else None,
        )
    own = {key: value for key, value in parameters.items() if key in row.parameters}
    extra = {key: value for key, value in parameters.items() if key not in row.parameters}
    rules = _rules(row.build(**own))
    shared = [_fitting(rule, rules, extra) for rule in rules]
    made = (_override(*each, family, first=k == 0) for k, each in enumerate(zip(rules, shared, strict=True)))
    return Spec(rules=tuple(made))


def _named(name: object) -> Preset:
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    close = get_close_matches(str(name), PRESETS, n=3)
    raise SpecError(
        f"no preset {name!r}",
        expected=", ".join(PRESETS),
        hint=f"did you mean {' or '.join(close)}?" if close else "name one of these, or give a ta.Preset of your own",
    )


def _fitting(rule: Rule, rules: Sequence[Rule], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Of a user's fields those that one of several rules has a use for: slots, and nodes by name.

    What no rule has a use for stays, and is refused as in any rule.
    """
    found = dict(extra)
    slotted = [r for r in rules if extra.get("shapes", r.shapes) == "slots"]
    if slotted and rule not in slotted:
        found.pop("slot", None)
    nodes = [set(parse(r.network)[0]) if r.network else set() for r in rules]
    others = set().union(*nodes) - nodes[rules.index(rule)]
    if isinstance(extra.get("init"), Mapping):
        found["init"] = {node: law for node, law in extra["init"].items() if node not in others}
    if isinstance(extra.get("frozen"), list | tuple):
        found["frozen"] = tuple(node for node in extra["frozen"] if node not in others)
    for name in (name for name in ("frozen", "zero") if isinstance(extra.get(name), str) and extra[name] in others):
        del found[name]
    return found


def _override(rule: Rule, extra: Mapping[str, Any], family: str, *, first: bool) -> Rule:
    """The rule with the user's fields; laws and excludes add up, targets and trained modules go to the first rule."""
    changed = {key: value for key, value in extra.items() if first or key not in ("targets", "default", "train")}
    more = changed.get("exclude", ())
    if rule.exclude and isinstance(more, str | list | tuple):
        changed["exclude"] = (*rule.exclude, *((more,) if isinstance(more, str) else more))
    laws = changed.get("init", {})
    init = {**rule.init, **laws} if isinstance(laws, Mapping) else laws
    own = rule.model_dump(exclude_defaults=True)
    if not str(changed.get("scale", "alpha")).startswith("alpha") and "alpha" not in changed:
        own.pop("alpha", None)  # a scale that is given takes the preset's alpha with it
    return Rule(**{**own, **changed, "init": init, "family": family})


def expand(spec: Spec) -> Spec:
    """The spec with every rule that names a preset replaced by that preset's rules."""
    rules: list[Rule] = []
    for rule in spec.rules:
        given = {key: getattr(rule, key) for key in rule.model_fields_set - {"preset", "options"}}
        rules += preset(rule.preset, **rule.options, **given).rules if rule.preset else [rule]
    return Spec(rules=tuple(rules))
