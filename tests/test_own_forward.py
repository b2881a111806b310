"""Modules with a forward of their own: attached is what merging does, or the plan refuses them by name."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Llama4ForCausalLM, Llama4TextConfig, pytorch_utils

import tensoradapt as ta


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3.0


class Squashed(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Masked(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(outputs, inputs, dtype=torch.int8).triu())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Normalised(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight, dim=1), self.bias)


class Clamped(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.clamp(-0.2, 0.2), self.bias)


class Bits(nn.Linear):
    """A linear of three values, as BitNet's: the sign of a weight, and one scale."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        values = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (values - self.weight).detach(), self.bias)


class Router(nn.Linear):
    """A router that returns scores and what it chose, as several mixtures have it."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.topk(2, dim=-1).values, torch.softmax(logits, -1)


class Doubled(nn.Module):
    """Features that are its weight's, and an output of twice as many."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(tiny.noise(outputs, inputs))

    def forward(self, x):
        y = F.linear(x, self.weight)
        return torch.cat((y, -y), -1)


class Turned(Doubled):
    """The same, stored (in, out)."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(tiny.noise(inputs, outputs))

    def forward(self, x):
        return torch.relu(x @ self.weight)


class Gated(pytorch_utils.Conv1D):
    """A Conv1D with a forward of its own, under a name of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(outputs, inputs)

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


class Convolution(nn.Conv2d):
    """A 1 x 1 convolution that changes its weight in the method that PyTorch's forward calls."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 1)

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)

    def __call__(self, x):
        return super().__call__(x.mT[..., None])[..., 0]


def instance(inputs, outputs):
    """A plain linear whose forward was set on the module."""
    made = nn.Linear(inputs, outputs)
    made.forward = lambda x: 2 * F.linear(x, made.weight, made.bias)
    return made


class Host(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        found = self.inner(x)
        return torch.cat(found, -1) if type(found) is tuple else found


OWN = [Scaled, Squashed, Masked, Normalised, Clamped, Bits, Router, Doubled, Turned, Gated, Convolution, instance]
X = tiny.noise(3, 5, 8)


@pytest.mark.parametrize("make", OWN, ids=lambda make: make.__name__)
@pytest.mark.parametrize("preset", [("lora", {"rank": 2}), ("krona", {"folds": "auto:2"})], ids=["lora", "krona"])
def test_attached_is_what_merging_does(make, preset):
    torch.manual_seed(0)
    model = Host(make(8, 6)).eval()
    before = model(X).detach()
    adapter = ta.attach(model, ta.preset(preset[0], **preset[1], targets=["inner"]))
    tiny.assert_merged_is_attached(model, adapter, before, X)


class Block(nn.Module):
    """A block that has features and no weight of its own, as the feed-forward parts of vision models have."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.fc1, self.fc2 = nn.Linear(inputs, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


