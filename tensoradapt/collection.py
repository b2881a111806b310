"""Sets of adapters of one model: their deltas as stacks over tasks, layers and roles.

Invariant: a delta that is a product of two factors stays one: shared bases and the core between them come from products
of thin matrices (an (out, in) matrix is formed only where a side is too small for a basis to be smaller).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.noise import Noise
from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import report_of
from tensoradapt.analysis.slices import flat
from tensoradapt.errors import AdapterError
from tensoradapt.io.saved import Savable, Saved
from tensoradapt.linalg import Dense, Product, Slice, empty
from tensoradapt.peft import open_adapter
from tensoradapt.sites import Site, SiteMap
from tensoradapt.targets import matches

Adapters = Mapping[str, Savable | str | Path] | Sequence[Savable | str | Path]


@dataclass(frozen=True)
class AdapterSource:
    """The deltas of several adapters; a site is one adapter's, with the adapter's name as its coordinate `task`."""

    adapters: Mapping[str, Saved]
    like: Tensor
    targets: tuple[str, ...] = ()

    @cached_property
    def origins(self) -> dict[str, tuple[str, str]]:
        """The adapter and the path there of every site."""
        return {
            f"{task}:{path}": (task, path)
            for task, saved in self.adapters.items()
            for path in saved.sites
            if not self.targets or any(matches(target, path) for target in self.targets)
        }

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every adapter's sites."""
        return tuple(self._site(name, *origin) for name, origin in self.origins.items())

    def _site(self, name: str, task: str, path: str) -> Site:
        site = self.adapters[task].sites[path][1].site
        return replace(site, path=name, owner=name, tensor=name, coordinates={**site.coordinates, "task": task})

    def slice(self, site: Site) -> Slice:
        """One delta: its two factors, where its chain is a product."""
        task, path = self.origins[site.path]
        saved = self.adapters[task]
        group, _ = saved.sites[path]
        pair = saved.chain(path).low_rank
        if pair is None:
            return Dense(flat(saved.delta(path)).to(self.like))
        return Product((pair[0] * group.scale).to(self.like), pair[1].to(self.like).contiguous())

    def noise(self, site: Site) -> Noise:
        """None: what an adapter adds is what its factors say."""
        numel = site.numel // site.out
        return Noise(torch.zeros(site.out, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64))

    def described(self, site: Site) -> dict[str, Any]:
        """The factors' dtype; there is no base."""
        task, path = self.origins[site.path]
        dtype = self.adapters[task].sites[path][0].rule.dtype
        return {"dtypes": (dtype, dtype), "base_norm": 0.0}


def analyze_adapters(adapters: Adapters, *, device: str | None = None, **options: Any) -> Report:
    """Ranks and spectra of several adapters of one model, over the axes task, layer and role, without dense deltas.

    `adapters` are adapters, or paths of native or PEFT adapters, by name or in a list (named by their folders). Options
    are those of `analyze`. Raises AdapterError on fewer than two or on adapters that share no site.
    """
    opened = {name: open_adapter(one) for name, one in _named(adapters).items()}
    if len(opened) < 2:
        raise AdapterError("a set has at least two adapters", got=len(opened), hint="give several folders")
    source = AdapterSource(opened, empty(device), tuple(options.pop("targets", ()) or ()))
    common = set.intersection(*(set(saved.sites) for saved in opened.values()))
    if not common:
        firsts = {task: next(iter(saved.sites)) for task, saved in opened.items()}
        raise AdapterError("the adapters share no site", got=firsts, hint="give adapters of one model")
    partial = {
        f"{task}:{path}": "not adapted by all of the set"
        for task, saved in opened.items()
        for path in saved.sites
        if path not in common
    }
    match = {"matched": len(source.sites), "only_base": [], "only_tuned": [], "reshaped": []}
    notes = [f"{len(partial)} sites are not adapted by all of the set"] if partial else []
    match |= {"refused": {}, "notes": notes}
    names = ("adapters", ", ".join(opened), f"{len(opened)} adapters")
    return report_of(source, SiteMap(source.sites), names, match, **{"memory": 0, **options})


def _named(adapters: Adapters) -> dict[str, Any]:
    """The adapters by name: those of a list by the last part of their paths that tells them apart, or by number."""
    if isinstance(adapters, Mapping):
        return dict(adapters)
    names = [Path(one).name if isinstance(one, str | Path) else f"adapter_{k}" for k, one in enumerate(adapters)]
    doubled = len(set(names)) < len(names)
    return {f"{name}_{k}" if doubled else name: one for k, (name, one) in enumerate(zip(names, adapters, strict=True))}
