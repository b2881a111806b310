"""Models of which accelerate keeps a part on the CPU or on disk: adapted as any other, or refused in words."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from test_own_forward import Squashed
from torch import nn
from transformers import AutoModelForCausalLM

import tensoradapt as ta


class Model(nn.Module):
    """Modules of every delivery: by output, by weight, and read by another under accelerate's own rule for that."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.plain, self.own = nn.Linear(8, 8), Squashed(8, 8)
        self.reader = Reader()
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.reader(self.own(self.plain(self.words(x)))))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(F.linear(x, self.child.weight, self.child.bias))


def made():
    torch.manual_seed(0)
    return Model()


X = torch.tensor([[1, 2, 8], [0, 3, 3]])
TARGETS = ["words", "plain", "own", "child"]
SPLIT = {"words": "cpu", "plain": "disk", "own": "disk", "reader": "cpu", "out": "cpu"}
OFFLOAD = {
    "to the cpu": lambda model, folder: cpu_offload(model, "cpu", preload_module_classes=["Reader"]),
    "to disk": lambda model, folder: disk_offload(model, folder, "cpu", preload_module_classes=["Reader"]),
    "split": lambda model, folder: dispatch_model(
        model, SPLIT, main_device="cpu", offload_dir=folder, force_hooks=True
    ),
}


def attach(model, targets=TARGETS, **more):
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=targets), **more)
    assert not any(p.is_meta for p in adapter.parameters())
    return adapter


@pytest.mark.parametrize("offload", OFFLOAD.values(), ids=OFFLOAD)
def test_an_adapter_on_an_offloaded_model_is_what_it_is_on_the_model(offload, tmp_path):
    whole, model = made(), made()
    before = whole(X)
    model = offload(model, tmp_path / "weights")
    assert any(p.is_meta for p in model.parameters())
    adapters = [attach(each) for each in (whole, model)]
    found = []
    for each, adapter in zip((whole, model), adapters, strict=True):
        assert torch.equal(each(X), before)
        tiny.shake(adapter)
        y = each(X)
        y.square().sum().backward()
        found.append((y, [p.grad for p in adapter.parameters() if p.requires_grad]))
    (expected, gradients), (y, others) = found
    assert torch.allclose(y, expected, atol=1e-6) and not torch.allclose(y, before, atol=1e-3)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients, others, strict=True))
    assert adapters[1].check(X).reached == adapters[0].check(X).reached == ("words", "plain", "own", "reader.child")
    adapters[1].save(tmp_path / "adapter")
    again = ta.load(tmp_path / "adapter", made())
    assert torch.allclose(again._model[0](X), expected, atol=1e-6)
    adapters[1].detach()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("offload", OFFLOAD.values(), ids=OFFLOAD)
def test_what_needs_the_weights_is_refused_with_the_reason(offload, tmp_path):
    model = offload(made(), tmp_path)
    adapter = attach(model, ["plain", "own"])
    with pytest.raises(
        ta.AdapterError, match=r"plain.weight has nothing to merge into: it is offloaded(?s:.*)next: load"
    ):
        adapter.merge()
    assert not adapter.merged
    adapter.detach()
    with pytest.raises(ta.AdapterError, match="plain has no weight to start from: it is offloaded"):
        ta.attach(model, ta.preset("lora_xs", rank=2, targets=["plain"]))
    with pytest.raises(ta.AdapterError, match="own.weight cannot be trained whole: it is offloaded(?s:.*)device_map"):
        ta.attach(model, ta.preset("lora", rank=2, targets=["plain"], train=["own"]))
    assert not hasattr(model, "tensoradapt")


def test_two_adapters_within_one_offloaded_call():
    whole, model = made(), OFFLOAD["to the cpu"](made(), "")
    for each in (whole, model):
        for seed, name in enumerate(("one", "two")):
            tiny.shake(attach(each, ["own", "plain"], name=name), seed=seed)
    assert torch.allclose(model(X), whole(X), atol=1e-6)
    model.tensoradapt.one.detach()
    whole.tensoradapt.one.detach()
    assert torch.allclose(model(X), whole(X), atol=1e-6)


