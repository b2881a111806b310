"""Orthonormal factors: the constraint, first order, oracles by hand and by torch's parametrizations, the delta kept."""

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations
from toys import Toy

import tensoradapt as ta
from tensoradapt.optim import Stiefel

TARGETS = ["q_proj", "up_proj"]
ALONE = "group"  # the name of the only group of a model without roles
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "sgd": (SGD, {"lr": 0.1}),
    "momentum": (SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True}),
    "adamw": (ADAMW, {"lr": 0.05, "weight_decay": 0.1}),
    "adam with coupled decay": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.02}),
}
BATCHED = {"format": "network", "network": "U: layer out a, G: layer a b, V: layer in b -> layer out in", "rank": 3}
STACKED = {"format": "network", "network": "U: layer out a, G: a b, V: b in -> layer out in", "rank": 3}
ORDERED = {"format": "network", "network": "U: a out, G: layer b a, V: in b -> layer out in", "rank": 3}
FORMATS = {
    "polar": ("polar", {"rank": 3}, ("factor_out", "factor_in")),
    "lotr": ("lotr", {"rank": 3, "init": {"factor_out": "orthogonal", "factor_in": "orthogonal"}},
             ("factor_out", "factor_in")),
    "fact_tt": ("fact_tt", {"rank": 3}, ("factor_out", "factor_in")),
    "lora": ("lora", {"rank": 3}, ("core_out",)),
    "train": ("metatt_4d", {"rank": 3}, ("core_in", "core_out")),
    "folded": ("tt_lora", {"rank": 2, "folds": {"in": [3, 4], "out": [3, 4]}, "targets": ["q_proj"]},
               ("core_in_0", "core_out_1")),
    "batched": (None, {**BATCHED, "zero": "G"}, ("U", "V")),
    "stacked": (None, {**STACKED, "zero": "G"}, ("U", "V")),
    "axes in other orders": (None, {**ORDERED, "zero": "G"}, ("U", "V")),
}  # fmt: skip


def spec_of(name, **more):
    preset, fields, _ = FORMATS[name]
    fields = {"targets": TARGETS, "scale": 1.0, **fields, **more}
    return ta.preset(preset, **fields) if preset else ta.Spec(rules=(ta.Rule(**fields),))


def attached(name, shaken=0.3, **more):
    model = Toy(layers=2)
    adapter = ta.attach(model, spec_of(name, **more))
    if shaken:
        tiny.shake(adapter, shaken)
    return model, adapter


def loss_of(model):
    return (model(tiny.noise(4, 5, 12)) - tiny.noise(4, 5, 12, seed=1)).square().mean()


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        yield


def matrices(group, node, tensor):
    """A factor as columns on its one bond, one matrix for each value of an axis that every node carries."""
    tensor = tensor.detach().double().numpy()
    indices, nodes = list(group.diagram.nodes[node]), group.diagram.nodes.values()
    if all("layer" in i for i in nodes):
        rows = [np.take(tensor, k, axis=indices.index("layer")) for k in range(tensor.shape[indices.index("layer")])]
        indices.remove("layer")
    else:
        rows = [tensor]
    (bond,) = [k for k, i in enumerate(indices) if i not in group.diagram.open]
    return [np.moveaxis(m, bond, -1).reshape(-1, m.shape[bond]) for m in rows]


def defect(adapter, nodes):
    """The largest ||U^T U - 1|| of the factors of such names."""
    found = [
        np.linalg.norm(m.T @ m - np.eye(m.shape[1]))
        for name, group in adapter.groups.items()
        for node in nodes
        for m in matrices(group, node, adapter.factors(name)[node])
    ]
    assert found
    return max(found)


def deltas(adapter):
    return {p: adapter.delta(p).detach().double() for g in adapter.groups.values() for p in g.paths}


def assert_same_deltas(one, two, tolerance):
    for path, delta in one.items():
        assert float((delta - two[path]).norm()) <= tolerance * max(1.0, float(delta.norm())), path


