"""The adapter: the module that owns the factors of one plan on one model. The only thing with state.

Invariant: the base model keeps every parameter name and value; `detach` leaves no trace; each factor exists once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.chain import Chain
from tensoradapt.errors import AdapterError, ShapeError, SiteError, SpecError
from tensoradapt.grouping import Group
from tensoradapt.interchange import to_tensorly
from tensoradapt.io.native import write
from tensoradapt.lower import Line
from tensoradapt.lower import chain as lowered
from tensoradapt.merging import Merged, add_rows, keep_original, restore_all, rows_of, view
from tensoradapt.plan import START, Plan
from tensoradapt.scan import HOST
from tensoradapt.sites import Site


class Host(nn.Module):
    """What a model carries its adapters in: named adapters, and which parameters were trainable before the first came."""

    def __init__(self, flags: Mapping[str, bool]) -> None:
        super().__init__()
        self.flags = dict(flags)
        self.merged: list[str] = []

    def forward(self, x: Any) -> Any:
        """The identity: `nn.Sequential` calls everything that is registered on it."""
        return x

    def __len__(self) -> int:
        return len(self._modules)


class Adapter(nn.Module):
    """The factors of one plan on one model, and what they do to it: add, merge, be switched, be saved.

    `scale` multiplies every group's own scale; `enabled` switches the adapter on and off.
    """

    def __init__(self, plan: Plan, name: str, model: nn.Module) -> None:
        super().__init__()
        self.plan, self.name = plan, name
        self.scale: float = 1.0
        self.enabled: bool = True
        self.stored = nn.ModuleDict()
        self.extra = nn.ParameterDict()
        self._model = [model]  # in a list: no registered reference to the model, which would recurse
        self._handles: list[Any] = []
        self._merged: list[Merged] | None = None
        self._kept: str | None = None
        self._lines: dict[str, tuple[Group, Site, Line]] = {}
        self._addends: dict[str, list[str]] = {}  # parameters delivered by weight, and the sites on them
        self._sources = {
            g.name: [
                (n, *key.rpartition(".")[::2], g.diagram.shape(n), key in _banked(plan)) for n, key in g.store.items()
            ]
            for g in plan.groups
        }

    # -- what it holds ------------------------------------------------------------------------------------------

    @property
    def groups(self) -> dict[str, Group]:
        """The plan's groups by name."""
        return {group.name: group for group in self.plan.groups}

    @property
    def active(self) -> bool:
        """Whether hooks add anything: enabled, and not merged into the weights."""
        return self.enabled and self._merged is None

    @property
    def merged(self) -> bool:
        """Whether the deltas stand in the base's weights."""
        return self._merged is not None

    def _tensors(self, group: str, suffix: str = "") -> dict[str, Tensor]:
        """Every node's tensor; a bank's node cut to the group's sizes, a copy (`suffix`) where there is one."""
        found = {}
        for node, owner, leaf, shape, banked in self._sources[group]:
            held = self.stored[owner]._parameters
            tensor = held.get(leaf + suffix) if suffix else None
            tensor = held[leaf] if tensor is None else tensor
            found[node] = tensor[tuple(slice(0, n) for n in shape)] if banked else tensor  # type: ignore[index]
        return found  # type: ignore[return-value]

    def factors(self, group: str) -> dict[str, Tensor]:
        """A group's factors: node -> tensor, shapes as its diagram says; shared memory, not copies."""
        self._group(group)
        return self._tensors(group)

    def set_factors(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into a group's factors in place. Raises SpecError on an unknown node, ShapeError on another shape."""
        held = self.factors(group)
        for node, tensor in tensors.items():
            if node not in held:
                raise SpecError(f"group {group!r} has no node {node!r}", expected=", ".join(held))
            if tuple(tensor.shape) != tuple(held[node].shape):
                raise ShapeError(
                    f"node {node!r} of group {group!r} has another shape",
                    got=tuple(tensor.shape),
                    expected=tuple(held[node].shape),
                )
        with torch.no_grad():
            for node, tensor in tensors.items():
                held[node].copy_(tensor)

    def _group(self, name: str) -> Group:
        if name not in self.groups:
            raise SpecError(f"no group {name!r}", expected=", ".join(list(self.groups)[:20]))
        return self.groups[name]

    # -- what it does -------------------------------------------------------------------------------------------

    def chain(self, path: str, like: Tensor | None = None) -> Chain:
        """A site's chain, without the scale, in the dtype and on the device of `like` (of the factors where not given)."""
        group, _, made = self._lines[path]
        starts = self._tensors(group.name, START) if group.rule.start == "difference" else None
        return lowered(made, self._tensors(group.name), starts, like)

    def _scale(self, path: str) -> float:
        return self._lines[path][0].scale * self.scale

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to one site: scale * (N(theta) - N(theta0) where the start is a difference).

        Shape: (out, in), or (out, in, kh, kw). Scaled, without dropout, with gradients. Raises SiteError on other paths.
        """
        site = self._site(path)
        return (self.chain(path).dense() * self._scale(path)).reshape(site.shape)

    def _site(self, path: str) -> Site:
        found = self._lines.get(path)
        if found is None:
            raise SiteError(f"{path} is not adapted by {self.name!r}", expected=", ".join(list(self._lines)[:12]))
        return found[1]

    def addends(self, key: str, dtype: torch.dtype) -> Tensor:
        """What stands in or is added in a parameter's place during a call: a trained copy, or the sum of its sites' deltas."""
        if key.startswith("extra:"):
            return self.extra[key.removeprefix("extra:")].to(dtype)
        parameter = self._parameter(key)
        total = torch.zeros_like(parameter, requires_grad=False)
        for path in self._addends[key]:
            matrix = view(total, self._lines[path][1])
            matrix += self.delta(path).reshape(matrix.shape).to(dtype)
        return total

    def _parameter(self, name: str) -> Tensor:
        owner, leaf = owner_of(self._model[0], name)
        return owner._parameters[leaf]  # type: ignore[return-value]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Switch the adapter off inside a `with` block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def to_tensorly(self) -> dict[str, Any]:
        """Every group as a TensorLy tensor, detached and without the scale. Raises SpecError on other networks."""
        return {name: to_tensorly(group, self.factors(name)) for name, group in self.groups.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every stored tensor by its key in the adapter file: `group.node`, `group.node__start`, `extra.<parameter>`."""
        held = {f"{group}.{leaf}": t for group, bank in self.stored.items() for leaf, t in bank._parameters.items()}
        return held | {f"extra.{key.replace('/', '.')}": t for key, t in self.extra.items()}

    def save(self, path: str | Path) -> Path:
        """Write the adapter file (a folder with `adapter.safetensors`, or that file), atomically; returns its path.

        Raises FileError where the path cannot be written or a factor is not finite: an older file stays as it is.
        """
        return write(
            path,
            self.plan,
            self.tensors(),
            revision=getattr(getattr(self._model[0], "config", None), "_commit_hash", None) or "",
        )

    # -- merging ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, keep: str | None = "cpu", *, untie: bool = False) -> None:
        """Write W + delta into the base: float32 arithmetic in row blocks; `keep` says where the originals are kept.

        Raises AdapterError when already merged, on results that are not finite (nothing is changed then), on weights that
        are quantised or on the meta device, and on tied weights without `untie=True`.
        """
        if self.merged:
            raise AdapterError(f"adapter {self.name!r} is merged already", hint="unmerge() first")
        keep_original(torch.empty(0), keep)
        targets = [self._lines[path][1] for group in self.plan.groups for path in group.paths]
        for site in targets:
            self._check_mergeable(site, untie)
        if keep is None:
            self._merge_sites(targets, None, write=False)
        self._merged = self._merge_sites(targets, keep, write=True)
        self._kept = keep
        self._host().merged.append(self.name)

    def _merge_sites(self, targets: list[Site], keep: str | None, *, write: bool) -> list[Merged]:
        records: list[Merged] = []
        done: set[str] = set()
        try:
            for site in targets:
                owner, name = self._place(site)
                if write and site.tensor not in done:
                    done.add(site.tensor)
                    records.append(_take(owner, name, keep, untie=bool(set(site.aliases) - set(site.joined))))
                rows = rows_of(self.chain(site.path), self._scale(site.path))
                add_rows(view(owner._parameters[name], site), rows, site.path, write=write)  # type: ignore[arg-type]
            for key, trained in self.extra.items() if write else ():
                owner, name = owner_of(self._model[0], key.replace("/", "."))
                records.append(_take(owner, name, keep, untie=False))
                owner._parameters[name].copy_(trained)  # type: ignore[union-attr]
        except BaseException:
            restore_all(records)
            raise
        return records

    def _place(self, site: Site) -> tuple[nn.Module, str]:
        return owner_of(self._model[0], parameter_of(self._model[0], site))

    def _check_mergeable(self, site: Site, untie: bool) -> None:
        owner, name = self._place(site)
        parameter = owner._parameters.get(name)
        if parameter is None or not parameter.is_floating_point():
            raise AdapterError(
                f"{site.path} has no floating-point weight to merge into",
                got=getattr(parameter, "dtype", type(owner).__name__),
                hint="dequantise the base first, or serve the adapter unmerged",
            )
        if parameter.is_meta:
            raise AdapterError(
                f"{site.path} is on the meta device: there is nothing to merge into", hint="load the weights first"
            )
        if set(site.aliases) - set(site.joined) and not untie:
            raise AdapterError(
                f"{site.path} is tied to {', '.join(site.aliases)}: merging would change both",
                hint="merge(untie=True) gives this module a weight of its own",
            )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the kept originals back, bit for bit. Raises AdapterError where nothing was merged or kept."""
        if self._merged is None:
            raise AdapterError(f"adapter {self.name!r} is not merged", hint="merge() first")
        if self._kept is None:
            raise AdapterError(
                "the original weights were not kept",
                got="merge(keep=None)",
                hint="merge with keep='cpu', or load the base again",
            )
        if self._host().merged[-1] != self.name:
            raise AdapterError(
                f"{self._host().merged[-1]!r} was merged after {self.name!r}",
                hint=f"unmerge {self._host().merged[-1]!r} first",
            )
        restore_all(self._merged)
        self._merged = None
        self._host().merged.remove(self.name)

    def detach(self) -> None:
        """Take the adapter off the model: hooks, registration and frozen flags go, merged weights are restored.

        After `merge(keep=None)` the merged weights stay, which is how an adapter is made part of its base for good.
        """
        host = self._host()
        if self._merged is not None and self._kept is not None:
            self.unmerge()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        host.merged = [name for name in host.merged if name != self.name]
        del host._modules[self.name]
        if not len(host):
            model = self._model[0]
            del model._modules[HOST]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(host.flags.get(name, parameter.requires_grad))

    def _host(self) -> Host:
        host = self._model[0]._modules.get(HOST)
        if host is None or host._modules.get(self.name) is not self:
            raise AdapterError(
                f"adapter {self.name!r} is not attached",
                hint="attach(model, spec) makes a new one, load(path, model) a saved one",
            )
        return host  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return f"{self.name!r}, {self.plan.num_sites} sites, {self.plan.num_trainable:,} trainable"


def _banked(plan: Plan) -> set[str]:
    return (
        {key for key in plan.factors if sum(key in g.store.values() for g in plan.groups) > 1}
        if any(g.rule.shapes == "slices" for g in plan.groups)
        else set()
    )


def _take(owner: nn.Module, name: str, keep: str | None, *, untie: bool) -> Merged:
    """Record a parameter before it is changed; a tied one is replaced by a copy of its own."""
    parameter: nn.Parameter = owner._parameters[name]  # type: ignore[assignment]
    if untie:
        owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        return Merged(owner, name, None, untied=parameter)
    return Merged(owner, name, keep_original(parameter, keep))


def owner_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the parameter's name in it."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def parameter_of(model: nn.Module, site: Site) -> str:
    """The path of the parameter that holds a site's weight."""
    owner, name = owner_of(model, site.owner)
    return site.owner if name in owner._parameters else f"{site.owner}.weight"
