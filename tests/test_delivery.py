"""Delivery: attached to any kind of module, an adapter moves the output by its delta exactly, or is refused by name."""

import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

import tensoradapt as ta


class Wrapped(nn.Module):
    """A model with one module, called with whatever the model is called with."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


class Keyword(Wrapped):
    """The same, called by keyword."""

    def forward(self, x):
        return self.inner(input=x)


class Scaled(nn.Embedding):
    """An embedding that scales its rows after the look-up, like those of several language models."""

    def forward(self, x):
        return super().forward(x) * 7.0


class Standardised(nn.Conv2d):
    """A convolution that normalises its weight at every call."""

    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Quantised(nn.Module):
    """What quantised linears look like: features, integers, and no floating-point weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        weight = torch.randint(-8, 8, (inputs * outputs // 2, 2), generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight.to(torch.int8))

    def forward(self, x):
        return F.linear(x, self.weight.reshape(self.out_features, self.in_features).to(x.dtype) / 8)


class Listed(nn.Module):
    """Matrices in a ParameterList, used by the module that holds the list."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ParameterList([nn.Parameter(tiny.noise(6, 6, seed=k)) for k in range(3)])

    def forward(self, x):
        for weight in self.maps:
            x = torch.tanh(x @ weight.mT)
        return x


class Turned(nn.Module):
    """A matrix and experts in one tensor, both stored (in, out), which no class of a module tells."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(tiny.noise(8, 6))
        self.experts = nn.Parameter(tiny.noise(3, 6, 5))

    def forward(self, x):
        return torch.stack([torch.tanh(x @ self.table) @ expert for expert in self.experts])


class FusedQKV(nn.Module):
    """Grouped-query attention with one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(8, 8 + 4 + 4)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).split([8, 4, 4], -1)
        return torch.cat((q, torch.softmax(k, -1) * v), -1)


def add(name: str, *, turned: bool = False, index: int | None = None, rows: slice = slice(None)):
    """How a delta (out, in) is added to a stored parameter by hand."""

    def write(weights: dict[str, torch.Tensor], delta: torch.Tensor) -> None:
        placed = torch.zeros_like(weights[name])
        part = (slice(None), rows) if turned else (rows,)
        part = part if index is None else (index, *part)
        placed[part] = delta.T if turned else delta.reshape(placed[part].shape)
        weights[name] = weights[name] + placed

    return write


def by_hand(model: nn.Module, case, adapter) -> torch.Tensor:
    """The output with every delta added to its weight, differentiable."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for path, write in case.writes.items():
        write(weights, adapter.delta(path))
    return output(lambda *args: torch.func.functional_call(model, weights, args), case.args)


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, what is adapted, and where the deltas belong."""

    make: Any
    args: tuple
    targets: tuple[str, ...]
    writes: dict[str, Any]
    fields: dict[str, Any] | None = None


def one(make, *args, write=None, target="inner", path=None, **fields) -> Case:
    return Case(make, args, (target,), {path or target: write or add("inner.weight")}, fields or None)


X = tiny.noise(3, 5, 8)
IMAGE = tiny.noise(2, 4, 9, 8)
EXPERTS = "model.layers.0.mlp.experts"
GPT2 = "transformer.h.1"
QUERY_VALUE = {"c_attn": ["q", "k", "v"]}


def conv(**more):
    return lambda: Wrapped(nn.Conv2d(4, 6, 3, **more))


def attention(**more):
    return lambda: Wrapped(nn.MultiheadAttention(8, 2, batch_first=True, **more))


CASES = {
    "linear": one(lambda: Wrapped(nn.Linear(8, 6)), X),
    "linear, one vector": one(lambda: Wrapped(nn.Linear(8, 6)), X[0, 0]),
    "linear, no batch": one(lambda: Wrapped(nn.Linear(8, 6)), X[:0]),
    "linear, one output": one(lambda: Wrapped(nn.Linear(8, 1)), X),
    "linear, one input": one(lambda: Wrapped(nn.Linear(1, 8)), X[..., :1]),
    "linear, by keyword": one(lambda: Keyword(nn.Linear(8, 6, bias=False)), X),
    "linear, the model itself": Case(lambda: nn.Linear(8, 6), (X,), ("re:.*",), {"": add("weight")}),
    "embedding": one(
        lambda: Wrapped(nn.Embedding(9, 6)), torch.tensor([[0, 8, 3]]), write=add("inner.weight", turned=True)
    ),
    "embedding, padding": one(
        lambda: Wrapped(nn.Embedding(9, 6, padding_idx=3)),
        torch.tensor([[0, 3]]),
        write=add("inner.weight", turned=True),
    ),
    "embedding, scaled": one(
        lambda: Wrapped(Scaled(9, 6)), torch.tensor([[0, 8, 3]]), write=add("inner.weight", turned=True)
    ),
    "embedding, its columns": one(
        lambda: Wrapped(nn.Embedding(9, 6)),
        torch.tensor([[0, 8, 3]]),
        target="inner[b]",
        write=add("inner.weight", turned=True, rows=slice(4, 6)),
        parts={"inner": {"a": 4, "b": 2}},
    ),
    "embedding bag": one(
        lambda: Wrapped(nn.EmbeddingBag(9, 6, mode="sum")),
        torch.tensor([[0, 8, 3]]),
        write=add("inner.weight", turned=True),
    ),
    "conv": one(conv(), IMAGE),
    "conv, unbatched": one(conv(), IMAGE[0]),
    "conv, strided and dilated": one(conv(stride=(2, 1), padding=(1, 2), dilation=2), IMAGE),
    "conv, same": one(conv(padding="same"), IMAGE),
    "conv, circular": one(conv(padding=1, padding_mode="circular"), IMAGE),
    "conv, reflected": one(conv(padding=2, padding_mode="reflect", bias=False), IMAGE),
    "conv, channels last": one(lambda: conv()().to(memory_format=torch.channels_last), IMAGE),
    "conv, 1 x 1": one(lambda: Wrapped(nn.Conv2d(4, 6, 1)), IMAGE),
    "conv, its rows": one(
        conv(), IMAGE, target="inner[b]", write=add("inner.weight", rows=slice(4, 6)), parts={"inner": {"a": 4, "b": 2}}
    ),
    "conv, grouped": one(conv(groups=2), IMAGE),
    "conv, grouped, channels last": one(lambda: conv(groups=2)().to(memory_format=torch.channels_last), IMAGE),
    "conv, depthwise": one(lambda: Wrapped(nn.Conv2d(4, 8, 3, groups=4, padding=1)), IMAGE),
    "conv, standardised": one(lambda: Wrapped(Standardised(4, 6, 3)), IMAGE),
    "conv1d": one(lambda: Wrapped(nn.Conv1d(4, 6, 3, stride=2, padding=1)), IMAGE[:, :, 0]),
    "lstm cell": one(
        lambda: Wrapped(nn.LSTMCell(8, 4)),
        X[0],
        target="weight_ih",
        path="inner.weight_ih",
        write=add("inner.weight_ih"),
    ),
    "parameters in a list": Case(
        Listed, (X[..., :6],), ("maps.0", "maps.2"), {f"maps.{k}": add(f"maps.{k}") for k in (0, 2)}
    ),
    "parameters, transposed": Case(
        Turned,
        (X,),
        ("table", "experts[1]"),
        {"table": add("table", turned=True), "experts[1]": add("experts", turned=True, index=1)},
        {"layout": {"table": "in out", "experts": "in out"}},
    ),
    "attention, in": one(
        attention(), X, X, X, target="in_proj_weight", path="inner.in_proj_weight", write=add("inner.in_proj_weight")
    ),
    "attention, value rows": one(
        attention(),
        X,
        X,
        X,
        target="in_proj_weight[v]",
        path="inner.in_proj_weight[v]",
        write=add("inner.in_proj_weight", rows=slice(16, 24)),
        parts={"in_proj_weight": ["q", "k", "v"]},
    ),
    "attention, out": one(
        attention(), X, X, X, target="out_proj", path="inner.out_proj", write=add("inner.out_proj.weight")
    ),
    "attention, other widths": one(
        attention(kdim=6, vdim=5),
        X,
        X[..., :6],
        X[..., :5],
        target="v_proj_weight",
        path="inner.v_proj_weight",
        write=add("inner.v_proj_weight"),
    ),
    "fused qkv": Case(
        FusedQKV,
        (X,),
        ("qkv_proj[q]", "qkv_proj[v]"),
        {
            "qkv_proj[q]": add("qkv_proj.weight", rows=slice(0, 8)),
            "qkv_proj[v]": add("qkv_proj.weight", rows=slice(12, 16)),
        },
        {"parts": {"qkv_proj": {"q": 8, "k": 4, "v": 4}}},
    ),
    "gpt2, fused": Case(
        tiny.gpt2,
        (tiny.tokens(),),
        ("h.1.attn.c_attn[q]", "h.1.attn.c_attn[v]"),
        {
            f"{GPT2}.attn.c_attn[q]": add(f"{GPT2}.attn.c_attn.weight", turned=True, rows=slice(0, 16)),
            f"{GPT2}.attn.c_attn[v]": add(f"{GPT2}.attn.c_attn.weight", turned=True, rows=slice(32, 48)),
        },
        {"parts": QUERY_VALUE},
    ),
    "gpt2, whole": Case(
        tiny.gpt2,
        (tiny.tokens(),),
        ("h.1.attn.c_attn", "h.1.mlp.c_proj"),
        {f"{GPT2}.{name}": add(f"{GPT2}.{name}.weight", turned=True) for name in ("attn.c_attn", "mlp.c_proj")},
    ),
    "experts": Case(
        tiny.mixtral,
        (tiny.tokens(3, 9),),
        ("gate_up_proj", "down_proj[1]"),
        {f"{EXPERTS}.gate_up_proj[{k}]": add(f"{EXPERTS}.gate_up_proj", index=k) for k in range(3)}
        | {f"{EXPERTS}.down_proj[1]": add(f"{EXPERTS}.down_proj", index=1)},
    ),
    "experts, half of a row": Case(
        tiny.mixtral,
        (tiny.tokens(3, 9),),
        ("gate_up_proj[2][up]",),
        {f"{EXPERTS}.gate_up_proj[2][up]": add(f"{EXPERTS}.gate_up_proj", index=2, rows=slice(24, 48))},
        {"parts": {"gate_up_proj": ["gate", "up"]}},
    ),
    "experts, transposed": Case(
        tiny.gpt_oss,
        (tiny.tokens(3, 9),),
        ("gate_up_proj", "down_proj"),
        {
            f"{EXPERTS}.{name}[{k}]": add(f"{EXPERTS}.{name}", index=k, turned=True)
            for name in ("gate_up_proj", "down_proj")
            for k in range(3)
        },
    ),
    "router": Case(
        tiny.mixtral,
        (tiny.tokens(3, 9),),
        ("mlp.gate",),
        {"model.layers.0.mlp.gate": add("model.layers.0.mlp.gate.weight")},
    ),
}
PRESETS = {
    "lora": {"rank": 2},
    "krona": {"folds": "auto:2"},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "quanta": {"folds": "auto:2"},
    "tt_lora": {"rank": 2, "folds": "auto:2"},
    "dota": {"rank": 2, "folds": "auto:2"},
}


def output(model: nn.Module, args: tuple) -> torch.Tensor:
    """The first tensor that a model returns."""
    found = model(*args)
    found = next(iter(found.values())) if hasattr(found, "keys") else found
    return found if torch.is_tensor(found) else found[0]


@torch.no_grad()
def silent(model: nn.Module, args: tuple) -> torch.Tensor:
    """The same without gradients."""
    return output(model, args)


def close(one: torch.Tensor, two: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return torch.allclose(
        one, two, rtol=0, atol=tolerance * (1 + float(two.detach().abs().amax()) if two.numel() else 1)
    )


def made(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.make().eval().requires_grad_(False)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_output_moves_by_the_delta_and_by_nothing_else(case, preset):
    model, plain = made(case), made(case)
    base, before = tiny.base_of(model), silent(model, case.args)
    adapter = ta.attach(model, ta.preset(preset, **PRESETS[preset], targets=case.targets, **(case.fields or {})))
    assert {path for group in adapter.plan.groups for path in group.paths} == set(case.writes)
    if preset != "tt_lora":  # its cores start with norm one
        assert torch.equal(silent(model, case.args), before)
    tiny.shake(adapter)
    attached, expected = output(model, case.args), by_hand(plain, case, adapter)
    assert close(attached, expected)
    assert not attached.numel() or not close(attached, before, 1e-3)
    adapter.merge()
    assert close(output(model, case.args), expected)
    adapter.detach()
    assert tiny.same(base, tiny.base_of(model)) and torch.equal(silent(model, case.args), before)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_are_those_of_the_delta_in_the_weight(case):
    model, plain = made(case), made(case)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=case.targets, **(case.fields or {})))
    tiny.shake(adapter)
    found = []
    for y in (output(model, case.args), by_hand(plain, case, adapter)):
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        found.append(torch.autograd.grad(loss, list(adapter.parameters()), allow_unused=y.numel() == 0))
    assert all(close(one, two) for one, two in zip(*found, strict=True) if one is not None)
    assert not y.numel() or all(bool(grad.any()) for grad in found[0])


# -- nn.MultiheadAttention and the layers that bypass their own modules ------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj"])
def test_attention_in_every_mode(target, training, grad):
    """In eval mode without gradients a fused kernel takes the weights, and calls no sub-module."""
    model = attention()().train(training)
    case = CASES["attention, in" if target == "in_proj_weight" else "attention, out"]
    plain = attention()().train(training)
    plain.load_state_dict(model.state_dict())
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=[target]))
    tiny.shake(adapter)
    with torch.set_grad_enabled(grad):
        attached, expected = output(model, case.args), by_hand(plain, case, adapter)
        assert close(attached, expected) and not close(attached, output(plain, case.args), 1e-3)
        adapter.merge()
        assert close(output(model, case.args), expected)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("target", ["in_proj_weight", "out_proj", "linear1", "linear2"])
def test_transformer_encoder_layers_in_eval_mode(target, padded):
    """Their fast path takes all weights of a layer at once, past every hook."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5]) if padded else None

    def call():
        with torch.no_grad():
            return model(X, src_key_padding_mask=mask)[:, :3]

    before = call()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=[target]))
    assert adapter.plan.num_sites == 2
    tiny.shake(adapter)
    attached = call()
    assert not close(attached, before, 1e-3)
    adapter.merge()
    assert close(call(), attached)


