"""Initial factors: every preset's laws as bounds and deviations, seeds, bytes, and starts that change no output."""

import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from toys import Convolutions, Toy

import tensoradapt as ta
from tensoradapt.init import draw, evaluate
from tensoradapt.rows import Factor

# -- laws of the papers ----------------------------------------------------------------------------------

LAYERS, WIDTH, HEADS = 12, 768, 12
ROBERTA = {
    f"encoder.layer.{layer}.{role}": shape
    for layer in range(LAYERS)
    for role, shape in {
        **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), (WIDTH, WIDTH)),
        **{
            "attention.output.dense": (WIDTH, WIDTH),
            "intermediate.dense": (3072, WIDTH),
            "output.dense": (WIDTH, 3072),
        },
    }.items()
}
QV = ("query", "value")


def uniform(bound):
    """Flat between the bounds: the largest entry comes close to it, and the deviation is bound / sqrt(3)."""

    def check(values):
        assert 0.98 * bound * (1 - 4 / values.size) <= np.abs(values).max() <= bound
        assert abs(values.std() * np.sqrt(3) / bound - 1) < 5 / np.sqrt(values.size)
        assert abs(values.mean()) < 5 * bound / np.sqrt(3 * values.size)

    return check


def normal(std):
    def check(values):
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * values.size)
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
        assert np.abs(values).max() > 2 * std  # flat between +-sqrt(3) std would not pass

    return check


def constant(value):
    return lambda values: np.testing.assert_array_equal(values, np.float32(value))


def orthogonal(values):
    """Orthonormal columns, or rows where they are fewer."""
    matrix = values.reshape(-1, values.shape[-1]).astype(np.float64)
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-6)


def eye(values):
    """Every slice between the first and the last index is an identity."""
    for k in range(values.shape[1] if values.ndim == 3 else 1):
        matrix = values[:, k] if values.ndim == 3 else values
        np.testing.assert_array_equal(matrix, np.eye(*matrix.shape))


def unit_norm(values):
    assert abs(np.linalg.norm(values.astype(np.float64)) - 1) < 1e-6
    assert np.abs(values).max() < 3 * np.abs(values).mean()  # flat, not spiked


