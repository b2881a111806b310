"""Starts of attached adapters against their equations in numpy: weights, gradients, activations, deltas, seeds."""

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from toys import Convolutions, Toy

import tensoradapt as ta

RANK, WIDTH = 3, 12
TARGETS = ["q_proj", "up_proj"]
GATHERED = {
    **dict.fromkeys(("lora_ga", "lora_one"), "gradients"),
    **dict.fromkeys(("eva", "corda", "corda_minor"), "activations"),
    "delta": "deltas",
}
KEEPING = ("pissa", "minor", "olora", "orthogonal", "lora_ga", "lora_one", "eva", "corda", "corda_minor")
FORMATS = {
    "lora": {"preset": "lora", "rank": 4},
    "lotr": {"preset": "lotr", "rank": 4},
    "cp over heads": {"preset": "lorta", "rank": 4, "heads": 4},
    "cp": {"format": "cp", "axes": ("layer", "out", "in"), "rank": 4, "zero": "factor_layer"},
    "train of a stack": {"preset": "metatt_4d", "rank": 4},
    "slots": {"preset": "fact_tk", "rank": 4},
    "folded train": {"preset": "tt_lora", "rank": 4, "folds": {"in": [3, 4], "out": [3, 4]}, "targets": ["q_proj"]},
    "frozen bases": {"preset": "lora_xs", "rank": 4},
    "products": {"preset": "loha", "rank": 4},
}
NO_FORM = {  # what the mathematics does not extend to: each is refused in words
    "lora_ga": ("cp over heads", "folded train", "frozen bases", "products"),
    "orthogonal": ("frozen bases",),
    "eva": ("slots", "folded train", "frozen bases", "products"),
    **dict.fromkeys(("corda", "corda_minor"), ("folded train", "frozen bases", "products")),
}


def attach(model, fields, **more):
    fields = {"targets": TARGETS, **fields, **more}
    name = fields.pop("preset", None)
    return ta.attach(model, ta.preset(name, **fields) if name else ta.Spec(rules=(ta.Rule(**fields),)))


def batches(count=3, dtype=torch.float32):
    return [tiny.noise(2, 5, WIDTH, seed=seed).to(dtype) for seed in range(count)]


def squares(model, batch):
    return model(batch).square().mean()


def gathered(method, model, adapter, dtype=torch.float32):
    kind = GATHERED.get(method)
    if kind == "gradients":
        return {kind: ta.gradients(model, adapter, batches(dtype=dtype), squares)}
    if kind == "activations":
        return {kind: ta.activations(model, adapter, batches(dtype=dtype))}
    shapes = {path: adapter.delta(path).shape for group in adapter.groups.values() for path in group.paths}
    return {kind: {p: tiny.noise(*s, seed=k).to(dtype) for k, (p, s) in enumerate(shapes.items())}} if kind else {}


def numpy_of(tensor):
    return tensor.detach().double().numpy()


def weight(model, path):
    return numpy_of(model.get_submodule(path).weight)


def lora(method, scale=2.5, **options):
    """A float64 LoRA after a start: model, adapter, and (path, B, A) of every site."""
    model = Toy(layers=2, width=WIDTH).double()
    adapter = attach(model, {"preset": "lora", "rank": RANK, "dtype": "float64"}, alpha=scale * RANK)
    ta.initialize(adapter, method, **gathered(method, model, adapter, torch.float64), **options)
    found = []
    for name, group in adapter.groups.items():
        f = adapter.factors(name)
        found.append((group.paths[0], numpy_of(f["core_out"]), numpy_of(f["core_in"])))
    return model, adapter, found


def covariance(model, path, damping=0.0):
    """X^T X / tokens of a projection's inputs, by a hook of the test's own."""
    rows = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, y: rows.append(numpy_of(a[0])))
    for batch in batches(dtype=torch.float64):
        model(batch)
    handle.remove()
    x = np.concatenate([r.reshape(-1, r.shape[-1]) for r in rows])
    found = x.T @ x / len(x)
    return found + damping * np.trace(found) / len(found) * np.eye(len(found))


def gradient(model, path):
    """The mean gradient by autograd itself, on a model without adapters."""
    bare = Toy(layers=2, width=WIDTH).double()
    losses = torch.stack([squares(bare, batch) for batch in batches(dtype=torch.float64)])
    return numpy_of(torch.autograd.grad(losses.mean(), bare.get_submodule(path).weight)[0])


# -- one matrix: the published equations ------------------------------------------------------------------------------


