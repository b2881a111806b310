"""The base of an adapter: what its file says of it, and whether weights at hand are those that it was made on.

A fingerprint is the checksum of a few entries of some of the adapted weights, as they are stored, for every dtype that
they can be rounded to: a base that was cast is the same base. Invariant: it does not depend on devices, shards, ties,
or on which of a weight's sides is called `out`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tensoradapt.paths import origin
from tensoradapt.plan import Plan
from tensoradapt.sites import Site
from tensoradapt.tables import first_of

WEIGHTS = "weights"
LOOKED_AT, SAMPLES = 64, 16  # weights of an adapter, and entries of each
GOLDEN = 0x9E3779B97F4A7C15  # its multiples modulo 2^64 lie evenly, and at no regular distance
NARROW = (torch.bfloat16, torch.float16)
CASTS = {
    **dict.fromkeys((torch.float64, torch.float32), (torch.float32, *NARROW)),
    **{dtype: (dtype,) for dtype in NARROW},
}
Read = Callable[[Site], Tensor | None]  # the stored tensor, or the one expert of it, of a site; None where not at hand
Fingerprint = dict[str, dict[str, str]]  # of every weight that is looked at, by its module: dtype -> checksum


def identity(plan: Plan, base: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the base: its name, whether that is a hub's, its revision, shapes, and a fingerprint."""
    said = str(base.get("name") or plan.model)
    found = origin(said)
    hub = base["hub"] is True if "hub" in base else found.hub and "/" in found.name  # others may be folders' names
    name, _, revision = said.partition("@") if hub else (found.name, "", "")
    return {
        "name": name,
        "hub": hub,
        "revision": str(base.get("revision") or revision or found.revision),
        "shapes": shapes_of(plan),
        **({WEIGHTS: weights} if (weights := recorded(base)) else {}),
    }


def shapes_of(plan: Plan) -> str:
    """A hash of the shapes of the weights that a plan adapts."""
    shapes = sorted((p.site.path, list(p.site.shape)) for group in plan.groups for p in group.placements)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def recorded(base: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of what is known of a base; empty in older files."""
    return dict(base.get(WEIGHTS) or {})


def fingerprint(plan: Plan, read: Read) -> Fingerprint:
    """The fingerprint of the weights that a plan adapts, of those of them that are at hand."""
    held = _weights(plan)
    paths = list(held)
    taken = range(len(held)) if len(held) <= LOOKED_AT else sorted(set(_spread(LOOKED_AT, len(held))))
    return {paths[k]: row for k in taken if (row := _row(held[paths[k]], read))}


def _spread(count: int, total: int) -> list[int]:
    """Places below a total that lie evenly, and at no distance that roles or rows could have."""
    return [(k * GOLDEN % 2**64) * total >> 64 for k in range(1, count + 1)]


def _weights(plan: Plan) -> dict[str, Site]:
    """A site of every stored weight, or expert of one, by its module: several may be rows of it."""
    sites = (placement.site for group in plan.groups for placement in group.placements)
    return {site.owner if site.index is None else f"{site.owner}[{site.index}]": site for site in sites}


def _row(site: Site, read: Read) -> dict[str, str]:
    tensor = read(site)
    if tensor is None or tensor.dtype not in CASTS or not tensor.numel():
        return {}
    taken = samples(tensor)
    shape = zlib.crc32(repr(tuple(tensor.shape)).encode())
    casts = {dtype: taken.to(dtype) for dtype in CASTS[tensor.dtype]}
    return {str(t)[6:]: f"{zlib.crc32(c.view(torch.uint8).numpy().data, shape):08x}" for t, c in casts.items()}


def samples(tensor: Tensor) -> Tensor:
    """Some entries of a tensor, on the CPU: no other is read, wherever it lies.  Shape: (SAMPLES,)."""
    places = torch.unravel_index(torch.tensor(_spread(SAMPLES, tensor.numel())), tensor.shape)
    return tensor.detach()[tuple(place.to(tensor.device) for place in places)].cpu()


def check_base(base: Mapping[str, Any], plan: Plan, read: Read, where: str, *, stacklevel: int = 3) -> None:
    """Warn where the weights at hand are not those that an adapter was made on, as far as its file tells.

    Those that are there in no dtype which both can be rounded to are not compared.
    """
    known, held = recorded(base), _weights(plan)
    rows = {path: _row(held[path], read) for path in known if path in held}
    compared = {path: known[path].keys() & row.keys() for path, row in rows.items()}
    other = [path for path, both in compared.items() if both and all(known[path][d] != rows[path][d] for d in both)]
    if not other:
        return
    total = sum(map(bool, compared.values()))
    name = " ".join(filter(None, (str(base.get("name") or ""), str(base.get("revision") or ""))))
    warnings.warn(
        f"{where} was made on another base{f', {name}' if name else ''}: of {total} weights that were compared "
        f"{len(other)} {'are' if len(other) > 1 else 'is'} not as they were, {first_of(other, 3)}. What it adds was "
        "found for those weights: give the base that it is of, unmerged and not trained further",
        stacklevel=stacklevel,
    )
