"""Activations: what goes into every site, as an incremental SVD over batches.

Invariant: of a site's inputs X[tokens, in] only the singular values and right vectors are kept, (in + 1) k numbers at
most, beside the inputs of one call of one module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.errors import RankError, SiteError
from tensoradapt.linalg import truncated_svd
from tensoradapt.scan import module_at
from tensoradapt.sites import Site
from tensoradapt.spec import Spec
from tensoradapt.start.passes import called, each, plain, require_some, sites_of


@dataclass(frozen=True)
class Inputs:
    """The inputs of one site: X^T X ~ v diag(s)^2 v^T over `count` rows.  Shapes: s (k,), v (in kernel, k)."""

    s: Tensor
    v: Tensor
    count: int

    @property
    def rows(self) -> Tensor:
        """Rows with the same X^T X.  Shape: (k, in kernel)."""
        return self.s[:, None] * self.v.mT

    def grown(self, rows: Tensor, rank: int | None, count: int) -> Inputs:
        """These and further rows, cut to the leading `rank` directions."""
        found = truncated_svd(torch.cat([self.rows, rows.to(self.rows)]), rank, method="exact")
        return Inputs(found.s, found.v, self.count + count)


@dataclass(frozen=True)
class Activations:
    """The inputs of every site by path: an incremental SVD of them."""

    sites: Mapping[str, Inputs] = field(repr=False)
    batches: int


def activations(
    model: nn.Module, where: Adapter | Spec, batches: Iterable[Any], *, rank: int | None = None
) -> Activations:
    """Singular values and right singular vectors of the inputs of the sites of an adapter, or of a spec, over batches.

    X_s[token, in] = U diag(s) V^T, adapters off; a convolution's inputs are its patches, (in kernel). `rank` cuts every
    site's decomposition after every call (incremental SVD); without it nothing is lost, in memory (in x in) a site.
    Raises SiteError on sites without activations (embeddings, weights of no module), SpecError without batches,
    AdapterError on the meta device. Source: EVA, arXiv 2410.07170.
    """
    if rank is not None and (type(rank) is not int or rank < 1):
        raise RankError("rank is a positive number of directions", got=rank)
    ready = each(batches)
    owners: dict[str, list[Site]] = {}
    for site in sites_of(model, where):
        if site.delivery != "output" or site.kind == "embedding":
            reason = "it looks rows up by number" if "embedding" in site.kind else "no module of its own applies it"
            raise SiteError(f"{site.path} has no activations: {reason}", hint="leave this site out")
        owners.setdefault(site.owner, []).append(site)
    kept: dict[str, Inputs] = {}
    handles, count = [], 0
    try:
        for owner, mine in owners.items():
            watch = _Watch(owner, mine[0].kind, rank, kept)
            handles.append(module_at(model, owner).register_forward_pre_hook(watch, with_kwargs=True))
        with plain(model), torch.no_grad():
            for batch in ready:
                called(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    require_some(count)
    missing = [owner for owner in owners if owner not in kept]
    if missing:
        raise SiteError(f"the batches do not reach {missing[0]}", hint="leave this site out, or use batches that do")
    return Activations({site.path: replace(kept[owner]) for owner, mine in owners.items() for site in mine}, count)


@dataclass(frozen=True)
class _Watch:
    """A hook that takes up the inputs of a module."""

    owner: str
    kind: str
    rank: int | None
    kept: dict[str, Inputs]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        rows = patches(module, x.detach()) if self.kind == "conv" else x.detach().reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        before = self.kept.get(self.owner) or Inputs(rows.new_zeros(0), rows.new_zeros(rows.shape[1], 0), 0)
        self.kept[self.owner] = before.grown(rows, self.rank, len(rows))


def patches(module: Any, x: Tensor) -> Tensor:
    """What a convolution multiplies its kernel with.  Shapes: (.., in, h, w) -> (positions, in kernel)."""
    x = x if x.dim() == 4 else x[None]
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = module.padding
    found = F.unfold(x, module.kernel_size, dilation=module.dilation, padding=padding, stride=module.stride)
    return found.mT.flatten(0, 1)