# -- the constraint ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retraction", ["polar", "qr"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", FORMATS)
def test_factors_stay_orthonormal_while_the_loss_falls(name, base, retraction):
    model, adapter = attached(name)
    kind, options = BASES[base]
    optimizer = Stiefel(adapter, kind, retraction=retraction, **options)
    before, first = loss_of(model).item(), {k: t.clone() for k, t in adapter.tensors().items()}
    for _ in train(model, optimizer, 25):
        assert defect(adapter, FORMATS[name][2]) <= 1e-6
    assert loss_of(model).item() < before
    assert all(not torch.equal(first[key], tensor) for key, tensor in adapter.tensors().items())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_other_dtypes_stay_orthonormal_to_their_own_rounding(dtype):
    model = Toy(layers=2).to(getattr(torch, dtype))
    adapter = ta.attach(model, spec_of("lotr", dtype=dtype))
    optimizer = Stiefel(adapter, SGD, lr=0.1)
    x = tiny.noise(4, 5, 12).to(getattr(torch, dtype))
    for _ in range(10):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        limit = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
        assert defect(adapter, ("factor_out", "factor_in")) <= limit
        assert len(optimizer.directions()) == len(optimizer.frames)  # none is taken for one that a resize has left
    assert {t.dtype for t in adapter.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_wide_factors_of_many_columns_stay_orthonormal(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 512))
    adapter = ta.attach(model, ta.preset("polar", rank=64, targets=["0"], dtype=dtype))
    optimizer = Stiefel(adapter, lr=1e-2)
    for k in range(5):
        optimizer.zero_grad()
        model(tiny.noise(8, 768, seed=k)).square().sum().backward()
        optimizer.step()
        u = adapter.factors(ALONE)["factor_in"].detach().double()
        assert float((u.T @ u - torch.eye(64)).norm()) <= (1e-6 if dtype == "float32" else 1e-12)
        assert len(optimizer.directions()) == 2


# -- against equations by hand ----------------------------------------------------------------------------------------


def one_site(preset="polar", shape=(7, 5), rank=3, **more):
    """A float64 adapter of one linear layer, its optimiser's factors with a gradient set by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=torch.float64))
    adapter = ta.attach(model, ta.preset(preset, rank=rank, targets=["0"], dtype="float64", **more))
    tiny.shake(adapter, 0.5)
    return model, adapter


def put_gradients(adapter, seed=3):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for node, tensor in adapter.factors(ALONE).items():
        tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        found[node] = tensor.grad.numpy().copy()
    return found


def arrays(adapter):
    return {node: tensor.detach().numpy().copy() for node, tensor in adapter.factors(ALONE).items()}


def polar_of(m):
    values, vectors = np.linalg.eigh(m.T @ m)
    return m @ (vectors / np.sqrt(values)) @ vectors.T


def qr_of(m):
    """Gram-Schmidt."""
    columns = []
    for column in m.T:
        for done in columns:
            column = column - done * (done @ column)
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


def tangent_of(u, g):
    return g - u @ (u.T @ g + g.T @ u) / 2


@pytest.mark.parametrize(("retraction", "retract"), [("polar", polar_of), ("qr", qr_of)])
def test_one_step_of_sgd_is_the_equation(retraction, retract):
    _, adapter = one_site()
    optimizer = Stiefel(adapter, SGD, retraction=retraction, lr=0.2)
    before, gradients = arrays(adapter), put_gradients(adapter)
    optimizer.step()
    after = arrays(adapter)
    np.testing.assert_allclose(after["core"], before["core"] - 0.2 * gradients["core"], atol=1e-13)
    for node in ("factor_out", "factor_in"):
        expected = retract(before[node] - 0.2 * tangent_of(before[node], gradients[node]))
        np.testing.assert_allclose(after[node], expected, atol=1e-12)


def test_with_momentum_only_the_tangent_part_of_the_velocity_moves_the_factor():
    """v <- 0.9 v + P(g) is not turned with the factor; P at today's point is applied to the step."""
    _, adapter = one_site()
    optimizer = Stiefel(adapter, SGD, lr=0.2, momentum=0.9)
    u = arrays(adapter)["factor_out"]
    velocity = np.zeros_like(u)
    for k in range(4):
        g = put_gradients(adapter, seed=k)["factor_out"]
        optimizer.step()
        velocity = 0.9 * velocity + tangent_of(u, g)
        u = polar_of(u - 0.2 * tangent_of(u, velocity))
        np.testing.assert_allclose(arrays(adapter)["factor_out"], u, atol=1e-12)


