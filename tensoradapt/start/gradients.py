"""Gradients of the base's weights, accumulated over a few batches in bounded memory.

Invariant: beside what is accumulated there is one weight's gradient at a time: each is taken and dropped as soon as the
backward pass has made it. What is accumulated is one float32 tensor as large as the adapted weights, or, with `sketch`
k, (out + 2 in) k numbers per site and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.adapter import Adapter
from tensoradapt.errors import AdapterError, RankError, SiteError
from tensoradapt.init import require_seed
from tensoradapt.linalg import Dense, Product, Seed, Slice, double
from tensoradapt.linalg.lapack import qr
from tensoradapt.parts import view
from tensoradapt.quantised import is_plain, kind_of
from tensoradapt.scan import owner_of, parameter_of
from tensoradapt.sites import Site
from tensoradapt.spec import Spec
from tensoradapt.start.passes import called, each, plain, require_some, sites_of

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Gradients(Mapping[str, Tensor]):
    """The mean gradient G[out, in] of the loss at the weight of every site, by path; `loss` is the mean loss."""

    slices: Mapping[str, Slice] = field(repr=False)
    batches: int
    loss: float

    def __getitem__(self, path: str) -> Tensor:
        return self.slices[path].dense()

    def __iter__(self) -> Iterator[str]:
        return iter(self.slices)

    def __len__(self) -> int:
        return len(self.slices)


def gradients(
    model: nn.Module,
    where: Adapter | Spec,
    batches: Iterable[Any],
    loss: Loss | None = None,
    *,
    sketch: int | None = None,
    seed: int = 0,
) -> Gradients:
    """The mean gradient of the base's weights over batches, at the sites of an adapter or of a spec.

    G_s[out, in] = (1/n) sum_b dL_b / dW_s[out, in], adapters off, kernels flattened into `in`. `loss(model, batch)` is
    a scalar; without it the model's output must have a `.loss`. `sketch` keeps a rank-k approximation instead, from two
    random projections of every gradient (arXiv 1609.00048). Raises AdapterError on a model without a loss, on the meta
    device or with quantised weights, SpecError without batches, SiteError on a weight that the loss does not reach.
    """
    sites, ready = sites_of(model, where), each(batches)
    if sketch is not None and (type(sketch) is not int or sketch < 1):
        raise RankError("sketch is a positive number of directions", got=sketch)
    if loss is not None and not callable(loss):
        raise AdapterError("this is no loss", got=repr(loss), hint="pass loss=lambda model, batch: ...")
    require_seed(seed)
    held: dict[str, _Sum] = {}
    for site in sites:
        held[site.path] = _Whole() if sketch is None else _Sketch(site, sketch, Seed(seed), len(held))
    total, count = 0.0, 0
    with plain(model), _taking(model, sites, held):
        for batch in ready:
            with torch.enable_grad():
                value = _loss(model, batch, loss)
                value.backward()
            total, count = total + float(value.detach()), count + 1
    require_some(count)
    for site in sites:
        if not held[site.path].seen:
            raise SiteError(f"the loss does not reach {site.path}", hint="leave this site out, or use batches that do")
    return Gradients({path: part.mean(count) for path, part in held.items()}, count, total / count)


def _loss(model: nn.Module, batch: Any, loss: Loss | None) -> Tensor:
    value = getattr(called(model, batch), "loss", None) if loss is None else loss(model, batch)
    if value is None:
        raise AdapterError(
            "the model returns no loss, so there is no gradient",
            hint="put labels into the batches, or pass loss=lambda model, batch: ...",
        )
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise AdapterError(
            "the loss is no scalar that depends on the weights",
            got=f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
            hint="return loss.mean(), computed outside of torch.no_grad",
        )
    if not bool(torch.isfinite(value)):
        raise AdapterError("the loss is not finite", got=float(value.detach()), hint="leave that batch out")
    return value.reshape(())


class _Whole:
    """The sum itself."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    @property
    def seen(self) -> bool:
        return self.held is not None

    def add(self, part: Tensor) -> None:
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        self.held = part.clone() if self.held is None else self.held.add_(part)

    def mean(self, count: int) -> Slice:
        assert self.held is not None
        return Dense(self.held / count)


class _Sketch:
    """Two linear images of the sum, Y = G P and Z = R G: G ~ Q (R Q)^+ Z with Q a basis of Y."""

    def __init__(self, site: Site, rank: int, seed: Seed, salt: int) -> None:
        self.out, self.inp = site.out, site.inp * site.kernel
        self.widths = min(rank, self.out, self.inp), min(2 * rank + 1, self.out)
        self.seed, self.salt = seed, salt
        self.right: Tensor | None = None
        self.left: Tensor | None = None

    @property
    def seen(self) -> bool:
        return self.right is not None

    def _noise(self, like: Tensor) -> tuple[Tensor, Tensor]:
        sizes = (self.inp, self.widths[0]), (self.out, self.widths[1])
        found = [self.seed.noise(*size, like=like, salt=2 * self.salt + k) for k, size in enumerate(sizes)]
        return found[0], found[1]

    def add(self, part: Tensor) -> None:
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        right, left = self._noise(part)
        y, z = part @ right, left.mT @ part
        self.right = y if self.right is None else self.right + y
        self.left = z if self.left is None else self.left + z

    def mean(self, count: int) -> Slice:
        assert self.right is not None and self.left is not None
        basis = qr(self.right)[0]
        middle = self._noise(self.right)[1].mT @ basis
        return Product(basis, torch.linalg.lstsq(double(middle), double(self.left)).solution.to(basis) / count)


_Sum = _Whole | _Sketch


@contextmanager
def _taking(model: nn.Module, sites: list[Site], held: Mapping[str, _Sum]) -> Iterator[None]:
    """Only the sites' weights ask for gradients, and each is added up and dropped the moment it is there."""
    parameters = dict(model.named_parameters())
    flags = {p: (p.requires_grad, p.grad) for p in parameters.values()}
    mine: dict[nn.Parameter, list[Site]] = {}
    for site in sites:
        mine.setdefault(_weight(model, site), []).append(site)
    handles = []
    try:
        for parameter in flags:
            parameter.requires_grad_(parameter in mine)
            parameter.grad = None
        for parameter, owned in mine.items():
            handles.append(parameter.register_post_accumulate_grad_hook(_taker(owned, held)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (flag, grad) in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = grad


def _taker(sites: list[Site], held: Mapping[str, _Sum]) -> Callable[[Tensor], None]:
    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for site in sites:
            held[site.path].add(view(parameter.grad.detach(), site).flatten(1))
        parameter.grad = None

    return take


def _weight(model: nn.Module, site: Site) -> nn.Parameter:
    owner, name = owner_of(model, parameter_of(model, site))
    held = owner._parameters.get(name)
    if held is None or not is_plain(held):
        raise AdapterError(
            f"{site.path} has no weight that a gradient can be taken of: it is quantised, or computed from others",
            got=kind_of(held),
            hint="take the gradients on the model in half precision",
        )
    return held
