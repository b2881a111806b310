"""The methods of the frontier as a table, and one run of one of them: build, attach, initialise, train, score."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import io
import math
import platform
import re
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import tensoradapt as ta
from tensoradapt import optim
from tensoradapt.errors import FileError

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import finetune_text as example
from finetune_text_data import TASKS, Row, batches, collate, hold_out, read_rows
from finetune_text_methods import HEAD, Method, apply, head_of, num_trainable

QV = ["query", "value"]
ALL = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LORA_ALL = 331_776  # the parameters of LoRA r=8 on all roles
ROWS = {"mrpc": 3300, "cola": 7690, "rte": 1600}  # training rows: the first after a fixed shuffle
HELD_OUT, VALIDATION = "held-out", "validation"
HEAD_RATE = 1e-3  # of pooler and classifier, one for all methods, so that the rate chosen is the adapter's alone
GRADIENT_BATCHES = 8


@dataclass(frozen=True)
class Entry:
    """One row: what is attached, how it starts, what trains it.  Entries of one family share the first one's rate."""

    label: str
    family: str
    preset: str  # nothing: `options` are a rule of their own
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    rates: tuple[float, ...] = ()
    budget: int | None = None
    start: str = ""  # the name of an initialisation of ta.initialize, or nothing: the preset's own laws
    optimiser: str = "AdamW"
    held_out_only: bool = False  # a variant that lost on the held-out tenth, or is another row's, has no scores

    @property
    def initialisation(self) -> str:
        laws = ",".join(f"{key}={value}" for key, value in self.options.get("init", {}).items())
        return self.start or laws or "default"


def lora(rank: int, targets: list[str]) -> dict[str, Any]:
    return {"rank": rank, "alpha": 16, "targets": targets}


ORTHO = {"targets": ALL, "scale": 4.0, "init": {"factor_out": "orthogonal", "factor_in": "orthogonal"}}
OURS = {"targets": ALL}
BY_ROLE = {"targets": ALL, "init": ORTHO["init"]}  # the preset's own laws, by name
IN_SLOTS = {  # the same with feed-forward weights as four square slots, of which each has a core and all share factors
    **{"format": "tucker", "axes": ["layer", "slot", "out", "in"], "compress": ["out", "in"], "rank": 1},
    **{"shapes": "slots", "slot": [384, 384], "scale": "alpha", "alpha": 4.0, "targets": ALL},
    "init": {"core": "zero", **ORTHO["init"]},
}
FIFTH, TENTH, THIRTIETH = LORA_ALL // 5, LORA_ALL // 10, LORA_ALL // 30
FIFTH_OF_QV = 73_728 // 5  # of LoRA r=8 on query and value
USUAL = (2e-4, 5e-4, 1.5e-3)  # of LoRA on all roles; on two, more
SMALL, MIDDLE, LARGE = (4e-4, 1.2e-3, 2.4e-3, 4.8e-3), (2e-3, 6e-3), (4e-3, 1e-2, 3e-2)
PLAIN = (1.5e-4, 4e-4, 1.2e-3)  # of cores between factors of entries about 1
SPHERE = (6e-4, 2e-3, 6e-3)  # of cores between orthonormal factors
ROLES = (1e-3, 2e-3)  # the same for one role, whose cores are fewer
ROLES_LARGE, ROLES_SMALL = (1e-3, 1.4e-3, 2e-3), (2e-3, 3e-3, 4e-3)  # at other ranks
DELTA = (2e-5, 6e-5)  # of LoRAPro: the root mean square by which the entries of a delta move, as in full