def test_pissa_is_the_top_of_the_weight():
    model, _, found = lora("pissa")
    for path, b, a in found:
        u, s, vh = np.linalg.svd(weight(model, path))
        np.testing.assert_allclose(2.5 * b @ a, (u[:, :RANK] * s[:RANK]) @ vh[:RANK], atol=1e-12)
        np.testing.assert_allclose(b.T @ b, np.diag(s[:RANK] / 2.5), atol=1e-12)
        np.testing.assert_allclose(a @ a.T, np.diag(s[:RANK] / 2.5), atol=1e-12)


def test_minor_is_the_bottom_of_the_weight():
    model, _, found = lora("minor")
    for path, b, a in found:
        u, s, vh = np.linalg.svd(weight(model, path), full_matrices=False)
        np.testing.assert_allclose(2.5 * b @ a, (u[:, -RANK:] * s[-RANK:]) @ vh[-RANK:], atol=1e-12)


def test_olora_is_the_qr_of_the_weight():
    model, _, found = lora("olora")
    for path, b, a in found:
        q, r = np.linalg.qr(weight(model, path))
        np.testing.assert_allclose(b, q[:, :RANK], atol=1e-12)
        np.testing.assert_allclose(a, r[:RANK], atol=1e-12)


def test_the_gradients_are_those_of_autograd():
    model = Toy(layers=2, width=WIDTH).double()
    adapter = attach(model, {"preset": "lora", "rank": RANK})
    tiny.shake(adapter)  # gradients are the base's, whatever an adapter adds
    found = ta.gradients(model, adapter, batches(dtype=torch.float64), squares)
    for path in found:
        np.testing.assert_allclose(numpy_of(found[path]), gradient(model, path), atol=1e-14)
    spec = ta.preset("lora", rank=RANK, targets=TARGETS)
    again = ta.gradients(Toy(layers=2, width=WIDTH).double(), spec, batches(dtype=torch.float64), squares)
    assert all(torch.allclose(again[path], found[path], atol=1e-14) for path in found)


def tangent_residual(b, a, g):
    """|g - P g| with P the projection on {B X + Y A}, dense."""
    outside = (np.eye(len(b)) - b @ np.linalg.pinv(b)) @ g @ (np.eye(a.shape[1]) - np.linalg.pinv(a) @ a)
    return np.linalg.norm(outside)


@pytest.mark.parametrize(("method", "held"), [("lora_ga", 2 * RANK), ("lora_one", RANK)])
def test_the_tangent_space_at_the_start_holds_the_top_of_the_gradient(method, held):
    """LoRA-GA misses the gradient's singular values beyond 2r, LoRA-One those beyond r."""
    model, _, found = lora(method)
    for path, b, a in found:
        g = gradient(model, path)
        s = np.linalg.svd(g, compute_uv=False)
        np.testing.assert_allclose(tangent_residual(b, a, g), np.linalg.norm(s[held:]), rtol=1e-6)


def test_lora_ga_takes_disjoint_directions_of_the_published_size():
    model, _, found = lora("lora_ga", gamma=9.0)
    for path, b, a in found:
        u, _, vh = np.linalg.svd(gradient(model, path))
        size = len(u) ** 0.25 / 3
        np.testing.assert_allclose(b @ b.T, size**2 * u[:, RANK : 2 * RANK] @ u[:, RANK : 2 * RANK].T, atol=1e-9)
        np.testing.assert_allclose(a.T @ a, size**2 * vh[:RANK].T @ vh[:RANK], atol=1e-9)


def test_lora_one_is_a_step_down_the_gradient():
    model, _, found = lora("lora_one")
    for path, b, a in found:
        u, s, vh = np.linalg.svd(gradient(model, path), full_matrices=False)
        step = -(len(u) ** 0.5) / 64 * (u[:, :RANK] * s[:RANK] / s[0]) @ vh[:RANK]
        np.testing.assert_allclose(b @ a, step, atol=1e-9)
        np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-9)


def test_eva_is_the_svd_of_the_inputs():
    model, adapter, found = lora("eva")
    for path, b, a in found:
        _, vectors = np.linalg.eigh(covariance(model, path))
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-12)
        np.testing.assert_allclose(a.T @ a, vectors[:, -RANK:] @ vectors[:, -RANK:].T, atol=1e-9)
        assert not b.any()
    assert {group.rule.start for group in adapter.groups.values()} == {"zero"}


