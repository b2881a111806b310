"""Weights that another module reads: the delta is in what is read, or the user is told."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import tensoradapt as ta


class Host(nn.Module):
    """A model with an inner part, a linear before it and one behind."""

    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), inner, nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.inner(torch.tanh(self.first(x)))))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.child.weight, self.child.bias)


class Named(Reads):
    """The weight of a child under names of its own, as a function's argument."""

    def forward(self, x):
        mine = self.child
        weight = mine.weight
        return mix(x, weight=weight)


class Handed(Reads):
    """The module itself is handed to a function, which reads its weight."""

    def forward(self, x):
        return apply_weight(self.child, x)


class ByMethod(Reads):
    """The weight comes from a method, which calls another."""

    def matrix(self):
        return self.whole(self.child)

    def whole(self, module):
        return getattr(module, "weight")  # noqa: B009

    def forward(self, x):
        return x @ self.matrix().mT


class ByProperty(Reads):
    @property
    def matrix(self):
        return self.child.weight

    def forward(self, x):
        return x @ self.matrix.mT


class Bypasses(Reads):
    """The child's forward is called by its name, past every hook."""

    def forward(self, x):
        return self.child.forward(x)


class Several(nn.Module):
    """Children in a list, read in a loop."""

    def __init__(self):
        super().__init__()
        self.child = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        for k, layer in enumerate(self.child):
            x = torch.tanh(F.linear(x, layer.weight)) + k
        return x


class Both(Reads):
    """Called, and read as well."""

    def forward(self, x):
        return torch.tanh(self.child(x)) @ self.child.weight.mT


class Sometimes(Reads):
    """Called in training, read in evaluation."""

    def forward(self, x):
        return self.child(x) if self.training else F.linear(x, self.child.weight, self.child.bias)


class Decoder(nn.Module):
    """Reads the weight of a module that its caller gives it."""

    def forward(self, x, table):
        return x @ table.weight.mT


class Given(Reads):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def forward(self, x):
        return self.decoder(x, table=self.child)


class Fused(Reads):
    """A convolution whose weight a kernel of its own takes."""

    def __init__(self):
        super().__init__()
        self.child = nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return torch.einsum("oi,bti->bto", self.child.weight.squeeze(2), x)


class Queries(Reads):
    """Learned queries: a table of which all rows are taken."""

    def __init__(self):
        super().__init__()
        self.child = nn.Embedding(5, 8)

    def forward(self, x):
        return torch.softmax(x @ self.child.weight.mT, -1) @ self.child.weight


def mix(x, weight):
    return F.linear(x, weight)


def apply_weight(module, x):
    return F.linear(x, module.weight)


READING = [Reads, Named, Handed, ByMethod, ByProperty, Bypasses, Several, Both, Sometimes, Given, Fused, Queries]
X = tiny.noise(3, 5, 8)


def hosted(make):
    torch.manual_seed(0)
    return Host(make())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", READING, ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("error")
def test_what_another_module_reads_has_the_delta(make, training):
    model = hosted(make).train(training)
    before = model(X).detach()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["re:.*child.*"]))
    tiny.assert_merged_is_attached(model, adapter, before, X)


class Asks(Reads):
    """A weight that is only asked for its dtype and device is not read."""

    def forward(self, x):
        x = x.to(self.child.weight.dtype) if self.child.weight is not None else x
        return self.child(x.to(self.child.weight.device))


def test_a_question_is_no_reading():
    plan = ta.plan(ta.preset("lora", rank=2, targets=["child"]), hosted(Asks))
    assert [p.site.delivery for p in plan.groups[0].placements] == ["output"]


def test_two_adapters_on_a_weight_that_is_read():
    model = hosted(Both)
    adapters = [ta.attach(model, ta.preset("lora", rank=1, targets=["child"]), name=name) for name in ("a", "b")]
    for seed, adapter in enumerate(adapters):
        tiny.shake(adapter, seed=seed)
    attached = model(X)
    for adapter in adapters:
        adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)


def test_a_trained_copy_is_what_another_module_reads():
    model = hosted(Reads)
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["first"], train=["inner.child"]))
    tiny.shake(adapter)
    attached = model(X)
    adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)


TEXT = {"vocab_size": tiny.WORDS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"intermediate_size": 24, "max_position_embeddings": 32}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}


