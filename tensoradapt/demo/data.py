"""The demo's data: scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, cut into two tasks.

The model is pre-trained on the digits 0 to 4 in four orientations, and fine-tuned on 200 of the digits 5 to 9 as a
mirror shows them: other classes, other shapes and few images, so that neither a new head nor a new model is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tensoradapt.errors import TensorAdaptError

CLASSES = 5  # digits in each half
ORIENTATIONS = 4
NUM_TRAIN, NUM_VALIDATION = 200, 200


class Split(NamedTuple):
    """Inputs, images (number, 8, 8) in [-1, 1] or features (number, width), and their labels (number,)."""

    inputs: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """The two tasks. `validation` is what the learning rates were chosen on; `test` is looked at once per run."""

    pretrain: Split
    train: Split
    validation: Split
    test: Split


def load(seed: int) -> Digits:
    """The digits, split by seed.

    Raises TensorAdaptError where scikit-learn is not installed.
    """
    images, labels = _read()
    images, labels = _shuffled(images, labels, seed)
    first = labels < CLASSES
    tune = Split(images[~first].flip(2), labels[~first] - CLASSES)
    ends = (NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION)
    parts = [Split(*part) for part in zip(*(t.tensor_split(ends) for t in tune), strict=True)]
    return Digits(_turned(images[first], labels[first]), *parts)


def _read() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TensorAdaptError(
            "the demo's images come with scikit-learn, which is not installed",
            hint='pip install "tensoradapt[demo]"',
        ) from None
    digits = load_digits()
    return torch.as_tensor(digits.images, dtype=torch.float32) / 8 - 1, torch.as_tensor(digits.target).long()


def _shuffled(images: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return images[order], labels[order]


def _turned(images: Tensor, labels: Tensor) -> Split:
    """Each image in four orientations; a digit in another orientation is another class."""
    turns = range(ORIENTATIONS)
    return Split(
        torch.cat([images.rot90(turn, (1, 2)) for turn in turns]),
        torch.cat([labels + CLASSES * turn for turn in turns]),
    )
