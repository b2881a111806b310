"""Adapters on live models: what they add, switch, copy, merge and leave behind."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import tensoradapt as ta
from tensoradapt import merging

X = tiny.noise(3, 5, 8)
IDS = tiny.tokens()


def out(model, **more):
    return model(input_ids=IDS, **more).last_hidden_state


def lotr(model, name="default", seed=0, **fields):
    adapter = ta.attach(model, ta.preset("lotr", rank=2, targets=["query", "value"], **fields), name=name, seed=seed)
    tiny.shake(adapter, seed=seed)
    return adapter


def attended(**more):
    """Attention whose projections are delivered by weight, and a linear delivered by output."""
    torch.manual_seed(0)
    return Attended(**more)


class Attended(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, width)

    def forward(self, x):
        return self.head(self.mix(x, x, x, need_weights=False)[0])


BOTH = {"targets": ["in_proj_weight", "head"]}
MODELS = {
    "output": (tiny.bert, {"targets": ["query", "value"]}, lambda model: out(model)),
    "weight": (attended, BOTH, lambda model: model(X)),
}


@pytest.fixture(params=MODELS)
def kind(request):
    return MODELS[request.param]


# -- what attaching does to the model ---------------------------------------------------------------------------------


def test_the_base_is_frozen_and_keeps_its_names():
    model = tiny.bert()
    names, base = [n for n, _ in model.named_parameters()], tiny.base_of(model)
    adapter = lotr(model)
    assert [n for n, _ in model.named_parameters() if not n.startswith("tensoradapt.")] == names
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"tensoradapt.default.{n}" for n, _ in adapter.named_parameters()
    }
    assert tiny.same(base, tiny.base_of(model))
    assert set(model.state_dict()) - set(base) == {f"tensoradapt.default.{n}" for n in adapter.state_dict()}


def test_the_adapter_is_registered_once_and_owns_each_factor_once():
    model = tiny.bert()
    adapter = lotr(model)
    assert [m for m in model.modules() if m is adapter] == [adapter]
    assert not [m for m in adapter.modules() if m is model]
    parameters = list(adapter.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters) == 3  # left, cores, right: for all four sites
    assert sum(p.numel() for p in parameters) == adapter.plan.num_trainable == 16 * 2 * 2 + 4 * 2 * 2


@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(kind):
    make, fields, call = kind
    model = make()
    model.requires_grad_(False)
    before = call(model)
    ta.attach(model, ta.preset("lora", rank=2, **fields))
    assert torch.equal(call(model), before)


def test_only_the_adapter_gets_gradients(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    call(model).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("tensoradapt."))


@pytest.mark.parametrize("preset", ["vera", "lora_xs", "quanta"])
def test_frozen_nodes_and_frozen_starts_are_not_trained(preset):
    fields = {"folds": "auto:2"} if preset == "quanta" else {"rank": 2}
    adapter = ta.attach(tiny.bert(), ta.preset(preset, targets=["query"], **fields))
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert (
        trained
        == adapter.plan.num_trainable
        < adapter.plan.num_parameters
        == sum(p.numel() for p in adapter.parameters())
    )


def test_training_moves_the_output_and_leaves_the_base(kind):
    make, fields, call = kind
    model, teacher = make(), make()
    base = tiny.base_of(model)
    tiny.shake(ta.attach(teacher, ta.preset("lora", rank=2, **fields)))
    target = call(teacher).detach()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    optimiser = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(call(model), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert tiny.same(base, tiny.base_of(model))


@pytest.mark.parametrize("name", ["keys", "values", "items", "pop", "update", "train", "type"])
def test_roles_may_have_the_names_of_methods(name):
    model = nn.ModuleDict({"0": nn.Module()})
    linear = model["0"]._modules[name] = nn.Linear(4, 4)
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=[f"0.{name}"]))
    tiny.shake(adapter)
    x = tiny.noise(2, 4)
    assert torch.allclose(linear(x), F.linear(x, linear.weight + adapter.delta(f"0.{name}"), linear.bias), atol=1e-6)
    assert sum(p.numel() for p in adapter.parameters()) == 8


@pytest.mark.parametrize("node", ["keys", "values", "pop", "items", "train", "type"])
def test_nodes_may_have_the_names_of_methods(node):
    rule = ta.Rule(
        targets=("head",), format="network", network=f"{node}: out a, in_: a in -> out in", zero=node, rank=2
    )
    adapter = ta.attach(attended(), ta.Spec(rules=(rule,)))
    assert set(adapter.factors(next(iter(adapter.groups)))) == {node, "in_"}


# -- roots that are containers ----------------------------------------------------------------------------------------


def test_a_sequential_root():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    before = model(X)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["0", "2"]))
    assert torch.equal(model(X), before)
    tiny.shake(adapter)
    hidden = F.linear(X, model[0].weight + adapter.delta("0"), model[0].bias).relu()
    assert torch.allclose(model(X), F.linear(hidden, model[2].weight + adapter.delta("2"), model[2].bias), atol=1e-5)
    assert len(model) == 3 and model[-1] is model[2]
    adapter.detach()
    assert torch.equal(model(X), before) and not any("tensoradapt" in name for name, _ in model.named_modules())


def test_a_module_list_root():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def call():
        x = X
        for layer in model:
            x = layer(x)
        return x

    before = call()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["0", "1"]))
    assert torch.equal(call(), before)
    tiny.shake(adapter)
    assert not torch.allclose(call(), before)
    assert len(model) == 2
    adapter.detach()
    assert torch.equal(call(), before)


def test_a_container_of_containers_carries_its_adapters_below():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 4)))
    first = ta.attach(model, ta.preset("lora", rank=1, targets=["0.0"]))
    second = ta.attach(model, ta.preset("lora", rank=1, targets=["1.0"]), name="second")
    assert [len(model), len(model[0]), len(model[1])] == [2, 2, 1] and "0.0.tensoradapt" in dict(model.named_modules())
    with pytest.raises(ta.AdapterError, match="has an adapter 'second' already"):
        ta.attach(model, ta.preset("lora", rank=1, targets=["1.0"]), name="second")
    first.detach()
    second.detach()
    assert all(p.requires_grad for p in model.parameters())


# -- several adapters -------------------------------------------------------------------------------------------------


def test_several_adapters_add_their_deltas(kind):
    make, fields, call = kind
    model, plain = make(), make()
    one = ta.attach(model, ta.preset("lora", rank=2, **fields), name="one")
    two = ta.attach(model, ta.preset("krona", folds="auto:2", **fields), name="two", seed=1)
    tiny.shake(one)
    tiny.shake(two, seed=1)
    weights = {n: p.detach().clone() for n, p in plain.named_parameters()}
    for path in (p for group in one.groups.values() for p in group.paths):
        name = path if path in weights else f"{path}.weight"
        weights[name] += one.delta(path).detach() + two.delta(path).detach()
    plain.load_state_dict(weights, strict=False)
    assert torch.allclose(call(model), call(plain), atol=1e-5)
    with one.disabled():
        alone = call(model)
    one.detach()
    assert torch.allclose(call(model), alone, atol=1e-6)


@pytest.mark.parametrize("first", ["one", "two"])
def test_adapters_leave_in_any_order(first):
    model = tiny.bert()
    model.pooler.requires_grad_(False)
    flags, before = {n: p.requires_grad for n, p in model.named_parameters()}, tiny.base_of(model)
    reference = out(model)
    adapters = {name: lotr(model, name, seed) for seed, name in enumerate(("one", "two"))}
    adapters.pop(first).detach()
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith("tensoradapt."))
    adapters.popitem()[1].detach()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert tiny.same(before, tiny.base_of(model)) and torch.equal(out(model), reference)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "tensoradapt" not in model._modules


def test_merged_adapters_are_taken_out_last_in_first_out(kind):
    make, fields, call = kind
    model = make()
    base = tiny.base_of(model)
    one = ta.attach(model, ta.preset("lora", rank=2, **fields), name="one")
    two = ta.attach(model, ta.preset("lora", rank=2, **fields), name="two")
    tiny.shake(one)
    tiny.shake(two, seed=1)
    attached = call(model)
    one.merge()
    two.merge()
    assert torch.allclose(call(model), attached, atol=1e-5)
    for refused in (one.unmerge, one.detach):
        with pytest.raises(ta.AdapterError, match="'two' was merged after 'one'(?s:.*)unmerge 'two' first"):
            refused()
    assert one.merged and torch.allclose(call(model), attached, atol=1e-5)
    two.unmerge()
    one.detach()
    two.detach()
    assert tiny.same(base, tiny.base_of(model))


@pytest.mark.parametrize("name", ["", "a.b", "1st", "train", "forward", "flags", "merged", "two words"])
def test_names_that_a_module_cannot_have(name):
    model = tiny.bert()
    with pytest.raises(ta.AdapterError, match="is no adapter name(?s:.*)letters, digits and underscores"):
        ta.attach(model, ta.preset("lora", targets=["query"]), name=name)
    assert all(p.requires_grad for p in model.parameters()) and "tensoradapt" not in model._modules


def test_attaching_twice_under_one_name_is_refused():
    model = tiny.bert()
    adapter = lotr(model)
    before = out(model)
    with pytest.raises(ta.AdapterError, match="has an adapter 'default' already(?s:.*)name='default_2'(?s:.*)detach"):
        lotr(model)
    assert torch.equal(out(model), before)
    adapter.detach()
    lotr(model)


@pytest.mark.parametrize("first", ["inner", "outer"])
def test_attaching_to_a_model_and_to_a_part_of_it_is_refused(first):
    model = tiny.bert()
    outer, inner = (model, model.encoder) if first == "outer" else (model.encoder, model)
    lotr(outer)
    before = out(model)
    with pytest.raises(ta.AdapterError, match="carries an adapter that was attached to a part of it(?s:.*)same module"):
        lotr(inner)
    assert torch.equal(out(model), before)


BAD = {
    "target": {"targets": ["qery"]},
    "rank": {"targets": ["query"], "rank": 17, "excess": "error"},
    "law": {"targets": ["query"], "init": {"core_in": "gauss(1)"}},
    "law's argument": {"targets": ["query"], "init": {"core_in": "normal(1/width)"}},
    "extra": {"targets": ["query"], "train": ["classifier"]},
    "both": {"targets": ["query"], "train": ["query"]},
}


@pytest.mark.parametrize("fields", BAD.values(), ids=BAD)
def test_a_spec_that_does_not_fit_leaves_the_model_as_it_was(fields):
    model = tiny.bert()
    modules, base = list(model.modules()), tiny.base_of(model)
    with pytest.raises(ta.TensorAdaptError, match="expected|next"):
        ta.attach(model, ta.preset("lora", **fields))
    assert list(model.modules()) == modules and tiny.same(base, tiny.base_of(model))
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_a_law_is_looked_at_where_nothing_is_drawn():
    with torch.device("meta"):
        model = tiny.bert()
    with pytest.raises(ta.SpecError, match=r"no law 'gauss\(1\)'"):
        ta.attach(model, ta.preset("lora", targets=["query"], init={"core_in": "gauss(1)"}))


@pytest.mark.parametrize("seed", [-1, 1.5, "one", True], ids=repr)
def test_a_seed_is_a_number(seed):
    with pytest.raises(ta.SpecError, match="seed is an integer"):
        ta.attach(tiny.bert(), ta.preset("lora", targets=["query"]), seed=seed)


def test_attaching_draws_nothing_from_the_global_generator():
    model = tiny.bert()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    ta.attach(model, ta.preset("lora", targets=["query"]))
    assert torch.equal(torch.get_rng_state(), before)


# -- scale, switches, factors -----------------------------------------------------------------------------------------


def test_scale_multiplies_every_delta(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, alpha=4.0, **fields))  # its own scale is 4 / 2
    tiny.shake(adapter)
    group = adapter.groups[next(iter(adapter.groups))]
    factors = adapter.factors(group.name)
    assert group.scale == 2.0
    adapter.scale = 0.5
    product = factors["core_out"] @ factors["core_in"]
    assert torch.allclose(adapter.delta(group.paths[0]), 0.5 * 2.0 * product, atol=1e-6)
    attached = call(model)
    adapter.merge()
    assert torch.allclose(call(model), attached, atol=1e-5)


@torch.no_grad()
def test_a_scale_of_zero_is_the_base(kind):
    make, fields, call = kind
    model = make()
    model.requires_grad_(False)
    before = call(model)
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    adapter.scale = 0
    assert torch.equal(call(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_is_finite(value):
    adapter = lotr(tiny.bert())
    with pytest.raises(ta.AdapterError, match="finite"):
        adapter.scale = value
    assert adapter.scale == 1.0


def test_switching_off_and_on(kind):
    make, fields, call = kind
    model = make()
    model.requires_grad_(False)
    before = call(model)
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    attached = call(model)
    adapter.enabled = False
    assert torch.equal(call(model), before)
    with adapter.disabled():
        assert torch.equal(call(model), before)
    assert not adapter.enabled  # as it was before the block
    adapter.enabled = True
    with pytest.raises(KeyError), adapter.disabled():
        assert not adapter.enabled
        raise KeyError
    assert torch.equal(call(model), attached)


def test_nothing_can_be_switched_while_merged():
    model = tiny.bert()
    adapter = lotr(model)
    adapter.merge()
    for act in (lambda: setattr(adapter, "scale", 2.0), lambda: setattr(adapter, "enabled", False), adapter.merge):
        with pytest.raises(ta.AdapterError, match="is merged into the weights(?s:.*)unmerge"):
            act()
    (group,) = adapter.groups
    held = {node: tensor.clone() for node, tensor in adapter.factors(group).items()}
    with pytest.raises(ta.AdapterError, match="unmerge"):
        adapter.set_factors(group, {node: tensor + 1 for node, tensor in held.items()})
    with pytest.raises(ta.AdapterError, match="unmerge"), adapter.disabled():
        pass
    assert adapter.scale == 1.0 and adapter.enabled and tiny.same(held, adapter.factors(group))


def test_a_state_of_an_unmerged_model_is_not_loaded_into_a_merged_one():
    model = tiny.bert()
    adapter = lotr(model)
    tiny.shake(adapter)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached = model(tiny.tokens()).last_hidden_state
    adapter.merge()
    with pytest.raises(ta.AdapterError, match=r"is merged(?s:.*)unmerge\(\), then load it"):
        model.load_state_dict(state)
    adapter.unmerge()
    model.load_state_dict(state)
    assert torch.equal(model(tiny.tokens()).last_hidden_state, attached)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keep", ["cpu", "same"])
def test_a_weight_that_was_resized_after_the_merge_is_not_written_to(keep, tied):
    model = tiny.llama(tie_word_embeddings=tied)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["embed_tokens", "v_proj"], exclude=["lm_head"]))
    tiny.shake(adapter)
    adapter.merge(keep, untie=True)
    model.resize_token_embeddings(tiny.WORDS + 8)
    merged = model(tiny.tokens()).logits
    for undo in (adapter.unmerge, adapter.detach):
        with pytest.raises(ta.AdapterError, match="embed_tokens.weight was resized(?s:.*)merge_and_detach"):
            undo()
    assert adapter.merged and torch.equal(model(tiny.tokens()).logits, merged)
    adapter.merge_and_detach()
    assert torch.equal(model(tiny.tokens()).logits, merged)


def test_factors_share_memory_and_set_factors_copies():
    model = tiny.bert()
    adapter = lotr(model)
    (group,) = adapter.groups
    before = out(model)
    mine = {node: tiny.noise(*t.shape, seed=3) for node, t in adapter.factors(group).items()}
    kept = {node: t.data_ptr() for node, t in adapter.factors(group).items()}
    adapter.set_factors(group, mine)
    assert {node: t.data_ptr() for node, t in adapter.factors(group).items()} == kept
    assert all(torch.equal(adapter.factors(group)[node], mine[node]) for node in mine)
    layer, head, tail = mine["core"][0], mine["factor_out"], mine["factor_in"]
    scale = adapter.groups[group].scale
    assert torch.allclose(adapter.delta(adapter.groups[group].paths[0]), scale * head @ layer @ tail.T, atol=1e-5)
    assert not torch.allclose(out(model), before)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"core": (4, 2, 2), "kernel": (1,)}, "has no node 'kernel'(?s:.*)factor_out"),
        ({"core": (4, 2, 2), "factor_in": (2, 16)}, r"node 'factor_in'(?s:.*)\(2, 16\)(?s:.*)\(16, 2\)"),
    ],
)
def test_set_factors_takes_all_or_nothing(values, says):
    adapter = lotr(tiny.bert())
    (group,) = adapter.groups
    before = {node: t.detach().clone() for node, t in adapter.factors(group).items()}
    with pytest.raises(ta.TensorAdaptError, match=says):
        adapter.set_factors(group, {node: torch.zeros(shape) for node, shape in values.items()})
    assert tiny.same(before, {node: t.detach() for node, t in adapter.factors(group).items()})


def test_unknown_groups_and_sites_are_named():
    adapter = lotr(tiny.bert())
    with pytest.raises(ta.SpecError, match="no group 'nope'(?s:.*)query_value"):
        adapter.factors("nope")
    with pytest.raises(ta.SiteError, match=r"pooler.dense is not adapted(?s:.*)encoder.layer.0.attention.self.query"):
        adapter.delta("pooler.dense")


def test_delta_has_gradients_and_no_dropout():
    model = tiny.bert().train()
    adapter = lotr(model, dropout=0.5)
    path = "encoder.layer.0.attention.self.query"
    assert torch.equal(adapter.delta(path), adapter.delta(path))
    adapter.delta(path).sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["in", "code"])
def test_dropout_in_training_mode_only(where):
    model = attended().eval()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["head"], dropout=0.5, dropout_at=where))
    tiny.shake(adapter)
    (group,) = adapter.groups.values()
    a, b = (adapter.factors(group.name)[node] for node in ("core_in", "core_out"))
    base = F.linear(X, model.head.weight, model.head.bias)
    assert torch.allclose(model.head(X), base + group.scale * X @ a.T @ b.T, atol=1e-5)
    model.train()
    assert adapter.training
    torch.manual_seed(3)
    found = model.head(X)
    torch.manual_seed(3)
    code = F.dropout(X, 0.5) @ a.T if where == "in" else F.dropout(X @ a.T, 0.5)
    assert torch.allclose(found, base + group.scale * code @ b.T, atol=1e-5)
    model.eval()
    assert torch.allclose(model.head(X), base + group.scale * X @ a.T @ b.T, atol=1e-5)


def test_an_adapter_takes_the_mode_of_its_model():
    assert not lotr(tiny.bert().eval()).training
    assert lotr(tiny.bert().train()).training


# -- copies -----------------------------------------------------------------------------------------------------------


def saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


def adapter_of(model) -> ta.Adapter:
    (adapter,) = (m for m in model.modules() if isinstance(m, ta.Adapter))
    return adapter


@pytest.fixture(params=COPIES.values(), ids=COPIES)
def copied(request):
    return request.param


def test_a_copy_is_whole_and_apart(copied, kind):
    make, fields, call = kind
    model = make()
    original = ta.attach(model, ta.preset("lotr", rank=2, **fields))
    tiny.shake(original)
    before = call(model)
    other = copied(model)
    mine = adapter_of(other)
    assert torch.equal(call(other), before)
    shapes = [tuple(p.shape) for p in original.parameters()]
    assert [tuple(p.shape) for p in mine.parameters()] == shapes  # what is shared by the sites still is
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}
    tiny.shake(mine, seed=4)
    assert torch.equal(call(model), before) and not torch.allclose(call(other), before)
    moved = call(other)
    tiny.shake(original, seed=5)
    assert torch.equal(call(other), moved)


def test_a_copy_is_merged_and_detached_by_itself(copied, kind):
    make, fields, call = kind
    model = make()
    plain = call(model)
    original = ta.attach(model, ta.preset("lotr", rank=2, **fields))
    tiny.shake(original)
    before, base = call(model), tiny.base_of(model)
    other = copied(model)
    mine = adapter_of(other)
    mine.merge()
    assert not original.merged and tiny.same(base, tiny.base_of(model)) and torch.equal(call(model), before)
    assert not tiny.same(base, tiny.base_of(other)) and torch.allclose(call(other), before, atol=1e-5)
    mine.detach()
    assert tiny.same(base, tiny.base_of(other)) and torch.allclose(call(other), plain, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    assert torch.equal(call(model), before)
    original.detach()
    assert torch.allclose(call(model), plain, atol=1e-6)


def test_a_copy_of_a_merged_model_unmerges_by_itself(copied):
    model = tiny.bert()
    base = tiny.base_of(model)
    adapter = lotr(model)
    adapter.merge()
    other = copied(model)
    adapter_of(other).unmerge()
    assert tiny.same(base, tiny.base_of(other)) and not tiny.same(base, tiny.base_of(model))
    adapter.unmerge()
    assert tiny.same(base, tiny.base_of(model))


# -- dtypes, devices, autocast, checkpointing -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapted_model_changes_its_dtype_as_a_whole(dtype, kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter, 0.1)
    before = call(model)
    model.to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    after = call(model) if "query" in fields["targets"] else model(X.to(dtype))
    assert after.dtype == dtype
    assert torch.allclose(after.float(), before, atol=0.1 if dtype == torch.bfloat16 else 0.02)
    after.sum().backward()
    assert all(p.grad.dtype == dtype for p in adapter.parameters())


def test_a_half_precision_base_with_float32_factors(kind):
    make, fields, call = kind
    model = make().to(torch.bfloat16)
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter, 0.1)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    y = call(model) if "query" in fields["targets"] else model(X.to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in adapter.parameters())


def test_autocast(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter, 0.1)
    exact = call(model).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(model)
        y.float().square().mean().backward()
    assert torch.allclose(y.float(), exact, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.any()) for p in adapter.parameters())


def test_the_delta_of_autocast_is_in_the_output_s_dtype():
    model = attended()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["head"]))
    tiny.shake(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.head(X).dtype == torch.bfloat16
        with adapter.disabled():
            assert model.head(X).dtype == torch.bfloat16


def test_the_meta_device(kind):
    make, fields, call = kind
    with torch.device("meta"):
        model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    assert all(p.is_meta for p in adapter.parameters())
    shape = (model(X.to("meta")) if "head" in fields["targets"] else model(IDS.to("meta"))[0]).shape
    assert shape == call(make()).shape
    with pytest.raises(ta.AdapterError, match="is on the meta device(?s:.*)load the weights first"):
        adapter.merge()


def test_an_adapted_model_goes_to_another_device(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    model.to("meta")
    assert all(p.is_meta for p in adapter.parameters()) and call(make()).shape
    y = model(X.to("meta")) if "head" in fields["targets"] else model(IDS.to("meta"))[0]
    assert y.is_meta


def test_gradient_checkpointing_of_outputs():
    gradients = []
    for checkpointed in (False, True):
        model = tiny.bert().train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        adapter = lotr(model, dropout=0.1)
        torch.manual_seed(0)
        out(model).square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_of_weights():
    gradients = []
    for checkpointed in (False, True):
        model = attended()
        adapter = ta.attach(model, ta.preset("lora", rank=2, **BOTH))
        tiny.shake(adapter)
        x = X.clone().requires_grad_()
        call = torch.utils.checkpoint.checkpoint if checkpointed else (lambda f, x, use_reentrant: f(x))
        call(model, x, use_reentrant=False).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in adapter.parameters())])
        assert isinstance(model.mix.in_proj_weight, nn.Parameter)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


# -- transformations --------------------------------------------------------------------------------------------------


def test_functional_call_takes_factors_and_weights(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(0.01)
    before = call(model)
    state = {n: p.detach() for n, p in moved.named_parameters()}
    found = call(lambda *args, **kwargs: torch.func.functional_call(model, state, args, kwargs))
    assert torch.allclose(found, call(moved), atol=1e-6) and torch.equal(call(model), before)


def test_grad_and_vmap_over_factors(kind):
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    names = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(factors):
        return call(lambda *args, **kwargs: torch.func.functional_call(model, factors, args, kwargs)).square().sum()

    call(model).square().sum().backward()
    functional = torch.func.grad(loss)(names)
    assert all(torch.allclose(functional[n], p.grad, atol=1e-4) for n, p in model.named_parameters() if n in names)
    stacked = {n: torch.stack([t, 0.5 * t, -t]) for n, t in names.items()}
    together = torch.func.vmap(loss)(stacked)
    apart = torch.stack([loss({n: t[k] for n, t in stacked.items()}) for k in range(3)])
    assert torch.allclose(together, apart, rtol=1e-4)


class Mixed(nn.Module):
    """One delivery by output and one by weight, and little else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.table = nn.Linear(8, 8), nn.Parameter(tiny.noise(8, 8))

    def forward(self, x):
        return torch.tanh(self.head(x)) @ self.table.mT


