"""Training and scoring for the demo: AdamW with warm-up and cosine decay, on whatever the model leaves trainable."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensoradapt.demo.data import Split


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, and on how many images at a time."""

    steps: int
    rate: float
    batch: int = 25


def train(model: nn.Module, split: Split, recipe: Recipe, *, seed: int, on_step: Callable[[], None]) -> None:
    """Minimise the cross-entropy over the parameters that require gradients, in an order that the seed fixes."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, recipe.steps))
    model.train()
    for batch in _batches(len(split.labels), recipe, seed):
        loss = nn.functional.cross_entropy(model(split.inputs[batch]), split.labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        on_step()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """The share of a split that the model labels rightly."""
    model.eval()
    return (model(split.inputs).argmax(dim=-1) == split.labels).float().mean().item()


def _rate(step: int, steps: int) -> float:
    """The learning rate's factor: a linear rise over the first tenth, then half a cosine down to zero."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _batches(count: int, recipe: Recipe, seed: int) -> Iterator[Tensor]:
    """Positions of whole batches, one shuffled pass over the images after another."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(recipe.steps):
        while len(queue) < recipe.batch:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        batch, queue = queue[: recipe.batch], queue[recipe.batch :]
        yield batch
