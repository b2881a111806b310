"""Chains: one site's delta as a few stages, applied to activations without forming the delta.

Invariant: `chain(x)` equals `x @ chain.dense().T`, in values and gradients, whatever the recipe. A chain with a start
computes N(theta) - N(theta0) by the product rule, W x - W0 x0 = (W - W0) x0 + W (x - x0), stage by stage: it is zero
bit for bit while theta equals theta0, and loses no digits to cancellation afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tensoradapt.contraction import Contraction
from tensoradapt.recipe import Recipe, Stage

Weights = tuple[Tensor, ...]
Pair = tuple[Tensor, Tensor]  # a tensor's start, and its difference from it
Step = Callable[[Stage, Tensor, Tensor], Tensor]


def staged(stage: Stage, weight: Tensor, x: Tensor) -> Tensor:
    """One stage: y[.., p, m, s] = sum_n W[m, n] x[.., p, n, s]; integers x stand for one-hot rows.

    Shapes: (.., P n S) -> (.., P m S).
    """
    if not x.is_floating_point():
        return F.embedding(x, weight.mT)
    if stage.diagonal:
        return x * weight
    if stage.before == 1 and stage.after == 1:
        return F.linear(x, weight)
    if stage.after == 1:
        return F.linear(x.unflatten(-1, (stage.before, stage.cols)), weight).flatten(-2)
    return (weight @ x.unflatten(-1, (stage.before, stage.cols, stage.after))).flatten(-3)


@dataclass(frozen=True)
class Convolved:
    """One stage on a convolution's channels: the one that consumes the kernel has its stride and padding."""

    module: nn.Conv2d

    def __call__(self, stage: Stage, weight: Tensor, x: Tensor) -> Tensor:
        """One stage.  Shapes: (.., channels, height, width) -> (.., rows, height, width)."""
        if stage.diagonal:
            return x * weight[:, None, None]
        if stage.kernel:
            return self.module._conv_forward(x, weight.reshape(stage.rows, -1, *self.module.kernel_size), None)
        return F.conv2d(x, weight[:, :, None, None])


@dataclass(frozen=True)
class Chain:
    """A recipe with its tensors: one weight per stage, or the operands of its einsum.

    `start` holds, for a difference, the pairs (start, difference) in the weights' place.
    """

    recipe: Recipe
    weights: Weights = ()
    start: tuple[Pair, ...] | None = None

    def __call__(self, x: Tensor, step: Step = staged, dropout: float = 0.0) -> Tensor:
        """y[.., out] = sum_in delta[out, in] x[.., in]; `dropout` is that of the code, before the last stage.

        Shapes: (.., in) -> (.., out).
        """
        if self.start is not None:
            return self._permuted(self._difference(x, self.start, step))
        if self.recipe.einsum is not None:
            y = contract(self.recipe.einsum, (x.reshape(-1, *self.recipe.inputs), *self.weights))
            return y.reshape(*x.shape[:-1], -1)
        return self._permuted(step(self.recipe.stages[-1], self.weights[-1], self.code(x, step, dropout)))

    def code(self, x: Tensor, step: Step = staged, dropout: float = 0.0) -> Tensor:
        """The activation before the last stage."""
        for stage, weight in zip(self.recipe.stages[:-1], self.weights[:-1], strict=True):
            x = step(stage, weight, x)
        return F.dropout(x, dropout) if dropout else x

    def add(self, x: Tensor, y: Tensor, scale: float, dropout: float = 0.0) -> Tensor:
        """Return y + scale * chain(x), the sum fused into the last product where that is a plain matrix."""
        if not self.plain_end or self.start is not None or y.dim() < 2:
            return y + self(x, dropout=dropout) * scale
        code = self.code(x, dropout=dropout)
        return torch.addmm(y.flatten(0, -2), code.flatten(0, -2), self.weights[-1].mT, alpha=scale).view_as(y)

    @property
    def plain_end(self) -> bool:
        """Whether the last stage is a matrix that ends in (.., out)."""
        last = self.recipe.stages[-1] if self.recipe.stages else None
        return last is not None and last.before == last.after == 1 and not last.diagonal and not self.recipe.order

    def _difference(self, x: Tensor, pairs: Sequence[Pair], step: Step) -> Tensor:
        if self.recipe.einsum is not None:
            flat = x.reshape(-1, *self.recipe.inputs)
            _, change = contract_pairs(self.recipe.einsum, ((flat, None), *pairs))
            assert change is not None
            return change.reshape(*x.shape[:-1], -1)
        moved: Tensor | None = None
        for stage, (weight, change) in zip(self.recipe.stages, pairs, strict=True):
            first = step(stage, change, x)
            moved = first if moved is None else first + step(stage, weight + change, moved)
            x = step(stage, weight, x)
        assert moved is not None
        return moved

    def _permuted(self, y: Tensor) -> Tensor:
        order = self.recipe.order
        if not order:
            return y
        base = y.dim() - 1
        return y.unflatten(-1, self.recipe.sizes).permute(*range(base), *(base + k for k in order)).flatten(-len(order))

    def dense(self) -> Tensor:
        """The delta itself.  Shape: (out, in)."""
        low_rank = self.low_rank
        if low_rank is not None:
            return low_rank[0] @ low_rank[1]
        if len(self.weights) == 1 and self.plain_end:
            return self.weights[0]
        return self(self._eye()).mT

    @property
    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """The delta as B, A with B (out, r) and A (r, in), where the chain ends in a plain matrix; None elsewhere."""
        if not self.plain_end or self.start is not None or len(self.weights) < 2:
            return None
        first = self.recipe.stages[0]
        if first.before == first.after == 1 and not first.diagonal:
            code = self.weights[0]
            for stage, weight in zip(self.recipe.stages[1:-1], self.weights[1:-1], strict=True):
                code = staged(stage, weight, code.mT).mT
            return self.weights[-1], code
        return self.weights[-1], self.code(self._eye()).mT

    def _eye(self) -> Tensor:
        like = self.weights[0] if self.start is None else self.start[0][0]
        return torch.eye(math.prod(self.recipe.inputs), dtype=like.dtype, device=like.device)


def contract(contraction: Contraction, tensors: Sequence[Tensor]) -> Tensor:
    """Run the pairwise steps of a contraction."""
    left = list(tensors)
    for positions, equation in contraction.steps:
        taken = [left.pop(position) for position in positions]
        source, _, target = equation.partition("->")
        left.append(taken[0] if source == target else torch.einsum(equation, *taken))
    return left[0]


def contract_pairs(
    contraction: Contraction, pairs: Sequence[tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """The same on pairs (start, difference), by the product rule; a difference of None is zero."""
    left = list(pairs)
    for positions, equation in contraction.steps:
        taken = [left.pop(position) for position in positions]
        starts = [start for start, _ in taken]
        terms: list[Tensor] = []
        for k, (_, change) in enumerate(taken):  # what lies before k has moved, what lies after it has not
            moved = [start if d is None else start + d for start, d in taken[:k]]
            terms += [] if change is None else [torch.einsum(equation, *moved, change, *starts[k + 1 :])]
        left.append((torch.einsum(equation, *starts), sum(terms[1:], terms[0]) if terms else None))
    return left[0]