# In the order in which they run: a grid that is stopped early has measured the rows that the goal is about.
METHODS = (
    Entry("LoRA r=8 all", "lora all", "peft-lora", lora(8, ALL), USUAL),
    Entry("LoRA r=8 qv", "lora qv", "peft-lora", lora(8, QV), (5e-4, 1.5e-3, 3e-3)),
    Entry("LoTR 1/10 orthonormal", "lotr orthonormal", "lotr", ORTHO, SPHERE, TENTH),
    Entry("LoTR 1/10 by role", "lotr by role", "lotr_by_role", BY_ROLE, ROLES, TENTH),
    Entry("LoTR 1/30 by role", "lotr by role", "lotr_by_role", BY_ROLE, ROLES, THIRTIETH),
    Entry("MetaTT 1/10", "metatt", "metatt_4d", OURS, SMALL, TENTH),
    Entry("LoRTA 1/10", "lorta", "lorta", OURS, LARGE, TENTH),
    Entry("TT-LoRA 1/10", "tt_lora", "tt_lora", OURS, MIDDLE, TENTH),
    Entry("LoRA r=1 all", "lora all r=1", "peft-lora", lora(1, ALL), USUAL),
    Entry("full", "full", "full", {}, (5e-5, 1e-4, 2e-4)),
    Entry("LoTR 1/10", "lotr", "lotr", OURS, PLAIN, TENTH),
    Entry("LoTR 1/5 by role", "lotr by role", "lotr_by_role", BY_ROLE, ROLES, FIFTH),
    Entry(  # which chose the rate of the tenth: its runs are those of the row before
        "LoTR 1/5 by role own rate",
        "lotr by role large",
        "lotr_by_role",
        BY_ROLE,
        ROLES_LARGE,
        FIFTH,
        held_out_only=True,
    ),
    Entry("LoTR 1/5 of qv by role", "lotr by role", "lotr_by_role", BY_ROLE, ROLES, FIFTH_OF_QV),
    Entry("LoTR 1/5 of qv by role own rate", "lotr by role small", "lotr_by_role", BY_ROLE, ROLES_SMALL, FIFTH_OF_QV),
    Entry("LoTR 1/5 of qv by role in slots", "lotr slots small", "", IN_SLOTS, ROLES_SMALL, FIFTH_OF_QV),
    Entry("LoTR 1/10 by role in slots", "lotr slots", "", IN_SLOTS, ROLES_SMALL[:2], TENTH),
    Entry(
        "LoTR 1/10 LoRAPro by role",
        "lotr pro",
        "lotr_by_role",
        BY_ROLE,
        DELTA,
        TENTH,
        optimiser="LoRAPro",
        held_out_only=True,
    ),
    Entry("LoTR 1/30", "lotr", "lotr", OURS, PLAIN, THIRTIETH),
    Entry("LoTR 1/5", "lotr", "lotr", OURS, PLAIN, FIFTH),
    Entry("MetaTT 1/30", "metatt", "metatt_4d", OURS, SMALL, THIRTIETH),
    Entry("MetaTT 1/5", "metatt", "metatt_4d", OURS, SMALL, FIFTH),
    Entry("LoRTA 1/30", "lorta", "lorta", OURS, LARGE, THIRTIETH),
    Entry("LoRTA 1/5", "lorta", "lorta", OURS, LARGE, FIFTH),
    Entry("TT-LoRA 1/30", "tt_lora", "tt_lora", OURS, MIDDLE, THIRTIETH),
    Entry("TT-LoRA 1/5", "tt_lora", "tt_lora", OURS, MIDDLE, FIFTH),
    Entry("LoRA r=1 qv", "lora qv r=1", "peft-lora", lora(1, QV), (5e-4, 1.5e-3)),
    Entry("LoTR 1/10 gradient", "lotr gradient", "lotr", OURS, PLAIN, TENTH, "lora_ga", held_out_only=True),
    Entry(
        "LoTR 1/10 Stiefel by role",
        "lotr stiefel",
        "lotr_by_role",
        BY_ROLE,
        SPHERE[1:],
        TENTH,
        optimiser="Stiefel",
        held_out_only=True,
    ),
    Entry(
        "TT-LoRA 1/10 orthogonal",
        "tt_lora orthogonal",
        "tt_lora",
        OURS,
        MIDDLE,
        TENTH,
        "orthogonal",
        held_out_only=True,
    ),
    Entry(
        "MetaTT 1/10 LoRAPro", "metatt pro", "metatt_4d", OURS, DELTA, TENTH, optimiser="LoRAPro", held_out_only=True
    ),
    Entry("LoRTA 1/10 LoRAPro", "lorta pro", "lorta", OURS, DELTA, TENTH, optimiser="LoRAPro", held_out_only=True),
    Entry(
        "TT-LoRA 1/10 LoRAPro", "tt_lora pro", "tt_lora", OURS, DELTA, TENTH, optimiser="LoRAPro", held_out_only=True
    ),
)


@dataclass(frozen=True)
class Run:
    """One training: an entry on a task at a rate with a seed, scored on a split."""

    entry: Entry
    task: str
    rate: float
    seed: int
    split: str


def available(entries: tuple[Entry, ...] = METHODS) -> list[Entry]:
    """The entries whose optimiser exists."""
    return [
        entry for entry in entries if hasattr(torch.optim if entry.optimiser == "AdamW" else optim, entry.optimiser)
    ]


