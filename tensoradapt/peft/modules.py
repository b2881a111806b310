"""Sites as PEFT has them: modules, each with one delta.

Invariant: every site of the adapter is in exactly one module, or the export is refused by the site's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tensoradapt.errors import AdapterError, FileError
from tensoradapt.grouping import Group
from tensoradapt.io.saved import Saved
from tensoradapt.layouts import AS_STORED, KNOWN, OUT_IN, READ, UNSURE, check_rows, crossed, fits, turns
from tensoradapt.peft.factors import Pair, factors_of
from tensoradapt.peft.keys import EMBEDDINGS
from tensoradapt.sites import Site, SiteMap
from tensoradapt.targets import matches

CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")  # of GPT-2 and its kin; others have Linears under these names
SERVED = ("linear", "embedding", "conv")


@dataclass(frozen=True)
class Part:
    """A site's share of a module: its rows from `start` on, turned where the module uses the tensor the other way."""

    path: str
    start: int = 0
    turned: bool = False


@dataclass(frozen=True)
class Module:
    """One module that PEFT is to adapt: its kind and layout, the shape of its whole delta, and the sites in it."""

    path: str
    kind: str
    layout: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dims: int = 0  # of a convolution's kernel

    @property
    def flat(self) -> tuple[int, int]:
        """The shape of the delta as a matrix: (out, in * kernel)."""
        return self.shape[0], math.prod(self.shape[1:])

    def delta(self, saved: Saved) -> Tensor:
        """The module's delta as a matrix, from the deltas of its sites."""
        deltas = [(part, saved.delta(part.path).flatten(1)) for part in self.parts]
        whole = torch.zeros(self.flat, dtype=deltas[0][1].dtype if deltas else torch.float64)
        for part, delta in deltas:
            delta = delta.mT if part.turned else delta
            whole[part.start : part.start + len(delta)] += delta.cpu()
        return whole

    def factors(self, saved: Saved) -> Pair | None:
        """The module's delta as B, A: those of its sites beside each other, or None where a site has none."""
        pairs = [(part, factors_of(saved, part.path)) for part in self.parts]
        wide: list[Pair] = []
        for part, pair in pairs:
            if pair is None:
                return None
            b, a = (pair[1].mT, pair[0].mT) if part.turned else pair
            below = self.flat[0] - part.start - len(b)
            wide.append((torch.nn.functional.pad(b, (0, 0, part.start, below)), a))
        return torch.cat([b for b, _ in wide], 1), torch.cat([a for _, a in wide])


def modules_of(saved: Saved, model: SiteMap | None) -> list[Module]:
    """The modules of an adapter; a model's own sites, where it is given, say what they are and have to fit.

    Raises AdapterError on what PEFT cannot hold, FileError where the model lacks a module or has it in another shape.
    """
    live = {site.owner: site for site in model.sites if site.index is None} if model else None
    found: dict[str, list[Module]] = {}
    for group, placement in saved.sites.values():
        for module in _modules(group, placement.site, live, saved.where):
            found.setdefault(module.path, []).append(module)
    made = [replace(m[0], path=path, parts=tuple(p for each in m for p in each.parts)) for path, m in found.items()]
    if live is not None:
        _check_fits(saved, made, live)
    return made


def assumed(saved: Saved, model: SiteMap | None) -> list[str]:
    """The paths of weights of which nothing says which side is `out`: the first is taken, as in an nn.Linear."""
    live = {site.owner: site for site in model.sites if site.layout in KNOWN} if model else {}
    sites = [placement.site for _, placement in saved.sites.values()]
    return [site.path for site in sites if site.layout in (AS_STORED, UNSURE) and site.owner not in live]


