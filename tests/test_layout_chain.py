"""From two checkpoints to the tuned model: every way there is right by the model's outputs, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from transformers.models.llama4 import Llama4ForCausalLM, Llama4TextConfig
from transformers.pytorch_utils import Conv1D

import tensoradapt as ta
from tensoradapt.folders import merge_folder

RANK = 2
IDS = tiny.tokens()
Model = Callable[[], nn.Module]


class Diffusion(nn.Module):
    """Linears with names of embeddings, square and not, an embedding with the name of none, and a Conv1D of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder, self.cond_embed = nn.Linear(6, 8), nn.Linear(8, 8)
        self.times, self.mix = nn.Embedding(8, 8), Conv1D(8, 8)
        self.patch_embed = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.x_embedder(x) + self.times(torch.arange(x.shape[-2]))
        return self.patch_embed(self.mix(torch.tanh(self.cond_embed(x))))


class Experts(nn.Module):
    """Experts stored (in, out), square, and nothing that says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ParameterDict({"up": nn.Parameter(tiny.noise(3, 6, 6))})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share = self.gate(x).softmax(-1)
        return torch.einsum("be,bi,eio->bo", share, x, self.experts["up"])


def openai_gpt() -> nn.Module:
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": tiny.WORDS, "n_positions": 32}
    torch.manual_seed(0)
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()


def mamba() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": tiny.WORDS}
    return MambaForCausalLM(MambaConfig(**sizes)).eval()


def llama4() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 24, "head_dim": 4}
    more = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": tiny.WORDS}
    return Llama4ForCausalLM(
        Llama4TextConfig(**sizes, **more, num_local_experts=2, interleave_moe_layer_step=1, pad_token_id=0)
    ).eval()


def made(kind: Callable[[], nn.Module]) -> Model:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return kind().eval()

    return build


# The model, its input, and the ends of the names of what is changed.
MODELS: dict[str, tuple[Model, torch.Tensor, tuple[str, ...]]] = {
    "gpt2": (tiny.gpt2, IDS, ("c_attn.weight", "c_proj.weight", "c_fc.weight", "wpe.weight")),
    "openai-gpt": (openai_gpt, IDS, ("c_attn.weight", "c_proj.weight", "positions_embed.weight")),
    "llama": (tiny.llama, IDS, ("q_proj.weight", "down_proj.weight", "embed_tokens.weight")),
    "bert": (tiny.bert, IDS, ("query.weight", "word_embeddings.weight", "token_type_embeddings.weight")),
    "gpt-oss": (tiny.gpt_oss, IDS, ("experts.down_proj", "experts.gate_up_proj", "q_proj.weight")),
    "llama4": (llama4, IDS, ("experts.down_proj", "experts.gate_up_proj", "o_proj.weight")),
    "mamba": (mamba, IDS, ("in_proj.weight", "conv1d.weight")),
    "diffusion": (
        made(Diffusion),
        tiny.noise(2, 8, 6),
        ("embedder.weight", "embed.weight", "times.weight", "mix.weight"),
    ),
    "experts": (made(Experts), tiny.noise(4, 6), ("experts.up",)),
}
SOURCES = ("states", "modules", "base a module", "files", "folders", "folders of no type", "model=")
WAYS = (
    "load",
    "load and merge",
    "merge into a folder",
    "merge into a file",
    "export",
    "export alone",
    "convert",
    "verify",
)


def changed(build: Model, endings: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    """A model, and the same with changes that the adapter can hold, large enough to see."""
    base, tuned = build(), build()
    with torch.no_grad():
        for k, (name, parameter) in enumerate(tuned.named_parameters()):
            if name.endswith(endings):
                *more, out, inp = parameter.flatten(1).shape if "conv" in name else parameter.shape
                delta = tiny.noise(*more, out, RANK, seed=k) @ tiny.noise(*more, RANK, inp, seed=k + 99) / 3
                parameter += delta.view_as(parameter)
    return base, tuned


def folder_of(model: nn.Module, folder: Path, config: str) -> Path:
    """A model on disk as its state dict has it, with its own config, with none, or with one of no known type."""
    folder.mkdir(parents=True)
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    if config == "own":
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    elif config == "of no type":
        (folder / "config.json").write_text(json.dumps({"model_type": "my own", "hidden_size": 8}))
    return folder


def sides_of(source: str, base: nn.Module, tuned: nn.Module, folder: Path) -> tuple[tuple, dict]:
    """The two checkpoints as a user has them, and further options of reading."""
    models = {"base": base, "tuned": tuned}
    if source in ("files", "folders", "folders of no type"):
        config = {"files": "none", "folders": "own", "folders of no type": "of no type"}[source]
        found = [folder_of(model, folder / name, config) for name, model in models.items()]
        return tuple(path / "model.safetensors" if source == "files" else path for path in found), {}
    states = base.state_dict(), tuned.state_dict()
    if source == "modules":
        return (base, tuned), {}
    return (base, states[1]) if source == "base a module" else states, {"model": base} if source == "model=" else {}


def stored(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors" if path.is_dir() else path)


def loaded(build: Model, adapter, *, merge: bool = False) -> nn.Module:
    model = build()
    found = ta.load(adapter, model)
    if merge:
        found.merge()
    return model


def merged(build: Model, base: nn.Module, adapter, folder: Path, config: str) -> nn.Module:
    model = build()
    out = merge_folder(folder_of(base, folder / "to", config), adapter, folder / "merged").path
    model.load_state_dict(stored(out))
    return model


def exported(build: Model, base: nn.Module, adapter, folder: Path, model: nn.Module | None) -> nn.Module:
    result = ta.export_peft(adapter, folder / "peft", model=model)
    opened = peft.PeftModel.from_pretrained(build(), str(folder / "peft")).base_model.model
    opened.assumed = any("outputs first" in note for note in result.notes)
    return opened


def delivered(way: str, build: Model, base: nn.Module, path: Path, folder: Path) -> nn.Module:
    if way.startswith("load"):
        return loaded(build, path, merge=way.endswith("merge"))
    if way.startswith("merge"):
        return merged(
            build, base, path, folder, "own" if way.endswith("folder") and hasattr(base, "config") else "none"
        )
    if way == "convert":
        return loaded(build, ta.convert(path, ta.preset("lotr", rank=8 * RANK), folder / "new").path)
    return exported(build, base, path, folder, base if way == "export" else None)


def refusals(model: str, source: str, way: str) -> tuple[str, ...]:
    """What a way may be refused with: nothing that could be right."""
    told = source in ("modules", "base a module", "model=") or (
        source == "folders" and model not in ("diffusion", "experts")
    )
    if model in ("gpt-oss", "llama4", "experts") and way.startswith("export"):
        return ("cannot hold the delta",)
    if model == "mamba" and way.startswith("export"):  # PEFT refuses its convolutions
        return ("PEFT cannot load", "does not say which", "cannot hold the delta")
    if way == "export alone" and not told:
        return ("name of a Conv1D", "name of an embedding")
    if way == "export alone" and model in ("diffusion",):
        return ("name of an embedding",)
    return ()


CELLS = [(model, source) for model in MODELS for source in SOURCES]


@pytest.mark.parametrize(("name", "source"), CELLS)
@pytest.mark.filterwarnings("ignore")
def test_every_way_ends_at_the_tuned_model(name, source, tmp_path):
    build, given, endings = MODELS[name]
    base, tuned = changed(build, endings)
    if source == "folders" and not hasattr(base, "config"):
        pytest.skip("it has no config")
    before, wanted = outputs(base, given), outputs(tuned, given)
    sides, options = sides_of(source, base, tuned, tmp_path)
    result = ta.extract(*sides, ta.preset("lora", rank=RANK), tmp_path / "adapter", **options)
    assert result.relative_error < 1e-4
    found = ta.verify(result.path, *sides, **options)
    assert found.whole_error < 1e-4
    for way in WAYS[:-1]:
        try:
            model = delivered(way, build, base, result.path, tmp_path / way)
        except ta.TensorAdaptError as error:
            reasons = refusals(name, source, way)
            assert any(reason in str(error) for reason in reasons) and "next: " in str(error), (way, error)
            continue
        off = float((outputs(model, given) - wanted).norm() / (wanted - before).norm())
        assert off < 1e-3 or getattr(model, "assumed", False), (way, off)


def outputs(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(given)
    return found if torch.is_tensor(found) else found[0]