@pytest.mark.parametrize(("method", "part"), [("corda", slice(RANK)), ("corda_minor", slice(-RANK, None))])
def test_corda_is_the_svd_of_the_weight_times_the_covariance(method, part):
    model, _, found = lora(method, damping=0.03)
    for path, b, a in found:
        c = covariance(model, path, damping=0.03)
        u, s, vh = np.linalg.svd(weight(model, path) @ c, full_matrices=False)
        np.testing.assert_allclose(2.5 * b @ a, (u[:, part] * s[part]) @ vh[part] @ np.linalg.inv(c), atol=1e-9)
        np.testing.assert_allclose(b.T @ b, np.diag(s[part] / 2.5), atol=1e-9)


def test_orthogonal_factors_of_a_zero_network():
    model, adapter = Toy(layers=1, width=40), None
    adapter = attach(model, {"preset": "lora", "rank": 8})
    ta.initialize(adapter, "orthogonal", seed=3)
    for name, group in adapter.groups.items():
        f = {n: numpy_of(t) for n, t in adapter.factors(name).items()}
        np.testing.assert_allclose(f["core_out"] @ f["core_in"], 0, atol=1e-7)
        for tensor in f.values():
            assert 0.05 < tensor.std() < 0.1  # deviation 0.1 over half of the directions
        squares(model, tiny.noise(2, 5, 40)).backward()
        assert all(float(adapter.factors(name)[n].grad.abs().max()) > 0 for n in group.trainable)


def test_orthogonal_starts_depend_on_the_seed_alone():
    def made(seed):
        adapter = attach(Toy(layers=2), {"preset": "lotr", "rank": 4})
        torch.manual_seed(seed + 17)
        return ta.initialize(adapter, "orthogonal", seed=seed).tensors()

    assert tiny.same(made(1), made(1)) and not tiny.same(made(1), made(2))


# -- groups: one shared basis for a stack of layers -------------------------------------------------------------------


def unfoldings(stack):
    return np.concatenate(list(stack), 1), np.concatenate(list(stack), 0).T


def partial_hosvd(stack, rank):
    u, v = (np.linalg.svd(part, full_matrices=False)[0][:, :rank] for part in unfoldings(stack))
    return np.stack([u @ (u.T @ d @ v) @ v.T for d in stack])


@pytest.mark.parametrize("method", ["pissa", "lora_one"])
def test_lotr_takes_the_partial_hosvd_of_the_stack(method):
    """Shared bases of the stacked weights or gradients: as good as the partial HOSVD, or better by its sweeps."""
    model = Toy(layers=3, width=WIDTH).double()
    adapter = attach(model, {"preset": "lotr", "rank": RANK, "dtype": "float64", "targets": ["q_proj"]})
    data = gathered(method, model, adapter, torch.float64)
    ta.initialize(adapter, method, **data)
    (name, group), *_ = adapter.groups.items()
    f = {n: numpy_of(t) for n, t in adapter.factors(name).items()}
    made = np.einsum("oa,lab,ib->loi", f["factor_out"], f["core"], f["factor_in"]) * group.scale
    if method == "pissa":
        wanted = np.stack([weight(model, path) for path in group.paths])
    else:
        g = np.stack([numpy_of(data["gradients"][path]) for path in group.paths])
        wanted = -group.scale * WIDTH**0.5 / 64 * g / np.linalg.svd(unfoldings(g)[0], compute_uv=False)[0]
    best = np.linalg.norm(wanted - partial_hosvd(wanted, RANK))
    assert 0.9 * best < np.linalg.norm(wanted - made) <= best * (1 + 1e-9)


def test_lora_ga_of_a_stack_takes_directions_of_both_unfoldings():
    model = Toy(layers=2, width=WIDTH).double()
    adapter = attach(model, {"preset": "lotr", "rank": RANK, "dtype": "float64", "targets": ["q_proj"]})
    found = gathered("lora_ga", model, adapter, torch.float64)
    ta.initialize(adapter, "lora_ga", **found)
    (name, group), *_ = adapter.groups.items()
    f = {n: numpy_of(t) for n, t in adapter.factors(name).items()}
    g = np.stack([numpy_of(found["gradients"][path]) for path in group.paths])
    u, v = (np.linalg.svd(part)[0] for part in unfoldings(g))
    size = WIDTH**0.5 / 16
    u, v = u[:, RANK : 2 * RANK], v[:, :RANK]
    np.testing.assert_allclose(f["factor_out"] @ f["factor_out"].T, size * u @ u.T, atol=1e-9)
    np.testing.assert_allclose(f["factor_in"] @ f["factor_in"].T, size * v @ v.T, atol=1e-9)
    np.testing.assert_array_equal(f["core"], np.broadcast_to(np.eye(RANK), f["core"].shape))