def _check_named(site: Site) -> None:
    """Raise AdapterError on a weight whose name says that the first of its sides may not be `out`."""
    name = site.owner.rpartition(".")[2]
    table = (site.kind, site.layout) == ("embedding", AS_STORED) or (site.kind == "linear" and name in EMBEDDINGS)
    if table:
        raise AdapterError(
            f"{site.path} has the name of an embedding, and the adapter was made without its model",
            hint="give model=: PEFT stores embeddings otherwise",
        )
    if site.layout in (AS_STORED, UNSURE) and name in CONV1D:
        raise AdapterError(
            f"{site.path} has the name of a Conv1D, and the adapter was made without its model",
            got=f"a delta of {site.shape}, {READ[site.layout]}",
            hint="give model=: PEFT has B A with the outputs first",
        )


def _modules(group: Group, site: Site, live: Mapping[str, Site] | None, where: str) -> list[Module]:
    """A site's module, and the modules that are tied to it and adapted with it."""
    here = live.get(site.owner, site) if live else site
    conv1d = here.dims == 1  # plain, and delivered by weight here alone
    here = replace(here, kind="conv") if conv1d else here
    if site.index is not None or here.kind not in SERVED or (here.delivery == "weight" and not conv1d):
        raise AdapterError(
            f"PEFT's LoRA cannot hold the delta of {site.path}",
            got="an expert of a 3-D parameter" if site.index is not None else f"a {here.kind} delivered by weight",
            expected="a Linear, Conv1D, Embedding or Conv2d module with its class's own forward, which is called",
            hint="merge the adapter and serve the whole model, or leave the site out of the adapter",
        )
    if here.kind == "conv" and here.shape[2] == 1 and not here.dims:
        raise AdapterError(
            f"{site.path} is a Conv1d or a Conv2d: its kernel {here.shape[2:]} does not say which",
            hint="give model=: PEFT stores the two otherwise",
        )
    told = live is not None and site.owner in live and here.layout in KNOWN
    if not told:
        _check_named(site)
    turned = told and fits(site, here) and turns(site, here, where)
    check_rows(site, here, turned=turned)
    shape = site.shape[::-1] if turned else site.shape
    shape = shape if site.rows is None else (_height(group, site, live), *shape[1:])
    start = 0 if site.rows is None else site.rows[0]
    layout = here.layout if here.layout in KNOWN else OUT_IN
    made = [Module(site.owner, here.kind, layout, shape, (Part(site.path, start, turned),), here.dims)]
    for twin in site.joined:
        if live is None or twin not in live:
            raise AdapterError(
                f"{twin} is tied to {site.path}, and what it is cannot be told without the model", hint="give model="
            )
        other = live[twin]
        across = crossed(other, here)
        sides = shape[::-1] if across else shape
        made.append(Module(twin, other.kind, other.layout, sides, (Part(site.path, 0, turned != across),)))
    return made


def _height(group: Group, site: Site, live: Mapping[str, Site] | None) -> int:
    """The number of rows of the whole weight that a site is a range of."""
    if live and site.owner in live:
        return live[site.owner].out
    sizes: Any = next((value for name, value in group.rule.parts.items() if matches(name, site.owner)), None)
    if sizes is None:
        raise AdapterError(f"{site.path} is a part of a weight whose height is not known", hint="give model=")
    return sum(sizes.values()) if hasattr(sizes, "values") else len(sizes) * site.out


def _shapes(site: Site) -> tuple[tuple[int, ...], ...]:
    """What the (out, in) of a model's weight can be."""
    return (site.shape, site.shape[::-1]) if site.layout == AS_STORED else (site.shape,)


def _check_fits(saved: Saved, made: Sequence[Module], live: Mapping[str, Site]) -> None:
    wrong = [
        f"{m.path}: {m.shape} in the adapter, {live[m.path].shape if m.path in live else 'nothing'} in the model"
        for m in made
        if m.path not in live or m.shape not in _shapes(live[m.path])
    ]
    if wrong:
        raise FileError(
            f"{saved.where} is for another model: {len(wrong)} modules do not fit",
            got="; ".join(wrong[:5]),
            hint="give the model that the adapter was made for",
        )
