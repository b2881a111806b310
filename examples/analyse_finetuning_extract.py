"""The adapters of `analyse_finetuning.py`: five formats at shared budgets, extracted and scored.

What is scored is the tuned model with its adapted weights replaced by base + extracted delta. Everything that no
adapter holds (head, embeddings, norms, biases) is the tuned model's, so a row differs from the full fine-tuning by what
its adapter lost and by nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from analyse_finetuning_results import Row
from torch import nn

import tensoradapt as ta
from tensoradapt.errors import RankError

Scorer = Callable[[nn.Module], dict[str, float]]
Loader = Callable[[Path, str], nn.Module]


def formats(targets: Sequence[str]) -> dict[str, ta.Spec]:
    """Return the five formats on the targets: two that give every weight its own network, three that share one."""
    stacked = {"targets": tuple(targets), "start": "nonzero", "excess": "cap"}
    folds = {"out": "auto:3", "in": "auto:3"}
    return {
        "LoRA": ta.preset("lora", rank=1, targets=targets),
        "TT-LoRA": ta.preset("tt_lora", rank=1, targets=targets),
        "LoTR": ta.preset("lotr", rank=1, targets=targets),
        "CP": one_rule(format="cp", axes=("layer", "role", "out", "in"), **stacked),
        "TT-matrix": one_rule(format="ttm", axes=("site", "out", "in"), folds=folds, **stacked),
    }


def one_rule(**fields: object) -> ta.Spec:
    """Return a spec of one rule."""
    return ta.Spec(rules=(ta.Rule(rank=1, **fields),))


def needed(error: RankError) -> str:
    """Return what an error expected, or its first line."""
    lines = str(error).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if "expected:" in line), lines[0])


def budgets(base: Path, targets: Sequence[str], ranks: Sequence[int]) -> dict[int, int]:
    """Return the numbers of parameters of LoRA at some ranks, by rank: what every format may spend."""
    return {rank: ta.plan(ta.preset("lora", rank=rank, targets=targets), base).num_trainable for rank in ranks}


def compare(base: Path, tuned: Path, args: argparse.Namespace, score: Scorer, load: Loader) -> Iterator[Row]:
    """Yield a row for every format at every budget."""
    for rank, budget in budgets(base, args.targets, args.lora_ranks).items():
        for name, spec in formats(args.targets).items():
            out = args.out / "adapters" / f"{name.lower()}-{rank}"
            try:
                found = ta.extract(base, tuned, spec, out, max_parameters=budget, device=args.device, overwrite=True)
            except RankError as error:
                yield Row(name, budget, note=needed(error))
                continue
            paths = list(found.report["sites"])
            model = base_with_rest_tuned(load(base, args.device), load(tuned, args.device), paths)
            if found.path is not None:
                ta.load(found.path, model)
            yield Row(name, budget, found.num_parameters, found.relative_error, score(model))


@torch.no_grad()
def base_with_rest_tuned(base: nn.Module, tuned: nn.Module, paths: Sequence[str]) -> nn.Module:
    """Put the base's weights into the tuned model at the paths, and return it: where an adapter then goes on."""
    for path in paths:
        tuned.get_parameter(f"{path}.weight").copy_(base.get_parameter(f"{path}.weight"))
    return tuned
