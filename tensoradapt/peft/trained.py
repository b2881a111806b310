"""Parameters that were trained whole, as PEFT has them: modules of which it keeps a copy, or the base's own parameters.

Invariant: every such parameter has one key in the folder, and PEFT wants no other parameter with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tensoradapt.errors import AdapterError
from tensoradapt.io.names import upwards

# The modules that PEFT trains whole by itself, as it looks for them: by the end of their names.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Trained:
    """Tensors by the names of a model, the name that each has in the folder, and what the config says of them."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()  # modules_to_save
    bias: str = "none"

    @property
    def said(self) -> tuple[str, ...]:
        """Modules, and the parameters of the base's own, by name."""
        return (*self.modules, *(path for path, name in self.names.items() if not _under(name, self.modules)))


def trained_of(extras: Mapping[str, Tensor], adapted: Collection[str], parameters: Collection[str]) -> Trained:
    """How a folder holds what was trained whole; `parameters` are those of the model, none where it is not known.

    A module of which all is trained is saved as PEFT's copy; of any other, the parameters stand for the base's own.
    """
    names: dict[str, str] = {}
    whole: list[str] = []
    for path in extras:
        owner, _, leaf = path.rpartition(".")
        if owner in adapted:
            names[path] = f"{owner}.base_layer.{leaf}"
        else:
            names[path] = path
            whole.append(_whole(owner, leaf, extras, parameters))
    modules = tuple(sorted({name for name in whole if name and _alone(name, extras, parameters)}))
    biases = [path for path in names if path.endswith(".bias") and not _under(path, modules)]
    bias = "none" if not biases else "lora_only" if all(names[path] != path for path in biases) else "all"
    return Trained(extras, names, modules, bias)


def _whole(owner: str, leaf: str, extras: Collection[str], parameters: Collection[str]) -> str:
    """The largest module around a parameter of which all is trained; empty where there is none."""
    if not parameters:
        siblings = [path for path in extras if path.rpartition(".")[0] == owner]
        head = next((up for up in _modules(owner) if up.endswith(sum(HEADS.values(), ()))), owner)
        return "" if leaf == "bias" and len(siblings) == 1 else head
    found = ""
    for module in _modules(owner):
        if not all(path in extras for path in parameters if path.startswith(f"{module}.")):
            break
        found = module
    return found


def _modules(path: str) -> Iterator[str]:
    """A module and all that it lies in, but the model itself."""
    return filter(None, upwards(path))


def _alone(module: str, extras: Collection[str], parameters: Collection[str]) -> bool:
    """Whether PEFT, which looks for the end of a name, takes no other module for this one."""
    others = {owner for path in parameters if path not in extras for owner in _modules(path.rpartition(".")[0])}
    return not any(other.endswith(module) for other in others)


def _under(name: str, modules: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def check_head(task: str | None, trained: Trained, parameters: Collection[str]) -> None:
    """Raise AdapterError where PEFT trains a head of this task whole, and the folder would lack a part of it."""
    if task not in HEADS:
        return
    ends = HEADS[task]
    heads = [path for path in parameters or trained.tensors if any(up.endswith(ends) for up in _modules(path))]
    lacking = [path for path in heads if path not in trained.tensors]
    if lacking or not heads:
        raise AdapterError(
            f"PEFT expects a trained head in a folder of task {task}, and could not load it without",
            got=f"nothing of {', '.join(lacking[:4])}"
            if lacking
            else f"no module whose name ends in {' or '.join(ends)}",
            hint="extras=True where the adapter has one (train=['classifier']), or no task_type",
        )
