"""What a site's chain has to give, by the oracle: its matrix, its output on some input, and the gradients of both."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from cases import dense, draw, pullback
from torch import nn

from tensoradapt import recipe as recipes
from tensoradapt.chain import Convolved, staged
from tensoradapt.grouping import Group
from tensoradapt.lower import Line, chain, line
from tensoradapt.placing import Placement


def tensors(factors, grad=True):
    return {node: torch.from_numpy(value.copy()).requires_grad_(grad) for node, value in factors.items()}


def assert_close(found, expected, says=""):
    found = found.detach().numpy() if isinstance(found, torch.Tensor) else found
    assert found.shape == expected.shape, says
    assert np.abs(found - expected).max() <= 1e-11 * (1 + np.abs(expected).max()), says


def gradients(result, factors):
    """Gradients of a scalar in every factor; zeros where it does not depend on one."""
    found = torch.autograd.grad(result, list(factors.values()), allow_unused=True)
    return {
        node: np.zeros(factor.shape) if grad is None else grad.numpy()
        for (node, factor), grad in zip(factors.items(), found, strict=True)
    }


def candidates(group: Group, placement: Placement, kind: str = "", transpose: bool = False) -> list[recipes.Recipe]:
    """Every lowering that exists for a site, chosen or not."""
    problem = recipes._problem(group.diagram, placement.slots, kind or placement.site.kind, transpose=transpose)
    return recipes.candidates(problem)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Truth:
    """What one site's chain has to give: its matrix, its output on some input, and the gradients of both together.

    `turned` for a tied module that uses the tensor the other way round, `difference` for a delta less its start.
    """

    def __init__(
        self, group: Group, placement: Placement, kind: str = "", *, turned: bool = False, difference: bool = False
    ) -> None:
        self.group, self.placement, self.kind = group, placement, kind or placement.site.kind
        self.factors = draw(group.diagram)
        self.begun = draw(group.diagram, 5) if difference else None
        delta = dense(group, self.factors, placement)
        delta = delta - dense(group, self.begun, placement) if self.begun is not None else delta
        self.matrix = delta.T if turned else delta
        self.step = Convolved(self._module()) if self.kind == "conv" else staged
        self.x = self._input()
        weight = torch.from_numpy(self.matrix.copy()).requires_grad_()
        y = self._apply(weight)
        self.y = y.detach().numpy()
        self.on_y, self.on_matrix = random(2, *y.shape), random(3, *weight.shape)
        cotangent = torch.autograd.grad((y * self.on_y).sum(), weight)[0] + self.on_matrix
        self.pulled = pullback(group, self.factors, placement, cotangent.T.numpy() if turned else cotangent.numpy())

    def _module(self) -> nn.Conv2d:
        out, inp, *kernel = self.placement.site.shape
        return nn.Conv2d(inp, out, kernel, stride=(2, 1), padding=(1, 2), dilation=(1, 2), dtype=torch.float64)

    def _input(self) -> torch.Tensor:
        size = self.matrix.shape[1]
        if self.kind == "conv":
            return random(1, 2, self.placement.site.inp, 7, 8)
        if self.kind == "embedding":
            return torch.randint(0, size, (2, 3), generator=torch.Generator().manual_seed(1))
        return random(1, 2, 3, size)

    def _apply(self, weight: torch.Tensor) -> torch.Tensor:
        if self.kind == "conv":
            how = {name: getattr(self.step.module, name) for name in ("stride", "padding", "dilation")}
            return F.conv2d(self.x, weight.reshape(self.placement.site.shape), **how)
        if self.kind == "embedding":
            return F.one_hot(self.x, weight.shape[1]).double() @ weight.T
        return self.x @ weight.T

    def check(self, made: Line) -> None:
        held = tensors(self.factors)
        start = None if self.begun is None else tensors(self.begun, grad=False)
        found = chain(made, held, start)
        y, matrix = found(self.x, self.step), found.dense()
        assert_close(y, self.y, made.recipe.kind)
        assert_close(matrix, self.matrix, made.recipe.kind)
        for node, grad in gradients((y * self.on_y).sum() + (matrix * self.on_matrix).sum(), held).items():
            assert_close(grad, self.pulled[node], f"{made.recipe.kind} {node}")


def line_of(group: Group, placement: Placement, candidate: recipes.Recipe) -> Line:
    """A site's line with one of its lowerings, chosen or not."""
    return replace(line(group, placement), recipe=candidate)