def test_a_parameter_is_put_back_when_a_call_fails():
    model = attention()()
    weight = model.inner.in_proj_weight
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["in_proj_weight"]))
    with pytest.raises(AssertionError, match="embedding dimension"):
        model(X[..., :3], X, X)
    assert model.inner.in_proj_weight is weight and isinstance(model.inner.in_proj_weight, nn.Parameter)
    model(X, X, X)
    assert model.inner.in_proj_weight is weight
    adapter.detach()


def test_a_parameter_that_no_call_uses_leaves_the_model_as_it_was():
    model = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.ones(4, 4))]), nn.Linear(4, 4)])
    with pytest.raises(ta.SiteError, match="no module whose call uses 0.0 was found"):
        ta.attach(model, ta.preset("lora", rank=1, targets=["0.0"]))
    assert all(p.requires_grad for p in model.parameters()) and len(model) == 2


# -- quantised bases --------------------------------------------------------------------------------------------------


def test_quantised_modules_are_served_by_their_features():
    model = Wrapped(Quantised(8, 6))
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["inner"]))
    before = model(X)
    tiny.shake(adapter)
    expected = before + X @ adapter.delta("inner").T
    assert close(model(X), expected) and not close(before, expected, 1e-3)
    with pytest.raises(ta.AdapterError, match="inner.weight is no plain weight(?s:.*)dequantise"):
        adapter.merge()
    assert close(model(X), expected)
    adapter.detach()
    assert torch.equal(model(X), before)


