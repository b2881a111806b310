"""Modules that an adapter does not change and a server wants beside those that it does: written with zero factors.

SGLang stacks the factors of `q_proj`, `k_proj`, `v_proj`, and of `gate_proj`, `up_proj`, and wants all of a stack;
TGI and LoRAX read a role in every layer, or in none.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from tensoradapt.peft.modules import SERVED, Module
from tensoradapt.sites import SiteMap

STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings_of(modules: Sequence[Module], known: SiteMap | None) -> list[Module]:
    """The modules of a model with the role of one of these in another layer, or stacked with one; none without it."""
    if known is None:
        return []
    ours = {module.path for module in modules}
    wanted = {other for path in ours for other in (_role(path), *_stacked(_role(path)))}
    return [
        Module(site.owner, site.kind, site.layout, site.shape, (), site.dims)
        for site in known.sites
        if site.owner not in ours and _role(site.owner) in wanted and _is_served(site.kind, site.delivery, site.index)
    ]


def _is_served(kind: str, delivery: str, index: int | None) -> bool:
    return kind in SERVED and delivery == "output" and index is None


def _role(path: str) -> str:
    """A path with its numbers left open."""
    return re.sub(r"\b\d+\b", "*", path)


def _stacked(role: str) -> Collection[str]:
    above, _, leaf = role.rpartition(".")
    return [f"{above}.{other}" for stack in STACKS if leaf in stack for other in stack]
