"""Scaled gradient descent: every factor's gradient in the metric that the others give it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from tensoradapt.adapter import Adapter
from tensoradapt.optim.preconditioned import Preconditioned, checked_damping


class ScaledGD(Preconditioned):
    """Riemannian preconditioning for every network: each node's gradient times the inverse of its own block of J^T J.

        d_u[..b] = s^-2 sum_c g_u[..c] (K_u + delta)^-1[c,b]
        K_u[b,c] = the Gram matrix over u's bonds of all else

    LoRA: dB = s^-2 gB (A A^T + delta)^-1, dA = s^-2 (B^T B + delta)^-1 gA. Shared factors get the Gram matrix of the
    group: dU = s^-2 gU (sum_l G_l V^T V G_l^T + delta)^-1. What several nodes see of a gradient counts for each, which
    `LoRAPro` does not do. With SGD as `base` and without damping the step of the deltas does not depend on the
    gauge; elementwise moments (AdamW) make it depend on it, as in the paper.

    `damping` is relative: delta = damping * tr(J^T J) / entries of the network, one for all of its blocks. With one for
    each block, the second step after a start at zero would not shrink with the learning rate. A zero node (B = 0) gets
    its full step and the others none; in an all-zero network nothing moves.

    State: that of `base`. Clip gradients before `step`: the gradients are the factors' raw ones until then.
    Raises SpecError where groups share a bank of slices, AdapterError where no factor is trained.
    Source: arXiv:2402.02347; the group form is derived in the geometry page of the documentation.
    """

    def __init__(
        self,
        adapter: Adapter,
        base: Callable[..., Optimizer] = torch.optim.AdamW,
        params: Iterable[Any] | None = None,
        *,
        damping: float = 1e-4,
        **options: Any,
    ) -> None:
        self.damping = checked_damping(damping)
        super().__init__(adapter, base, params, **options)

    def directions(self) -> Mapping[Tensor, Tensor]:
        """Every factor's gradient in its own metric."""
        found: dict[Tensor, Tensor] = {}
        for batch in self.batches():
            metric, scale = self.metric(batch), batch.kind.scale
            found |= batch.spread(metric.directions(batch.factors, batch.grads, self.damping, scale, project=False))
        return found
