"""Parts: where a site lies in a stored parameter, to read it, to write it, and to lay a delta out for it.

Invariant: a site's part is a view of the parameter, `out` first; what is not plain has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensoradapt.calls import computed
from tensoradapt.errors import AdapterError
from tensoradapt.offload import said
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.scan import owner_of, parameter_of
from tensoradapt.sites import Site


def view(parameter: Tensor, site: Site) -> Tensor:
    """A site's part of a stored parameter, `out` first; it shares the parameter's memory."""
    part = parameter if site.index is None else parameter[site.index]
    part = part.mT if site.layout == "in out" else part
    return part if site.rows is None else part[site.rows[0] : site.rows[1]]


def plain_weight(model: nn.Module, site: Site) -> Tensor:
    """A site's part of the base's weight, to start from.  Shape: (out, in kernel).

    Raises AdapterError on the meta device, and on weights that are quantised, sharded or computed from others.
    """
    owner, name = owner_of(model, parameter_of(model, site))
    held = owner._parameters.get(name)
    absent = said(model, parameter_of(model, site), held)
    if absent is not None:
        raise AdapterError(f"{site.path} has no weight to start from: it is {absent[0]}", hint=absent[1])
    made = computed(owner, name)
    if made is not None:
        raise AdapterError(f"{site.path} has no parameter to start from: it is {made[0]}", hint=f"call {made[1]} first")
    found = view(held.detach(), site).flatten(1) if is_plain(held) else None  # type: ignore[union-attr]
    if found is None or tuple(found.shape) != (site.out, site.inp * site.kernel):
        raise AdapterError(
            f"{site.path} has no plain weight to start from: it is quantised or sharded",
            got=kind_of(held),
            hint="start from the model in half precision, save the adapter, and load it onto the quantised one",
        )
    return found


def laid_out(deltas: Sequence[tuple[Site, Tensor]], like: Tensor) -> Tensor:
    """The deltas of one parameter's sites in a tensor of its shape and dtype; zero where no site lies."""
    stored: dict[int | None, Tensor] = {}
    shape = like.shape if deltas[0][0].index is None else like.shape[1:]
    for site, delta in deltas:
        piece = _stored(site, delta.to(device=like.device, dtype=like.dtype), shape)
        stored[site.index] = stored[site.index] + piece if site.index in stored else piece
    if None in stored:
        return stored[None]
    blank = torch.zeros(shape, device=like.device, dtype=like.dtype)
    return torch.stack([stored.get(k, blank) for k in range(like.shape[0])])


def _stored(site: Site, delta: Tensor, shape: torch.Size) -> Tensor:
    """A delta (out, in) or (out, in, kh, kw) as its parameter stores it, rows of other sites filled with zeros."""
    turned = site.layout == "in out"
    if site.rows is not None:
        below = shape[-1 if turned else 0] - site.rows[1]
        delta = F.pad(delta, (0, 0) * (delta.dim() - 1) + (site.rows[0], below))
    return (delta.mT if turned else delta).reshape(shape)
