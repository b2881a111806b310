"""One architecture at work: its model, tuned copies, folders, and what a call gives; nothing here asks tensoradapt.

The oracles are the model's own outputs, transformers' own saving and loading, and numbers of torch and numpy.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from zoo.building import built

CLOSE = 2e-3  # of the effect that is compared: sums in another order, and factors in float32
RANK = 2  # of every change


class Wrong(AssertionError):
    """A result that is not what the oracle says."""


class Unavailable(Exception):
    """The oracle itself cannot do it: the reason is its own."""


class Specimen:
    """A model of the table, with everything made once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.place = name, folder
        self.base, self.inputs = built(name)
        self.mode = False  # whether a backward pass needs the training mode

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.base)

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """Every tensor of numbers that a call gives, without gradients."""
        with torch.no_grad():
            return self.called(model)

    def called(self, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        with patch("torch.seed", lambda: 0):  # Reformer draws its hashes by a seed of the machine's in training
            found = list(_tensors(model(**copy.deepcopy(self.inputs))))
        assert found, "the call gives no tensor"
        return found

    @cached_property
    def before(self) -> list[Tensor]:
        return self.outputs(
            self.fresh()
        )  # some models keep a state from one call to the next: the base is never called

    @cached_property
    def matrices(self) -> dict[str, nn.Parameter]:
        """The weights that a matrix can be added to, by their first name: linear, convolutional, experts', tables."""
        return {name: p for name, p in self.base.named_parameters() if _is_matrix(self.base, name, p)}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The modules that PEFT knows how to adapt, whose weight is in use."""
        kinds = (nn.Linear, nn.Embedding, nn.Conv2d, Conv1D)
        paths = dict(self.base.named_modules())
        return {path: m for path, m in paths.items() if type(m) in kinds and f"{path}.weight" in self.used}

    @cached_property
    def used(self) -> set[str]:
        """The names of the parameters that the outputs depend on, all names of a tied one."""
        model = self.fresh()
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
        try:
            loss_of(self.called(model)).backward()
        except (AssertionError, RuntimeError):  # models that can be trained in training mode alone
            self.mode = True
            loss_of(self.called(model.train())).backward()
        named = model.named_parameters(remove_duplicate=False)
        return {name for name, p in named if p.grad is not None and bool(p.grad.any())}

    @cached_property
    def tuned(self) -> nn.Module:
        """The model after a change of low rank to every matrix, ties kept."""
        model = self.fresh()
        change({name: p for name, p in model.named_parameters() if name in self.matrices})
        return model

    @cached_property
    def tied(self) -> dict[str, list[str]]:
        """The names in other modules of every parameter that several modules have, by its first."""
        names: dict[int, list[str]] = {}
        for path, module in self.base.named_modules():
            for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
                names.setdefault(id(p), []).append(f"{path}.{name}" if path else name)
        return {first: others for first, *others in names.values() if others}

    @cached_property
    def base_folder(self) -> Path:
        return self.saved(self.base, "base")

    @cached_property
    def tuned_folder(self) -> Path:
        return self.saved(self.tuned, "tuned")

    def saved(self, model: nn.Module, name: str) -> Path:
        """A folder as transformers writes it; of plain torch, its state dict as safetensors."""
        folder = self.place / name
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
        else:
            save_model(model, str(folder / "model.safetensors"))
        again = self.outputs(self.opened(folder))
        if not near(again, self.outputs(model), self.scale):
            raise Unavailable("transformers does not load what it saved")
        return folder

    @cached_property
    def scale(self) -> float:
        return max(float(t.abs().max()) for t in self.before)

    def opened(self, folder: Path) -> nn.Module:
        """The model of a folder, by transformers' own loader."""
        if isinstance(self.base, PreTrainedModel):
            return type(self.base).from_pretrained(folder).eval()
        model = self.fresh()
        load_model(model, folder / "model.safetensors")
        return model


@cache
def specimen(name: str, folder: Path) -> Specimen:
    """The architecture of a line; one for a process and a folder."""
    return Specimen(name, folder / name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _is_matrix(model: nn.Module, name: str, p: nn.Parameter) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    if name.endswith("bias") or min(p.shape, default=0) < 1 or not p.requires_grad:
        return False
    if isinstance(owner, nn.Conv1d | nn.Conv2d):
        return name.endswith(".weight")
    return (p.dim() == 2 and min(p.shape) > 1) or (p.dim() == 3 and "expert" in name)


@torch.no_grad()
def change(parameters: Mapping[str, nn.Parameter], size: float = 0.4, seed: int = 1) -> None:
    """Add a change of low rank to every matrix, `size` times its norm; to each expert one of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in parameters.items():
        experts = (p.shape[0],) if p.dim() == 3 and "expert" in name else ()
        out, inp = p.shape[len(experts)], p[0].numel() if not experts else p.shape[-1]
        rank = min(RANK, out, inp)
        left = torch.randn((*experts, out, rank), generator=generator, dtype=torch.float64)
        right = torch.randn((*experts, rank, inp), generator=generator, dtype=torch.float64)
        delta = (left @ right).reshape(p.shape)
        p.add_((delta * (size * p.double().norm() / delta.norm())).to(p.dtype))


def loss_of(outputs: list[Tensor], seed: int = 5) -> Tensor:
    """A sum over everything that a call gives, of the squared distances to fixed random numbers."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(())
    for tensor in outputs:
        total = total + (tensor.float() - torch.randn(tensor.shape, generator=generator)).square().mean()
    return total


def distance(one: list[Tensor], two: list[Tensor]) -> float:
    """The largest difference between two calls' numbers, infinities that agree left out."""
    if len(one) != len(two) or any(a.shape != b.shape for a, b in zip(one, two, strict=True)):
        raise Wrong("the calls give tensors of other shapes")
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        differ = (a.double() - b.double()).abs()[~(a == b)]
        worst = max(worst, float(differ.max()) if len(differ) else 0.0)
    return worst


def near(one: list[Tensor], two: list[Tensor], scale: float) -> bool:
    return distance(one, two) <= 1e-5 * scale


def agree(found: list[Tensor], wanted: list[Tensor], before: list[Tensor], what: str) -> None:
    """Raise Wrong unless a call gives what is wanted, by comparison with how far that is from the base's."""
    effect = distance(wanted, before)
    if not effect > 0:
        raise Unavailable("the change has no effect on the outputs")
    error = distance(found, wanted) / effect
    if not error <= CLOSE:
        raise Wrong(f"{what}: off by {error:.1%} of the effect")


def quietly(call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()
