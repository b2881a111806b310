"""Handing a model over: what `save_pretrained` writes with an adapter on it, and the verb that leaves a plain model."""

import copy
import warnings

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

import tensoradapt as ta

IDS = tiny.tokens()
SPEC = ta.preset("lotr", rank=2, targets=["query", "value"], train=["classifier"])


def adapted(make=tiny.bert_classifier, spec=SPEC):
    model = make().eval()
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    return model, adapter


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).logits


def keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as opened:
        return set(opened.keys())


def test_a_merged_model_is_saved_without_a_key_of_ours(tmp_path):
    model, adapter = adapted()
    expected = set(tiny.bert_classifier().state_dict())
    adapter.merge()
    merged = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert keys(tmp_path) == expected == set(model.state_dict())
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again), merged)
    tiny.bert_classifier().load_state_dict(model.state_dict())
    model.load_state_dict(model.state_dict())
    adapter.unmerge()
    assert set(model.state_dict()) > expected


def test_the_other_adapters_keys_stay(tmp_path):
    model, adapter = adapted()
    other = ta.attach(model, ta.preset("lora", rank=1, targets=["key"]), name="other")
    adapter.merge()
    assert {key.split(".")[1] for key in model.state_dict() if key.startswith("tensoradapt.")} == {"other"}
    with pytest.warns(UserWarning, match="'other' is not merged"):
        model.save_pretrained(tmp_path)
    assert other.enabled


def test_saving_with_an_adapter_that_is_not_merged_warns(tmp_path):
    model, adapter = adapted()
    with pytest.warns(
        UserWarning, match=r"writes the base: 'default' is not merged.*merge_and_detach.*AdapterCallback"
    ):
        model.save_pretrained(tmp_path)
    adapter.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model)


def test_copies_save_themselves(tmp_path):
    model, adapter = adapted()
    other = copy.deepcopy(model)
    other.tensoradapt.default.merge_and_detach()
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(other))
    with pytest.warns(UserWarning, match="'default' is not merged"):
        model.save_pretrained(tmp_path)


def test_detaching_a_merged_adapter_warns_that_the_change_goes():
    model, adapter = adapted()
    base = tiny.base_of(model)
    adapter.merge()
    with pytest.warns(UserWarning, match=r"takes its change out of the weights again.*merge_and_detach"):
        adapter.detach()
    assert tiny.same(tiny.base_of(model), base)


CASES = {
    "a classifier": (tiny.bert_classifier, SPEC, {}),
    "a tied head": (tiny.gpt2, ta.preset("lora", rank=2, targets=["lm_head"]), {"untie": True}),
    "tied embeddings": (tiny.gpt2, ta.preset("lora", rank=2, targets=["wte"]), {"untie": True}),
    "both sides of a tie": (tiny.gpt2, ta.preset("lora", rank=2, targets=["wte", "lm_head"]), {}),
    "a tied head of an encoder and decoder": (tiny.t5, ta.preset("lora", rank=2, targets=["lm_head"]), {"untie": True}),
    "experts": (tiny.mixtral, ta.preset("lotr", rank=2, targets=["gate_up_proj", "down_proj"]), {}),
    "a start from the weights": (
        tiny.bert_classifier,
        ta.preset("dota", rank=2, folds="auto:2", targets=["query"]),
        {},
    ),
}


@pytest.mark.parametrize("merged", [False, True], ids=["at once", "merged before"])
@pytest.mark.parametrize("case", CASES)
def test_merge_and_detach(case, merged, tmp_path):
    make, spec, options = CASES[case]
    model, adapter = adapted(make, spec)
    fresh, expected = make(), logits(model)
    if merged:
        adapter.merge(**options)
        options = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adapter.merge_and_detach(**options) is model
        model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
    assert vars(model).keys() == vars(fresh).keys()
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._load_state_dict_pre_hooks for m in model.modules())
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits(again.eval()), logits(model))


TRAINED = {
    "by output": (tiny.bert_classifier, SPEC),
    "by weight": (tiny.mixtral, ta.preset("lotr", rank=2, targets=["gate_up_proj"])),
}


@pytest.mark.parametrize("case", TRAINED)
def test_training_while_merged_says_so(case):
    model, adapter = adapted(*TRAINED[case])
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    adapter.merge()
    loss = model(input_ids=IDS).logits.sum()
    with pytest.raises(ta.AdapterError, match=r"(?s)is merged into the weights.*unmerge\(\)"):
        loss.backward()
    model.eval()
    assert not model(input_ids=IDS).logits.requires_grad
    adapter.unmerge()
    model.train()
    model(input_ids=IDS).logits.sum().backward()


def test_a_second_adapter_is_trained_on_a_merged_one():
    model, adapter = adapted()
    adapter.merge()
    other = ta.attach(model, ta.preset("lotr", rank=2, targets=["query", "value"]), name="other")
    model.train()
    model(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in other.parameters())


def test_a_merged_network_may_change_its_values_in_place():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2))
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["0", "2"]))
    adapter.merge()
    with pytest.raises(ta.AdapterError, match="is merged"):
        model(tiny.noise(3, 4)).sum().backward()
    torch.compile(model, backend="eager")(tiny.noise(3, 4))


def test_a_parted_head_is_not_tied_again_by_a_loader():
    model, adapter = adapted(tiny.gpt2, ta.preset("lora", rank=2, targets=["lm_head"]))
    adapter.merge(untie=True)
    assert model.config.tie_word_embeddings is False  # what loaders go by
    adapter.unmerge()
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is model.transformer.wte.weight
