"""Names as the model has them that PEFT would adapt, where the adapter was attached to something around it.

Invariant: every name loses the same prefix, or none does.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tensoradapt.errors import AdapterError
from tensoradapt.grouping import Group
from tensoradapt.io.names import shift
from tensoradapt.io.saved import Saved
from tensoradapt.scan import Model, scan
from tensoradapt.sites import Site


def seen_from_within(saved: Saved, model: Model | None) -> tuple[Saved, Model | None]:
    """An adapter and the model whose names PEFT will look for: a SentenceTransformer loads adapters into its inner one.

    Where a part of the adapter's own model is given, the names are that part's. Raises AdapterError where sites lie
    outside it.
    """
    if model is None:
        return saved, None
    inner = getattr(model, "transformers_model", None)
    if isinstance(model, nn.Module) and isinstance(inner, nn.Module):
        prefix = next((f"{path}." for path, module in model.named_modules() if module is inner and path), "")
        return _without(saved, prefix), inner
    owners = {placement.site.owner for _, placement in saved.sites.values()}
    by = shift(owners, {site.owner for site in scan(model).sites})
    return (_without(saved, by.prefix) if by.strip else saved), model


def _without(saved: Saved, prefix: str) -> Saved:
    """The adapter with a prefix taken off every site and every parameter that was trained whole."""
    plan = saved.plan
    names = [*(placement.site.owner for _, placement in saved.sites.values()), *plan.extras]
    outside = [name for name in names if not name.startswith(prefix)]
    if outside:
        raise AdapterError(
            f"{outside[0]} lies outside the model that PEFT adapts, {prefix.rstrip('.')}",
            got=f"{len(outside)} of {len(names)} weights outside it",
            hint="leave it out of the adapter, or merge and save the whole model",
        )
    groups = tuple(_renamed(group, prefix) for group in plan.groups)
    extras = {name.removeprefix(prefix): shape for name, shape in plan.extras.items()}
    tensors = {
        f"extra.{key.removeprefix('extra.').removeprefix(prefix)}" if key.startswith("extra.") else key: tensor
        for key, tensor in saved.tensors.items()
    }
    return replace(saved, plan=replace(plan, groups=groups, extras=extras), tensors=tensors)


def _renamed(group: Group, prefix: str) -> Group:
    return replace(group, placements=tuple(replace(p, site=_site(p.site, prefix)) for p in group.placements))


def _site(site: Site, prefix: str) -> Site:
    names = {field: getattr(site, field).removeprefix(prefix) for field in ("path", "owner", "tensor")}
    lists = {
        field: tuple(name.removeprefix(prefix) for name in getattr(site, field)) for field in ("aliases", "joined")
    }
    return replace(site, **names, **lists)  # type: ignore[arg-type]