# -- ties -------------------------------------------------------------------------------------------------------------


def tied(**fields):
    model = tiny.gpt2()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapter = ta.attach(model, ta.preset("lora", rank=2, **fields))
    tiny.shake(adapter)
    return model, adapter, [str(w.message) for w in caught]


@pytest.mark.parametrize(("target", "other"), [("wte", "lm_head"), ("lm_head", "transformer.wte")])
def test_one_side_of_a_tie_is_adapted_alone(target, other):
    model, adapter, notes = tied(targets=[target])
    assert any("is tied to" in note and "untie=True" in note for note in notes)
    base, attached = tiny.base_of(model), output(model, (tiny.tokens(),))
    with pytest.raises(ta.AdapterError, match=f"tied to {other}(?s:.*)untie=True"):
        adapter.merge()
    assert tiny.same(base, tiny.base_of(model)) and model.lm_head.weight is model.transformer.wte.weight
    adapter.merge(untie=True)
    assert model.lm_head.weight is not model.transformer.wte.weight
    assert close(output(model, (tiny.tokens(),)), attached)
    adapter.unmerge()
    assert model.lm_head.weight is model.transformer.wte.weight and tiny.same(base, tiny.base_of(model))


@pytest.mark.parametrize("preset", ["lora", "krona", "quanta"])
def test_both_sides_of_a_tie_are_one_site(preset):
    model = tiny.gpt2()
    before = output(model, (tiny.tokens(),))
    adapter = ta.attach(model, ta.preset(preset, **PRESETS[preset], targets=["wte", "lm_head"]))
    assert adapter.plan.num_sites == 1
    assert torch.equal(output(model, (tiny.tokens(),)), before)
    tiny.shake(adapter)
    assert torch.equal(adapter.delta("lm_head"), adapter.delta("transformer.wte").T)
    by_hand_ = tiny.gpt2()
    with torch.no_grad():
        by_hand_.transformer.wte.weight += adapter.delta("lm_head")
    expected = output(by_hand_, (tiny.tokens(),))
    assert close(output(model, (tiny.tokens(),)), expected) and not close(before, expected, 1e-3)
    adapter.merge()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert close(output(model, (tiny.tokens(),)), expected)
    adapter.detach()
    assert torch.equal(output(model, (tiny.tokens(),)), before)