def test_eva_of_a_stack_pools_the_inputs_of_its_layers():
    model = Toy(layers=2, width=WIDTH).double()
    adapter = attach(model, {"preset": "lotr", "rank": RANK, "dtype": "float64", "targets": ["q_proj"]})
    ta.initialize(adapter, "eva", **gathered("eva", model, adapter, torch.float64))
    (name, group), *_ = adapter.groups.items()
    v = numpy_of(adapter.factors(name)["factor_in"])
    _, vectors = np.linalg.eigh(sum(covariance(model, path) for path in group.paths))
    np.testing.assert_allclose(v @ v.T, vectors[:, -RANK:] @ vectors[:, -RANK:].T, atol=1e-9)


def projected(stack, axis, part, rank):
    """Every slice on the first or last `rank` left singular directions of an unfolding of the stack."""
    u = np.linalg.svd(unfoldings(stack)[axis])[0]
    return u[:, :rank] if part == "first" else u[:, -rank:]


def weighted(model, stack, paths):
    """The weights times the mean covariance of their inputs, and that covariance."""
    c = sum(covariance(model, path) for path in paths) / len(paths)
    c += 0.01 * np.trace(c) / len(c) * np.eye(len(c))
    return stack @ c, c


def wanted_of(method, model, stack, paths):
    """What the networks of a group are fitted to."""
    if method == "olora":
        q = np.linalg.qr(stack.mean(0))[0][:, :RANK]
        return q @ (q.T @ stack)
    turned, c = weighted(model, stack, paths) if method.startswith("corda") else (stack, np.eye(stack.shape[-1]))
    if method in ("minor", "corda_minor"):
        left, right = (projected(turned, axis, "last", RANK) for axis in (0, 1))
        turned = left @ (left.T @ turned @ right) @ right.T
    return turned @ np.linalg.inv(c)


