"""The axis `head` is the attention's head: one row of its factor moves the outputs of that head, and no others."""

import pytest
import torch
from toys import Toy

import tensoradapt as ta
from tensoradapt.sites import from_mapping

WIDTH, HEADS, KV_HEADS = 24, 4, 2
HEAD_DIM = WIDTH // HEADS
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
QKV = ("q_proj", "k_proj", "v_proj")
CASES = [
    ("lorta", {"targets": ATTENTION}, "factor_head", 0),
    ("metatt_5d", {"targets": ATTENTION}, "core_head", 1),
    *(
        (name, {"targets": QKV, "form": form}, "factor_head", 0)
        for name in ("tenslora_att", "tenslora_att_qkv", "tenslora_att_depth", "tenslora_att_qkv_depth")
        for form in ("tucker", "cp")
    ),
    ("cara", {"targets": QKV, "projections": ("up_proj",)}, "factor_head", 0),
]
every_case = pytest.mark.parametrize(
    ("name", "call", "node", "dim"), CASES, ids=[f"{c[0]}-{c[1].get('form', '')}" for c in CASES]
)


def heads_of(path: str) -> int:
    return KV_HEADS if path.endswith(("k_proj", "v_proj")) else HEADS


def randomise(adapter: ta.Adapter) -> None:
    generator = torch.Generator().manual_seed(0)
    for tensor in adapter.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))


@every_case
def test_one_row_of_the_factor_moves_one_head(name, call, node, dim):
    model = Toy(layers=2, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS)
    adapter = ta.attach(model, ta.preset(name, rank=3, **call))
    randomise(adapter)
    x = torch.randn(2, 5, WIDTH)
    for group_name, group in adapter.groups.items():
        if node not in group.diagram.nodes:
            continue  # cara's projections have no heads
        whole = adapter.factors(group_name)[node].detach().clone()
        for head in range(heads_of(group.paths[0])):
            one = torch.zeros_like(whole)
            one.select(dim, head).copy_(whole.select(dim, head))
            adapter.set_factors(group_name, {node: one})
            for path in group.paths:
                _check_moves(model.get_submodule(path), adapter, adapter.delta(path), x, head)
        adapter.set_factors(group_name, {node: whole})


def _check_moves(module, adapter, delta, x, head):
    rows = torch.zeros(delta.shape[0], dtype=torch.bool)
    rows[head * HEAD_DIM : (head + 1) * HEAD_DIM] = True
    assert delta[rows].abs().min() > 0 and not delta[~rows].any()
    with adapter.disabled():
        base = module(x)
    moved = module(x) - base
    assert moved[..., rows].abs().max() > 1e-4 and not moved[..., ~rows].any()


@every_case
def test_keys_and_values_have_their_own_heads(name, call, node, dim):
    model = Toy(layers=2, width=WIDTH, heads=HEADS, kv_heads=KV_HEADS)
    plan = ta.plan(ta.preset(name, **call), model)
    for group in (g for g in plan.groups if node in g.diagram.nodes):
        count = {heads_of(path) for path in group.paths}
        assert {group.diagram.sizes["head"]} == count and group.diagram.sizes["head_dim"] == HEAD_DIM


SHAPES = {f"h.{layer}.{role}_proj": (48, 48) if role in "qo" else (12, 48) for layer in range(2) for role in "qkvo"}


def sizes(spec: ta.Spec, model) -> dict[str, tuple[int, int]]:
    return {
        path: (g.diagram.sizes["head"], g.diagram.sizes["head_dim"])
        for g in ta.plan(spec, model).groups
        for path in g.paths
    }


def test_heads_are_passed_or_known_or_asked_for():
    with pytest.raises(ta.SpecError, match=r"(?s)heads.*pass heads=12"):
        ta.plan(ta.preset("lorta", targets=["q_proj"]), SHAPES)
    passed = sizes(ta.preset("lorta", heads=8, kv_heads=2, targets=["q_proj", "v_proj"]), SHAPES)
    known = sizes(ta.preset("lorta", targets=["q_proj", "v_proj"]), from_mapping(SHAPES, heads=8, kv_heads=2))
    assert passed == known == {f"h.{n}.{role}_proj": (8 if role == "q" else 2, 6) for n in range(2) for role in "qv"}


def test_heads_that_are_passed_win_over_the_models():
    found = sizes(
        ta.preset("lorta", heads=16, kv_heads=4, targets=["q_proj", "v_proj"]),
        from_mapping(SHAPES, heads=8, kv_heads=2),
    )
    assert set(found.values()) == {(16, 3), (4, 3)}


def test_keys_keep_the_models_heads_when_only_the_queries_heads_are_passed():
    """Otherwise 12 outputs of a key would be cut into 4 heads of 3 in silence, where the model has 2 of 6."""
    found = sizes(ta.preset("lorta", heads=4, targets=["q_proj", "k_proj"]), from_mapping(SHAPES, heads=4, kv_heads=1))
    assert found["h.0.k_proj"] == (1, 12) and found["h.0.q_proj"] == (4, 12)


def test_heads_that_do_not_divide_the_outputs_are_refused():
    with pytest.raises(ta.ShapeError, match="multiply out"):
        ta.plan(ta.preset("metatt_5d", heads=7, targets=["q_proj"]), SHAPES)


@pytest.mark.parametrize(
    "role", ["k_proj", "v_proj", "key", "attention.self.value", "k", "v", "k_lin", "keys", "c_attn[k]", "qkv_proj[v]"]
)
def test_names_of_keys_and_values(role):
    parts = {"c_attn": ["k"]} if "c_attn" in role else {"qkv_proj": ["v"]} if "qkv" in role else {}
    path = f"h.0.{role.partition('[')[0]}"
    spec = ta.preset("lorta", targets=[path], parts=parts)
    assert set(sizes(spec, from_mapping({path: (12, 48)}, heads=6, kv_heads=2)).values()) == {(2, 6)}


@pytest.mark.parametrize(
    "role",
    [
        "q_proj",
        "query",
        "o_proj",
        "attention.output.dense",
        "out_proj",
        "q",
        "o",
        "kv_gate",
        "conv",
        "block",
        "mlp.monkey",
    ],
)
def test_names_of_neither(role):
    spec = ta.preset("lorta", targets=[f"h.0.{role}"])
    assert set(sizes(spec, from_mapping({f"h.0.{role}": (12, 48)}, heads=6, kv_heads=2)).values()) == {(6, 2)}
