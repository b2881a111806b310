"""Single runs of the demo: pre-training, and fine-tuning by head, in full or through an adapter."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tensoradapt.attach import attach, load
from tensoradapt.demo.afterwards import Change
from tensoradapt.demo.data import CLASSES, ORIENTATIONS, Digits, Split
from tensoradapt.demo.methods import FRESH_RATE, FULL_RATE, HEAD_RATE
from tensoradapt.demo.model import VisionTransformer, build, with_new_head
from tensoradapt.demo.train import Recipe, accuracy, train
from tensoradapt.spec import Spec

Step = Callable[[], None]


@dataclass(frozen=True)
class Score:
    """One run: how much it trained, and its accuracy on the test and on the validation images."""

    num_trainable: int
    test: float
    validation: float


@dataclass(frozen=True)
class Bench:
    """What all fine-tuning shares: the images, the pre-trained base, the number of steps, whom to tell of each."""

    digits: Digits
    base: VisionTransformer
    steps: int
    on_step: Step


def pretrain(digits: Digits, steps: int, seed: int, on_step: Step) -> VisionTransformer:
    """A fresh model trained on the first half of the digits, in all orientations."""
    model = build(CLASSES * ORIENTATIONS, seed)
    train(model, digits.pretrain, Recipe(steps, rate=2e-3, batch=64), seed=seed, on_step=on_step)
    return model


def tune_head(bench: Bench, seed: int) -> Score:
    """Train a new head alone, on the frozen base's features, which are computed once."""
    model = with_new_head(bench.base, CLASSES, seed)
    with torch.no_grad():
        known, validation, test = (Split(model.features(s.inputs), s.labels) for s in bench.digits[1:])
    train(model.head, known, Recipe(3 * bench.steps, HEAD_RATE), seed=seed, on_step=lambda: None)
    return Score(_num_trainable(model.head), accuracy(model.head, test), accuracy(model.head, validation))


def tune_all(bench: Bench, seed: int, changes: dict[int, Change]) -> Score:
    """Train every weight of the base and a new head; `changes` gets both models, by seed."""
    base = with_new_head(bench.base, CLASSES, seed)
    tuned = copy.deepcopy(base)
    changes[seed] = Change(base, tuned)
    return _tune(bench, tuned, FULL_RATE, seed)


def train_afresh(bench: Bench, seed: int) -> Score:
    """Train a model that was not pre-trained: what the base is worth."""
    return _tune(bench, build(CLASSES, seed), FRESH_RATE, seed)


def tune_adapter(bench: Bench, spec: Spec, rate: float, seed: int, path: Path | None = None) -> Score:
    """Train an adapter and a new head on the frozen base; save both where a path is given."""
    model = with_new_head(bench.base, CLASSES, seed)
    adapter = attach(model, spec, seed=seed)
    score = _tune(bench, model, rate, seed)
    if path is not None:
        adapter.save(path)
    return score


def score_file(bench: Bench, path: Path) -> float:
    """The test accuracy of a saved adapter on a fresh copy of the base; the head, zero here, is in the file too."""
    model = with_new_head(bench.base, CLASSES, seed=0)
    nn.init.zeros_(model.head.weight)
    load(path, model)
    return accuracy(model, bench.digits.test)


def _tune(bench: Bench, model: VisionTransformer, rate: float, seed: int) -> Score:
    count = _num_trainable(model)
    train(model, bench.digits.train, Recipe(bench.steps, rate), seed=seed, on_step=bench.on_step)
    return Score(count, accuracy(model, bench.digits.test), accuracy(model, bench.digits.validation))


def _num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
