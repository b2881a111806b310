"""Starts from data: gradients, activations, deltas.

Invariant: sites that share a factor share the data that it is taken from.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tensoradapt.analysis.source import open_source
from tensoradapt.errors import AdapterError, ShapeError, SiteError, SpecError
from tensoradapt.io.pairs import Deltas
from tensoradapt.linalg import Dense, Slice, double, home_of
from tensoradapt.scan import scan_module
from tensoradapt.sites import Site
from tensoradapt.start.activations import Activations, Inputs
from tensoradapt.start.gradients import Gradients
from tensoradapt.start.install import Factors
from tensoradapt.start.sides import side, spaces
from tensoradapt.start.targets import Job
from tensoradapt.start.weights import drawn, minor, principal

Found = Mapping[str, Tensor]


def lora_ga(job: Job, found: Gradients | Found, gamma: float = 16.0) -> Factors:
    """Disjoint singular directions of the gradient: A = c V[:, :r]^T, B = c U[:, r:2r], c = out^1/4 / gamma^1/2.

    The tangent space at B A then holds the best rank-2r part of the gradient. Groups: U and V are the singular vectors
    of the stacked gradients' unfoldings (partial HOSVD); trained nodes of two bonds are the identity between them.
    Raises RankError where there are no 2r directions. Source: LoRA-GA, arXiv 2407.05000.
    """
    group = job.group
    outer, inner = side(group, "out", "lora_ga"), side(group, "in", "lora_ga")
    ranks = group.diagram.sizes[outer.bond], group.diagram.sizes[inner.bond]
    stack = job.stream(partial(_slice, job, found, what="gradient")).stack
    left, right = spaces(group, stack, (sum(ranks), sum(ranks)), job.seed)
    size = group.diagram.extent("out") ** 0.25 / gamma**0.5
    factors = drawn(job, "balanced")
    factors |= {node: _identity(job, node) for node in _between(job)}
    factors[outer.node] = outer.put(group, left[:, ranks[1] :]) * size
    factors[inner.node] = inner.put(group, right) * size
    return factors


def _between(job: Job) -> list[str]:
    """The trained nodes with two bonds and no side of the weights."""
    diagram = job.group.diagram
    free = [n for n in job.group.trainable if not set(diagram.nodes[n]) & {*diagram.fold("out"), *diagram.fold("in")}]
    return [n for n in free if sum(i in diagram.bonds for i in diagram.nodes[n]) == 2]


def _identity(job: Job, node: str) -> Tensor:
    """The identity between a node's two bonds, at all of its coordinates."""
    diagram = job.group.diagram
    indices = diagram.nodes[node]
    bonds = [i for i in indices if i in diagram.bonds]
    eye = torch.eye(diagram.sizes[bonds[0]], diagram.sizes[bonds[1]]).to(job.like)
    shape = [diagram.sizes[i] if i in bonds else 1 for i in indices]
    return eye.reshape(shape).expand(diagram.shape(node)).contiguous()


def lora_one(job: Job, found: Gradients | Found, gamma: float = 64.0) -> Factors:
    """The networks closest to one step down the gradient: N_s ~ -c^2 G_s / |G|, c = out^1/4 / gamma^1/2.

    One matrix: B = -c U_r (S_r/S_1)^1/2, A = c (S_r/S_1)^1/2 V_r^T. Groups: for Tucker the partial HOSVD of the stacked
    gradients, improved by HOOI; |G| is the largest singular value of their unfolding along `out`.
    Source: LoRA-One, arXiv 2502.01235.
    """
    stream = job.stream(partial(_slice, job, found, what="gradient"))
    gram = torch.zeros((), dtype=torch.float64, device=home_of(job.like.device))
    for _, part in stream.stack.passes():
        whole = double(part.dense())
        gram = gram + whole @ whole.mT
    largest = float(torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt())
    size = job.group.diagram.extent("out") ** 0.5 / gamma
    return job.fit(stream, -size / largest if largest else 1.0)


def _slice(job: Job, held: Mapping[str, Any], site: Site, what: str) -> Slice:
    """A site's slice of a mapping, its kernel flattened. Raises SiteError, ShapeError, AdapterError, SpecError."""
    part = held.get(site.path)
    part = held.get(f"{site.path}.weight") if part is None else part
    if part is None:
        raise SiteError(f"there is no {what} of {site.path}", expected=", ".join(map(str, list(held)[:12])))
    if not isinstance(part, Tensor):
        raise SpecError(f"the {what} of {site.path} is no tensor", got=type(part).__name__)
    matrix = part.flatten(1) if part.dim() > 2 else part
    shape = (site.out, site.inp * site.kernel)
    if tuple(matrix.shape) != shape:
        raise ShapeError(f"the {what} of {site.path} has another shape", got=tuple(matrix.shape), expected=shape)
    if not bool(torch.isfinite(matrix).all()):
        raise AdapterError(f"the {what} of {site.path} is not finite", hint="leave out what made it so")
    return Dense(matrix.to(job.like))


