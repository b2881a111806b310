"""Forward and backward of a wide site create no tensor of out x in entries, unless the plan says `dense`."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tensoradapt as ta

WIDTH = 4096


class Created(TorchDispatchMode):
    """Every tensor of out x in entries or more that an operation makes; views of the weights are not made."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.large: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and max(tensor.numel(), _held(tensor)) >= WIDTH * WIDTH:
                if tensor.untyped_storage().data_ptr() not in self.base:
                    self.large.append(f"{func} {tuple(tensor.shape)}")
        return result


def _held(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes() // tensor.element_size()


class Wide(nn.Module):
    """Three wide projections, of nothing but zeros, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        for name in ("q_proj", "v_proj", "o_proj"):
            module = nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False)
            module.weight = nn.Parameter(torch.zeros(WIDTH, WIDTH))
            self.layers[0].add_module(name, module)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[0]
        return layer.o_proj(x + layer.v_proj(x + layer.q_proj(x)))


@pytest.fixture(scope="module")
def model() -> Wide:
    return Wide()


HEADS = {"heads": 32}
CALLS = {name: HEADS if "heads" in row.parameters else {} for name, row in ta.PRESETS.items()}
CALLS["lora_xs"] = {"init": {"A": "normal(0.02)", "B": "normal(0.02)"}}  # a decomposition would take its time
CALLS["dota"] = {"init": {"*": "normal(0.1)"}}
CALLS["cara"] = {**HEADS, "projections": ["o_proj"]}
TARGETS = ["q_proj", "v_proj"]


def created(model: nn.Module, spec: ta.Spec) -> tuple[list[str], set[str]]:
    """The large tensors of a step with random factors, and what the plan says of the lowering."""
    adapter = ta.attach(model, spec)
    try:
        with torch.no_grad():
            for tensor in adapter.parameters():
                tensor.add_(0.01)
        said = {kind for group in adapter.plan.to_dict()["groups"] for kind in group["lowering"]}
        x = torch.ones(2, 4, WIDTH, requires_grad=True)
        with Created(model) as mode:
            model(x).sum().backward()
        assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)
        return mode.large, said
    finally:
        adapter.detach()


@pytest.mark.parametrize("name", ta.PRESETS)
def test_a_step_creates_no_tensor_of_the_weights_size(name, model):
    large, said = created(model, ta.preset(name, targets=TARGETS, **CALLS[name]))
    assert not large and "dense" not in said, (said, large)


HIGH = {"lora": 1024, "lotr": 512, "lorta": 512, "tt_lora": 64, "fact_tk": 64, "metatt_5d": 64, "loha": 40}
HIGH |= {"tenslora_att": 16, "tenslora_att_qkv_depth": 8, "cara": 256, "lokr": 48, "vera": 1024, "dota": 12}


@pytest.mark.parametrize("name", HIGH)
def test_ranks_far_above_the_usual_create_none_either(name, model):
    large, said = created(model, ta.preset(name, targets=TARGETS, rank=HIGH[name], **CALLS[name]))
    assert not large and "dense" not in said, (said, large)


@pytest.mark.parametrize("name", ["lora", "lotr", "quanta"])
def test_a_difference_and_dropout_create_none_either(name, model):
    spec = ta.preset(name, targets=TARGETS, dropout=0.1)
    assert created(model.train(), spec)[0] == []


def test_a_dense_lowering_is_seen(model):
    """The planner forms this one, which is cheaper than its two stages, and says so; the test sees both."""
    rule = {"format": "ttm", "axes": ("out", "in"), "folds": {"out": "auto:2", "in": "auto:2"}, "rank": 64}
    spec = ta.Spec(rules=(ta.Rule(targets=("q_proj",), start="nonzero", init={"*": "normal(0.01)"}, **rule),))
    large, said = created(model, spec)
    assert said == {"dense"} and large


def test_a_delta_that_is_added_to_a_weight_is_called_dense():
    """The output projection of PyTorch's attention never sees its input: its delta is formed at use."""
    plan = ta.plan(ta.preset("lora", targets=["out_proj"]), nn.ModuleDict({"attention": nn.MultiheadAttention(64, 2)}))
    assert [row["lowering"] for row in plan.to_dict()["groups"]] == [["dense"]]
    assert " dense " in plan.text(wide=True).splitlines()[1]