zero = constant(0)
_TUCKER = {"core": zero, "*": orthogonal}
_CP = {"factor_in": zero, "*": orthogonal}
_LORETTA_IN, _LORETTA_OUT = (WIDTH + 8) ** (-0.5 / 4), (8 + WIDTH) ** (-0.5 / 4)
LAWS = {
    "lora": ({"rank": 8}, {"core_in": uniform(768**-0.5), "core_out": zero}),
    "lotr": ({"rank": 8}, {"factor_out": normal(1), "factor_in": normal(1), "core": zero}),
    "lorta": (
        {"rank": 64, "heads": HEADS},
        {"factor_in": uniform(1 / 8), "factor_head_dim": zero, "*": uniform((6 / 64) ** 0.5)},
    ),
    "tt_lora": ({"rank": 5, "folds": {"in": [12, 8, 8], "out": [8, 8, 12]}}, {"*": unit_norm}),
    "loretta": (
        {"rank": 8, "tt_rank": 5, "folds": {"in": [12, 8, 8], "out": [8, 8, 12]}},
        {
            **{f"A_{k}": normal(_LORETTA_IN / 5**0.5) for k in range(3)},
            **{"A_rank": normal(_LORETTA_IN), "B_rank": normal(_LORETTA_OUT / 5**0.5)},
            **{"B_0": normal(_LORETTA_OUT / 5**0.5), "B_1": normal(_LORETTA_OUT / 5**0.5), "B_2": normal(_LORETTA_OUT)},
        },
    ),
    "fact_tt": ({"rank": 16}, {"factor_in": uniform(768**-0.5), "factor_out": zero, "core": uniform(16**-0.5)}),
    "fact_tk": (
        {"rank": 16},
        {
            **{"factor_in": uniform(768**-0.5), "factor_out": zero},
            **{"core": uniform((6 / (2 * 16**2)) ** 0.5), "factor_site": uniform((6 / (16 + 144)) ** 0.5)},
        },
    ),
    "metatt_4d": ({"rank": 8}, {"core_in": zero, "*": eye}),
    "metatt_5d": ({"rank": 8, "heads": HEADS}, {"core_in": zero, "*": eye}),
    **{
        name: ({"rank": 4, **({"heads": HEADS} if "att" in name else {})}, _TUCKER)
        for name in ta.PRESETS
        if name.startswith("tenslora")
    },
    "cara": (
        {"rank": 32, "heads": HEADS},
        {
            **{"lam": constant(1), "factor_in": zero, "*": orthogonal},
            **{
                "query_key_value.factor_site": normal((2 / (36 + 32)) ** 0.5),
                "factor_site": normal((2 / (108 + 32)) ** 0.5),
            },
        },
    ),
    "lokr": ({"rank": 8, "factor": 4}, {"W1": zero, "W2a": uniform(8**-0.5), "W2b": uniform((768 / 4) ** -0.5)}),
    "krona": ({"folds": "auto:2"}, {"W1": zero, "W2": uniform(24**-0.5)}),
    "loha": (
        {"rank": 8},
        {"w1_a": uniform(8**-0.5), "w1_b": uniform(768**-0.5), "w2_a": uniform(8**-0.5), "w2_b": zero},
    ),
    "vera": (
        {"rank": 64},
        {"A": uniform((6 / 768) ** 0.5), "B": uniform((6 / 64) ** 0.5), "d": constant(0.1), "b": zero},
    ),
    "lora_xs": ({"rank": 16}, {"R": normal(1e-5)}),
    "polar": ({"rank": 16}, {"core": zero, "*": orthogonal}),
    "lotr_by_role": ({"rank": 16}, {"core": zero, "*": orthogonal}),
    "quanta": (
        {"folds": {"in": [12, 8, 8], "out": [12, 8, 8]}},
        {"gate_12": uniform(1 / 8), "gate_02": uniform(96**-0.5), "gate_01": uniform(96**-0.5)},
    ),
    "dota": ({"rank": 2}, {}),
    "mpo_shared": (
        {"rank": 8, "folds": {"in": [12, 8, 8], "out": [12, 8, 8]}},
        {"core_0": uniform(12**-0.5), "core_1": uniform(64**-0.5), "core_2": zero},
    ),
    "locon": ({"rank": 8}, {"factor_out": zero, "factor_in": uniform(64**-0.5), "core": uniform((8 * 9) ** -0.5)}),
}
CONVOLUTIONS = {f"block.{n}.conv": (128, 64, 3, 3) for n in range(8)}


def plan_of(name, **more):
    call = {"targets": QV} if name not in ("fact_tt", "fact_tk", "cara", "locon") else {}
    call = {"targets": ("query", "key", "value")} if name.startswith("tenslora") else call
    return ta.plan(ta.preset(name, **call, **more), CONVOLUTIONS if name == "locon" else ROBERTA)


def check_laws(plan, laws):
    """All groups' factors of one node together, so that small ones are judged too."""
    drawn: dict[str, list] = {}
    for key, factor in plan.factors.items():
        if factor.law != "weight":
            node = key if key in laws else key.rpartition(".")[2]
            drawn.setdefault(node if node in laws else "*", []).append(draw(factor, 0).numpy())
    assert set(drawn) == set(laws)
    for node, values in drawn.items():
        pooled = laws[node] in (orthogonal, eye, unit_norm)
        for value in values if pooled else [np.concatenate([v.ravel() for v in values])]:
            laws[node](value)


def test_every_preset_has_its_laws():
    assert set(LAWS) == set(ta.PRESETS)


@pytest.mark.parametrize("name", LAWS)
def test_laws_of_the_paper(name):
    call, laws = LAWS[name]
    check_laws(plan_of(name, **call), laws)


@pytest.mark.parametrize("name", [name for name in LAWS if name.startswith("tenslora")])
def test_laws_of_tenslora_in_cp_form(name):
    check_laws(plan_of(name, **LAWS[name][0], form="cp"), _CP)