def eva(job: Job, found: Activations) -> Factors:
    """Leading directions of the inputs on `in`, zero on `out`: A = V[:, :r]^T of X = U S V^T, B = 0.

    Sites that share the node on `in` pool their inputs. Raises RankError where there are fewer directions. Source: EVA,
    arXiv 2410.07170.
    """
    group = job.group
    inner = side(group, "in", "eva")
    zero = next((n for n, law in group.laws.items() if law == "zero" and n != inner.node), None)
    zero = zero or side(group, "out", "eva").node
    factors = drawn(job, "balanced")
    factors[zero] = torch.zeros_like(factors[zero])
    shared = [i for i in inner.indices if i in group.diagram.coordinates]
    places: dict[tuple[int, ...], list[Inputs]] = {}
    for placement in group.placements:
        if placement.slots != (1, 1):
            raise SpecError(
                f"eva has no form for slots, and {placement.site.path} is cut into them",
                hint="use a format with shapes: separate, or leave this site out",
            )
        key = tuple(placement.index[axis] for axis in shared)
        places.setdefault(key, []).append(_inputs(found, placement.site))
    for key, inputs in places.items():
        basis = inner.narrowed(group, _pooled(job, inputs).v)
        laid = inner.put(group, basis)
        where = tuple(key[shared.index(i)] if i in shared else slice(None) for i in inner.indices)
        factors[inner.node] = factors[inner.node].clone()
        factors[inner.node][where] = laid[where]
    return factors


def _inputs(found: Activations, site: Site) -> Inputs:
    """What went into a site. Raises SiteError, and ShapeError where it is of another width: of another model."""
    if site.path not in found.sites:
        raise SiteError(f"there are no activations of {site.path}", expected=", ".join(list(found.sites)[:12]))
    inputs, width = found.sites[site.path], site.inp * site.kernel
    if len(inputs.v) != width:
        raise ShapeError(
            f"the activations of {site.path} have another width",
            got=len(inputs.v),
            expected=width,
            hint="gather them on the model that the adapter is on",
        )
    return inputs


def _pooled(job: Job, inputs: list[Inputs]) -> Inputs:
    """The inputs of several sites as those of one; by channels where the kernel is an axis of its own."""
    rows = torch.cat([part.rows.to(job.like) for part in inputs])
    if job.group.diagram.fold("kernel"):
        rows = rows.unflatten(1, (-1, job.group.diagram.extent("kernel"))).mT.flatten(0, 1)
    empty = Inputs(rows.new_zeros(0), rows.new_zeros(rows.shape[1], 0), 0)
    return empty.grown(rows, None, sum(part.count for part in inputs))


def corda(job: Job, found: Activations, damping: float = 0.01) -> Factors:
    """The part of the weights that the inputs see most: W_s C = U S V^T, scale N_s ~ U_r S_r V_r^T C^-1.

    C = X^T X / tokens + damping mean(diag) I over the inputs of the group; one matrix: B = U_r (S_r/s)^1/2,
    A = (S_r/s)^1/2 V_r^T C^-1. Source: CorDA, instruction-previewed, arXiv 2406.05223.
    """
    return _weighted(job, found, damping, principal)


def corda_minor(job: Job, found: Activations, damping: float = 0.01) -> Factors:
    """The part of the weights that the inputs see least: the last r triplets of W_s C. CorDA, knowledge-preserved."""
    return _weighted(job, found, damping, minor)


def _weighted(job: Job, found: Activations, damping: float, method: Any) -> Factors:
    group = job.group
    inner = side(group, "in", "corda")
    if group.diagram.fold("kernel"):
        raise SpecError("corda weighs channels and kernel together", got=str(group.diagram), hint="use lora")
    cut = [placement.site.path for placement in group.placements if placement.slots[1] > 1]
    if cut:
        raise SpecError(
            f"corda weighs whole inputs, and {cut[0]} is cut into slots along them",
            hint="use a format with shapes: separate, or leave this site out",
        )
    pooled = _pooled(job, [_inputs(found, placement.site) for placement in group.placements])
    rows = double(pooled.rows)
    covariance = rows.mT @ rows / pooled.count
    level = damping * covariance.diagonal().mean()
    if not float(level):
        raise AdapterError(f"the activations of group {group.name!r} are all zero", hint="use other batches")
    covariance += level * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    factors = dict(method(job, covariance.to(job.like)))
    dim = inner.indices.index("in")
    moved = double(factors[inner.node]).movedim(dim, -1)
    solved = torch.linalg.solve(covariance, moved.reshape(-1, moved.shape[-1]).mT).mT
    factors[inner.node] = solved.reshape(moved.shape).movedim(-1, dim).to(job.like)
    return factors


def from_delta(job: Job, deltas: Mapping[str, Tensor] | tuple[Any, Any]) -> Factors:
    """The networks closest to given changes of the weights: min sum_s |D_s - scale N_s|^2.

    `deltas` maps paths to D_s[out, in], or is a pair of checkpoints (base, tuned) whose difference it is.
    """
    if isinstance(deltas, tuple):
        if len(deltas) != 2:
            raise SpecError("a change of the weights is between two checkpoints", got=len(deltas), hint="(base, tuned)")
        with open_source(*deltas, model=scan_module(job.adapter._model[0])) as pairs:  # which knows the layouts
            return job.fit(job.stream(partial(_changed, job, pairs)), 1 / job.group.scale)
    return job.fit(job.stream(partial(_slice, job, deltas, what="delta")), 1 / job.group.scale)


def _changed(job: Job, pairs: Deltas, site: Site) -> Slice:
    path = next((s.path for s in pairs.sites if (s.owner, s.index) == (site.owner, site.index)), None)
    if path is None:
        raise SiteError(f"{site.path} is not in both checkpoints", expected=", ".join(s.path for s in pairs.sites[:12]))
    whole = pairs.delta(path).flatten(1)
    whole = whole if site.rows is None else whole[site.rows[0] : site.rows[1]]
    return _slice(job, {site.path: whole}, site, "delta")
