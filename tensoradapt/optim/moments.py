"""Moments of directions: those in the factors' space, and the dense ones of LoRA-Pro's paper.

What is kept is handed in and out as one mapping per group, node -> name -> tensor: an optimiser's state as it is saved.
Invariant: bias corrections are those of step 1 at the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tensoradapt.diagram import Diagram
from tensoradapt.gauge.spectra import overlap
from tensoradapt.gauge.tree import Factors


@dataclass(frozen=True)
class Betas:
    """Decays of first and second moments, and what is added to the root of the second."""

    first: float
    second: float
    eps: float

    def factor(self, second: Any, step: int) -> Any:
        """What the first moment is multiplied with, both corrected for their start at zero: 1 / (sqrt(vhat) + eps)."""
        return 1 / ((1 - self.first**step) * ((second / (1 - self.second**step)) ** 0.5 + self.eps))


def energy(diagram: Diagram, grads: Factors, directions: Factors) -> Any:
    """<J^T g, d> over the entries of the tensor, for every value of the batch: the mean square of the projected g.

    Shape: the sizes of `diagram.batch`; a plain number on a CPU where there are none, which is cheaper.
    """
    batch = diagram.batch
    entries = math.prod([diagram.sizes[axis] for axis in diagram.open if axis not in batch])
    if not batch:
        parts = (torch.dot(grads[node].ravel(), d.ravel()) for node, d in directions.items())
        if next(iter(directions.values())).device.type == "cpu":
            return max(sum([part.item() for part in parts]), 0.0) / entries
        return torch.stack(list(parts)).sum().clamp(min=0) / entries
    found = []
    for node, direction in directions.items():
        indices = diagram.nodes[node]
        order = [indices.index(i) for i in (*batch, *(i for i in indices if i not in batch))]
        found.append((grads[node] * direction).permute(order).flatten(len(batch)).sum(-1))
    return torch.stack(found).sum(0).clamp(min=0) / entries


def spread(diagram: Diagram, node: str, values: Any) -> Any:
    """Values for each value of the batch, to be multiplied with a node's tensor."""
    indices, batch = diagram.nodes[node], diagram.batch
    if not batch:
        return values
    ordered = values.permute([batch.index(i) for i in indices if i in batch])
    return ordered.reshape([diagram.sizes[i] if i in batch else 1 for i in indices])


def transported(diagram: Diagram, old: Factors, directions: Factors, new: Factors) -> dict[str, Tensor]:
    """J(new)^T J(old) d: what the change that a direction meant is to the new factors, without the change itself.

    In the factors' space: the gradient of sum_u <T(new), T(old with d_u in u's place)>.  Shapes: the factors'.
    """
    with torch.enable_grad():
        held = {node: new[node].detach().requires_grad_(node in directions) for node in diagram.nodes}
        terms = [overlap(diagram, held, {**old, node: move}) for node, move in directions.items()]
        found = torch.autograd.grad(sum(terms[1:], terms[0]), [held[node] for node in directions])
    return dict(zip(directions, found, strict=True))