def test_lokr_and_vera_of_unequal_shapes():
    """LoKr's bounds follow each site's own folds, VeRA's the largest input."""
    check_laws(plan_of("lokr", rank=8, factor=4, decompose=False), {"W1": zero, "W2": uniform((768 / 4) ** -0.5)})
    plan = ta.plan(ta.preset("vera", rank=64, targets=["query", "output.dense"]), ROBERTA)
    laws = {"A": uniform((6 / 3072) ** 0.5), "B": uniform((6 / 64) ** 0.5), "d": constant(0.1), "b": zero}
    check_laws(plan, laws)


def test_loretta_starts_at_the_deviation_it_aims_for():
    """Entries of A = TT(I x r) have the deviation (I + r)^-1/2, up to the heavy tail of a product."""
    plan = plan_of("loretta", **LAWS["loretta"][0])
    drawn = [{k.rpartition(".")[2]: draw(f, seed) for k, f in plan.factors.items()} for seed in range(5)]
    entries = [torch.einsum("ia,ajb,bkc,cr->ijkr", f["A_0"], f["A_1"], f["A_2"], f["A_rank"]) for f in drawn]
    assert 0.6 < torch.stack(entries).std() / (768 + 8) ** -0.5 < 1.4


# -- factors taken from weights ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lora_xs_holds_the_truncated_svd_of_the_weight(dtype):
    model = Toy(layers=1, width=24).to(dtype)
    names = {torch.float32: "float32", torch.float64: "float64"}
    adapter = ta.attach(model, ta.preset("lora_xs", rank=5, targets=["up_proj", "down_proj"], dtype=names[dtype]))
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    for name, group in adapter.groups.items():
        f = {node: t.detach().double().numpy() for node, t in adapter.factors(name).items()}
        assert {t.dtype for t in adapter.factors(name).values()} == {dtype}
        weight = model.get_submodule(group.paths[0]).weight.detach().double().numpy()
        u, s, vh = np.linalg.svd(weight)
        np.testing.assert_allclose(f["B"] @ f["A"], (u[:, :5] * s[:5]) @ vh[:5], atol=tolerance)
        np.testing.assert_allclose(f["B"].T @ f["B"], np.eye(5), atol=tolerance)  # all singular values are in A
        np.testing.assert_allclose(np.linalg.norm(f["A"], axis=1), s[:5], atol=tolerance)