def attach(entry: Entry, model: nn.Module, seed: int) -> tuple[nn.Module, Any]:
    """The model made ready to train, and our adapter where it is one: of the largest rank within the budget."""
    if entry.budget is None:
        return apply(model, Method(entry.preset, entry.options, ()), seed)
    options = {"train": head_of(model), **entry.options}
    spec = ta.preset(entry.preset, **options) if entry.preset else ta.Spec.from_dict({"rules": [options]})
    return model, ta.attach(model, ta.solve_rank(spec, model, max_parameters=entry.budget), seed=seed)


def begin(entry: Entry, model: nn.Module, adapter: Any, rows: list[Row], args: argparse.Namespace, seed: int) -> None:
    """Give the adapter the entry's initialisation, from gradients over a few training batches where it needs them."""
    if not entry.start:
        return
    needs = ta.start.METHODS[entry.start].needs
    order = torch.Generator().manual_seed(seed)
    inputs = [collate(batch, args.pad, args.device) for batch in batches(rows[: GRADIENT_BATCHES * 16], 16, order)]
    data = {needs: getattr(ta, needs)(model, adapter, inputs)} if needs else {}
    ta.initialize(adapter, entry.start, seed=seed, **data)


def optimiser_of(entry: Entry, model: nn.Module, adapter: Any, rate: float) -> torch.optim.Optimizer:
    """The entry's optimiser: factors, or all weights in full fine-tuning, at the rate; the head at its own."""
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    names = {name for name, _ in trained if {*re.split("[./]", name)} & {*HEAD}}  # an adapter's copies have slashes
    head = [value for name, value in trained if name in names]
    rest = [value for name, value in trained if name not in names]
    of_rest = {"params": rest, "lr": rate, "weight_decay": 0.0}
    of_head = torch.optim.AdamW(head, lr=HEAD_RATE, weight_decay=0.0)
    if entry.optimiser == "AdamW":
        return Both(torch.optim.AdamW([of_rest]), of_head)
    return Both(getattr(optim, entry.optimiser)(adapter, params=[of_rest], lr=rate), of_head)


class Both(torch.optim.Optimizer):
    """Two optimisers as one for a schedule, so that the head is trained by AdamW whatever trains the factors."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.defaults = parts[0].defaults

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)


@functools.lru_cache(maxsize=8)
def splits(data: str, task: str, max_length: int, name: str | None) -> dict[str, list[Row]]:
    """The training rows by nine tenths and a held-out tenth, always the same, and the validation rows."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(example.find_model(name))
    kept, tenth = hold_out(read_rows(data, task, "train", tokenizer, max_length))
    return {"train": kept, HELD_OUT: tenth, VALIDATION: read_rows(data, task, "validation", tokenizer, max_length)}


def rows_of(run: Run, args: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and those to score on. A rate's choice sees the training split alone."""
    parts = splits(args.data, run.task, args.max_length, args.model)
    count = args.rows or ROWS[run.task]
    rows = parts["train"] if run.split == HELD_OUT else parts["train"] + parts[HELD_OUT]
    if len(rows) < count:
        raise FileError(f"{run.task} has too few training rows", got=len(rows), expected=f"{count} at least")
    return rows[:count], parts[run.split][: args.rows]


def perform(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and score one run; what was found, beside what the run's key holds."""
    start, cpu = time.perf_counter(), time.process_time()
    rows, judge = rows_of(run, args)
    model = example.build(args, run.seed)
    head = sum(num_trainable(model.get_submodule(path)) for path in head_of(model))
    model, adapter = attach(run.entry, model, run.seed)
    parameters = num_trainable(model) - head
    if args.precision != "float32":
        model.forward = torch.autocast(torch.device(args.device).type, getattr(torch, args.precision))(model.forward)
    args = argparse.Namespace(**vars(args), task=run.task)
    begin(run.entry, model, adapter, rows, args, run.seed)
    optimiser = optimiser_of(run.entry, model, adapter, run.rate)
    with contextlib.redirect_stderr(io.StringIO()):  # the steps of two runs at a time say nothing to a reader
        loss = example.train(model, rows, args, run.rate, run.seed, optimiser)
    metric = TASKS[run.task].metrics[0]
    value = example.evaluate(model, judge, args)[metric] if math.isfinite(loss) else math.nan
    seconds, cpu = round(time.perf_counter() - start, 1), round(time.process_time() - cpu, 1)
    spent = {"seconds": seconds, "cpu_seconds": cpu}
    return {"parameters": parameters, "metric": metric, "value": value, **spent, "versions": versions()}


def versions() -> str:
    """What the figures depend on beside the settings."""
    names = ("tensoradapt", "torch", "transformers", "peft")
    return "; ".join([f"{name} {importlib.metadata.version(name)}" for name in names] + [platform.machine()])