@pytest.mark.parametrize("method", ["minor", "olora", "corda_minor"])
def test_a_stack_starts_from_its_weights_after_the_turn_of_the_method(method):
    """Targets that a group's shared bases hold exactly; a start at the weights themselves would be far from them."""
    model = Toy(layers=2, width=WIDTH).double()
    adapter = attach(model, {"preset": "lotr", "rank": RANK, "dtype": "float64", "targets": ["q_proj"]})
    ta.initialize(adapter, method, **gathered(method, model, adapter, torch.float64))
    (name, group), *_ = adapter.groups.items()
    f = {n: numpy_of(t) for n, t in adapter.factors(name).items()}
    made = np.einsum("oa,lab,ib->loi", f["factor_out"], f["core"], f["factor_in"])
    stack = np.stack([weight(model, path) for path in group.paths])
    wanted = wanted_of(method, model, stack, group.paths)
    if method == "olora":  # its rows are not confined, so that a rank is left to be cut
        best = np.linalg.norm(wanted - partial_hosvd(wanted, RANK))
        assert np.linalg.norm(wanted - made) <= best * (1 + 1e-9)
    else:
        np.testing.assert_allclose(made * group.scale, wanted, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", KEEPING)
def test_output_at_step_0_and_the_saved_adapter_on_the_untouched_base(method, name, tmp_path):
    model, x = Toy(layers=3, width=WIDTH), batches()[0]
    before, base = model(x).detach(), tiny.base_of(model)
    adapter = attach(model, FORMATS[name])
    held = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    data = gathered(method, model, adapter)
    if name in NO_FORM.get(method, ()):
        with pytest.raises(ta.SpecError, match="group|eva has no form"):
            ta.initialize(adapter, method, **data)
        assert tiny.same(held, adapter.tensors())
        return
    assert ta.initialize(adapter, method, **data) is adapter
    assert float((model(x) - before).norm().detach() / before.norm()) <= 1e-6
    assert tiny.same(base, tiny.base_of(model))
    assert any(float(t.detach().abs().max()) > 0 for t in adapter.tensors().values())
    tiny.shake(adapter)
    path = adapter.save(tmp_path / "a")
    fresh = Toy(layers=3, width=WIDTH)
    again = ta.load(path, fresh)
    assert torch.equal(fresh(x), model(x)) and not torch.allclose(model(x), before)
    assert again.plan.to_dict() == adapter.plan.to_dict()


def test_a_second_start_replaces_the_first():
    model, x = Toy(layers=2, width=WIDTH), batches()[0]
    before = model(x).detach()
    adapter = attach(model, {"preset": "lotr", "rank": 4})
    first = set(adapter.tensors())
    ta.initialize(adapter, "pissa")
    assert len(adapter.tensors()) == 2 * len(first)
    ta.initialize(adapter, "eva", **gathered("eva", model, adapter))
    assert set(adapter.tensors()) == first and torch.equal(model(x), before)


def test_a_started_adapter_trains_merges_and_comes_off():
    model, x = Toy(layers=2, width=WIDTH), batches()[0]
    base = tiny.base_of(model)
    adapter = ta.initialize(attach(model, {"preset": "lora", "rank": 4}), "pissa")
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = squares(model, x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    y = model(x).detach()
    adapter.merge()
    assert torch.allclose(model(x), y, atol=1e-5)
    adapter.detach()
    assert tiny.same(base, tiny.base_of(model))


# -- layouts and modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_gpt2_keeps_its_weights_the_other_way_round(preset):
    model, ids = tiny.gpt2(), tiny.tokens()
    before = model(ids).logits.detach()
    adapter = ta.attach(model, ta.preset(preset, rank=16, targets=["attn.c_proj"]))
    found = ta.gradients(model, adapter, [{"input_ids": ids, "labels": ids}])
    path = next(iter(found))
    bare = tiny.gpt2()
    bare(input_ids=ids, labels=ids).loss.backward()
    assert torch.allclose(found[path], bare.get_submodule(path).weight.grad.T, atol=1e-6)
    ta.initialize(adapter, "pissa")
    if preset == "lora":  # of full rank: the factors hold the whole weight
        (name,) = [n for n, g in adapter.groups.items() if path in g.paths]
        f, scale = adapter.factors(name), adapter.groups[name].scale
        whole = scale * f["core_out"] @ f["core_in"]
        assert torch.allclose(whole, model.get_submodule(path).weight.T, atol=1e-6)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("method", [*KEEPING[:-2], "locon pissa", "locon eva", "locon lora_ga", "corda"])
def test_convolutions(method):
    preset, _, method = method.rpartition(" ")
    model, x = Convolutions(), tiny.noise(2, 4, 9, 9)
    before = model(x).detach()
    adapter = ta.attach(model, ta.preset(preset or "lora", rank=2, targets=["conv1", "conv2"]))
    data = {"gradients": ta.gradients(model, adapter, [x], squares)} if "lora_" in method else {}
    data = {"activations": ta.activations(model, adapter, [x])} if method in ("eva", "corda") else data
    ta.initialize(adapter, method, **data)
    assert float((model(x) - before).norm().detach() / before.norm()) <= 1e-6


def test_a_convolutions_activations_are_its_patches():
    model, x = Convolutions().double(), tiny.noise(2, 4, 9, 9).double()
    found = ta.activations(model, ta.preset("lora", rank=2, targets=["conv1"]), [x]).sites["conv1"]
    rows = numpy_of(F.unfold(x, (3, 2), padding=1, stride=2)).transpose(0, 2, 1).reshape(-1, 24)
    y = numpy_of(model.conv1(x) - model.conv1.bias[:, None, None]).transpose(0, 2, 3, 1).reshape(-1, 6)
    np.testing.assert_allclose(rows @ weight(model, "conv1").reshape(6, -1).T, y, atol=1e-12)
    np.testing.assert_allclose(numpy_of(found.rows).T @ numpy_of(found.rows), rows.T @ rows, atol=1e-9)
    assert found.count == len(rows)


@pytest.mark.parametrize("method", ["pissa", "orthogonal", "lora_one"])
def test_embeddings_start_from_their_rows_and_gradients(method):
    model, ids = tiny.bert(), tiny.tokens()
    before = model(ids).last_hidden_state.detach()
    adapter = ta.attach(model, ta.preset("lora", rank=4, targets=["word_embeddings"]))
    loss = lambda m, b: m(b).last_hidden_state.square().sum()  # noqa: E731
    data = {"gradients": ta.gradients(model, adapter, [ids], loss)} if method == "lora_one" else {}
    ta.initialize(adapter, method, **data)
    after = model(ids).last_hidden_state
    assert float((after - before).norm().detach() / before.norm()) <= 1e-6
    with pytest.raises(ta.SiteError, match="no activations"):
        ta.activations(model, adapter, [ids])


# -- warm starts ------------------------------------------------------------------------------------------------------


def test_a_delta_that_the_format_holds_is_there_from_step_0(tmp_path):
    model, x = Toy(layers=3, width=WIDTH), batches()[0]
    adapter = attach(model, {"preset": "lotr", "rank": 4, "targets": ["q_proj"]})
    teacher = attach(Toy(layers=3, width=WIDTH), {"preset": "lotr", "rank": 4, "targets": ["q_proj"]})
    tiny.shake(teacher)
    deltas = {path: teacher.delta(path).detach() for path in teacher.plan.groups[0].paths}
    ta.initialize(adapter, "delta", deltas=deltas)
    for path, delta in deltas.items():
        assert torch.allclose(adapter.delta(path), delta, atol=1e-5)
    again = ta.load(adapter.save(tmp_path / "a"), Toy(layers=3, width=WIDTH))
    assert torch.equal(again._model[0](x), model(x))


@pytest.mark.parametrize(
    ("role", "rows"), [("c_attn", slice(48)), ("c_attn[v]", slice(32, 48)), ("attn.c_proj", slice(16))]
)
def test_a_warm_start_from_two_checkpoints(role, rows):
    """Conv1D layout, a part of a fused weight, and a square one, whose layout no shape tells."""
    base, tuned = (tiny.gpt2() for _ in range(2))
    owner = f"transformer.h.1.{'attn.c_proj' if role == 'attn.c_proj' else 'attn.c_attn'}"
    with torch.no_grad():
        for k, layer in enumerate(tuned.transformer.h):
            for weight in (layer.attn.c_attn.weight, layer.attn.c_proj.weight):
                weight += tiny.noise(16, 1, seed=k) @ tiny.noise(1, weight.shape[1], seed=k + 9)
    want = (tuned.get_submodule(owner).weight - base.get_submodule(owner).weight).T[rows]
    pair = ({k: t.clone() for k, t in base.state_dict().items()}, tuned.state_dict())
    parts = {"parts": {"c_attn": ["q", "k", "v"]}} if "[" in role else {}
    adapter = ta.attach(base, ta.preset("lora", rank=2, targets=[role], **parts))
    ta.initialize(adapter, "delta", deltas=pair)
    assert torch.allclose(adapter.delta(owner + role[6:] if parts else owner), want, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "lora_one", "eva"])
def test_parts_of_fused_weights_start_from_their_own_rows(method):
    model, ids = tiny.gpt2(), tiny.tokens(4, 8)
    before, batch = model(ids).logits.detach(), {"input_ids": ids, "labels": ids}
    rule = {"rank": 16, "targets": ["c_attn[v]"], "parts": {"c_attn": ["q", "k", "v"]}}
    adapter = ta.attach(model, ta.preset("lora", **rule))
    data = {"gradients": ta.gradients(model, adapter, [batch])} if method == "lora_one" else {}
    data = {"activations": ta.activations(model, adapter, [batch])} if method == "eva" else data
    ta.initialize(adapter, method, **data)
    assert torch.equal(model(ids).logits, before)
    if method == "pissa":
        f = adapter.factors("layer1_c_attn_v")
        whole = adapter.groups["layer1_c_attn_v"].scale * f["core_out"] @ f["core_in"]
        assert torch.allclose(whole, model.transformer.h[1].attn.c_attn.weight.T[32:], atol=1e-6)


@pytest.mark.parametrize("method", ["pissa", "lora_one"])
def test_experts_of_one_tensor(method):
    model, ids = tiny.mixtral(), tiny.tokens(4, 8)
    before = model(ids).logits.detach()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["re:.*experts.*"]))
    batch = {"input_ids": ids, "labels": ids}
    data = {"gradients": ta.gradients(model, adapter, [batch])} if method == "lora_one" else {}
    ta.initialize(adapter, method, **data)
    assert float((model(ids).logits - before).norm().detach() / before.norm()) <= 1e-6
    with pytest.raises(ta.SiteError, match="no activations"):
        ta.activations(model, adapter, [batch])