@pytest.mark.parametrize("preset", ["lora", "quanta"])
def test_compile_in_one_graph(preset):
    """The default backend, forward and backward, and what is switched, scaled or trained afterwards."""
    torch._dynamo.reset()
    model = Mixed()
    fields = {"folds": "auto:2"} if preset == "quanta" else {"rank": 2}
    adapter = ta.attach(model, ta.preset(preset, targets=["head", "table"], **fields))
    tiny.shake(adapter)
    compiled = torch.compile(model, fullgraph=True)
    results = []
    for call in (model, compiled):
        y = call(X)
        adapter.zero_grad()
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in adapter.parameters() if p.requires_grad)])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*results, strict=True))
    assert isinstance(model.table, nn.Parameter)
    tiny.shake(adapter, seed=7)
    assert torch.allclose(compiled(X), model(X), atol=1e-4)  # new values, the same graph
    with torch.no_grad(), adapter.disabled():
        assert torch.allclose(compiled(X), model(X), atol=1e-4)
    adapter.scale = 0.5
    with torch.no_grad():
        assert torch.allclose(compiled(X), model(X), atol=1e-4)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", ["cpu", "same"])
def test_unmerging_restores_the_base_bit_for_bit(keep, kind):
    make, fields, call = kind
    model = make().to(torch.bfloat16)
    base = tiny.base_of(model)
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    for _ in range(3):
        adapter.merge(keep=keep)
        assert adapter.merged and not tiny.same(base, tiny.base_of(model))
        adapter.unmerge()
        assert not adapter.merged and tiny.same(base, tiny.base_of(model))
    adapter.merge(keep=keep)
    adapter.detach()
    assert tiny.same(base, tiny.base_of(model))