@pytest.mark.parametrize("make", [tiny.llama, tiny.mixtral, tiny.gpt2], ids=lambda make: make.__name__)
def test_a_model_of_transformers_with_a_device_map(make, tmp_path):
    whole = make()
    whole.save_pretrained(tmp_path / "base")
    layers = "transformer.h" if make is tiny.gpt2 else "model.layers"
    names = {name.rpartition(".")[0] for name, _ in whole.named_parameters()}
    places = {name: "disk" if name.startswith(layers) else "cpu" for name in names}
    places |= {layers: "disk", "lm_head": "cpu"}
    places = {name: where for name, where in places.items() if not name.startswith(f"{layers}.")}
    places |= {"model.rotary_emb": "cpu"} if make is not tiny.gpt2 else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=places, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in model.parameters())
    targets = ["c_attn", "c_proj"] if make is tiny.gpt2 else ["q_proj", "gate_up_proj", "down_proj"]
    targets = [t for t in targets if any(t in name for name, _ in whole.named_parameters())]
    for each in (whole.eval(), model.eval()):
        tiny.shake(attach(each, targets))
    words = tiny.tokens()
    assert torch.allclose(model(words).logits, whole(words).logits, atol=1e-5)
    model(words).logits.sum().backward()
    assert all(p.grad is not None for p in model.tensoradapt.parameters() if p.requires_grad)


@pytest.mark.parametrize("offload", OFFLOAD.values(), ids=OFFLOAD)
def test_an_adapter_that_was_there_before_the_offload_stays_itself(offload, tmp_path):
    """Its bank is not offloaded, its tensors are the same objects, which an optimiser may hold, and no map names it."""
    whole, model = made(), made()
    adapters = [attach(each, ["words", "plain", "out"]) for each in (whole, model)]
    held = [*adapters[1].parameters()]
    optimizers = [torch.optim.SGD(adapter.parameters(), lr=0.1) for adapter in adapters]
    for adapter in adapters:
        tiny.shake(adapter)
    offload(model, tmp_path / "weights")
    assert any(p.is_meta for p in model.parameters())
    assert all(a is b and not a.is_meta for a, b in zip(adapters[1].parameters(), held, strict=True))
    for each, optimizer in zip((whole, model), optimizers, strict=True):
        for _ in range(2):
            optimizer.zero_grad()
            each(X).square().sum().backward()
            optimizer.step()
    assert torch.allclose(model(X), whole(X), atol=1e-6)
    for a, b in zip(*(adapter.tensors().values() for adapter in adapters), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for path in ("words", "plain", "out"):
        assert torch.equal(adapters[1].delta(path), attached_delta(adapters[1], path, tmp_path))
    with pytest.raises(ta.AdapterError, match="has nothing to merge into: it is offloaded"):
        adapters[1].merge()
    adapters[1].detach()
    adapters[0].detach()
    assert torch.equal(model(X), whole(X))


def attached_delta(adapter, path, folder):
    """The delta after a save and a load onto a model that is not offloaded."""
    return ta.load(adapter.save(folder / "saved"), made()).delta(path)


def test_a_device_map_made_without_the_adapter_is_enough_to_load_a_checkpoint(tmp_path):
    whole, model = tiny.bert_classifier(), tiny.bert_classifier()
    whole.save_pretrained(tmp_path / "base")
    spec = ta.preset("lotr_by_role", rank=2, targets=["query", "value"])
    for each in (whole, model):
        tiny.shake(ta.attach(each, spec))
    places = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    with torch.no_grad():
        model.classifier.weight.zero_()
    names = set(model.state_dict())
    load_checkpoint_and_dispatch(model, tmp_path / "base", device_map=places, offload_folder=tmp_path / "off")
    assert any(p.is_meta for p in model.parameters()) and set(model.state_dict()) == names
    assert torch.allclose(model(tiny.tokens()).logits, whole(tiny.tokens()).logits, atol=1e-6)


@pytest.mark.parametrize("offload", OFFLOAD.values(), ids=OFFLOAD)
def test_a_weight_that_is_replaced_at_use_and_offloaded_later_is_refused(offload, tmp_path):
    model = made()
    adapter = attach(model, ["own"])
    offload(model, tmp_path)
    with pytest.raises(ta.AdapterError, match="own.weight is on the meta device(?s:.*)first, then attach"):
        model(X)
    adapter.detach()
    assert torch.equal(model(X), made()(X))