def test_two_of_four_tied_modules():
    """The two that are adapted stay tied to each other, and come apart from the rest."""
    model = tiny.t5()
    ids = {"input_ids": tiny.tokens(), "decoder_input_ids": tiny.tokens(seed=1)}
    assert len({id(m.weight) for m in (model.shared, model.encoder.embed_tokens, model.lm_head)}) == 1
    with pytest.warns(UserWarning, match="is tied to"):
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["encoder.embed_tokens", "lm_head"]))
    tiny.shake(adapter)
    attached = model(**ids).logits
    adapter.merge(untie=True)
    assert model.encoder.embed_tokens.weight is model.lm_head.weight is not model.decoder.embed_tokens.weight
    assert close(model(**ids).logits, attached)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_a_plain_module_whose_output_is_made_a_tuple_is_named_at_the_call():
    model = Wrapped(nn.Linear(8, 8))
    model.inner.register_forward_hook(lambda module, args, output: (output, None))
    ta.attach(model, ta.preset("lora", rank=1, targets=["inner"]))
    with pytest.raises(ta.AdapterError, match="inner returns no single tensor(?s:.*)tuple(?s:.*)exclude"):
        model(X)


REFUSED = {
    "lstm": lambda: nn.LSTM(4, 4),
    "gru": lambda: nn.GRU(4, 4),
    "script": lambda: torch.jit.script(nn.Linear(4, 4)),
    "transposed": lambda: nn.ConvTranspose2d(4, 4, 3),
    "bilinear": lambda: nn.Bilinear(4, 4, 4),
    "conv3d": lambda: nn.Conv3d(4, 4, 3),
    "max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    "bag with max_norm": lambda: nn.EmbeddingBag(4, 4, max_norm=1.0),
    "lazy": lambda: nn.LazyLinear(4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3)),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("target", ["inner", "*"])