def test_the_step_of_adam_loses_its_normal_part():
    """Adam's first step is -lr sign(P(g)), which is no tangent."""
    _, adapter = one_site()
    optimizer = Stiefel(adapter, torch.optim.Adam, lr=0.05, eps=0.0)
    u, g = arrays(adapter)["factor_in"], put_gradients(adapter)["factor_in"]
    optimizer.step()
    step = -0.05 * np.sign(tangent_of(u, g))
    assert np.linalg.norm(step - tangent_of(u, step)) > 0.01
    np.testing.assert_allclose(arrays(adapter)["factor_in"], polar_of(u + tangent_of(u, step)), atol=1e-9)


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_the_step_is_of_first_order(retraction):
    """What a step misses of the straight one falls with the square of the learning rate."""
    missed = []
    for lr in (1e-2, 5e-3, 2.5e-3):
        _, adapter = one_site()
        optimizer = Stiefel(adapter, SGD, retraction=retraction, lr=lr)
        u, g = arrays(adapter)["factor_out"], put_gradients(adapter)["factor_out"]
        optimizer.step()
        missed.append(np.linalg.norm(arrays(adapter)["factor_out"] - u + lr * tangent_of(u, g)))
    assert missed[0] / missed[1] == pytest.approx(4, rel=0.1) and missed[1] / missed[2] == pytest.approx(4, rel=0.1)


def test_the_gradient_is_the_tangent_that_falls_fastest():
    """Its product with every tangent is the gradient's; autograd's own gradients are the caller's again after."""
    model, adapter = one_site()
    optimizer = Stiefel(adapter, SGD, lr=0.0)
    model(tiny.noise(6, 5).double()).square().sum().backward()
    kept = {node: tensor.grad.clone() for node, tensor in adapter.factors(ALONE).items()}
    found = {node: optimizer.directions().get(tensor) for node, tensor in adapter.factors(ALONE).items()}
    assert found["core"] is None
    for node in ("factor_out", "factor_in"):
        u, xi = arrays(adapter)[node], found[node].numpy()
        size = np.linalg.norm(kept[node].numpy())  # rounding is a share of what is projected
        np.testing.assert_allclose(u.T @ xi + xi.T @ u, 0, atol=1e-14 * size)
        for k in range(5):
            z = tangent_of(u, np.random.default_rng(k).standard_normal(u.shape))
            assert np.sum(xi * z) == pytest.approx(np.sum(kept[node].numpy() * z))
    optimizer.step()
    assert all(torch.equal(kept[node], tensor.grad) for node, tensor in adapter.factors(ALONE).items())


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
def test_a_step_is_that_of_torchs_own_parametrization_to_second_order(orthogonal_map):
    """A square factor: torch's chart moves Q by -2 lr Q skew(Q^T G), the embedded metric by half of it."""
    missed = []
    for lr in (2e-2, 1e-2, 5e-3):
        _, adapter = one_site(shape=(4, 6), rank=4)
        optimizer = Stiefel(adapter, SGD, nodes="factor_out", lr=lr)
        layer = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        parametrizations.orthogonal(layer, orthogonal_map=orthogonal_map)
        with torch.no_grad():
            layer.weight = adapter.factors(ALONE)["factor_out"].detach()
        g = torch.from_numpy(put_gradients(adapter)["factor_out"])
        oracle = SGD(layer.parameters(), lr=lr / 2)
        (layer.weight * g).sum().backward()
        oracle.step()
        optimizer.step()
        missed.append(float((adapter.factors(ALONE)["factor_out"] - layer.weight).detach().norm()))
    assert missed[0] < 0.05 and missed[0] / missed[1] > 3.7 and missed[1] / missed[2] > 3.7


def test_a_tall_step_out_of_the_columns_is_that_of_torchs_parametrization():
    """Beyond the columns' own span the metrics agree: G with U^T G = 0, the learning rates are equal."""
    missed = []
    for lr in (2e-2, 1e-2):
        _, adapter = one_site(shape=(7, 5))
        optimizer = Stiefel(adapter, SGD, lr=lr)
        factor = adapter.factors(ALONE)["factor_out"]
        u = factor.detach().clone()
        g = torch.from_numpy(put_gradients(adapter)["factor_out"])
        factor.grad = g - u @ (u.T @ g)
        layer = nn.Linear(3, 7, bias=False, dtype=torch.float64)
        parametrizations.orthogonal(layer, orthogonal_map="matrix_exp")
        with torch.no_grad():
            layer.weight = u
        oracle = SGD(layer.parameters(), lr=lr)
        (layer.weight * factor.grad).sum().backward()
        oracle.step()
        optimizer.step()
        missed.append(float((factor - layer.weight).detach().norm()))
    assert missed[0] < 0.05 and missed[0] / missed[1] > 3.7


