"""The delta of every preset is that of its paper: plain loops over entries, heads, layers, roles, slots and gates.

Every loop is written from the published equation with `y = W x`, `W` of shape (out, in), `out = head * head_dim + j`.
What each paper shares, and over which sites, is written down as the key that sites of one tensor have in common.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import Convolutions, Toy

import tensoradapt as ta
from tensoradapt.plan import START

WIDTH, HEADS = 12, 4
QV, QKV, ATTENTION = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("up_proj", "down_proj")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class At:
    """One site: its layer and role, and its place among the sites that share its tensor."""

    path: str
    layer: int  # the number in the path
    name: str
    shape: tuple[int, ...]
    l: int = 0  # noqa: E741 - position among the layers of the tensor
    m: int = 0  # position among its roles, as the model has them
    s: int = 0  # position among its sites, as the model has them
    t: int = 0  # the first of its slots
    heads: int = HEADS


Entry = Callable[[Arrays, At, int, int], float]
Shared = Callable[[At], Any]


@dataclass(frozen=True)
class Paper:
    """How a preset is called in this test, the scale that follows, the delta's entries, and what shares a tensor."""

    call: Mapping[str, Any]
    scale: float
    entry: Entry
    shared: Shared
    preset: str = ""


def loop(*sizes: int) -> itertools.product:
    return itertools.product(*map(range, sizes))


def digits(number: int, sizes: tuple[int, ...]) -> list[int]:
    """Big-endian: the last digit changes fastest."""
    found = []
    for size in reversed(sizes):
        found.insert(0, number % size)
        number //= size
    return found


# -- the equations -----------------------------------------------------------------------------------------------------


def lora(f: Arrays, at: At, o: int, i: int) -> float:
    """D = B A."""
    return sum(f["core_out"][o, r] * f["core_in"][r, i] for r in range(f["core_in"].shape[0]))


def lotr(f: Arrays, at: At, o: int, i: int) -> float:
    """D_s = L M_s R^T, L and R shared by all sites."""
    left, core, right = f["factor_out"], f["core"][at.s], f["factor_in"]
    return sum(left[o, a] * core[a, b] * right[i, b] for a, b in loop(*core.shape))


def lorta(f: Arrays, at: At, o: int, i: int) -> float:
    """x D: concat_h A diag(C_h C_m C_l) B, so that A is on the input and heads are on the output."""
    a, b, c_h, c_l, c_m = (f[f"factor_{n}"] for n in ("in", "head_dim", "head", "layer", "role"))
    h, j = divmod(o, b.shape[0])
    return sum(a[i, r] * b[j, r] * c_h[h, r] * c_l[at.l, r] * c_m[at.m, r] for r in range(a.shape[1]))


def train(cores: list[np.ndarray], places: list[int]) -> float:
    """One entry of a tensor train: a row vector through the slices of its cores."""
    vector = np.ones(1)
    for core, place in zip(cores, places, strict=True):
        vector = vector @ core[:, place, :]
    return float(vector[0])


def cores_of(f: Arrays, names: list[str]) -> list[np.ndarray]:
    """Cores with the ends' missing bonds put back."""
    found = [f[name] for name in names]
    return [found[0][None], *found[1:-1], found[-1][..., None]]


TT_FOLDS = {"in": [2, 3, 2], "out": [3, 4]}


def tt_lora(f: Arrays, at: At, o: int, i: int) -> float:
    """G1[i1] G2[i2] .. K1[o1] ..: the input's folds first."""
    names = ["core_in_0", "core_in_1", "core_in_2", "core_out_0", "core_out_1"]
    return train(cores_of(f, names), [*digits(i, (2, 3, 2)), *digits(o, (3, 4))])


def loretta(f: Arrays, at: At, o: int, i: int) -> float:
    """(alpha/r) B A with A (I x r) and B (r x O) tensor trains each."""
    total = 0.0
    for r in range(f["A_rank"].shape[1]):
        a = train(cores_of(f, ["A_0", "A_1", "A_2", "A_rank"]), [*digits(i, (2, 3, 2)), r])
        b = train(cores_of(f, ["B_rank", "B_0", "B_1"]), [r, *digits(o, (3, 4))])
        total += a * b
    return total


