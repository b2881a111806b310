"""The written folder, re-opened as its reader would: by PEFT on the model's own class, or by its rules on stand-ins.

Invariant: what is reported of a folder was measured on its files, and who measured it is said.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tensoradapt.errors import AdapterError, FileError
from tensoradapt.io.saved import Saved
from tensoradapt.peft.config import WEIGHTS, read_config
from tensoradapt.peft.emptied import emptied
from tensoradapt.peft.keys import PREFIX
from tensoradapt.peft.modules import Module
from tensoradapt.peft.trained import Trained

Deltas = Callable[[Module], Tensor]
BY_FILE = "safetensors, by PEFT's rules"
STAND_INS = "stand-in modules"
LEFT_OUT = "leave it out of the adapter, or merge the adapter and serve the whole model"


def errors_of(
    folder: Path,
    modules: Sequence[Module],
    saved: Saved,
    trained: Trained,
    model: nn.Module | None,
    tell: Callable[[str, int, int], None],
) -> tuple[str, dict[str, float]]:
    """Who re-opened a folder, and every module's relative error ||theirs - ours|| / ||ours||, one at a time.

    Raises AdapterError on what PEFT does not load onto the model, FileError on a file that is not what was written.
    """
    tell("the folder, read back", 0, len(modules))
    reader, theirs = reopened(folder, modules, trained, model)
    held = load_file(folder / WEIGHTS)
    found: dict[str, float] = {}
    for module in modules:
        tell(f"{module.path}, read back", len(found), len(modules))
        ours = module.delta(saved).double()
        found[module.path] = float((theirs(module).double() - ours).norm() / (ours.norm() or 1.0))
    for path, tensor in trained.tensors.items():
        if not torch.equal(held[f"{PREFIX}{trained.names[path]}"], tensor):
            raise FileError(f"{path} is not in {folder} as it was trained")
    return reader, found


def reopened(folder: Path, modules: Sequence[Module], trained: Trained, model: nn.Module | None) -> tuple[str, Deltas]:
    """Who re-opened a folder, and the deltas that it found there, (out, in) whatever the layout."""
    try:
        import peft
    except (ImportError, ValueError):  # the latter where Python leaves out the docstrings that transformers reads
        return BY_FILE, _by_file(folder)
    if model is not None:
        loaded = _opened(folder, emptied(model, trained.tensors))
        _check_received(loaded, modules)
        _check_shared(loaded)
        _check_trained(loaded, trained)
        return f"PEFT {peft.__version__} on {type(model).__name__}", _by_layers(loaded)
    clash = nn.Module()
    if any(hasattr(clash, part) for module in modules for part in module.path.split(".")):
        return BY_FILE, _by_file(folder)  # PEFT finds no module with the name of a method
    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = None  # a task wants methods that a skeleton does not have
    loaded = _opened(folder, _skeleton(modules, trained.tensors), config=config)
    return f"{STAND_INS}, by PEFT {peft.__version__}", _by_layers(loaded)


def _opened(folder: Path, model: nn.Module, **options: Any) -> nn.Module:
    """The folder as PEFT loads it onto a model. Raises AdapterError where PEFT cannot, or says that factors lack."""
    import peft

    with _watched() as said:
        try:
            loaded = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu", **options)
        except Exception as error:  # whatever PEFT raises of a folder that it cannot load
            got = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            raise AdapterError(
                f"PEFT cannot load what was written onto a {type(model).__name__}: nothing was written",
                got=got,
                hint=LEFT_OUT,
            ) from error
    lacking = next((" ".join(str(w.message).split()) for w in said if "missing adapter keys" in str(w.message)), None)
    if lacking is not None:
        raise AdapterError(
            f"PEFT finds only a part of what was written on a {type(model).__name__}: nothing was written",
            got=lacking[:400],
            hint=LEFT_OUT,
        )
    return loaded.base_model.model  # type: ignore[no-any-return]


@contextmanager
def _watched() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings kept, and the random state left as it is."""
    with warnings.catch_warnings(record=True) as said, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        yield said