# -- what it reaches --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retraction", ["polar", "qr"])
@pytest.mark.parametrize(("base", "lr"), [(ADAMW, 0.05), (SGD, 0.05)])
def test_the_best_rank_r_fit_is_reached(retraction, base, lr):
    """min ||s U G V^T - D||^2 is the tail of D's singular values."""
    _, adapter = one_site(shape=(9, 7), rank=2, scale=0.7)
    options = {"momentum": 0.9} if base is SGD else {"weight_decay": 0.0}
    optimizer = Stiefel(adapter, base, retraction=retraction, lr=lr, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    target = tiny.noise(9, 7, seed=5).double()
    for _ in range(600):
        optimizer.zero_grad()
        loss = (adapter.delta("0") - target).square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    best = np.square(np.linalg.svd(target.numpy(), compute_uv=False)[2:]).sum()
    assert best <= loss.item() * (1 + 1e-12) and loss.item() <= best * (1 + 1e-4)


def test_a_shared_pair_reaches_what_least_squares_reach():
    """LoTR: with U and V given the cores are projections, so the loss is ||D||^2 - ||U^T D V||^2 at the end."""
    model = Toy(layers=3).double()
    adapter = ta.attach(model, ta.preset("lotr", rank=4, targets=["q_proj"], alpha=4.0, dtype="float64"))
    optimizer = Stiefel(adapter, lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    (group,) = adapter.groups.values()
    targets = {path: tiny.noise(12, 12, seed=k).double() for k, path in enumerate(group.paths)}
    for _ in range(500):
        optimizer.zero_grad()
        loss = torch.stack([(adapter.delta(p) - d).square().sum() for p, d in targets.items()]).sum()
        loss.backward()
        optimizer.step()
        schedule.step()
    f = {n: t.detach() for n, t in adapter.factors(group.name).items()}
    seen = sum(float((f["factor_out"].T @ d @ f["factor_in"]).square().sum()) for d in targets.values())
    whole = sum(float(d.square().sum()) for d in targets.values())
    assert loss.detach().item() == pytest.approx(whole - seen, rel=1e-4)


# -- gauge ------------------------------------------------------------------------------------------------------------


def turned_step(retraction, lr, nodes=None):
    """The change of the delta by one step of SGD, from two sets of factors that an orthogonal gauge joins."""
    found = []
    rng = np.random.default_rng(0)
    p, q = (torch.from_numpy(np.linalg.qr(rng.standard_normal((3, 3)))[0]) for _ in range(2))
    for turn in (False, True):
        model, adapter = one_site()
        optimizer = Stiefel(adapter, SGD, nodes=nodes, retraction=retraction, lr=lr)
        f = {node: tensor.detach() for node, tensor in adapter.factors(ALONE).items()}
        if turn:
            turned = {"factor_out": f["factor_out"] @ p, "core": p.T @ f["core"] @ q, "factor_in": f["factor_in"] @ q}
            adapter.set_factors(ALONE, turned)
        before = adapter.delta("0").detach()
        model(tiny.noise(6, 5).double()).square().sum().backward()
        optimizer.step()
        found.append(adapter.delta("0").detach() - before)
    return float((found[0] - found[1]).norm() / found[0].norm())


def test_a_step_does_not_depend_on_a_rotation_of_the_bonds():
    assert turned_step("polar", 1e-2) < 1e-12
    small, large = turned_step("qr", 1e-5), turned_step("qr", 1e-4)  # it does with qr, by the square of the step
    assert 1e-4 < small < large / 8


# -- becoming orthonormal ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_the_delta_is_kept_at_construction(name):
    _, adapter = attached(name, shaken=1.0)
    nodes, before = FORMATS[name][2], deltas(adapter)
    assert defect(adapter, nodes) > 0.1
    names = {key: t.shape for key, t in adapter.tensors().items()}
    parameters = dict(adapter.named_parameters())
    optimizer = Stiefel(adapter)
    assert defect(adapter, nodes) <= 1e-6
    assert_same_deltas(before, deltas(adapter), 1e-6)
    assert {frame.edge.child for frame in optimizer.frames} == set(nodes)
    assert {key: t.shape for key, t in adapter.tensors().items()} == names
    assert all(p is parameters[n] for n, p in adapter.named_parameters())


@pytest.mark.parametrize("start", ["zero factor", "equal columns", "zero core", "one layer of zeros"])
@pytest.mark.parametrize("name", ["polar", "lotr", "batched"])
def test_factors_of_any_rank_become_orthonormal_and_can_be_trained(name, start):
    model, adapter = attached(name)
    out, inner = FORMATS[name][2]
    core = "G" if name == "batched" else "core"
    with torch.no_grad():
        for group in adapter.groups:
            f = adapter.factors(group)
            if start == "zero factor":
                f[out].zero_()
            elif start == "equal columns":
                f[out].copy_(f[out][..., :1].expand_as(f[out]))
                f[inner][..., 1:].zero_()
            elif start == "zero core":
                f[core].zero_()
            elif name == "batched":
                f[out][0].zero_()
    before, first = deltas(adapter), loss_of(model).item()
    optimizer = Stiefel(adapter, lr=0.02)
    assert defect(adapter, (out, inner)) <= 1e-6
    assert_same_deltas(before, deltas(adapter), 1e-6)
    for _ in train(model, optimizer, 20):
        assert defect(adapter, (out, inner)) <= 1e-6
    assert all(bool(t.isfinite().all()) for t in adapter.parameters()) and loss_of(model).item() < first


def test_what_a_factor_spans_is_kept_and_the_rest_is_the_seeds():
    found = []
    for seed in (0, 0, 1):
        _, adapter = one_site(shape=(9, 7))
        with torch.no_grad():
            adapter.factors(ALONE)["factor_out"][:, 1:].zero_()
        column = adapter.factors(ALONE)["factor_out"][:, 0].detach().clone()
        Stiefel(adapter, seed=seed)
        u = adapter.factors(ALONE)["factor_out"].detach()
        assert float((u @ (u.T @ column) - column).norm()) < 1e-12
        found.append(u.clone())
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[0], found[2])


def test_a_factor_of_full_rank_becomes_the_nearest_orthonormal_one():
    _, adapter = one_site()
    before = arrays(adapter)
    Stiefel(adapter)
    for node in ("factor_out", "factor_in"):
        np.testing.assert_allclose(arrays(adapter)[node], polar_of(before[node]), atol=1e-12)


def test_a_fresh_lora_gets_random_columns_and_its_other_factor_is_zero():
    """Stiefel-LoRA: B on the manifold, A = 0 at first; both learn."""
    model, adapter = attached("lora", shaken=0)
    optimizer = Stiefel(adapter, lr=0.02)
    first = loss_of(model).item()
    for name in adapter.groups:
        f = adapter.factors(name)
        assert not f["core_in"].any() and bool((f["core_out"].abs() > 1e-3).float().mean() > 0.8)
    for _ in train(model, optimizer, 20):
        assert defect(adapter, ("core_out",)) <= 1e-6
    assert loss_of(model).item() < first


def test_orthonormal_factors_are_left_bit_for_bit():
    _, adapter = attached("polar", shaken=0)
    before = {key: t.clone() for key, t in adapter.tensors().items()}
    Stiefel(adapter)
    assert tiny.same(before, dict(adapter.tensors()))


def test_the_other_side_of_a_lora_by_name():
    _, adapter = attached("lora")
    Stiefel(adapter, nodes=["core_in"])
    assert defect(adapter, ("core_in",)) <= 1e-6 and defect(adapter, ("core_out",)) > 0.1


def test_named_nodes_of_a_mixed_adapter_leave_the_other_groups():
    model = Toy(layers=2)
    spec = ta.preset("lotr", rank=2, targets=["q_proj"]) + ta.preset("lorta", rank=2, targets=["k_proj"])
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    optimizer = Stiefel(adapter, nodes=["factor_out"], lr=0.01)
    assert len(optimizer.frames) == 1
    for _ in train(model, optimizer, 3):
        u = adapter.factors(optimizer.frames[0].group)["factor_out"].detach()
        assert float((u.T @ u - torch.eye(2)).norm()) <= 1e-6


def test_groups_that_the_optimiser_does_not_hold_are_not_asked():
    spec = ta.preset("lotr", rank=2, targets=["q_proj"]) + ta.preset("lorta", rank=2, targets=["k_proj"])
    adapter = ta.attach(Toy(layers=2), spec)
    name = next(name for name, group in adapter.groups.items() if "core" in group.diagram.nodes)
    optimizer = Stiefel(adapter, params=adapter.factors(name).values())
    assert {frame.edge.child for frame in optimizer.frames} == {"factor_out", "factor_in"}


def test_a_difference_that_starts_orthonormal_is_trained_and_any_other_is_refused():
    model, adapter = attached("lora", shaken=0)
    ta.initialize(adapter, "olora")
    x = tiny.noise(2, 5, 12)
    before = model(x)
    optimizer = Stiefel(adapter, lr=0.01)
    assert torch.equal(model(x), before)
    for _ in train(model, optimizer, 5):
        assert defect(adapter, ("core_out",)) <= 1e-6
    model, adapter = attached("lora", shaken=0)
    ta.initialize(adapter, "pissa")
    held = {key: t.clone() for key, t in adapter.tensors().items()}
    with pytest.raises(ta.SpecError, match="difference"):
        Stiefel(adapter)
    assert tiny.same(held, dict(adapter.tensors()))


def test_after_a_resize_factors_are_made_orthonormal_again():
    model, adapter = attached("lotr")
    optimizer = Stiefel(adapter, lr=0.02)
    list(train(model, optimizer, 3))
    ta.resize(adapter, 5, optimizer=optimizer)
    before = deltas(adapter)
    optimizer.orthonormalize()
    assert_same_deltas(before, deltas(adapter), 1e-6)
    assert defect(adapter, ("factor_out", "factor_in")) <= 1e-6
    for _ in train(model, optimizer, 3):
        assert defect(adapter, ("factor_out", "factor_in")) <= 1e-6


CHANGES = {
    "resize": lambda adapter, optimizer: ta.resize(adapter, 5, optimizer=optimizer),
    "truncate": lambda adapter, optimizer: ta.truncate(adapter, rank=2, optimizer=optimizer),
}


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_what_is_written_past_autograd_is_no_loss_of_length(retraction):
    """A write into `.data` leaves no trace on the tensor."""
    model, adapter = attached("lotr")
    optimizer = Stiefel(adapter, SGD, retraction=retraction, lr=0.0)
    list(train(model, optimizer, 1))
    for group in adapter.groups:
        adapter.factors(group)["factor_out"].data.mul_(2)
    before = deltas(adapter)
    list(train(model, optimizer, 1))
    assert_same_deltas(before, deltas(adapter), 1e-6)


@pytest.mark.parametrize("change", CHANGES)
def test_a_step_right_after_a_change_of_ranks_is_the_base_optimisers(change):
    """The factors' lengths are not lost: the delta moves as by plain SGD, and the factors are orthonormal after."""
    found = []
    for plain in (False, True):
        model, adapter = attached("lotr", shaken=0.5)
        optimizer = Stiefel(adapter, SGD, lr=0.02)
        CHANGES[change](adapter, optimizer)
        optimizer = SGD(adapter.parameters(), lr=0.02) if plain else optimizer
        list(train(model, optimizer, 1))
        found.append(deltas(adapter))
        assert (defect(adapter, ("factor_out", "factor_in")) <= 1e-6) != plain
    assert_same_deltas(*found, 1e-6)


# -- an optimiser like any other --------------------------------------------------------------------------------------


def test_weight_decay_leaves_orthonormal_factors_alone():
    model, adapter = attached("polar")
    optimizer = Stiefel(adapter, lr=0.1, weight_decay=0.5)
    own = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    factors = {(name, node): t for name in adapter.groups for node, t in adapter.factors(name).items()}
    assert own == {id(t) for (_, node), t in factors.items() if node != "core"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(factors)
    before = {key: t.detach().clone() for key, t in factors.items()}
    for tensor in adapter.parameters():
        tensor.grad = torch.zeros_like(tensor)
    optimizer.step()
    for (name, node), tensor in factors.items():
        factor = 1 - 0.1 * 0.5 if node == "core" else 1
        torch.testing.assert_close(tensor.detach(), before[name, node] * factor, rtol=0, atol=1e-6)


def test_parameter_groups_keep_their_options():
    model, adapter = attached("polar")
    cores = [adapter.factors(name)["core"] for name in adapter.groups]
    others = [p for p in adapter.parameters() if all(p is not core for core in cores)]
    groups = [{"params": cores, "lr": 0.5}, {"params": [*others, cores[0].new_ones(2, requires_grad=True)]}]
    optimizer = Stiefel(adapter, params=groups, lr=0.25, weight_decay=0.1)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [
        (0.5, 0.1, len(cores)),
        (0.25, 0.1, 1),
        (0.25, 0.0, len(others)),
    ]
    whole = Stiefel(adapter, params=[{"params": cores, "weight_decay": 0.5}, {"params": others}])
    assert [(g["weight_decay"], len(g["params"])) for g in whole.param_groups] == [
        (0.5, len(cores)),
        (0.0, len(others)),
    ]


def test_named_parameters_are_taken_too():
    model, adapter = attached("polar")
    optimizer = Stiefel(adapter, params=adapter.named_parameters(), lr=0.01)
    for group in optimizer.state_dict()["param_groups"]:
        assert len(group.get("param_names", group["params"])) == len(group["params"])
    for _ in train(model, optimizer, 2):
        assert defect(adapter, ("factor_out", "factor_in")) <= 1e-6


@pytest.mark.parametrize("base", BASES)
def test_a_saved_state_goes_on_as_if_nothing_had_been(base, tmp_path):
    kind, options = BASES[base]

    def made():
        model, adapter = attached("lotr")
        return model, adapter, Stiefel(adapter, kind, **options)

    model, adapter, optimizer = made()
    list(train(model, optimizer, 3))
    state, path = copy.deepcopy(optimizer.state_dict()), adapter.save(tmp_path / "a")
    list(train(model, optimizer, 3))
    other, _, _ = made()
    other.tensoradapt.default.detach()
    again = ta.load(path, other)
    for parameter in again.parameters():
        parameter.requires_grad = True
    follower = Stiefel(again, kind, **options)
    follower.load_state_dict(state)
    list(train(other, follower, 3))
    assert tiny.same({k: t.detach() for k, t in adapter.tensors().items()}, dict(again.tensors()))


def test_saved_files_have_the_names_and_shapes_of_any_adapter(tmp_path):
    headers = []
    for wrapped in (False, True):
        model, adapter = attached("lotr")
        optimizer = Stiefel(adapter) if wrapped else ADAMW(adapter.parameters())
        list(train(model, optimizer, 2))
        adapter.save(tmp_path / str(wrapped))
        with safe_open(tmp_path / str(wrapped) / "adapter.safetensors", "pt") as file:
            headers.append({k: file.get_slice(k).get_shape() for k in file.keys()})
    assert headers[0] == headers[1]


def test_schedules_move_the_learning_rate_of_all_groups():
    model, adapter = attached("polar")
    optimizer = Stiefel(adapter, lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for k, _ in enumerate(train(model, optimizer, 3)):
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * 0.5 ** (k + 1)] * 2)
        assert defect(adapter, ("factor_out", "factor_in")) <= 1e-6


def test_factors_without_a_gradient_stay_bit_for_bit():
    model, adapter = attached("polar")
    optimizer = Stiefel(adapter, lr=0.1)
    idle, *_ = adapter.groups
    before = {node: t.detach().clone() for node, t in adapter.factors(idle).items()}
    loss_of(model).backward()
    for tensor in adapter.factors(idle).values():
        tensor.grad = None
    optimizer.step()
    assert tiny.same(before, {node: t.detach() for node, t in adapter.factors(idle).items()})


def test_gradients_that_are_not_finite_stay_to_be_seen():
    model, adapter = attached("polar")
    optimizer = Stiefel(adapter, SGD, lr=0.1)
    (first, *_), node = adapter.groups, "factor_out"
    for tensor in adapter.parameters():
        tensor.grad = torch.zeros_like(tensor)
    adapter.factors(first)[node].grad[0, 0] = math.nan
    for _ in range(2):  # the second from a factor that is not finite itself
        optimizer.step()
    assert adapter.factors(first)[node].isnan().any()
    assert not any(t.isnan().any() for k, t in adapter.tensors().items() if k != f"{first}.{node}")


def test_modules_trained_beside_the_adapter_are_the_base_optimisers():
    model = tiny.bert_classifier()
    adapter = ta.attach(model, ta.preset("polar", rank=2, targets=["query"], train=["classifier"]))
    optimizer = Stiefel(adapter, SGD, lr=0.1)
    head = adapter.extra[next(iter(adapter.extra._parameters))]
    before = head.detach().clone()
    model(input_ids=tiny.tokens(3, 5), labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    torch.testing.assert_close(head.detach(), before - 0.1 * head.grad)
    assert defect(adapter, ("factor_out", "factor_in")) <= 1e-6


# -- refused ----------------------------------------------------------------------------------------------------------

RING = {"format": "network", "network": "a out b, b in c, c layer a -> layer out in"}
KEPT = {"rank": 16, "excess": "keep"}
REFUSED = {
    "cp": (ta.preset("lorta", rank=2, targets=["q_proj"]), {}, "a CP has no orthonormal factors: one bond joins all"),
    "rows": (ta.preset("polar", **KEPT, targets=["q_proj"]), {"nodes": "factor_out"}, "12 rows for the 16.*rank of 12"),
    "rows by default": (ta.preset("polar", **KEPT, targets=["q_proj"]), {}, "no factor can be.*12 rows for the 16"),
    "rows of one layer": (
        ta.Spec(rules=(ta.Rule(**{**BATCHED, **KEPT}, targets=("q_proj",), zero="G"),)),
        {"nodes": ["U"]},
        "12 rows for the 16",
    ),
    "no such node": (spec_of("polar"), {"nodes": ["U"]}, "no group has a node 'U'.*expected: core, factor_out"),
    "no node": (spec_of("polar"), {"nodes": []}, "no factor to keep"),
    "core": (spec_of("polar"), {"nodes": ["core"]}, "'core' cannot be orthonormal: it has 2 bonds"),
    "frozen": (spec_of("polar", frozen=["factor_in"]), {"nodes": ["factor_in"]}, "it is frozen"),
    "frozen core": (
        ta.preset("polar", targets=["q_proj"], frozen=["core"], init={"core": "eye", "factor_out": "zero"}),
        {},
        "'core' across its bond is frozen",
    ),
    "frozen bases": (ta.preset("lora_xs", rank=2, targets=["q_proj"]), {}, "A: it is frozen"),
    "both of two": (spec_of("lora"), {"nodes": ["core_out", "core_in"]}, "without a core between them"),
    "ring": (
        ta.Spec(rules=(ta.Rule(**RING, targets=("q_proj",), rank=2, zero="node_0"),)),
        {},
        "needs a tree, and here its bonds close a cycle",
    ),
    "slices": (
        ta.preset("lora", rank=2, targets=TARGETS, shapes="slices"), {}, "slices of a bank",
    ),
    "retraction": (spec_of("polar"), {"retraction": "cayley"}, "no retraction 'cayley'.*polar, qr"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason_and_unchanged(case):
    spec, options, said = REFUSED[case]
    model = Toy(layers=2)
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    before = {key: t.detach().clone() for key, t in adapter.tensors().items()}
    with pytest.raises(ta.SpecError, match=f"(?s){said}"):
        Stiefel(adapter, **options)
    assert tiny.same(before, {key: t.detach() for key, t in adapter.tensors().items()})


def test_one_frozen_side_leaves_the_other():
    model, adapter = attached("polar", frozen=["factor_in"])
    held = {k: t.detach().clone() for k, t in adapter.tensors().items() if k.endswith("factor_in")}
    optimizer = Stiefel(adapter, lr=0.05)
    for _ in train(model, optimizer, 3):
        assert defect(adapter, ("factor_out",)) <= 1e-6
    assert tiny.same(held, {k: t for k, t in adapter.tensors().items() if k in held})


def test_a_merged_adapter_and_params_without_factors_are_refused():
    _, adapter = attached("polar")
    cores = [adapter.factors(name)["core"] for name in adapter.groups]
    with pytest.raises(ta.SpecError, match="holds no factor that is to be orthonormal"):
        Stiefel(adapter, params=cores)
    adapter.merge()
    with pytest.raises(ta.AdapterError, match="merged"):
        Stiefel(adapter)
