"""The learning rate of presets for convolutions, on scikit-learn's digits.

A network of three convolutions of 64 channels learns 897 upright digits; the adapter and a new head then learn the same
ones turned by a quarter with black and white exchanged, eight epochs in batches of 16, AdamW, the head at 5e-3. The
score is the accuracy on the 900 others, the mean of three seeds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from frontier_methods import versions
from sklearn.datasets import load_digits
from torch import Tensor, nn

import tensoradapt as ta

SEEDS, TRAINED, EPOCHS, BATCH, WIDTH = 3, 897, (15, 8), 16, 64
BASE, HEAD = 1e-3, 5e-3  # learning rates


def measure(name: str, rate: float) -> dict[str, Any]:
    """A preset's row at a rate."""
    begun = time.perf_counter()
    runs = [adapted(name, rate, seed) for seed in range(SEEDS)]
    return {
        "parameters": runs[0][0],
        "score": f"{statistics.fmean(score for _, score in runs):.4f}",
        "seconds": f"{time.perf_counter() - begun:.1f}",
        "versions": versions(),
    }


def adapted(name: str, rate: float, seed: int) -> tuple[int, float]:
    """The adapter's parameters and the score, of one seed."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    model = network()
    train(model, images, labels, EPOCHS[0], [{"params": model.parameters(), "lr": BASE}])
    turned = 1 - images.rot90(dims=(2, 3))
    adapter = ta.attach(model, ta.preset(name))
    model[-1] = nn.Linear(WIDTH, 10)
    groups = [{"params": adapter.parameters(), "lr": rate}, {"params": model[-1].parameters(), "lr": HEAD}]
    train(model, turned, labels, EPOCHS[1], groups)
    with torch.no_grad():
        right = model.eval()(turned[TRAINED:]).argmax(1) == labels[TRAINED:]
    return adapter.plan.num_trainable, right.float().mean().item()


def network() -> nn.Sequential:
    sizes = (1, WIDTH, WIDTH, WIDTH)
    layers = [
        part
        for into, out in zip(sizes, sizes[1:], strict=False)
        for part in (nn.Conv2d(into, out, 3, padding=1), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, groups: Iterable[dict[str, Any]]) -> None:
    """AdamW on the first images."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(epochs):
        for rows in torch.randperm(TRAINED).split(BATCH):
            nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
