"""Changes of whole adapters: another gauge, smaller or other ranks, sums.

An attached adapter is changed in place, the optimiser that is passed follows; a file or an adapter without a model is
left as it is, and a new one is returned. Invariant: what is refused changes nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tensoradapt.adapter import Adapter
from tensoradapt.change.error import squared_norm
from tensoradapt.change.install import Turn
from tensoradapt.change.ranks import Ranks, by_bond, wider
from tensoradapt.change.result import Change
from tensoradapt.change.targets import (
    Source,
    changed,
    held_by,
    named,
    opened,
    put,
    require_free,
    require_own,
)
from tensoradapt.diagram import Diagram
from tensoradapt.errors import RankError, SpecError
from tensoradapt.gauge import (
    Network,
    ladder,
    orthogonalized,
    require_truncatable,
    squeezed,
    stacked,
    truncated,
    unstacked,
    widened,
)
from tensoradapt.grouping import Group
from tensoradapt.init import require_seed
from tensoradapt.io.saved import Saved
from tensoradapt.linalg import double


def orthogonalize(
    adapter: Source, form: str = "canonical", center: str | None = None, *, optimizer: Any = None
) -> Adapter | Saved:
    """Bring every group into a form of its network, no delta changed: returns the adapter, or a new one from a file.

    `form` is canonical (all nodes but `center` are isometries towards it), hosvd (all-orthogonal), symmetric (each
    bond's singular values split evenly), left or right (of trains); see `tensoradapt.gauge`. Moments of `optimizer`
    are carried along. Raises SpecError on networks without the form, frozen nodes and differences, AdapterError on a
    merged adapter.
    """
    target = opened(adapter, optimizer)
    for group in target.plan.groups:
        require_free(group, "cannot change the gauge of")
    turns = [
        Turn(group, before, after, after)
        for (group, before), after in zip(held_by(target), _formed(target, form, center), strict=True)
    ]
    return put(target, turns, optimizer)


def _formed(target: Adapter | Saved, form: str, center: str | None) -> list[Network]:
    """Every group in a form; groups of equal diagrams at once."""
    held = held_by(target)
    alike: dict[Any, list[int]] = {}
    for k, (group, network) in enumerate(held):
        kinds = tuple((t.dtype, t.device) for t in network.factors.values())
        alike.setdefault((group.diagram, kinds), []).append(k)
    found: dict[int, Network] = {}
    for members in alike.values():
        group, network = held[members[0]]
        with named(group):
            made = _at_once(network, [held[k][1].factors for k in members], form, center)
        found |= dict(zip(members, made, strict=True))
    return [found[k] for k in range(len(held))]


def _at_once(one: Network, factors: Sequence[Mapping[str, Tensor]], form: str, center: str | None) -> list[Network]:
    """Networks of one diagram in a form, as a batch. Raises SpecError, about one of them, where there is no form."""
    batch = stacked(one.diagram, factors)
    try:
        return unstacked(orthogonalized(batch.diagram, batch.factors, form, center))
    except SpecError:
        orthogonalized(one.diagram, one.factors, form, center)  # the same refusal, without the axis of the batch
        raise


def truncate(
    adapter: Source,
    *,
    rank: Ranks | None = None,
    error: float | None = None,
    max_parameters: int | None = None,
    optimizer: Any = None,
) -> Change:
    """Cut ranks: to a rank, to a relative error over all sites, or to a number of trained parameters over all bonds.

    By error or parameters, values go one by one, always from the bond of any group that costs least per parameter
    saved. The error is that of the discarded singular values (one bond), at most sqrt(sum of their squares) (many).
    Factors come in the symmetric form; every group keeps its scale; moments of `optimizer` are carried along.
    Raises SpecError on networks that are neither trees nor CP, on frozen nodes and differences, RankError on ranks and
    budgets below 1, AdapterError on a merged adapter.
    """
    target = opened(adapter, optimizer)
    for group in target.plan.groups:
        require_free(group, "cannot truncate")
        with named(group):
            require_truncatable(group.diagram)
    held = held_by(target)
    ranks = _ranks(held, rank, error, max_parameters)
    turns = []
    for (group, before), sizes in zip(held, ranks, strict=True):
        after = truncated(before.diagram, before.factors, sizes)
        turns.append(Turn(group, before, after, after))
    return changed(target, turns, optimizer)


def _ranks(
    held: Sequence[tuple[Group, Network]], rank: Ranks | None, error: float | None, max_parameters: int | None
) -> list[dict[str, int]]:
    """The rank of every bond of every group, as one of three ways to say it has it."""
    given = [
        name
        for name, value in (("rank", rank), ("error", error), ("max_parameters", max_parameters))
        if value is not None
    ]
    if len(given) != 1:
        raise SpecError(
            "say in one way how far to truncate",
            got=", ".join(given) or "nothing",
            expected="rank, error or max_parameters",
        )
    if rank is not None:
        return [{b: min(r, group.rank[b]) for b, r in by_bond(group, rank).items()} for group, _ in held]
    ladders = [ladder(network.diagram, network.factors, group.scale) for group, network in held]
    if error is not None:
        return squeezed(ladders, squared_error=_allowed(held, error))
    if type(max_parameters) is not int or max_parameters < 1:
        raise RankError("max_parameters is a positive integer", got=repr(max_parameters))
    return squeezed(ladders, max_parameters=max_parameters)


def _allowed(held: Sequence[tuple[Group, Network]], error: float) -> float:
    if type(error) not in (float, int) or not 0 <= error < 1:
        raise SpecError("a relative error is a number from 0 up to 1", got=repr(error), hint="write error=0.01 for 1 %")
    return float(error) ** 2 * sum(squared_norm(group, network) for group, network in held)


def resize(adapter: Source, rank: Ranks, *, optimizer: Any = None, seed: int = 0) -> Change:
    """Give every group other ranks: smaller bonds are truncated, wider ones are filled so that no delta changes.

    A wider bond gets zeros at one end and random entries of the old ones' size at the other, from where it can be
    trained; moments of `optimizer` get zeros. One number is a ceiling, capped at each bond's limit; ranks per bond (a
    list, or a mapping from bonds or axes; the rest stays) are literal. The copy that a difference subtracts is widened
    with its factors. Raises RankError on ranks above a bond's limit, SpecError on frozen nodes and on truncating what
    has no truncation, AdapterError on a merged adapter.
    """
    require_seed(seed)
    target = opened(adapter, optimizer)
    held = held_by(target)
    whole = target.as_saved()
    turns = [_resized(group, before, wider(group, rank), whole.starts(group.name), seed) for group, before in held]
    return changed(target, turns, optimizer)


def _resized(group: Group, before: Network, wanted: Diagram, starts: Mapping[str, Tensor] | None, seed: int) -> Turn:
    other = {bond for bond, size in group.rank.items() if wanted.sizes[bond] != size}
    smaller = {bond: wanted.sizes[bond] for bond in other if wanted.sizes[bond] < group.rank[bond]}
    for node in group.rule.frozen:
        if other & set(group.diagram.nodes[node]):
            raise SpecError(
                f"group {group.name!r} cannot be resized: {node!r} is frozen, and would not be what it was drawn as",
                got=", ".join(sorted(other)),
            )
    require_own(group, "cannot resize")
    middle = before
    if smaller:
        require_free(group, "cannot truncate")
        with named(group):
            middle = truncated(before.diagram, before.factors, smaller)
    after = middle
    if other:
        fill = {n: _drawn(t, wanted.shape(n), f"{group.name}.{n}", seed) for n, t in middle.factors.items()}
        after = widened(middle.diagram, middle.factors, fill)
    return Turn(group, before, middle, after, _widened_alike(after, starts) if starts else None)


def _drawn(old: Tensor, shape: tuple[int, ...], key: str, seed: int) -> Tensor:
    """Random entries as large as those of a factor; of unit columns where it is zero. Of the seed and the key alone."""
    own = int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, own])))
    size = float(double(old).square().mean().sqrt()) or 1 / math.sqrt(max(shape))
    return torch.from_numpy(size * rng.standard_normal(shape)).to(old)


def _widened_alike(after: Network, starts: Mapping[str, Tensor]) -> Network:
    """The frozen copies with the new entries of the factors: their difference is zero there."""
    copies = {node: tensor.clone() for node, tensor in after.factors.items()}
    for node, start in starts.items():
        copies[node][tuple(map(slice, start.shape))] = start
    return Network(after.diagram, copies)
