"""Sides whose names have a prefix more or less: an adapter has the names of the model that is known, or the base's."""

import copy

import pytest
import tiny
import torch
from torch import nn
from transformers import LlamaForSequenceClassification, LlamaModel

import tensoradapt as ta

LORA = ta.preset("lora", rank=1, targets=["q_proj", "v_proj"])


def changed(model: nn.Module) -> nn.Module:
    tuned = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight", "lm_head.weight", "score.weight")):
                weight += 0.1 * torch.outer(torch.randn(len(weight)), torch.randn(weight.shape[1]))
    return tuned


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    base = tiny.llama()
    folder = tmp_path_factory.mktemp("base")
    base.save_pretrained(folder)
    return base, changed(base), folder


def short(state):
    """Names of the decoder alone; the head's as it is."""
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


KINDS = {  # what the base is given as
    "a folder": lambda base, folder: folder,
    "a live model": lambda base, folder: base,
    "a state dict": lambda base, folder: base.state_dict(),
    "a file": lambda base, folder: folder / "model.safetensors",
}


@pytest.mark.parametrize("head", ["with its head", "without"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tuned_side_without_prefix_has_the_names_of_the_model(kind, head, sides, tmp_path):
    base, tuned, folder = sides
    state = short(tuned.state_dict())
    if head == "without":
        del state["lm_head.weight"]
    targets = ["q_proj", "v_proj"] + ["lm_head"] * (head != "without")
    result = ta.extract(KINDS[kind](base, folder), state, ta.preset("lora", rank=1, targets=targets), tmp_path / "a")
    paths = set(ta.open_adapter(result.path).sites)
    assert all(path.startswith("model.layers.") for path in paths - {"lm_head"})
    model = copy.deepcopy(base)
    ta.load(result.path, model)
    ids = tiny.tokens()
    assert torch.allclose(model.model(ids).last_hidden_state, tuned.model(ids).last_hidden_state, atol=1e-5)
    assert torch.allclose(model(ids).logits, tuned(ids).logits, atol=1e-5) == (head != "without")
    ta.merge_folder(folder, result.path, tmp_path / "merged")


def test_a_body_without_prefix_and_a_head_are_loaded_by_name(sides, tmp_path):
    """Both sides are state dicts of the decoder, with the head beside it."""
    base, tuned, _ = sides
    targets = ["q_proj", "v_proj", "lm_head"]
    result = ta.extract(
        short(base.state_dict()), short(tuned.state_dict()), ta.preset("lora", rank=1, targets=targets), tmp_path / "a"
    )
    assert "layers.0.self_attn.q_proj" in ta.open_adapter(result.path).sites
    model = copy.deepcopy(base)
    ta.load(result.path, model)
    assert torch.allclose(model(tiny.tokens()).logits, tuned(tiny.tokens()).logits, atol=1e-5)


@pytest.mark.parametrize("tuned", ["folder", "live", "state"])
def test_classes_of_one_config_share_their_body(tuned, sides, tmp_path):
    """The base generates text, the tuned side classifies it."""
    base, _, folder = sides
    config = copy.deepcopy(base.config)
    config.num_labels, config.pad_token_id = 3, 0
    classifier = LlamaForSequenceClassification(config).eval()
    classifier.model.load_state_dict(base.model.state_dict())
    classifier = changed(classifier)
    classifier.save_pretrained(tmp_path / "tuned")
    source = {"folder": tmp_path / "tuned", "live": classifier, "state": classifier.state_dict()}[tuned]
    result = ta.extract(folder, source, LORA, tmp_path / "a")
    model = copy.deepcopy(base)
    ta.load(result.path, model)
    bare = LlamaModel(base.config).eval()
    bare.load_state_dict(base.model.state_dict())
    ta.load(result.path, bare)
    ids = tiny.tokens()
    wanted = classifier.model(ids).last_hidden_state
    assert torch.allclose(model.model(ids).last_hidden_state, wanted, atol=1e-5)
    assert torch.allclose(bare(ids).last_hidden_state, wanted, atol=1e-5)


class Towers(nn.Module):
    """Two encoders with the same names behind their own prefixes."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = tiny.bert(), tiny.bert()


def test_which_of_two_towers_is_meant_is_asked(tmp_path):
    base = Towers()
    tuned = changed(tiny.bert())
    with torch.no_grad():
        tuned.encoder.layer[0].attention.self.query.weight += torch.outer(torch.ones(16), torch.ones(16))
    with pytest.raises(ta.FileError, match=r"'(text|image)\.' before, or with '(text|image)\.'(.|\n)*prefix="):
        ta.analyze(base, tuned.state_dict())
    report = ta.analyze(base, tuned.state_dict(), prefix="image")
    assert all(path.startswith("image.") for path in report.sites)