def wavlm():
    sizes = {"conv_dim": (8, 8), "conv_kernel": (4, 4), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    config = transformers.WavLMConfig(**TEXT, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return transformers.WavLMModel(config)


def mamba():
    return transformers.MambaModel(transformers.MambaConfig(vocab_size=tiny.WORDS, hidden_size=16, num_hidden_layers=2))


def deberta():
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**TEXT, **RELATIVE))


def lfm2():
    kinds = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
    return transformers.Lfm2Model(transformers.Lfm2Config(**TEXT, **kinds))


def prophetnet():
    sizes = {"hidden_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_encoder_layers": 1}
    sizes |= {"num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    return transformers.ProphetNetModel(transformers.ProphetNetConfig(vocab_size=tiny.WORDS, **sizes))


def mobilebert():
    sizes = {"embedding_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1}
    return transformers.MobileBertForMaskedLM(transformers.MobileBertConfig(**TEXT, **sizes))


SOUND = {"input_values": tiny.noise(1, 100)}
WORDS = {"input_ids": tiny.tokens()}
PAIR = {**WORDS, "decoder_input_ids": tiny.tokens(seed=1)}
REAL = {
    "wavlm": (wavlm, SOUND, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    "mamba": (mamba, WORDS, ["conv1d", "dt_proj", "x_proj", "in_proj", "out_proj"]),
    "deberta-v2": (deberta, WORDS, ["rel_embeddings"]),
    "lfm2": (lfm2, WORDS, ["conv.conv"]),
    "prophetnet": (prophetnet, PAIR, ["ngram_embeddings", "decoder.position_embeddings"]),
    "mobilebert": (mobilebert, WORDS, ["predictions.dense"]),
}


@pytest.mark.parametrize(("make", "inputs", "targets"), REAL.values(), ids=REAL)
def test_real_models_that_read_the_weights_of_their_children(make, inputs, targets):
    torch.manual_seed(0)
    model = make().eval()
    before = model(**inputs)[0].detach()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=targets))
    tiny.shake(adapter)
    attached = model(**inputs)[0]
    attached.square().sum().backward()
    assert all(p.grad is not None for p in adapter.parameters() if p.requires_grad)
    adapter.merge()
    assert torch.allclose(model(**inputs)[0], attached, atol=1e-4)
    assert not torch.allclose(attached, before, atol=1e-3)


# -- delivery by weight, asked for ------------------------------------------------------------------------------------


class Hidden(Reads):
    """The weight is found by a name that is put together at run time."""

    def forward(self, x):
        return F.linear(x, dict(self.named_parameters())["child.weight"], self.child.bias)


def asked(**fields):
    return ta.preset("lora", rank=2, targets=["first", "child"], **fields)


@pytest.mark.parametrize("delivery", ["weight", {"child": "weight"}, {"re:.*child": "weight"}], ids=str)
def test_delivery_by_weight_reaches_whoever_reads(delivery, tmp_path):
    model = hosted(Hidden)
    adapter = ta.attach(model, asked(delivery=delivery))
    sites = {p.site.path: p.site.delivery for group in adapter.plan.groups for p in group.placements}
    assert sites == {"first": "weight" if delivery == "weight" else "output", "inner.child": "weight"}
    tiny.shake(adapter)
    attached = model(X)
    adapter.save(tmp_path)
    again = hosted(Hidden)
    ta.load(tmp_path, again)
    assert torch.allclose(again(X), attached, atol=1e-6)
    adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)


def test_delivery_is_a_field_of_specs(tmp_path):
    spec = asked(delivery={"child": "weight"})
    spec.save(tmp_path / "spec.yaml")
    assert ta.Spec.load(tmp_path / "spec.yaml") == spec
    assert "delivered by weight: child" in " ".join(str(spec).split()) and "delivered by weight" in str(
        asked(delivery="weight")
    )
    assert "delivered by weight: child" in " ".join(ta.plan(spec, hosted(Hidden)).in_words.split())
    with pytest.raises(ta.SpecError, match="delivery"):
        asked(delivery="output")
    with pytest.raises(ta.SiteError, match="delivery 'chidl' matches no site(?s:.*)child"):
        ta.plan(asked(delivery={"chidl": "weight"}), hosted(Hidden))


def test_a_weight_that_is_computed_cannot_be_delivered_by_weight():
    model = hosted(Reads)
    nn.utils.parametrizations.weight_norm(model.first)
    with pytest.raises(ta.SiteError, match="first cannot be delivered by weight(?s:.*)remove_parametrizations"):
        ta.attach(model, asked(delivery="weight"))
    assert not hasattr(model, "tensoradapt")
