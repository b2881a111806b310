"""What optimisers of factors have in common: the adapter's groups at every step, whatever was done to it between."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.change.install import parameters_of
from tensoradapt.diagram import Diagram
from tensoradapt.errors import SpecError
from tensoradapt.gauge.environment import Blocks
from tensoradapt.gauge.metric import Metric
from tensoradapt.grouping import Group
from tensoradapt.optim.batches import Batch, Nodes, Sorter, factors_of
from tensoradapt.optim.wrapper import Wrapper


class Preconditioned(Wrapper):
    """A wrapper that knows the groups of its adapter."""

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(adapter, base, params, **options)
        self._known = (adapter.plan, Sorter(factors_of(adapter)))
        self._metrics: dict[tuple[Diagram, tuple[str, ...]], Metric | Blocks] = {}

    @property
    def groups(self) -> Sequence[tuple[Group, Nodes]]:
        """Every group with the parameters of its nodes, anew where the adapter was resized."""
        return self._sorter.groups

    @property
    def _sorter(self) -> Sorter:
        if self._known[0] is not self.adapter.plan:
            self._known = (self.adapter.plan, Sorter(factors_of(self.adapter)))
            self._metrics.clear()
        return self._known[1]

    def batches(self, tag: Callable[[Nodes, Sequence[str]], Any] | None = None) -> list[Batch]:
        """The groups that have gradients of parameters that are trained, equal ones of one tag together."""
        return self._sorter.batches(parameters_of(self.base), self.adapter.scale, tag)

    def metric(self, batch: Batch) -> Metric | Blocks:
        """The metric of a batch's factors: by Gram matrices of bonds for trees, by whole blocks for others."""
        key = batch.diagram, batch.kind.moving
        found = self._metrics.get(key)
        if found is None:
            found = self._metrics[key] = Metric(*key) if batch.diagram.is_tree else Blocks(*key)
        return found


def checked_damping(damping: float) -> float:
    """A relative damping. Raises SpecError where it is negative or not finite."""
    if type(damping) not in (int, float) or not 0 <= damping < float("inf"):
        raise SpecError("a relative damping is a number from 0 on", got=repr(damping), hint="write damping=1e-4")
    return float(damping)
