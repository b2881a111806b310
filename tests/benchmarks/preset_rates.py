"""The learning rate of every preset: its defaults on query and value of all-MiniLM-L6-v2, trained on SST-2.

    python tests/benchmarks/preset_rates.py run --data glue
    python tests/benchmarks/preset_rates.py table

`run` trains 2,000 sentences once, at three rates or four, and scores 2,000 held-out ones of the training split, seed 0,
AdamW, the head at a rate of its own. It appends a row per run to docs/data/preset-rates.csv and goes on from there.
`table` prints, by preset, the score at every rate; the rate that a preset suggests is the lowest of those that are
within a standard error of the best.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path
from typing import Any

import preset_rates_digits
import torch
import transformers
from frontier_methods import HELD_OUT, QV, Entry, Run, perform

import tensoradapt as ta

CSV = Path(__file__).parents[2] / "docs" / "data" / "preset-rates.csv"
RATES = (5e-4, 2e-3, 8e-3)
HIGHER = 3e-2  # for presets that are best at the highest of these
CLOSE = 0.011  # scores this close are the same: a standard error of 2,000 sentences is 0.9 points
COLUMNS = ("preset", "rate", "parameters", "score", "seconds", "versions")
# What a preset cannot do without, or what it is for, where query and value alone are not it.
OPTIONS: dict[str, dict[str, Any]] = {}
CONVOLUTIONS = ("locon",)  # measured on images


def options_of(name: str) -> dict[str, Any]:
    return {"targets": QV, **OPTIONS.get(name, {})}


def read() -> list[dict[str, str]]:
    if not CSV.exists():
        return []
    with CSV.open(newline="") as file:
        return list(csv.DictReader(file))


def add(row: dict[str, Any]) -> None:
    new = not CSV.exists()
    with CSV.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def measure(name: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    if name in CONVOLUTIONS:
        return {"preset": name, "rate": rate, **preset_rates_digits.measure(name, rate)}
    entry = Entry(name, name, name, options_of(name), (rate,))
    made = perform(Run(entry, "sst2", rate, 0, HELD_OUT), args)
    found = {key: made[key] for key in ("parameters", "seconds", "versions")}
    return {"preset": name, "rate": rate, "score": f"{made['value']:.4f}", **found}


def run(args: argparse.Namespace) -> None:
    """Make the runs that the file lacks."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in args.only or ta.PRESETS:
        for rate in RATES:
            find(name, rate, args)
        if max(RATES, key=lambda rate: find(name, rate, args)) == max(RATES):
            find(name, HIGHER, args)


def find(name: str, rate: float, args: argparse.Namespace) -> float:
    """A run's score, from the file or by running it."""
    found = next((row for row in read() if (row["preset"], float(row["rate"])) == (name, rate)), None)
    if found is None:
        found = measure(name, rate, args)
        add(found)
        print(f"{name} {rate:g}: {found['score']}, {found['seconds']} s", file=sys.stderr, flush=True)
    return float(found["score"])


def suggested(scores: dict[float, float]) -> float:
    """The best rate; the lowest of those that are as good."""
    best = max(scores.values())
    return min(rate for rate, score in scores.items() if score >= best - CLOSE)


def table() -> str:
    """By preset: parameters, the score at every rate in percent, and the rate to suggest."""
    rows = read()
    lines = ["| preset | parameters | " + " | ".join(f"{rate:g}" for rate in (*RATES, HIGHER)) + " | suggested |"]
    lines += ["| --- | --: | " + " | ".join("--:" for _ in RATES) + " | --: |"]
    for name in dict.fromkeys(row["preset"] for row in rows):
        mine = {float(row["rate"]): float(row["score"]) for row in rows if row["preset"] == name}
        count = next(row["parameters"] for row in rows if row["preset"] == name)
        cells = [f"{100 * mine[rate]:.1f}" if rate in mine else "" for rate in (*RATES, HIGHER)]
        lines.append(f"| `{name}` | {int(count):,} | {' | '.join(cells)} | {suggested(mine):g} |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="make the runs that the file lacks")
    command.add_argument("--data", required=True, help="a folder with sst2/train.parquet and validation.parquet")
    command.add_argument("--only", nargs="+", choices=list(ta.PRESETS), metavar="PRESET")
    command.add_argument("--rows", type=int, default=2000)
    command.set_defaults(model=None, device="cpu", max_length=64, batch_size=16, epochs=1, precision="bfloat16")
    command.set_defaults(warmup=0.06, weight_decay=0.0, pad=0)
    commands.add_parser("table", help="print the table")
    return result


if __name__ == "__main__":
    arguments = parser().parse_args()
    print(table()) if arguments.command == "table" else run(arguments)
