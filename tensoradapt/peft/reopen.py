"""The written folder, re-opened as its reader would: by PEFT where it is installed, else by its own rules.

Invariant: what is reported of a folder was measured on its files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tensoradapt.errors import FileError
from tensoradapt.io.saved import Saved
from tensoradapt.peft.config import WEIGHTS, read_config
from tensoradapt.peft.keys import PREFIX
from tensoradapt.peft.modules import Module

Deltas = Callable[[Module], Tensor]


def errors_of(
    folder: Path,
    modules: Sequence[Module],
    saved: Saved,
    extras: Mapping[str, Tensor],
    tell: Callable[[str, int, int], None],
) -> tuple[str, dict[str, float]]:
    """Who re-opened a folder, and every module's relative error ||theirs - ours|| / ||ours||, one at a time."""
    tell("the folder, read back", 0, len(modules))
    reader, theirs = reopened(folder, modules, extras)
    held = load_file(folder / WEIGHTS)
    found: dict[str, float] = {}
    for module in modules:
        tell(f"{module.path}, read back", len(found), len(modules))
        ours = module.delta(saved).double()
        found[module.path] = float((theirs(module).double() - ours).norm() / ours.norm())
    for path, tensor in extras.items():
        if not torch.equal(held[f"{PREFIX}{path}"], tensor):
            raise FileError(f"{path} is not in {folder} as it was trained")
    return reader, found


def reopened(folder: Path, modules: Sequence[Module], extras: Mapping[str, Tensor]) -> tuple[str, Deltas]:
    """Who re-opened a folder, and the deltas that it found there, (out, in) whatever the layout."""
    try:
        import peft
    except ImportError:
        return "safetensors", _by_file(folder)
    clash = nn.Module()
    if any(hasattr(clash, part) for module in modules for part in module.path.split(".")):
        return "safetensors", _by_file(folder)  # PEFT finds no module with the name of a method
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.task_type = None  # a task wants methods that a skeleton does not have
            skeleton = _skeleton(modules, extras)
            loaded = peft.PeftModel.from_pretrained(skeleton, str(folder), config=config, torch_device="cpu")
        except Exception as error:  # whatever PEFT raises of a folder that it cannot load
            raise FileError("PEFT cannot load what was written", got=f"{type(error).__name__}: {error}") from error
    return f"PEFT {version('peft')}", lambda module: _delta(loaded.base_model.model, module)


def _delta(model: nn.Module, module: Module) -> Tensor:
    layer: Any = model.get_submodule(module.path)
    found: Tensor = layer.get_delta_weight("default").detach()
    return found.mT if module.layout == "in out" else found.flatten(1)


def _by_file(folder: Path) -> Deltas:
    """Deltas by PEFT's rules, from the tensors and the config alone."""
    held, config = load_file(folder / WEIGHTS), read_config(folder)

    def delta(module: Module) -> Tensor:
        names = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        a, b = (held[f"{PREFIX}{module.path}.{name}"].float().flatten(1) for name in names)
        return b @ a * (config.alpha(module.path) / config.rank(module.path))

    return delta


def _skeleton(modules: Sequence[Module], extras: Mapping[str, Tensor]) -> nn.Module:
    """A model of the adapted modules alone, whose weights take no memory."""
    root = nn.Module()
    for module in modules:
        _place(root, module.path, _empty(module))
    for path, tensor in extras.items():
        owner, _, leaf = path.rpartition(".")
        _place(root, owner, None).register_parameter(leaf, nn.Parameter(torch.zeros_like(tensor), requires_grad=False))
    return root


def _place(root: nn.Module, path: str, made: nn.Module | None) -> nn.Module:
    """Put a module at a path, with plain modules above it; the one that is there where none is given."""
    *above, leaf = path.split(".")
    for part in above:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if made is not None or leaf not in root._modules:
        root.add_module(leaf, nn.Module() if made is None else made)
    return root.get_submodule(leaf)


def _empty(module: Module) -> nn.Module:
    """A module of the kind, its weight one zero seen from all sides."""
    out, inp = module.shape[:2]
    with torch.device("meta"):
        made = _MAKERS[module.kind](module, out, inp)
    weight: Any = made.weight
    made.register_parameter("weight", nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False))
    if getattr(made, "bias", None) is not None:
        made.register_parameter("bias", nn.Parameter(torch.zeros(out), requires_grad=False))
    return made


def _linear(module: Module, out: int, inp: int) -> nn.Module:
    if module.layout == "out in":
        return nn.Linear(inp, out, bias=False)
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, inp)  # type: ignore[no-any-return]


_MAKERS: Mapping[str, Callable[[Module, int, int], nn.Module]] = {
    "linear": _linear,
    "embedding": lambda module, out, inp: nn.Embedding(inp, out),
    "conv": lambda module, out, inp: nn.Conv2d(inp, out, module.shape[2:], bias=False),  # type: ignore[arg-type]
}