# -- bounded memory ---------------------------------------------------------------------------------------------------


def test_gradients_are_dropped_as_they_come_and_the_model_left_as_it_was():
    model = Toy(layers=3, width=WIDTH)
    model.layers[0].k_proj.weight.grad = torch.ones(WIDTH, WIDTH)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    spec = ta.preset("lora", rank=2, targets=["q_proj"])
    held = []

    def look(*_):
        held.append([n for n, p in model.named_parameters() if p.grad is not None])

    hooks = [layer.register_full_backward_pre_hook(look) for layer in model.layers[1:]]
    ta.gradients(model, spec, batches(), squares)
    for hook in hooks:
        hook.remove()
    assert held == [[]] * 6  # before the backward pass of every layer that gets a gradient
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["layers.0.k_proj.weight"]
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_sketch_is_small_and_holds_gradients_of_its_rank():
    """A batch of one token gives gradients of rank one: three of them fit in a sketch of four directions."""
    model, spec = Toy(layers=2, width=40), ta.preset("lora", rank=2, targets=["q_proj"])
    data = [tiny.noise(1, 1, 40, seed=k) for k in range(3)]
    whole, small = (ta.gradients(model, spec, data, squares, sketch=k) for k in (None, 4))
    for path in whole:
        assert torch.allclose(whole[path], small[path], atol=1e-4 * float(whole[path].norm()))
        part = small.slices[path]
        assert part.outer.numel() + part.inner.numel() == 4 * 80


