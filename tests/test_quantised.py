"""Quantised bases: trained under transformers' Trainer, never read as if their entries were the weight's."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

import tensoradapt as ta


class Codes(nn.Linear):
    """A linear as bitsandbytes has it: a packed parameter of integers, features that say the shape, a scale beside."""

    def __init__(self, inner: nn.Linear, packed: bool = True) -> None:
        super().__init__(inner.in_features, inner.out_features, device="meta")
        self.scale = inner.weight.detach().abs().max() / 127
        codes = (inner.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes.reshape(-1, 1) if packed else codes, requires_grad=False)
        self.bias = inner.bias

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features).to(x.dtype) * self.scale
        return F.linear(x, weight, self.bias)


class Wrapper(torch.Tensor):
    """A tensor as torchao has it: integers and a scale that say of themselves that they are float32."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("detach", "alias", "clone"):
            return cls(args[0].codes, args[0].scale)
        plain = [a.codes * a.scale if isinstance(a, cls) else a for a in args]
        if name in ("t", "addmm", "mm", "linear", "transpose"):
            return func(*plain, **(kwargs or {}))
        raise NotImplementedError(name)


def wrapped(inner: nn.Linear) -> nn.Linear:
    made = copy.deepcopy(inner)
    scale = inner.weight.detach().abs().max() / 127
    made.weight = nn.Parameter(Wrapper((inner.weight.detach() / scale).round(), scale), requires_grad=False)
    return made


KINDS = {"packed": Codes, "codes": lambda inner: Codes(inner, packed=False), "wrapper": wrapped}


@pytest.fixture(params=KINDS)
def change(request):
    return KINDS[request.param]


def quantised(change, trainable: bool = True, *, head: bool = False):
    """A classifier whose linears are quantised, saying so as transformers' quantisers do."""
    model = tiny.bert_classifier()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and (head or "classifier" not in path):
            parent, _, leaf = path.rpartition(".")
            model.get_submodule(parent)._modules[leaf] = change(module)
    config = SimpleNamespace(quant_method="made-up")
    model.hf_quantizer = SimpleNamespace(
        is_trainable=trainable, is_qat_trainable=False, quantization_config=config, is_serializable=lambda: True
    )
    model.is_quantized = True
    return model


def trainer(model, folder):
    rows = [{"input_ids": tiny.tokens(6, seed=k), "labels": torch.tensor(k % 3)} for k in range(8)]
    settings = {"max_steps": 3, "learning_rate": 0.05, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(folder), save_strategy="no", **settings), train_dataset=rows)


def attach(model, **fields):
    return ta.attach(model, ta.preset("lora", rank=2, targets=["query", "value"], **fields))


def test_transformers_trains_an_adapter_on_a_quantised_base(change, tmp_path):
    model = quantised(change)
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    adapter = attach(model, train=["classifier"])
    before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
    trainer(model, tmp_path).train()
    assert all(not torch.equal(before[name], tensor) for name, tensor in adapter.tensors().items())
    again = copy.deepcopy(model)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    ta.load(tmp_path / "adapter", model)
    trainer(model, tmp_path)
    trainer(again, tmp_path)


def test_the_last_of_two_adapters_gives_the_model_its_word_back():
    model = quantised(Codes)
    first, second = attach(model), ta.attach(model, ta.preset("lora", rank=1, targets=["key"]), name="second")
    first.detach()
    assert model.is_quantized is False
    second.detach()
    assert model.is_quantized is True


def test_a_model_that_is_not_quantised_is_left_alone():
    model = tiny.bert_classifier()
    attach(model).detach()
    assert "is_quantized" not in vars(model)


def test_a_method_that_transformers_cannot_train_is_left_to_its_refusal(tmp_path):
    model = quantised(Codes, trainable=False)
    with pytest.warns(UserWarning, match="quantised with made-up in this way cannot be trained"):
        adapter = attach(model)
    assert model.is_quantized is True
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(model, tmp_path)
    adapter.save(tmp_path / "adapter")
    adapter.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ta.load(tmp_path / "adapter", model)  # to use it, which is no training


def test_a_model_whose_weights_were_unpacked_is_trained(tmp_path):
    """As a GGUF file's are, which transformers calls quantised and impossible to train all the same."""
    model = quantised(lambda linear: linear, trainable=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapter = attach(model)
    trainer(model, tmp_path).train()
    adapter.detach()
    assert model.is_quantized is True


def test_merging_into_a_quantised_weight_is_refused_in_words(change):
    model = quantised(change)
    adapter = attach(model)
    with pytest.raises(ta.AdapterError, match="query.weight is no plain weight(?s:.*)quantised(?s:.*)dequantise"):
        adapter.merge()
    assert not adapter.merged


@pytest.mark.parametrize("name", ["lora_xs", "dota"])
def test_no_start_is_taken_from_a_quantised_weight(change, name):
    """Integers of the weight's own shape would else be decomposed as if they were the weight."""
    model, spec = quantised(change), ta.preset(name, rank=2, targets=["query"])
    with pytest.raises(ta.AdapterError, match="no plain weight to start from: it is quantised(?s:.*)half precision"):
        ta.attach(model, spec)
    assert not hasattr(model, "tensoradapt")


def test_a_quantised_head_is_not_trained_whole(change):
    model = quantised(change, head=True)
    with pytest.raises(ta.AdapterError, match="classifier.weight cannot be trained whole(?s:.*)skip_modules"):
        attach(model, train=["classifier"])


def test_shapes_come_from_the_features_of_a_module(change):
    sites = ta.plan(ta.preset("lora", rank=2, targets=["query"]), quantised(change)).groups[0].placements
    assert sites[0].site.shape == (16, 16)


def test_a_packed_parameter_without_features_is_no_matrix():
    model = nn.Module()
    model.table = nn.Parameter(torch.zeros(64, 2, dtype=torch.uint8), requires_grad=False)
    model.head = nn.Linear(4, 4)
    with pytest.raises(ta.SiteError, match="its weight is quantised or sharded: uint8 of shape"):
        ta.plan(ta.preset("lora", rank=1, targets=["table"]), model)


def test_a_weight_that_was_quantised_after_the_merge_is_not_written_to(change):
    model = tiny.bert_classifier()
    adapter = attach(model)
    tiny.shake(adapter)
    adapter.merge()
    attention = model.bert.encoder.layer[1].attention.self
    attention.query.weight = change(attention.query).weight
    held = attention.query.weight
    for undo in (adapter.unmerge, adapter.detach):
        with pytest.raises(ta.AdapterError, match="query.weight was quantised after the merge(?s:.*)merge_and_detach"):
            undo()
    assert adapter.merged and attention.query.weight is held