def test_merging_for_good():
    model = tiny.bert()
    adapter = lotr(model)
    attached = out(model)
    adapter.merge(keep=None)
    with pytest.raises(ta.AdapterError, match=r"not kept(?s:.*)keep='cpu'"):
        adapter.unmerge()
    adapter.detach()
    assert torch.allclose(out(model), attached, atol=1e-5) and "tensoradapt" not in model._modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_merging_is_rounded_once(factors):
    """A weight in bfloat16 gets the value nearest to W + delta, computed in float32: never that of a bfloat16 sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).to(torch.bfloat16)
    adapter = ta.attach(model, ta.preset("lotr", rank=16, targets=["0"], dtype=factors, scale=0.3))
    tiny.shake(adapter, 0.1)
    (group,) = adapter.groups
    head, core, tail = (adapter.factors(group)[n].detach().double() for n in ("factor_out", "core", "factor_in"))
    exact = model[0].weight.detach().double() + 0.3 * head @ core[0] @ tail.T
    adapter.merge()
    error = (model[0].weight.detach().double() - exact).abs()
    assert bool((error <= 2.0**-8 * exact.abs() * 1.001 + 1e-6).all())  # half a unit in the last of eight places
    assert float((model[0].weight == exact.to(torch.bfloat16)).double().mean()) > 0.999


def test_a_float64_base_is_merged_in_float64():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["0"], dtype="float64"))
    tiny.shake(adapter)
    exact = model[0].weight.detach() + adapter.delta("0").detach()
    adapter.merge()
    assert torch.allclose(model[0].weight, exact, atol=1e-14, rtol=0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        fresh = torch.is_tensor(result) and not func._schema.is_mutable and not func.is_view
        self.numel = max(self.numel, result.numel() if fresh else 0)
        return result


def test_merging_goes_by_blocks_of_rows(monkeypatch):
    monkeypatch.setattr(merging, "BLOCK", 256)
    model = nn.Sequential(nn.Linear(32, 70))
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["0"]))
    tiny.shake(adapter)
    expected = model[0].weight.detach() + adapter.delta("0").detach()
    with Largest() as seen:
        adapter.merge(keep=None)
    assert seen.numel <= 256 < model[0].weight.numel()
    assert torch.allclose(model[0].weight, expected, atol=1e-6)


@pytest.mark.parametrize("keep", ["cpu", "same", None])
@pytest.mark.parametrize("fault", ["nan", "inf", "overflow", "extra"])
def test_a_merge_that_would_not_be_finite_changes_nothing(fault, keep):
    model = tiny.bert_classifier()
    model = model.half() if fault == "overflow" else model
    spec = ta.preset("lora", rank=2, targets=["query", "value"], train=["classifier"])
    adapter = ta.attach(model, spec)
    tiny.shake(adapter, 0.01)
    last = adapter.factors(list(adapter.groups)[-1])  # those before it are sound
    with torch.no_grad():
        if fault == "extra":
            adapter.extra["classifier/weight"][1, 2] = float("nan")
        elif fault == "overflow":
            last["core_out"].fill_(1e3), last["core_in"].fill_(1e3)
        else:
            last["core_out"][3, 1] = float(fault)
    base, flags = tiny.base_of(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ta.AdapterError, match=r"merging \S+ would give values that are not finite(?s:.*)look for NaN"):
        adapter.merge(keep=keep)
    assert tiny.same(base, tiny.base_of(model)) and not adapter.merged
    assert [p.requires_grad for p in model.parameters()] == flags
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.nan_to_num_(0, 0, 0).clamp_(-0.1, 0.1)
    adapter.merge(keep=keep)
    assert adapter.merged


def test_a_merge_that_is_interrupted_changes_nothing(monkeypatch):
    model = tiny.bert()
    adapter = lotr(model)
    base, calls = tiny.base_of(model), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sums(*args, **kwargs)

    sums = merging._sums
    monkeypatch.setattr(merging, "_sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter.merge()
    assert tiny.same(base, tiny.base_of(model)) and not adapter.merged


@pytest.mark.parametrize("keep", ["gpu", "", 0, True], ids=repr)
def test_a_place_to_keep_originals(keep):
    model = tiny.bert()
    adapter = lotr(model)
    base = tiny.base_of(model)
    with pytest.raises(ta.AdapterError, match="'cpu', 'same' or None"):
        adapter.merge(keep=keep)
    assert tiny.same(base, tiny.base_of(model)) and not adapter.merged


def test_states_in_which_nothing_can_be_merged():
    model = tiny.bert()
    adapter = lotr(model)
    with pytest.raises(ta.AdapterError, match="is not merged(?s:.*)merge"):
        adapter.unmerge()
    adapter.enabled = False
    with pytest.raises(ta.AdapterError, match="switched off(?s:.*)enabled = True"):
        adapter.merge()
    adapter.enabled = True
    adapter.detach()
    base = tiny.base_of(model)
    for act in (adapter.merge, adapter.detach):
        with pytest.raises(ta.AdapterError, match=r"is not attached(?s:.*)attach\(model, spec\)"):
            act()
    assert tiny.same(base, tiny.base_of(model)) and not adapter.merged


# -- modules trained beside the adapter -------------------------------------------------------------------------------


def classified(model):
    return model(input_ids=IDS).logits


def trained_beside(**more):
    model = tiny.bert_classifier()
    spec = ta.preset("lora", rank=2, targets=["query"], train=["classifier"], **more)
    return model, ta.attach(model, spec)


def test_extra_modules_are_trained_as_copies():
    model, adapter = trained_beside()
    base, before = tiny.base_of(model), classified(model).detach()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = F.cross_entropy(classified(model), torch.tensor([0, 1]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert tiny.same(base, tiny.base_of(model))
    for name in ("weight", "bias"):
        assert not torch.equal(adapter.extra[f"classifier/{name}"], base[f"classifier.{name}"])
    trained = classified(model).detach()
    assert not torch.allclose(trained, before, atol=1e-3)
    with adapter.disabled():
        assert torch.allclose(classified(model), before, atol=1e-6)
    adapter.merge()
    assert torch.allclose(classified(model), trained, atol=1e-6)
    assert torch.equal(model.classifier.bias, adapter.extra["classifier/bias"])
    adapter.detach()
    assert tiny.same(base, tiny.base_of(model)) and torch.allclose(classified(model), before, atol=1e-6)


def test_extra_modules_are_counted_apart():
    _, adapter = trained_beside()
    assert adapter.plan.num_extra == 3 * 16 + 3
    assert sum(p.numel() for p in adapter.parameters() if p.requires_grad) == adapter.plan.num_trainable + 51


def test_an_extra_module_that_is_tied_needs_untie():
    model = tiny.gpt2()
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["c_fc"], train=["lm_head"]))
    tiny.shake(adapter)
    base, attached = tiny.base_of(model), model(IDS).logits
    with pytest.raises(ta.AdapterError, match="lm_head.weight is tied to transformer.wte"):
        adapter.merge()
    adapter.merge(untie=True)
    assert torch.allclose(model(IDS).logits, attached, atol=1e-4)
    adapter.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight and tiny.same(base, tiny.base_of(model))


def test_two_adapters_do_not_train_one_module():
    model, _ = trained_beside()
    with pytest.raises(ta.AdapterError, match="classifier.weight is trained by the adapter 'default' already"):
        ta.attach(model, ta.preset("lora", rank=2, targets=["value"], train=["classifier"]), name="two")


# -- trainers ---------------------------------------------------------------------------------------------------------


def trainer(folder, steps, model):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": tiny.tokens(6, seed=k), "labels": torch.tensor(k % 3)} for k in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        seed=1,
    )
    return Trainer(model=model, args=arguments, train_dataset=rows)


def test_hugging_face_trainer_without_a_patch(tmp_path):
    """Four steps at once, and two steps, a new process's model, and two more from the checkpoint: the same factors."""
    model, adapter = trained_beside()
    start, base = copy.deepcopy(adapter.state_dict()), tiny.base_of(model)
    trainer(tmp_path / "whole", 4, model).train()
    assert tiny.same(base, tiny.base_of(model))
    assert all(not torch.equal(t, start[n]) for n, t in adapter.state_dict().items())

    half, _ = trained_beside()
    trainer(tmp_path / "parts", 2, half).train()
    fresh, resumed = trained_beside()
    trainer(tmp_path / "parts", 4, fresh).train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    pairs = zip(adapter.parameters(), resumed.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert torch.allclose(classified(fresh), classified(model), atol=1e-5)


def test_nothing_is_warned_of_on_an_ordinary_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = tiny.bert()
        adapter = lotr(model)
        adapter.merge()
        adapter.unmerge()
        adapter.detach()


# -- copies of the adapter alone --------------------------------------------------------------------------------------


def test_a_copy_of_an_adapter_alone_shares_its_model(kind):
    """What `AveragedModel(adapter)` makes: the factors once more, and not the base with them."""
    make, fields, call = kind
    model = make()
    adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    before, hooks = call(model), sum(len(m._forward_hooks) for m in model.modules())
    copied = copy.deepcopy(adapter)
    assert copied._model[0] is model and sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert all(torch.equal(t, copied.tensors()[key]) for key, t in adapter.tensors().items())
    tiny.shake(copied, seed=1)
    assert torch.equal(call(model), before)  # it is on no hook
    with pytest.raises(ta.AdapterError, match="is not attached"):
        copied.detach()


@pytest.mark.parametrize("decay", [0.5, 0.9])
def test_a_moving_average_of_the_adapter_is_an_adapter(decay, tmp_path):
    model = tiny.bert()
    adapter = lotr(model)
    averaged = AveragedModel(adapter, multi_avg_fn=get_ema_multi_avg_fn(decay))
    hand: dict[str, torch.Tensor] = {}
    for step in range(4):
        tiny.shake(adapter, seed=step)
        averaged.update_parameters(adapter)
        for key, tensor in adapter.tensors().items():
            hand[key] = torch.lerp(tensor, hand[key], decay) if key in hand else tensor.detach().clone()
    averaged.module.save(tmp_path / "average")
    again = ta.load(tmp_path / "average", tiny.bert())
    assert all(torch.allclose(tensor, hand[key], atol=1e-6) for key, tensor in again.tensors().items())


FLIPPED = np.arange(24.0).reshape(2, 12)[::-1]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(24.0).reshape(2, 12),
        np.arange(24.0).reshape(12, 2).T,
        FLIPPED,
        np.arange(24).reshape(2, 12).astype(">i4"),
        np.arange(24).reshape(2, 12).astype(np.float16),
        np.arange(24).reshape(2, 12).astype(np.longdouble),
        torch.arange(24.0, dtype=torch.bfloat16).reshape(2, 12),
    ],
    ids=["float64", "turned", "backwards", "big-endian", "float16", "long", "bfloat16"],
)
def test_set_factors_takes_arrays_of_every_make_without_a_word_where_it_keeps_their_values(values):
    adapter = ta.attach(nn.ModuleList([nn.Linear(12, 8) for _ in range(2)]), ta.preset("lora", rank=2, targets="*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.set_factors("layer0", {"core_in": values})
    held = adapter.factors("layer0")["core_in"].detach().double().numpy()
    assert np.array_equal(held, values.double().numpy() if isinstance(values, torch.Tensor) else values.astype(float))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_a_factor_cannot_hold_are_told_of_or_refused(dtype):
    spec = ta.preset("lora", rank=2, targets="*", dtype=dtype)
    adapter = ta.attach(nn.ModuleList([nn.Linear(12, 8) for _ in range(2)]), spec)
    fine = np.linspace(0.1, 1.0, 24).reshape(2, 12)
    with pytest.warns(UserWarning, match=f"core_in of group 'layer0' are rounded from float64 to {dtype}(?s:.*)dtype="):
        adapter.set_factors("layer0", {"core_in": fine})
    held = adapter.factors("layer0")["core_in"].detach()
    assert np.allclose(held.double().numpy(), fine, rtol=1e-2) and held.dtype == getattr(torch, dtype)
    for bad, says in ((fine * 1e300, r"1e\+300"), (fine + 1j, "real")):
        with pytest.raises(ta.ShapeError, match=f"core_in(?s:.*){says}"):
            adapter.set_factors("layer0", {"core_out": np.ones((8, 2)), "core_in": bad})
        assert torch.equal(adapter.factors("layer0")["core_in"].detach(), held)
        assert not adapter.factors("layer0")["core_out"].detach().any()


@pytest.mark.parametrize("name", ["dota", "quanta"])
def test_a_frozen_start_is_read_and_set(name, tmp_path):
    """D = s (N(theta) - N(theta0)): with both set, the delta is the difference of the two networks."""
    model = nn.ModuleList([nn.Linear(12, 8)])
    adapter = ta.attach(model, ta.preset(name, targets="*"))
    (group,) = adapter.groups
    factors = {node: t.detach().clone() for node, t in adapter.factors(group).items()}
    assert all(torch.equal(t, factors[node]) for node, t in adapter.factors(group, start=True).items())
    doubled = {node: 2 * t for node, t in factors.items()}
    adapter.set_factors(group, doubled)
    double = adapter.delta("0").detach()
    adapter.set_factors(group, {node: torch.zeros_like(t) for node, t in factors.items()}, start=True)
    whole = adapter.delta("0").detach()
    one = whole / 2 ** len(factors)
    assert torch.allclose(double, whole - one, atol=1e-5 * float(whole.abs().max())) and float(whole.abs().max()) > 0
    adapter.save(tmp_path)
    again = ta.load(tmp_path, nn.ModuleList([nn.Linear(12, 8)]))
    assert torch.equal(again.delta("0"), adapter.delta("0"))


def test_a_frozen_start_that_there_is_not_is_said():
    adapter = ta.attach(nn.ModuleList([nn.Linear(12, 8) for _ in range(2)]), ta.preset("lora", rank=2, targets="*"))
    for act in (lambda: adapter.factors("layer0", start=True), lambda: adapter.set_factors("layer0", {}, start=True)):
        with pytest.raises(ta.SpecError, match="no frozen start(?s:.*)zero(?s:.*)difference"):
            act()