def test_dota_holds_the_truncated_tt_matrix_of_the_weight():
    model = Toy(layers=1, width=12).double()
    call = {"targets": ["q_proj"], "folds": {"out": [2, 3, 2], "in": [3, 2, 2]}, "dtype": "float64"}
    weight = model.layers[0].q_proj.weight.detach().numpy()
    errors = {rank: _dota_error(model, rank, call) for rank in (1, 2, 4, 6)}
    assert errors[6] < 1e-12  # the cuts' limits are 6 and 4: the weight itself
    tensor = weight.reshape(2, 3, 2, 3, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    for rank, error in errors.items():
        tails = [np.linalg.svd(tensor.reshape(left, -1), compute_uv=False)[rank:] for left in (6, 36)]
        lower, upper = max(np.linalg.norm(t) for t in tails), np.sqrt(sum(np.sum(t**2) for t in tails))
        assert lower - 1e-12 <= error <= upper + 1e-12, rank


def _dota_error(model, rank, call):
    adapter = ta.attach(model, ta.preset("dota", rank=rank, **call))
    (name,) = adapter.groups
    a, b, c = (adapter.factors(name)[f"core_{k}"].detach().numpy() for k in range(3))
    start = np.einsum("oia,apjb,bqk->opqijk", a, b, c)
    weight = model.layers[0].q_proj.weight.detach().numpy()
    adapter.detach()
    return np.linalg.norm(start.reshape(12, 12) - weight)


def test_half_precision_weights_are_decomposed_in_float32():
    model = Toy(layers=1, width=12).to(torch.bfloat16)
    adapter = ta.attach(model, ta.preset("lora_xs", rank=3, targets=["q_proj"]))
    (name,) = adapter.groups
    assert {t.dtype for t in adapter.factors(name).values()} == {torch.float32}
    b = adapter.factors(name)["B"]
    torch.testing.assert_close(b.T @ b, torch.eye(3), atol=1e-6, rtol=0)


def test_ranks_of_a_weight_may_differ_and_its_nodes_may_be_transposed():
    model = Toy(layers=1, width=12).double()
    network = "B: a out, R: a b, A: in b -> out in"
    laws = {"A": "weight", "B": "weight", "R": "normal(1)"}
    rule = {"format": "network", "network": network, "rank": {"a": 3, "b": 5}, "start": "nonzero", "excess": "keep"}
    adapter = ta.attach(model, ta.Spec(rules=(ta.Rule(targets=("up_proj",), init=laws, dtype="float64", **rule),)))
    (name,) = adapter.groups
    f = {node: t.detach().numpy() for node, t in adapter.factors(name).items()}
    u, s, vh = np.linalg.svd(model.layers[0].up_proj.weight.detach().numpy(), full_matrices=False)
    assert f["B"].shape == (3, 24) and f["A"].shape == (12, 5)
    np.testing.assert_allclose(np.abs(f["B"] @ u), np.eye(3, 12), atol=1e-12)
    np.testing.assert_allclose(np.abs(vh @ f["A"]), np.diag(s)[:, :5], atol=1e-12)


WIDE = "B: out x y, A: x y in -> out in"
REFUSED = [
    ({"preset": "lora", "init": {"core_in": "weight"}}, ta.SpecError, "two nodes"),
    ({"preset": "lotr", "init": {"factor_in": "weight", "factor_out": "weight"}}, ta.SpecError, "every site"),
    ({"preset": "lora_xs", "init": {"A": "normal(1)"}}, ta.SpecError, "two nodes"),
    ({"preset": "lora_xs", "rank": 13, "excess": "keep"}, ta.RankError, "rank.*excess: cap"),
    ({"preset": "dota", "rank": 50, "excess": "keep"}, ta.RankError, "rank.*excess: cap"),
    (
        {"format": "network", "network": WIDE, "init": {"*": "weight"}, "start": "nonzero"},
        ta.SpecError,
        "one bond each",
    ),
]


@pytest.mark.parametrize(("rule", "error", "says"), REFUSED)
def test_weights_that_no_law_can_take_apart_are_refused(rule, error, says):
    model = Toy(layers=2)
    with pytest.raises(error, match=f"(?s){says}"):
        ta.attach(model, ta.Spec(rules=(ta.Rule(targets=("q_proj",), **rule),)))
    assert "tensoradapt" not in dict(model.named_children())


def test_weights_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Toy(layers=1)
    with pytest.raises(ta.AdapterError, match="meta"):
        ta.attach(model, ta.preset("dota", targets=["q_proj"]))


# -- seeds and bytes ----------------------------------------------------------------------------------

# One factor of every law, large enough for a threaded BLAS to split its sums, and a whole adapter.
DIGESTS = """
import hashlib, json, sys
import torch, tensoradapt as ta
from tensoradapt.init import draw
from tensoradapt.rows import Factor
laws = ["uniform(0.1)", "normal(0.1)", "constant(0.1)", "zero", "eye", "unit_norm", "balanced"]
sizes = {"out": 300, "r": 200}
digest = lambda t: hashlib.sha256(t.detach().numpy().tobytes()).hexdigest()
found = {law: digest(draw(Factor("g.n", (300, 200), "float64", True, law, sizes, ("r",), False), 3)) for law in laws}
q = draw(Factor("g.n", (300, 200), "float64", True, "orthogonal", sizes, ("r",), False), 3)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
adapter = ta.attach(model, ta.preset("tt_lora", targets=["0", "1"]), seed=5)
found |= {key: digest(t) for key, t in adapter.tensors().items()}
print(json.dumps({"exact": found, "rounded": [float(v) for v in (q @ torch.ones(200, dtype=q.dtype))[:20]]}))
"""


def digests(threads: int) -> dict:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    ran = subprocess.run(
        [sys.executable, "-c", DIGESTS],
        env={**os.environ, **dict.fromkeys(names, str(threads)), "PYTHONHASHSEED": str(threads)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_factors_are_the_same_bytes_in_every_process_and_for_every_number_of_threads():
    one, four = digests(1), digests(4)
    assert one["exact"] == four["exact"] and len(one["exact"]) == 7 + 16
    np.testing.assert_allclose(one["rounded"], four["rounded"], atol=1e-12)


# What every machine draws: to change it is to change every user's run.
KNOWN = {
    "uniform(1/sqrt(out))": "a19872092c467a19",
    "normal(1)": "82c9be8fc5b4edae",
    "unit_norm": "0e04b100cf5b90cc",
    "balanced": "cc2dfbab55566712",
}


@pytest.mark.parametrize("law", KNOWN)
def test_factors_are_the_same_bytes_on_every_machine(law):
    factor = Factor("group.node", (5, 4), "float32", True, law, {"out": 5, "r": 4}, ("r",), False)
    assert hashlib.sha256(draw(factor, 0).numpy().tobytes()).hexdigest()[:16] == KNOWN[law]


def attached(name, seed=0, **more):
    model = Convolutions() if name == "locon" else Toy(layers=2)
    targets = {"targets": ["conv1", "conv2"]} if name == "locon" else {"targets": ["q_proj", "v_proj"]}
    return model, ta.attach(model, ta.preset(name, **targets, **more), seed=seed)


def bytes_of(adapter):
    return {key: tensor.detach().numpy().tobytes() for key, tensor in adapter.tensors().items()}


@pytest.mark.parametrize("name", ta.PRESETS)
def test_a_seed_is_repeated_and_another_is_another(name):
    one, again, other = (bytes_of(attached(name, seed=seed)[1]) for seed in (3, 3, 4))
    assert one == again
    fixed = {key for key in one if one[key] == other[key] and len(one[key]) > 8}
    plan = attached(name)[1].plan
    laws = {key: factor.law for key, factor in plan.factors.items()}
    assert {laws[key.removesuffix("__start")].partition("(")[0] for key in fixed} <= {
        "zero",
        "constant",
        "eye",
        "weight",
    }


@pytest.mark.parametrize("name", ta.PRESETS)
def test_factors_of_different_keys_differ(name):
    _, adapter = attached(name)
    drawn = {
        key: adapter.tensors()[key].detach().numpy().tobytes()
        for key, factor in adapter.plan.factors.items()
        if factor.law.partition("(")[0] not in ("zero", "constant", "eye", "weight") and factor.numel > 2
    }
    assert len(set(drawn.values())) == len(drawn)


def test_factors_of_one_law_and_shape_are_not_slices_of_each_other():
    _, adapter = attached("loha", rank=4)
    values = [t.detach().ravel() for key, t in adapter.tensors().items() if not key.endswith("w2_b")]
    pairs = [(a, b) for k, a in enumerate(values) for b in values[:k]]
    assert all(abs(np.corrcoef(a / a.std(), b / b.std())[0, 1]) < 0.6 for a, b in pairs)


def test_other_rules_and_their_order_leave_a_factors_bytes():
    one, two = ta.preset("lotr", targets=["q_proj"]), ta.preset("loha", targets=["up_proj"])
    alone = bytes_of(ta.attach(Toy(), one))
    for spec in (one + two, two + one):
        together = bytes_of(ta.attach(Toy(), spec))
        assert {key: together[key] for key in alone} == alone and len(together) > len(alone)


@pytest.mark.parametrize("name", ta.PRESETS)
def test_global_generators_are_left_alone(name):
    model = Convolutions() if name == "locon" else Toy(layers=1)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate(), torch.get_default_dtype()
    targets = ["conv1"] if name == "locon" else ["q_proj"]
    ta.attach(model, ta.preset(name, targets=targets), seed=2)
    assert torch.equal(states[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(states[1], np.random.get_state(), strict=True))
    assert states[2:] == (random.getstate(), torch.get_default_dtype())


def test_the_seed_is_no_global_one():
    torch.manual_seed(1)
    one = bytes_of(attached("lora")[1])
    torch.manual_seed(2)
    assert bytes_of(attached("lora")[1]) == one


def test_a_negative_seed_is_refused():
    with pytest.raises(ta.SpecError, match="seed"):
        attached("lora", seed=-1)


# -- laws that do not exist ----------------------------------------------------------------------------------

BAD_LAWS = [
    ("kaiming", "has no law 'kaiming'"),
    ("kaiming_uniform(5)", "has no law"),
    ("uniform", "has no law 'uniform'"),
    ("uniform(1", "has no law"),
    ("zero(1)", "has no law"),
    ("eye()", "has no law"),
    ("normal()", "cannot evaluate ''"),
    ("normal(width)", "cannot evaluate 'width'"),
    ("normal(1/0)", "cannot evaluate"),
    ("normal(sqrt(-1))", "cannot evaluate"),
    ("normal((0-2)**0.5)", "cannot evaluate"),
    ("normal(10**1000)", "cannot evaluate"),
    ("uniform(1e999)", "cannot evaluate"),
    ("normal(__import__('os'))", "cannot evaluate"),
    ("normal(sqrt(in, 2))", "cannot evaluate"),
    ("normal(1 if in else 2)", "cannot evaluate"),
    ("normal('a')", "cannot evaluate"),
]


@pytest.mark.parametrize(("law", "says"), BAD_LAWS)
def test_bad_laws_are_refused_and_the_model_untouched(law, says):
    model = Toy(layers=1)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ta.SpecError) as caught:
        ta.attach(model, ta.preset("lora", targets=["q_proj"], init={"core_in": law}))
    message = str(caught.value)
    assert says in message
    for exists in ("uniform(...)", "orthogonal") if "no law" in says else ("sqrt", "in"):
        assert exists in message
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_arithmetic_of_laws():
    sizes = {"in": 16, "in_0": 4, "out": 9, "r": 2}
    assert evaluate("1/sqrt(in)", sizes) == 0.25
    assert evaluate("-(in_0 + out)*r**-1 - 2", sizes) == -(4 + 9) * 2**-1 - 2
    assert evaluate("(in + out)**(-0.5/2)", sizes) == 25**-0.25


# -- starts ----------------------------------------------------------------------------------

NONZERO = {"tt_lora", "loretta", "lora_xs"}


def test_starts_are_declared():
    assert {name for name, row in ta.PRESETS.items() if row.rules[0].start == "nonzero"} == NONZERO
    assert {name for name, row in ta.PRESETS.items() if row.rules[0].start == "difference"} == {"quanta", "dota"}


def data_for(name):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 9, 8, generator=generator) if name == "locon" else torch.randn(2, 5, 12, generator=generator)
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ta.PRESETS)
def test_a_fresh_adapter_leaves_the_output_bit_for_bit(name, training):
    model = (Convolutions() if name == "locon" else Toy(layers=2)).train(training)
    x = data_for(name)
    before = model(x)
    targets = ["conv1", "conv2"] if name == "locon" else ["q_proj", "v_proj", "up_proj"]
    adapter = ta.attach(model, ta.preset(name, targets=targets, dropout=0.0 if name in ("fact_tt", "fact_tk") else 0.3))
    assert adapter.training == training
    assert torch.equal(model(x), before) == (name not in NONZERO)
    for group in adapter.groups.values():
        assert all(adapter.delta(path).any() == (name in NONZERO) for path in group.paths)


@pytest.mark.parametrize("name", ta.PRESETS)
def test_a_fresh_adapter_learns(name):
    """One zero factor, not two: the first gradient is not zero, and a step along it moves the output."""
    model, adapter = attached(name)
    x = data_for(name)
    before = model(x)
    (before * torch.randn(before.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained) and any(p.grad.any() for p in trained)
    for group in adapter.groups:
        assert any(t.grad is not None and t.grad.any() for t in adapter.factors(group).values())
    with torch.no_grad():
        for p in trained:
            p -= 0.1 * p.grad / (p.grad.norm() + 1e-9)
    assert not torch.equal(model(x), before)