def test_what_cannot_be_served_is_refused_by_name(make, target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit
        model = Wrapped(make())
    model.head = nn.Linear(4, 4)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ta.SiteError, match=r"inner cannot be adapted: (?s:.*)exclude=\['inner'\]"):
        ta.attach(model, ta.preset("lora", rank=1, targets=[target]))
    assert [p.requires_grad for p in model.parameters()] == flags and set(model._modules) == {"inner", "head"}
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["head"], exclude=["inner"]))
    assert adapter.plan.num_sites == 1


@pytest.mark.parametrize("target", ["weight_ih_l0", "inner.weight_ih_l0"])
def test_a_weight_that_a_fused_kernel_takes_is_refused_by_its_own_name_too(target):
    model = Wrapped(nn.GRU(4, 4))
    model.head = nn.Linear(4, 4)
    with pytest.raises(ta.SiteError, match=f"{target} cannot be adapted: GRU hands(?s:.*)out of targets"):
        ta.plan(ta.preset("lora", rank=1, targets=[target, "head"]), model)


def test_a_parametrised_linear_is_served_by_its_output():
    model = Wrapped(nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)))
    before = model(X)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["inner"]))
    tiny.shake(adapter)
    assert close(model(X), before + X @ adapter.delta("inner").T)
    with pytest.raises(ta.AdapterError, match=r"inner.weight is computed at every call(?s:.*)remove_parametrizations"):
        adapter.merge()


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "a part"])
def test_compiled_models_are_refused(how):
    model = Wrapped(nn.Sequential(nn.Linear(8, 8)))
    if how == "torch.compile":
        model = torch.compile(model)
    elif how == "model.compile":
        model.compile()
    else:
        model.inner[0] = torch.compile(model.inner[0])
    with pytest.raises(ta.AdapterError, match="the model is compiled(?s:.*)attach first, then torch.compile"):
        ta.attach(model, ta.preset("lora", rank=1, targets=["*"]))


def test_dropout_that_a_delivery_cannot_apply_is_said():
    with pytest.warns(UserWarning, match="dropout has no effect on inner.in_proj_weight"):
        ta.attach(attention()(), ta.preset("lora", rank=1, targets=["in_proj_weight"], dropout=0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ta.attach(Wrapped(nn.Linear(8, 6)), ta.preset("lora", rank=1, targets=["inner"], dropout=0.1))