def test_an_incremental_svd_keeps_the_leading_directions():
    model, spec = Toy(layers=1, width=WIDTH), ta.preset("lora", rank=2, targets=["q_proj"])
    leading = tiny.noise(3, WIDTH)
    data = [tiny.noise(4, 3, seed=k) @ leading for k in range(5)]
    found = ta.activations(model, spec, data, rank=3).sites["layers.0.q_proj"]
    x = torch.cat(data)
    assert found.s.shape == (3,) and found.count == 20
    assert torch.allclose(found.rows.T @ found.rows, x.T @ x, rtol=1e-4, atol=1e-3)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pissa", "minor", "olora", "orthogonal"])
def test_weights_on_the_meta_device_are_refused(method):
    with torch.device("meta"):
        model = Toy(layers=1)
    adapter = attach(model, {"preset": "lora", "rank": 2})
    with pytest.raises(ta.AdapterError, match="meta device"):
        ta.initialize(adapter, method)
    for gather in (ta.gradients, ta.activations):
        with pytest.raises(ta.AdapterError, match="meta device"):
            gather(model, adapter, batches())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "returns no loss"),
        (lambda m, b: m(b), "no scalar"),
        (lambda m, b: 1.0, "no scalar"),
        (lambda m, b: squares(m, b).detach(), "no scalar"),
        (lambda m, b: squares(m, b) * float("nan"), "not finite"),
    ],
)
def test_a_model_without_a_loss_is_refused(loss, message):
    model = Toy(layers=1, width=WIDTH)
    with pytest.raises(ta.AdapterError, match=message):
        ta.gradients(model, ta.preset("lora", rank=2, targets=TARGETS), batches(), loss)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_language_model_without_labels_has_no_loss():
    with pytest.raises(ta.AdapterError, match="labels"):
        ta.gradients(tiny.gpt2(), ta.preset("lora", rank=2, targets=["c_attn"]), [{"input_ids": tiny.tokens()}])


def refused(adapter, model):
    good = ta.gradients(model, adapter, batches(), squares)
    inputs = ta.activations(model, adapter, batches())
    path = next(iter(good))
    return {
        "no initialisation 'pisa'": ("pisa", {}),
        "starts from gradients": ("lora_ga", {}),
        "has no effect on pissa": ("pissa", {"gradients": good}),
        "'gama' has no effect": ("lora_ga", {"gradients": good, "gama": 1.0}),
        "gamma is a positive number": ("lora_ga", {"gradients": good, "gamma": 0.0}),
        "there is no gradient of": ("lora_one", {"gradients": {path: good[path]}}),
        "has another shape": ("lora_one", {"gradients": {p: good[p][1:] for p in good}}),
        "is not finite": ("lora_one", {"gradients": {p: good[p] * float("nan") for p in good}}),
        "cannot start from zeros": ("lora_one", {"gradients": {p: good[p] * 0 for p in good}}),
        "a seed is an integer": ("orthogonal", {"seed": -1}),
        "there is no initialisation": (["pissa"], {}),
        "these are no gradients": ("lora_ga", {"gradients": inputs}),
        "these are no activations": ("eva", {"activations": good}),
        "these are no deltas": ("delta", {"deltas": "folder"}),
        "is between two checkpoints": ("delta", {"deltas": (1, 2, 3)}),
        "is no tensor": ("lora_one", {"gradients": dict.fromkeys(good, 1.0)}),
        "damping is a positive number": ("corda", {"activations": inputs, "damping": "much"}),
    }


@pytest.mark.parametrize("message", refused(attach(m := Toy(layers=1, width=WIDTH), {"preset": "lora", "rank": 2}), m))
def test_what_is_refused_changes_nothing(message):
    model = Toy(layers=1, width=WIDTH)
    adapter = attach(model, {"preset": "lora", "rank": 2})
    held = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    method, data = refused(adapter, model)[message]
    with pytest.raises(ta.TensorAdaptError, match=message):
        ta.initialize(adapter, method, **data)
    assert tiny.same(held, adapter.tensors())


