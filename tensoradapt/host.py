"""Hosts: how a model carries its adapters, and how those hold their tensors.

Invariant: what is registered on a model under `HOST` is never a part of the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

HOST = "tensoradapt"  # the name under which adapters register themselves on a model


class Host(nn.Module):
    """What a model carries its adapters in, and what the first one changed of it.

    `flags` says which parameters were trainable, `quantised` whether the model said of itself that it is quantised.
    """

    def __init__(self, flags: Mapping[str, bool], *, quantised: bool = False) -> None:
        super().__init__()
        self.flags, self.quantised = dict(flags), quantised
        self.merged: list[str] = []

    def forward(self, x: Any) -> Any:
        """The identity: `nn.Sequential` calls everything that is registered on it."""
        return x

    def __len__(self) -> int:
        return len(self._modules)


def home_of(model: nn.Module) -> nn.Module:
    """The module that a model's adapters are registered on: itself, or where it lists its children, the first of them.

    What is registered on a list is a member of it: it would be called, counted, and saved as if it were a layer.
    """
    while isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        first = next((child for child in model.children() if not isinstance(child, torch.jit.ScriptModule)), None)
        if first is None:
            break
        model = first
    return model


def host_of(model: nn.Module) -> Host | None:
    """What a model carries its adapters in; None where it has none."""
    return home_of(model)._modules.get(HOST)  # type: ignore[return-value]


class Bank(nn.Module):
    """Tensors, or banks of them, by name. Unlike `nn.ParameterDict` it takes any: `values`, say, or `keys`."""

    def __getitem__(self, name: str) -> Any:
        return self._parameters[name] if name in self._parameters else self._modules[name]

    def __setitem__(self, name: str, held: nn.Parameter | Bank) -> None:
        names: dict[str, Any] = self._parameters if isinstance(held, nn.Parameter) else self._modules  # type: ignore[assignment]
        names[name] = held


def slashed(path: str) -> str:
    """A parameter's path as one name: PyTorch takes dots for levels."""
    return path.replace(".", "/")
