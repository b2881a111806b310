"""Passes of batches through a base model, its adapters off, and the sites that are looked at while they run.

Invariant: whatever happens, the model leaves as it came: hooks, flags, gradients, what is switched on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from tensoradapt.adapter import Adapter
from tensoradapt.change.targets import ATTACHED, attached, several
from tensoradapt.errors import AdapterError, SpecError
from tensoradapt.host import host_of
from tensoradapt.plan import make_plan
from tensoradapt.presets import Preset, SpecLike, as_spec
from tensoradapt.presets.door import FILES
from tensoradapt.scan import scan_module
from tensoradapt.sites import Site
from tensoradapt.spec import Rule, Spec


def sites_of(model: nn.Module, where: Adapter | SpecLike) -> list[Site]:
    """The live sites of an adapter of the model, or those that a spec would adapt.

    Raises AdapterError on what is no model, no adapter and no spec, and on an adapter of another model.
    """
    if not isinstance(model, nn.Module):
        raise AdapterError("this is no model", got=type(model).__name__, expected="the nn.Module that is adapted")
    saved = isinstance(where, str | Path) and "/" in str(where) and Path(where).suffix not in FILES
    if not saved and isinstance(where, Spec | Rule | Preset | str | Path | Mapping | list | tuple):
        plan = make_plan(as_spec(where), scan_module(model))
        return [placement.site for group in plan.groups for placement in group.placements]
    adapter = attached(where, "after the model comes what says which sites", f"{ATTACHED}, or a Spec")
    if adapter._model[0] is not model:
        raise AdapterError(f"adapter {adapter.name!r} is attached to another model", hint="pass the model it adapts")
    paths = [path for group in adapter.plan.groups for path in group.paths]
    return [replace(adapter._lines[path][1], path=path) for path in paths]


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """The model without what its adapters add. Raises AdapterError where one is merged, or on the meta device."""
    if any(p.is_meta for p in model.parameters()):
        raise AdapterError("the model is on the meta device: nothing can be computed", hint="load the weights first")
    host = host_of(model)
    with ExitStack() as stack:
        for adapter in host._modules.values() if host is not None else ():
            stack.enter_context(adapter.disabled())  # type: ignore[operator, union-attr]
        yield


def called(model: nn.Module, batch: Any) -> Any:
    """What the model makes of a batch: a mapping of keywords, a tuple or list of arguments, or the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def each(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, one by one. Raises AdapterError where it is one batch, or nothing to iterate over."""
    return several(batches, "batches", "put a single batch into a list: [batch]")


def require_some(count: int) -> None:
    """Raise SpecError where no batch came."""
    if not count:
        raise SpecError("there are no batches", hint="give an iterable of a few, fresh at every call")