def _check_received(loaded: nn.Module, modules: Sequence[Module]) -> None:
    """Every module of ours has its factors in PEFT's model, and no other one has any."""
    adapted = {path.replace(".base_layer", "") for path, layer in loaded.named_modules() if _holds(layer)}
    ours = {module.path for module in modules}
    for wrong, says in (
        (sorted(ours - adapted), "PEFT drops the factors of"),
        (sorted(adapted - ours), "PEFT adapts, beside what was written,"),
    ):
        if wrong:
            raise AdapterError(
                f"{says} {wrong[0]} on this model: nothing was written",
                got=f"{len(wrong)} modules: {', '.join(wrong[:4])}",
                hint=LEFT_OUT,
            )


def _check_shared(loaded: nn.Module) -> None:
    """No module that PEFT wraps is called from a place where the wrapper does not stand: another name, a plain list."""
    everywhere = dict(loaded.named_modules(remove_duplicate=False))
    inside = {id(layer.base_layer): path for path, layer in everywhere.items() if _holds(layer)}
    places = [(path, module) for path, module in everywhere.items() if not path.endswith(".base_layer")]
    places += [(f"{path}.{name}", held) for path, module in everywhere.items() for name, held in _listed(module)]
    other, wrapped = next(((place, inside[id(held)]) for place, held in places if id(held) in inside), ("", ""))
    if other:
        raise AdapterError(
            f"PEFT adapts {wrapped} in one of its places alone: nothing was written",
            got=f"the module is in {other} too, which would call it without its delta",
            hint=LEFT_OUT,
        )


def _listed(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds in attributes that are no modules of its own: lists of layers, say."""
    for name, value in vars(module).items():
        if name != "_modules":
            several = value.values() if isinstance(value, Mapping) else value
            held = several if isinstance(value, Mapping | list | tuple) else [value]
            yield from ((name, each) for each in held if isinstance(each, nn.Module))


def _check_trained(loaded: nn.Module, trained: Trained) -> None:
    """Every parameter that was trained whole has its values in PEFT's model."""
    for path, tensor in trained.tensors.items():
        found = _in_use(loaded, path)
        if found is None or not torch.equal(found, tensor.to(found.dtype)):
            raise AdapterError(
                f"PEFT does not restore {path}, which was trained whole: nothing was written", hint=LEFT_OUT
            )


def _in_use(loaded: nn.Module, path: str) -> Tensor | None:
    """The parameter that a PEFT model uses for one of the base's: in a copy of its module, or in the base."""
    module: Any = loaded
    *above, leaf = path.split(".")
    for name in (*above, ""):
        copies = getattr(module, "modules_to_save", None)
        module = copies["default"] if copies is not None and "default" in copies else module
        module = module if name in module._modules or not hasattr(module, "base_layer") else module.base_layer
        module = module._modules.get(name) if name else module
        if module is None:
            return None
    found: Tensor | None = module._parameters.get(leaf)
    return found


def _holds(layer: Any) -> bool:
    """Whether a module is a layer of PEFT's with factors of its own."""
    return any("default" in getattr(layer, name, ()) for name in ("lora_A", "lora_embedding_A"))


def _by_layers(loaded: nn.Module) -> Deltas:
    """Deltas as PEFT's own layers compute them."""

    def delta(module: Module) -> Tensor:
        layer: Any = loaded.get_submodule(module.path)
        found: Tensor = layer.get_delta_weight("default").detach()
        return found.mT if module.layout == "in out" else found.flatten(1)

    return delta


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
    "conv": lambda module, out, inp: (
        nn.Conv1d(inp, out, module.shape[3], bias=False)
        if module.dims == 1
        else nn.Conv2d(inp, out, module.shape[2:], bias=False)  # type: ignore[arg-type]
    ),
}