def slot_of(at: At, o: int, i: int, side: tuple[int, int]) -> tuple[int, int, int]:
    """The slot of an entry, row by row of the site's slots, and the entry's place in it."""
    columns = at.shape[1] // side[1]
    return at.t + (o // side[0]) * columns + i // side[1], o % side[0], i % side[1]


def fact_tt(f: Arrays, at: At, o: int, i: int) -> float:
    """D_t = U S_t V over d x d slots: U on the input, V on the output."""
    v, s, u = f["factor_out"], f["core"], f["factor_in"]
    t, o, i = slot_of(at, o, i, (len(v), len(u)))
    return sum(v[o, a] * s[t, a, b] * u[i, b] for a, b in loop(*s.shape[1:]))


def fact_tk(f: Arrays, at: At, o: int, i: int) -> float:
    """D_t = U (sum_c C[:, :, c] P[c, t]) V."""
    v, c, u, p = f["factor_out"], f["core"], f["factor_in"], f["factor_site"]
    t, o, i = slot_of(at, o, i, (len(v), len(u)))
    return sum(v[o, a] * c[k, a, b] * p[t, k] * u[i, b] for k, a, b in loop(*c.shape))


def metatt_4d(f: Arrays, at: At, o: int, i: int) -> float:
    """x D = x G1 G2[l] G3[m] G4."""
    names = ["core_in", "core_layer", "core_role", "core_out"]
    return train(cores_of(f, names), [i, at.l, at.m, o])


def metatt_5d(f: Arrays, at: At, o: int, i: int) -> float:
    """x D = x G1 G2[l] G3[m] G4[h] G5[j]."""
    names = ["core_in", "core_layer", "core_role", "core_head", "core_head_dim"]
    return train(cores_of(f, names), [i, at.l, at.m, *divmod(o, f["core_head_dim"].shape[1])])


def tenslora(*axes: str) -> Entry:
    """Tucker over (in, out or head_dim and head, then roles and layers): the core times a row of every factor."""

    def entry(f: Arrays, at: At, o: int, i: int) -> float:
        h, j = divmod(o, at.shape[0] // at.heads)
        place = {"in": i, "out": o, "head": h, "head_dim": j, "role": at.m, "layer": at.l}
        total = 0.0
        for bonds in loop(*f["core"].shape):
            term = f["core"][bonds]
            for axis, r in zip(axes, bonds, strict=True):
                term *= f[f"factor_{axis}"][place[axis], r]
            total += term
        return total

    return entry


def tenslora_cp(*axes: str) -> Entry:
    """CP over the same axes, weights fixed at one."""

    def entry(f: Arrays, at: At, o: int, i: int) -> float:
        h, j = divmod(o, at.shape[0] // at.heads)
        place = {"in": i, "out": o, "head": h, "head_dim": j, "role": at.m, "layer": at.l}
        return sum(
            float(np.prod([f[f"factor_{axis}"][place[axis], r] for axis in axes]))
            for r in range(f["factor_in"].shape[1])
        )

    return entry


def cara(f: Arrays, at: At, o: int, i: int) -> float:
    """Queries, keys, values: lam A1[k] A2[i] A3[h] A4[j]; the rest in d x d slots: lam P1[t] P2[i] P3[o]."""
    lam, sites, ins = f["lam"], f["factor_site"], f["factor_in"]
    if at.name in QKV:
        h, j = divmod(o, len(f["factor_head_dim"]))
        heads, dims = f["factor_head"], f["factor_head_dim"]
        return sum(lam[r] * sites[at.s, r] * ins[i, r] * heads[h, r] * dims[j, r] for r in range(len(lam)))
    t, o, i = slot_of(at, o, i, (len(f["factor_out"]), len(ins)))
    return sum(lam[r] * sites[t, r] * ins[i, r] * f["factor_out"][o, r] for r in range(len(lam)))


def lokr(f: Arrays, at: At, o: int, i: int) -> float:
    """W1 (x) (W2a W2b): row a * b_size + b, column c * d_size + d."""
    second = f["W2a"] @ f["W2b"]
    (a, b), (c, d) = divmod(o, second.shape[0]), divmod(i, second.shape[1])
    return f["W1"][a, c] * second[b, d]


def krona(f: Arrays, at: At, o: int, i: int) -> float:
    """W1 (x) W2."""
    return np.kron(f["W1"], f["W2"])[o, i]


def loha(f: Arrays, at: At, o: int, i: int) -> float:
    """(w1_a w1_b) * (w2_a w2_b), entrywise."""
    return (f["w1_a"] @ f["w1_b"])[o, i] * (f["w2_a"] @ f["w2_b"])[o, i]


def vera(f: Arrays, at: At, o: int, i: int) -> float:
    """diag(b_s) B diag(d_s) A."""
    return f["b"][at.s, o] * sum(f["B"][o, r] * f["d"][at.s, r] * f["A"][r, i] for r in range(len(f["A"])))


def lora_xs(f: Arrays, at: At, o: int, i: int) -> float:
    """B R A."""
    return float(f["B"][o] @ f["R"] @ f["A"][:, i])


def polar(f: Arrays, at: At, o: int, i: int) -> float:
    """U Theta V^T, for every weight of its own."""
    u, theta, v = f["factor_out"], f["core"], f["factor_in"]
    return sum(u[o, a] * theta[a, b] * v[i, b] for a, b in loop(*theta.shape))


def circuit(f: Arrays, side: tuple[int, ...], o: int, i: int, suffix: str = "") -> float:
    """Gates on two axes each, applied to the input's basis vector in the order of combinations(-1 .. -N, 2)."""
    state = np.zeros(side)
    state[tuple(digits(i, side))] = 1
    for one, two in itertools.combinations(range(-1, -len(side) - 1, -1), 2):
        k, n = one + len(side), two + len(side)  # k > n
        gate = f[f"gate_{n}{k}{suffix}"]  # (new k, new n, old k, old n)
        after = np.zeros(side)
        for place in loop(*side):
            for old_k, old_n in loop(side[k], side[n]):
                before = list(place)
                before[k], before[n] = old_k, old_n
                after[place] += gate[place[k], place[n], old_k, old_n] * state[tuple(before)]
        state = after
    return state[tuple(digits(o, side))]


def quanta(f: Arrays, at: At, o: int, i: int) -> float:
    """prod T - prod T0."""
    return circuit(f, (2, 3, 2), o, i) - circuit(f, (2, 3, 2), o, i, START)


def train_matrix(cores: list[np.ndarray], o: int, i: int) -> float:
    """One entry of a TT-matrix: cores (left, out, in, right)."""
    outs, ins = (digits(number, tuple(core.shape[k] for core in cores)) for number, k in ((o, 1), (i, 2)))
    vector = np.ones(1)
    for core, a, b in zip(cores, outs, ins, strict=True):
        vector = vector @ core[:, a, b, :]
    return float(vector[0])


def dota(f: Arrays, at: At, o: int, i: int) -> float:
    """TTM(G) - TTM(G0)."""
    names = ["core_0", "core_1", "core_2"]
    return train_matrix(cores_of(f, names), o, i) - train_matrix(cores_of(f, [n + START for n in names]), o, i)


def mpo_shared(f: Arrays, at: At, o: int, i: int) -> float:
    """G1[l] Gc G3[l]: outer cores private to the layer, the central one shared."""
    cores = cores_of({"0": f["core_0"][at.l], "1": f["core_1"], "2": f["core_2"][at.l]}, ["0", "1", "2"])
    return train_matrix(cores, o, i)


def locon(f: Arrays, at: At, o: int, i: int) -> float:
    """sum up[o, a] mid[a, b, k] down[b, c]; a column is channel * kernel + position."""
    up, mid, down = f["factor_out"], f["core"], f["factor_in"]
    c, k = divmod(i, mid.shape[2])
    return sum(up[o, a] * mid[a, b, k] * down[c, b] for a, b in loop(*mid.shape[:2]))


def alone(at: At) -> Any:
    return at.path


def of_shape(at: At) -> Any:
    return at.shape


def of_layer(at: At) -> Any:
    return at.layer, at.shape


def of_role(at: At) -> Any:
    return at.name


def everything(at: At) -> Any:
    return 0


def _tenslora() -> dict[str, Paper]:
    """Seven groupings, Tucker and CP: which of heads, roles and layers are axes; the others have their own."""
    found = {}
    rows = {"att": alone, "qkv": of_layer, "depth": of_role, "att_qkv": of_layer, "att_depth": of_role}
    rows |= {"qkv_depth": of_shape, "att_qkv_depth": of_shape}
    for name, shared in rows.items():
        out = ("head_dim", "head") if name.startswith("att") else ("out",)
        axes = ("in", *out, *(("role",) if "qkv" in name else ()), *(("layer",) if "depth" in name else ()))
        call = {"targets": QKV, "rank": 2, "scale": 0.7}
        found[f"tenslora_{name}"] = Paper(call, 0.7, tenslora(*axes), shared)
        cp = Paper({**call, "form": "cp"}, 0.7, tenslora_cp(*axes), shared, preset=f"tenslora_{name}")
        found[f"tenslora_{name} cp"] = cp
    ranks = {"in": 3, "head_dim": 2, "head": 1, "role": 2, "layer": 4}
    axes = ("in", "head_dim", "head", "role", "layer")
    call = {"targets": QKV, "rank": ranks, "scale": 0.7}
    found["tenslora per mode"] = Paper(call, 0.7, tenslora(*axes), of_shape, preset="tenslora_att_qkv_depth")
    return found


BLOCK = (*QV, *FEED_FORWARD)
QUANTA_FOLDS = {"out": [2, 3, 2], "in": [2, 3, 2]}
PAPERS: dict[str, Paper] = {
    "lora": Paper({"targets": QV, "rank": 2, "alpha": 3.0}, 1.5, lora, alone),
    "lora sqrt": Paper(
        {"targets": QV, "rank": 4, "alpha": 3.0, "scale": "alpha/sqrt(rank)"}, 1.5, lora, alone, preset="lora"
    ),
    "lotr": Paper({"targets": QV, "rank": 2, "alpha": 3.0}, 1.5, lotr, of_shape),
    "lotr mixed": Paper(
        {"targets": (*ATTENTION, *FEED_FORWARD), "rank": 3, "alpha": 3.0}, 1.0, lotr, of_shape, preset="lotr"
    ),
    "lotr_by_role": Paper({"targets": (*ATTENTION, *FEED_FORWARD), "rank": 3, "alpha": 3.0}, 3.0, lotr, of_role),
    "lorta": Paper({"targets": ATTENTION, "rank": 2, "alpha": 3.0}, 1.5, lorta, of_shape),
    "tt_lora": Paper({"targets": ("q_proj",), "rank": 2, "folds": TT_FOLDS, "alpha": 5.0}, 5.0, tt_lora, alone),
    "loretta": Paper({"targets": ("q_proj",), "rank": 3, "tt_rank": 2, "folds": TT_FOLDS}, 16 / 3, loretta, alone),
    "fact_tt": Paper({"targets": BLOCK, "rank": 2, "scale": 0.7}, 0.7, fact_tt, everything),
    "fact_tk": Paper({"targets": BLOCK, "rank": 2, "scale": 0.7}, 0.7, fact_tk, everything),
    "metatt_4d": Paper({"targets": ATTENTION, "rank": 2, "alpha": 3.0}, 3.0, metatt_4d, of_shape),
    "metatt_5d": Paper({"targets": ATTENTION, "rank": 2, "alpha": 3.0}, 3.0, metatt_5d, of_shape),
    **_tenslora(),
    "cara": Paper(
        {"targets": QKV, "projections": ("o_proj", *FEED_FORWARD), "rank": 2, "scale": 0.7},
        0.7,
        cara,
        lambda at: at.shape if at.name in QKV else 0,
    ),
    "lokr": Paper({"targets": (*QV, *FEED_FORWARD), "rank": 2, "factor": 4, "alpha": 3.0}, 1.5, lokr, alone),
    "lokr whole": Paper({"targets": QV, "factor": 4, "decompose": False}, 1.0, krona, alone, preset="lokr"),
    "krona": Paper({"targets": (*QV, *FEED_FORWARD), "folds": "auto:2", "scale": 0.7}, 0.7, krona, alone),
    "loha": Paper({"targets": QV, "rank": 2, "alpha": 3.0}, 1.5, loha, alone),
    "vera": Paper({"targets": (*QV, *FEED_FORWARD), "rank": 3}, 1.0, vera, of_shape),
    "lora_xs": Paper({"targets": QV, "rank": 2, "alpha": 3.0}, 1.5, lora_xs, alone),
    "polar": Paper({"targets": (*QV, *FEED_FORWARD), "rank": 2, "alpha": 3.0}, 1.5, polar, alone),
    "quanta": Paper({"targets": ("q_proj", "o_proj"), "folds": QUANTA_FOLDS}, 1.0, quanta, alone),
    "dota": Paper({"targets": QV, "rank": 3, "folds": "auto:3"}, 1.0, dota, alone),
    "mpo_shared": Paper({"targets": QV, "rank": 2, "folds": "auto:3"}, 1.0, mpo_shared, of_role),
    "locon": Paper({"targets": ("conv1", "conv2"), "rank": 2, "alpha": 3.0}, 1.5, locon, alone),
}


def sites_of(model: nn.Module, targets: tuple[str, ...]) -> list[At]:
    """The adapted modules, as the model has them."""
    found = []
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in targets and not path.startswith("tensoradapt"):
            number = int(path.split(".")[1]) if "." in path else 0
            heads = model.config.num_key_value_heads if name in ("k_proj", "v_proj") else HEADS
            found.append(At(path, number, name, tuple(module.weight.shape), heads=heads))
    return found


def placed(sites: list[At], paper: Paper) -> dict[str, At]:
    """Sites with their place among those that share their tensor."""
    found = {}
    for key in dict.fromkeys(map(paper.shared, sites)):
        members = [at for at in sites if paper.shared(at) == key]
        layers, names = sorted({at.layer for at in members}), list(dict.fromkeys(at.name for at in members))
        side = tuple(int(np.gcd.reduce([at.shape[k] for at in members])) for k in (0, 1))
        start = 0
        for s, at in enumerate(members):
            place = {"l": layers.index(at.layer), "m": names.index(at.name), "s": s, "t": start}
            found[at.path] = At(**{**vars(at), **place})
            start += (at.shape[0] // side[0]) * (at.shape[1] // side[1])
    return found


def attached(name: str, model: nn.Module) -> tuple[ta.Adapter, dict[str, At]]:
    """An adapter with every factor random, trained and frozen alike, and the places of its sites."""
    paper = PAPERS[name]
    adapter = ta.attach(model, ta.preset(paper.preset or name, dtype="float64", **paper.call))
    rng = np.random.default_rng(7)
    for tensor in adapter.tensors().values():
        tensor.data.copy_(torch.from_numpy(rng.standard_normal(tensor.shape)))
    targets = (*paper.call["targets"], *paper.call.get("projections", ()))
    return adapter, placed(sites_of(model, targets), paper)


def factors_of(adapter: ta.Adapter, path: str) -> tuple[str, Arrays]:
    """The group that holds a site, and its factors with the frozen copies of a difference."""
    group = next(name for name, group in adapter.groups.items() if path in group.paths)
    held = {node: tensor.detach().numpy() for node, tensor in adapter.factors(group).items()}
    starts = {
        k.rpartition(".")[2]: t.numpy()
        for k, t in adapter.tensors().items()
        if k.startswith(f"{group}.") and k.endswith(START)
    }
    return group, held | starts


def expected_delta(adapter: ta.Adapter, at: At, paper: Paper) -> np.ndarray:
    _, f = factors_of(adapter, at.path)
    rows, columns = at.shape[0], int(np.prod(at.shape[1:]))
    delta = [[paper.entry(f, at, o, i) for i in range(columns)] for o in range(rows)]
    return paper.scale * np.array(delta).reshape(at.shape)


def model_for(name: str, kv_heads: int = HEADS) -> nn.Module:
    return (Convolutions() if name == "locon" else Toy(layers=2, width=WIDTH, kv_heads=kv_heads)).double()


def check(name: str, model: nn.Module) -> None:
    adapter, sites = attached(name, model)
    planned = {path for group in adapter.groups.values() for path in group.paths}
    assert planned == set(sites)
    for path, at in sites.items():
        np.testing.assert_allclose(
            adapter.delta(path).detach(), expected_delta(adapter, at, PAPERS[name]), rtol=1e-9, atol=1e-9, err_msg=path
        )


def test_every_preset_has_an_equation():
    assert {paper.preset or name for name, paper in PAPERS.items()} == set(ta.PRESETS)


@pytest.mark.parametrize("name", PAPERS)
def test_delta_is_the_papers_equation(name):
    check(name, model_for(name))


@pytest.mark.parametrize("name", [n for n in PAPERS if n not in ("tt_lora", "loretta", "quanta", "locon")])
def test_delta_is_the_papers_equation_with_fewer_heads_of_keys_and_values(name):
    check(name, model_for(name, kv_heads=2))


@pytest.mark.parametrize("name", PAPERS)
def test_a_tensor_is_shared_by_the_sites_that_the_paper_says(name):
    model = model_for(name)
    adapter, sites = attached(name, model)
    shares = {path: factors_of(adapter, path)[0] for path in sites}
    for one, two in itertools.combinations(sites.values(), 2):
        same = PAPERS[name].shared(one) == PAPERS[name].shared(two)
        assert (shares[one.path] == shares[two.path]) == same, (one.path, two.path)


def test_veras_projections_are_slices_of_the_largest():
    adapter, sites = attached("vera", model_for("vera"))
    banks = {at.shape: factors_of(adapter, path)[1] for path, at in sites.items()}
    (largest_b,), (largest_a,) = (
        [f[n] for f in banks.values() if f[n].shape[k] == 24] for n, k in (("B", 0), ("A", 1))
    )
    for shape, held in banks.items():
        np.testing.assert_array_equal(held["B"], largest_b[: shape[0]])
        np.testing.assert_array_equal(held["A"], largest_a[:, : shape[1]])
    assert sum("bank" in key for key in adapter.tensors()) == 2


@pytest.mark.parametrize("name", PAPERS)
def test_the_output_moves_by_the_delta_once(name):
    """y = W x + b + delta x: the scale is in the delta, and nowhere else; the adapter's own scale multiplies it."""
    model = model_for(name)
    modules = dict(model.named_modules())
    path = next(iter(attached(name, model)[1]))
    (adapter,) = model.tensoradapt.children()
    layer = modules[path]
    x = torch.randn(2, 4, 7, 8) if name == "locon" else torch.randn(2, 5, layer.in_features)
    x = x.double()
    delta = adapter.delta(path).detach()
    with adapter.disabled():
        base = layer(x)
    for factor in (1.0, 0.5, -2.0):
        adapter.scale = factor
        apply = nn.functional.conv2d if name == "locon" else nn.functional.linear
        how = {"stride": layer.stride, "padding": layer.padding} if name == "locon" else {}
        target = base + factor * apply(x, delta, **how)
        np.testing.assert_allclose(layer(x).detach(), target.detach(), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(adapter.delta(path).detach(), factor * delta, rtol=1e-9, atol=1e-9)


DEFAULT_SCALES = {
    **{
        "lora": 8 / 8,
        "lotr": 1 / 8,
        "lotr_by_role": 4,
        "lorta": 8 / 8,
        "tt_lora": 16,
        "loretta": 16 / 8,
        "fact_tt": 1,
        "fact_tk": 1,
    },
    **{"metatt_4d": 1, "metatt_5d": 1, "cara": 1, "lokr": 8 / 8, "krona": 1, "loha": 8 / 8, "vera": 1},
    **{"lora_xs": 16 / 16, "polar": 8 / 8, "quanta": 1, "dota": 1, "mpo_shared": 1, "locon": 8 / 8},
    **{name: 1 for name in ta.PRESETS if name.startswith("tenslora")},
}


@pytest.mark.parametrize("name", ta.PRESETS)
def test_default_scale(name):
    targets = ("conv1", "conv2") if name == "locon" else ("q_proj", "v_proj")
    plan = ta.plan(ta.preset(name, targets=targets), model_for(name))
    assert {group.scale for group in plan.groups} == {DEFAULT_SCALES[name]}


@pytest.mark.parametrize("name", ["loretta", "fact_tt", "krona", "tenslora_att", "cara", "vera", "quanta"])
def test_alpha_is_refused_where_the_scale_does_not_use_it(name):
    with pytest.raises(ta.SpecError, match="alpha"):
        ta.preset(name, alpha=4.0)


def test_a_rank_without_effect_is_refused():
    with pytest.raises(ta.SpecError, match="no rank"):
        ta.preset("lokr", rank=4, decompose=False)


DEFAULTS = {
    **{
        "lora": {"rank": 8},
        "lotr": {"rank": 8},
        "lotr_by_role": {"rank": 8},
        "lorta": {"rank": 8},
        "tt_lora": {"rank": 5},
    },
    **{"loretta": {"rank": 8, "tt_rank": 5}, "lokr": {"rank": 8, "factor": -1}, "loha": {"rank": 8}},
    **{"vera": {"rank": 256}, "cara": {"rank": 32}, "tenslora_qkv": {"rank": 4, "form": "tucker"}},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_parameters(name):
    found = inspect.signature(ta.PRESETS[name].build).parameters
    assert {key: found[key].default for key in DEFAULTS[name]} == DEFAULTS[name]
