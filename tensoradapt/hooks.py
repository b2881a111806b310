"""Hooks: how a delta reaches a module's output. Objects, not closures, so that models can be copied and pickled.

`OutputHook` adds to what a module returns. `WeightHook` puts the sum of weight and delta in the parameter's place while
one call of the module that uses it runs; the parameter itself, its name and its value stay as they are.
Invariant: a hook holds no tensor: it asks its adapter at every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensoradapt.chain import Chain, Convolved, staged
from tensoradapt.errors import AdapterError


class Source(Protocol):
    """What a hook needs of its adapter."""

    scale: float
    training: bool

    @property
    def active(self) -> bool: ...
    def chain(self, key: str, like: Tensor | None = None) -> Chain: ...
    def addends(self, key: str, dtype: torch.dtype) -> Tensor: ...


@dataclass(frozen=True)
class Site:
    """What an output hook knows of its site: fixed at attach."""

    path: str
    kind: str
    scale: float
    dropout: float
    dropout_at: str
    rows: tuple[int, int] | None


class OutputHook:
    """Adds scale * chain(x) to a module's output, in the output's dtype."""

    def __init__(self, source: Source, site: Site) -> None:
        self.source, self.site = source, site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        if not self.source.active:
            return None
        if not isinstance(output, Tensor):
            raise AdapterError(
                f"{self.site.path} returns no single tensor, so nothing can be added to it",
                got=type(output).__name__,
                hint="exclude this module",
            )
        x = args[0] if args else next(iter(kwargs.values()))
        device = output.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.add(module, x, output)
        return self.add(module, x, output)

    def add(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """y + scale * delta(x), on the rows of the output that the site has."""
        site = self.site
        chain = self.source.chain(site.path, y)
        scale = site.scale * self.source.scale
        at_in, at_code = self._dropout()
        if x.is_floating_point():
            x = x.to(y.dtype)
            x = F.dropout(x, at_in) if at_in else x
        if site.kind == "linear" and site.rows is None:
            return chain.add(x, y, scale, at_code)
        delta = chain(x, Convolved(module) if site.kind == "conv" else staged, at_code) * scale  # type: ignore[arg-type]
        if site.rows is None:
            return y + delta
        start, stop = site.rows
        return torch.cat((y[..., :start], y[..., start:stop] + delta, y[..., stop:]), -1)

    def _dropout(self) -> tuple[float, float]:
        p = self.site.dropout if self.source.training else 0.0
        return (p, 0.0) if self.site.dropout_at == "in" else (0.0, p)


class WeightHook:
    """Before a call: `owner.name` reads as weight + delta (or as the trained copy); after it: as the parameter again."""

    def __init__(self, source: Source, key: str, owner: nn.Module, name: str, *, copy: bool = False) -> None:
        self.source, self.key, self.name, self.copy = source, key, name, copy
        self.owner = [owner]  # in a list: a hook is no module, and must not look like one
        self.shadowed: list[Any] = []

    def before(self, module: nn.Module, args: Any) -> None:
        """Put the sum in the parameter's place."""
        owner = self.owner[0]
        current: Any = owner._parameters[self.name]
        self.shadowed.append(current)
        if self.source.active:
            added = self.source.addends(self.key, current.dtype)
            owner._parameters[self.name] = added if self.copy else current + added

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Put the parameter back, also when the call has failed."""
        if self.shadowed:
            self.owner[0]._parameters[self.name] = self.shadowed.pop()
