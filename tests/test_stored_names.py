"""Names: whatever wrappers put into them, an adapter has those of the model's own modules."""

import copy
import re

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import tensoradapt as ta
from tensoradapt.io.checkpoint import open_checkpoint
from tensoradapt.io.names import plain, plain_names
from tensoradapt.io.renamed import renamed as renaming

QV = ["query", "value"]
LORA = ta.preset("lora", rank=2, targets=QV)


def renamed(state, by):
    return {by(name): tensor for name, tensor in state.items()}


IN_FILES = {  # what saves of a wrapped model call its tensors
    "DataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "compiled, then DataParallel": lambda name: f"module._orig_mod.{name}",
    "DataParallel, then compiled": lambda name: f"_orig_mod.module.{name}",
    "compiled layers": lambda name: re.sub(r"(layer\.[0-9]\.)", r"\1_orig_mod.", name),
    "sharded layers": lambda name: (
        f"_fsdp_wrapped_module.{name.replace('attention.', 'attention._fsdp_wrapped_module.', 1)}"
    ),
    "checkpointed layers": lambda name: name.replace("layer.1.", "layer.1._checkpoint_wrapped_module."),
    "Lightning Fabric": lambda name: f"_forward_module.{name}",
}


def in_wrappers(model: nn.Module) -> dict[str, nn.Module]:
    """A live model in wrappers; a copy each."""
    layers = copy.deepcopy(model)
    for k, layer in enumerate(layers.encoder.layer):
        layers.encoder.layer[k] = checkpoint_wrapper(layer) if k else torch.compile(layer)
    return {
        "DataParallel": nn.DataParallel(copy.deepcopy(model)),
        "torch.compile": torch.compile(copy.deepcopy(model)),
        "averaged": AveragedModel(model),
        "layers": layers,
    }


@pytest.fixture(scope="module")
def sides():
    base = tiny.bert()
    tuned = copy.deepcopy(base)
    adapter = ta.attach(tuned, LORA)
    tiny.shake(adapter)
    saved = adapter.as_saved()
    outputs = tuned(tiny.tokens()).last_hidden_state.detach()
    adapter.merge_and_detach()
    return base, tuned, saved, outputs


def loads(path, base, outputs) -> None:
    """An adapter gives a copy of the base the outputs of the tuned model."""
    model = copy.deepcopy(base)
    ta.load(path, model)
    assert torch.allclose(model(tiny.tokens()).last_hidden_state, outputs, atol=1e-5)


@pytest.mark.parametrize("how", IN_FILES)
def test_a_state_with_wrappers_in_its_names_is_the_models(how, sides, tmp_path):
    base, tuned, saved, outputs = sides
    state = renamed(tiny.base_of(tuned), IN_FILES[how])
    assert set(open_checkpoint(state).entries) == set(tiny.base_of(base))
    result = ta.extract(tiny.base_of(base), state, LORA, tmp_path / "a")
    assert result.relative_error < 1e-5
    assert set(ta.open_adapter(result.path).sites) == set(saved.sites)
    loads(result.path, base, outputs)
    found = ta.verify(saved, tiny.base_of(base), state)
    assert found.whole_error < 1e-5 and not found.only_base and not found.only_tuned


@pytest.mark.parametrize("how", ["DataParallel", "torch.compile", "averaged", "layers"])
def test_a_live_model_in_wrappers_has_its_own_names(how, sides, tmp_path):
    base, tuned, saved, outputs = sides
    wrapped = in_wrappers(tuned)[how]
    plan = ta.plan(LORA, wrapped)
    assert {path for group in plan.groups for path in group.paths} == set(saved.sites)
    result = ta.extract(base, wrapped, LORA, tmp_path / "a")
    loads(result.path, base, outputs)


@pytest.mark.parametrize("how", ["DataParallel", "averaged"])
def test_an_adapter_is_loaded_onto_a_wrapped_model(how, sides):
    base, _, saved, outputs = sides
    wrapped = in_wrappers(base)[how]
    adapter = ta.load(saved, wrapped)
    assert set(adapter.as_saved().sites) == set(saved.sites)
    assert torch.allclose(wrapped.module(tiny.tokens()).last_hidden_state, outputs, atol=1e-5)
    adapter.merge()
    assert torch.allclose(wrapped.module(tiny.tokens()).last_hidden_state, outputs, atol=1e-5)


@pytest.mark.parametrize("how", IN_FILES)
def test_a_folder_keeps_the_names_that_it_has(how, sides, tmp_path):
    base, _, saved, outputs = sides
    (tmp_path / "base").mkdir()
    save_file(renamed(tiny.base_of(base), IN_FILES[how]), tmp_path / "base" / "model.safetensors")
    ta.merge_folder(tmp_path / "base", saved, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == {IN_FILES[how](name) for name in tiny.base_of(base)}
    model = copy.deepcopy(base)
    model.load_state_dict({name: found[IN_FILES[how](name)] for name in tiny.base_of(base)})
    assert torch.allclose(model(tiny.tokens()).last_hidden_state, outputs, atol=1e-5)


@pytest.mark.parametrize("how", [how for how in IN_FILES if "Data" not in how])
def test_an_adapter_with_wrappers_in_its_names_is_the_models(how, sides, tmp_path):
    """As one was saved that had been made on a compiled model's layers."""
    base, tuned, saved, outputs = sides
    strange = renaming(saved, IN_FILES[how], IN_FILES[how])
    loads(strange, base, outputs)
    assert ta.verify(strange, base, tuned).whole_error < 1e-5
    ta.export_peft(strange, tmp_path / "peft", model=base)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert torch.allclose(model(tiny.tokens()).last_hidden_state, outputs, atol=1e-5)


class Holds(nn.Module):
    """A model whose own module is called `module`, beside another."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        if beside:
            self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_a_module_that_is_called_module_is_no_wrapper(beside, live, tmp_path):
    torch.manual_seed(0)
    base = Holds(beside)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.module[1].weight += torch.outer(torch.randn(6), torch.randn(6))
    source = tuned if live else tuned.state_dict()
    result = ta.extract(base if live else base.state_dict(), source, ta.preset("lora", rank=1), tmp_path / "a")
    if live or beside:
        assert all(path.startswith(("module.", "head")) for path in ta.open_adapter(result.path).sites)
    ta.load(result.path, base)
    x = torch.randn(3, 6)
    assert torch.allclose(base(x), tuned(x), atol=1e-5)


def test_two_tensors_of_one_name_are_told():
    state = {"layer.0.weight": torch.ones(2, 2), "layer._orig_mod.0.weight": torch.ones(2, 2)}
    with pytest.raises(ta.FileError, match=r"layer.0.weight and layer._orig_mod.0.weight are both layer.0.weight"):
        open_checkpoint(state)


def test_plain_names_are_of_everything_or_of_the_part():
    assert plain("a._orig_mod.b._checkpoint_wrapped_module.c") == "a.b.c"
    assert plain_names(["module.a", "module.b"]) == {"module.a": "a", "module.b": "b"}
    assert plain_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert plain_names(["n_averaged", "module.a"]) == {"n_averaged": "n_averaged", "module.a": "a"}


@pytest.mark.parametrize("merged", ["not merged", "the adapter alone"])
def test_a_peft_model_that_is_not_merged_is_told(merged, sides, tmp_path):
    base = sides[0]
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=QV))
    state = model.state_dict() if merged == "not merged" else get_peft_model_state_dict(model)
    with pytest.raises(ta.FileError, match=r"PEFT adapter that is not merged(.|\n)*merge_and_unload"):
        ta.analyze(base, dict(state))