def test_states_that_cannot_start():
    model = Toy(layers=1, width=WIDTH)
    odd = attach(model, {"preset": "lora", "rank": 3})
    with pytest.raises(ta.RankError, match="even"):
        ta.initialize(odd, "orthogonal")
    with pytest.raises(ta.SpecError, match="no batches"):
        ta.gradients(model, odd, [], squares)
    with pytest.raises(ta.AdapterError, match="another model"):
        ta.gradients(Toy(layers=1, width=WIDTH), odd, batches(), squares)
    with pytest.raises(ta.SiteError, match="does not reach"):
        ta.gradients(model, odd, batches(), lambda m, b: m.layers[0].q_proj(b).sum())
    odd.merge()
    with pytest.raises(ta.AdapterError, match="merged"):
        ta.initialize(odd, "pissa")


@pytest.mark.parametrize("gather", [ta.gradients, ta.activations])
def test_data_of_what_is_no_adapter_or_no_batches_is_refused(gather, tmp_path):
    model = Toy(layers=1, width=WIDTH)
    adapter = attach(model, {"preset": "lora", "rank": 2})
    path = adapter.save(tmp_path)
    for where in (model, adapter.as_saved(), path, str(path), None):
        with pytest.raises(ta.AdapterError, match=r"(?s)what says which sites.*, or a Spec"):
            gather(model, where, batches())
    for other in (adapter.as_saved(), path, None):
        with pytest.raises(ta.AdapterError, match="this is no model"):
            gather(other, adapter, batches())
    for one in ({"x": batches(1)[0]}, "batch", None, 3):
        with pytest.raises(ta.AdapterError, match=r"(?s)batches come as a list.*into a list: \[batch\]"):
            gather(model, adapter, one)
    assert not any(module._forward_pre_hooks for module in model.layers.modules())


def test_a_loss_is_a_function():
    model = Toy(layers=1, width=WIDTH)
    with pytest.raises(ta.AdapterError, match="this is no loss"):
        ta.gradients(model, ta.preset("lora", rank=2, targets=TARGETS), batches(), "mse")


def test_only_an_attached_adapter_starts(tmp_path):
    model = Toy(layers=1, width=WIDTH)
    adapter = attach(model, {"preset": "lora", "rank": 2})
    for other in (model, adapter.as_saved(), adapter.save(tmp_path), None):
        with pytest.raises(ta.AdapterError, match=r"(?s)needs an attached adapter.*ta\.load\("):
            ta.initialize(other, "pissa")


@pytest.mark.parametrize("method", ["eva", "corda", "corda_minor"])
def test_activations_of_another_model_are_refused(method):
    fields = {"preset": "lora", "rank": 2, "targets": ["q_proj"]}
    wide, model = Toy(layers=1, width=2 * WIDTH), Toy(layers=1, width=WIDTH)
    found = ta.activations(wide, attach(wide, fields), [tiny.noise(2, 5, 2 * WIDTH)])
    with pytest.raises(ta.ShapeError, match="q_proj have another width"):
        ta.initialize(attach(model, fields), method, activations=found)


@pytest.mark.parametrize("method", ["corda", "corda_minor"])
@pytest.mark.parametrize("preset", ["fact_tt", "fact_tk"])
def test_inputs_cut_into_slots_are_refused_by_name(method, preset):
    model = tiny.bert()
    adapter = ta.attach(model, ta.preset(preset, rank=2, targets=["query", "output.dense"]))
    held = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    found = ta.activations(model, adapter, [tiny.tokens()])
    with pytest.raises(ta.SpecError, match=r"0\.output\.dense is cut into slots"):
        ta.initialize(adapter, method, activations=found)
    assert tiny.same(held, adapter.tensors())


def test_dropout_at_the_code_goes_with_no_difference():
    adapter = attach(Toy(layers=1), {"preset": "lora", "rank": 2, "dropout": 0.1, "dropout_at": "code"})
    with pytest.raises(ta.SpecError, match="dropout at the code"):
        ta.initialize(adapter, "pissa")
    assert {group.rule.start for group in adapter.groups.values()} == {"zero"}


def test_a_rank_above_what_there_is():
    model = nn.Sequential(nn.Linear(6, 4))
    adapter = ta.attach(model, ta.preset("lora", rank=3, targets=["0"]))
    found = ta.activations(model, adapter, [tiny.noise(2, 6)])
    with pytest.raises(ta.RankError, match="fewer directions"):
        ta.initialize(adapter, "eva", activations=found)