class Wrapped(nn.Module):
    """A linear and what is added to it, as adapters of other libraries have it: features, and the weight of a child."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.base_layer = nn.Linear(inputs, outputs)
        self.in_features, self.out_features = inputs, outputs

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + 1


@pytest.mark.parametrize(
    ("make", "sites"), [(Block, {"inner.fc1", "inner.fc2"}), (Wrapped, {"inner.base_layer"})], ids=["block", "wrapped"]
)
def test_features_without_a_weight_are_no_site(make, sites):
    spec = ta.preset("lora", rank=1, targets=["*"])
    found = {path for group in ta.plan(spec, Host(make(8, 6))).groups for path in group.paths}
    assert found == sites


MIXTURE = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "num_hidden_layers": 2}
MIXTURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": tiny.WORDS}
MIXTURE |= {"num_local_experts": 3, "pad_token_id": 0}
GEMMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
GEMMA |= {"num_key_value_heads": 2, "head_dim": 4, "vocab_size": tiny.WORDS, "pad_token_id": 0}
REAL = {
    "llama 4, router": (lambda: Llama4ForCausalLM(Llama4TextConfig(**MIXTURE)), "router", {}),
    "gemma 3, embedding": (lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA)), "embed_tokens", {"untie": True}),
}


@pytest.mark.parametrize(("make", "target", "options"), REAL.values(), ids=REAL)
@pytest.mark.filterwarnings("ignore:.*is tied to")
def test_real_models_with_such_modules(make, target, options):
    torch.manual_seed(0)
    model, words = make().eval(), tiny.tokens()
    before = model(words).logits
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=[target]))
    tiny.shake(adapter)
    attached = model(words).logits
    adapter.merge(**options)
    assert torch.allclose(model(words).logits, attached, atol=1e-5) and not torch.allclose(attached, before, atol=1e-4)


# -- weights that are computed at every call --------------------------------------------------------------------------

COMPUTED = {
    "pruned": (
        lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5),
        lambda m: nn.utils.prune.remove(m, "weight"),
        r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
    ),
    "pruned twice": (
        lambda m: nn.utils.prune.random_unstructured(nn.utils.prune.l1_unstructured(m, "weight", 0.3), "weight", 0.3),
        lambda m: nn.utils.prune.remove(m, "weight"),
        r"torch\.nn\.utils\.prune\.remove\(module, 'weight'\)",
    ),
    "weight norm": (
        nn.utils.parametrizations.weight_norm,
        lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
        r"WeightNorm(?s:.*)torch\.nn\.utils\.parametrize\.remove_parametrizations\(module, 'weight'\)",
    ),
    "weight norm of old": (
        nn.utils.weight_norm,
        nn.utils.remove_weight_norm,
        r"torch\.nn\.utils\.remove_weight_norm\(module, 'weight'\)",
    ),
    "spectral norm of old": (
        nn.utils.spectral_norm,
        nn.utils.remove_spectral_norm,
        r"torch\.nn\.utils\.remove_spectral_norm\(module, 'weight'\)",
    ),
}


@pytest.mark.parametrize(("change", "remove", "words"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_merging_into_a_computed_weight_says_how_to_end_that(change, remove, words):
    torch.manual_seed(0)
    model = Host(nn.Linear(8, 6)).eval()
    change(model.inner)
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["inner"]))
    tiny.shake(adapter)
    attached = model(X)
    with pytest.raises(ta.AdapterError, match=words) as caught:
        adapter.merge()
    assert "quantise" not in str(caught.value)
    remove(model.inner)
    adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)


@pytest.mark.parametrize(("change", "remove", "words"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_computed_weight_of_a_forward_of_its_own_is_refused_when_planned(change, remove, words):
    model = Host(Squashed(8, 6))
    change(model.inner)
    with pytest.raises(ta.SiteError, match=words):
        ta.plan(ta.preset("lora", rank=2, targets=["inner"]), model)
    remove(model.inner)
    assert ta.plan(ta.preset("lora", rank=2, targets=["inner"]), model).num_sites == 1


@pytest.mark.parametrize(("change", "remove", "words"), COMPUTED.values(), ids=COMPUTED)
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_weight_that_is_computed_since_it_was_adapted_is_refused_when_it_is_used(change, remove, words):
    model = Host(Squashed(8, 6)).eval()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["inner"]))
    tiny.shake(adapter)
    with adapter.disabled():
        before = model(X)
    change(model.inner)
    with pytest.raises(ta.AdapterError, match=r"inner\.weight is no parameter any more(?s:.*)" + words):
        model(X)
    with adapter.disabled():
        model(X)
    remove(model.inner)
    if "weight" in model.inner._buffers:
        with pytest.raises(ta.AdapterError, match=r"inner\.weight is no parameter any more(?s:.*)a buffer"):
            model(X)
    else:
        assert not torch.allclose(model(X), before, atol=1e-3)
    adapter.detach()
    same = "WeightNorm" in words or "weight_norm" in words  # the others change the weight
    assert torch.allclose(model(X), before, atol=1e-5) == same
