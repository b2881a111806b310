"""The parameter-efficiency frontier: full fine-tuning, LoRA and tensor formats of few parameters on three GLUE tasks.

    python tests/benchmarks/frontier.py run --data glue --workers 2 --minutes 75
    python tests/benchmarks/frontier.py plot

`run` appends one row per finished training to docs/data/frontier.csv and goes on from there when it is started again;
Ctrl-C, or a termination signal, loses only the trainings under way. A family's learning rate is the one with the best
mean score over TUNED tasks on a held-out tenth of the training split, with seed 0; its other budgets use the same. The
validation split is scored once per run, after the last step. `plot` draws the table and the figure from the CSV alone.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import transformers
from frontier_methods import HEAD_RATE, HELD_OUT, METHODS, ROWS, VALIDATION, Entry, Run, available, perform
from frontier_results import TASKS, Ledger, draw, goals, summaries, table

DOCS = Path(__file__).parents[2] / "docs"
SEEDS = (0, 1, 2)
TUNED = ("mrpc", "cola")  # RTE's held-out tenth, 249 rows near chance, would add noise to the choice of a rate
GUESS = {"mrpc": 105.0, "cola": 75.0, "rte": 50.0}  # seconds per run, until the ledger knows


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def settings_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """All that determines a run."""
    entry = run.entry
    return {
        **{"task": run.task, "method": entry.label, "rate": run.rate, "seed": run.seed, "split": run.split},
        **{"epochs": args.epochs, "train_rows": args.rows or ROWS[run.task], "judged_rows": args.rows or "all"},
        **{"max_length": args.max_length, "batch": args.batch_size, "precision": args.precision},
        **{"initialisation": entry.initialisation, "optimiser": entry.optimiser, "head_rate": HEAD_RATE},
    }


def choices(entry: Entry, entries: Sequence[Entry], args: argparse.Namespace) -> dict[float, list[Run]]:
    """The runs on the held-out tenth that choose the entry's rate: those of the first entry of its family.

    None where there is one rate alone.
    """
    first = next(each for each in entries if each.family == entry.family)
    tasks = [task for task in args.tasks if task in TUNED] or args.tasks
    if len(first.rates) == 1:
        return {first.rates[0]: []}
    return {rate: [Run(first, task, rate, SEEDS[0], HELD_OUT) for task in tasks] for rate in first.rates}


def chosen(runs: dict[float, list[Run]], ledger: Ledger, args: argparse.Namespace) -> float | None:
    """The rate with the best mean score on the held-out tenth; none while some of it is not measured."""

    def quality(rate: float) -> float:
        scores = [float(ledger.rows[key(run, args)]["value"]) for run in runs[rate]]
        return -math.inf if any(map(math.isnan, scores)) else sum(scores)

    done = all(ledger.find(settings_of(run, args)) for group in runs.values() for run in group)
    return max(runs, key=quality) if done else None


def key(run: Run, args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(map(str, settings_of(run, args).values()))


def pending(entries: Sequence[Entry], ledger: Ledger, args: argparse.Namespace) -> Iterator[Run]:
    """The runs that can be made now, the most valuable first: an entry's rates before its validation runs."""
    for entry in entries:
        runs = choices(entry, METHODS, args)
        rate = chosen(runs, ledger, args)
        ready = validations(entry, rate, args) if rate else [run for group in runs.values() for run in group]
        yield from (run for run in ready if ledger.find(settings_of(run, args)) is None)


def validations(entry: Entry, rate: float, args: argparse.Namespace) -> list[Run]:
    """An entry's runs on the validation split; none for a variant tried on the held-out tenth alone."""
    tasks = [] if entry.held_out_only or args.choose else args.tasks
    return [Run(entry, task, rate, seed, VALIDATION) for seed in args.seeds for task in tasks]


def left(entries: Sequence[Entry], ledger: Ledger, args: argparse.Namespace) -> float:
    """Seconds of training that the whole grid still needs, on one process."""
    total = 0.0
    for each in {entry.family: entry for entry in reversed(entries)}.values():
        runs = [run for group in choices(each, METHODS, args).values() for run in group]
        total += sum(cost(run.task, ledger) for run in runs if ledger.find(settings_of(run, args)) is None)
    for entry in entries:
        rate = chosen(choices(entry, METHODS, args), ledger, args) or math.nan
        runs = validations(entry, rate, args)
        total += sum(cost(run.task, ledger) for run in runs if ledger.find(settings_of(run, args)) is None)
    return total


def cost(task: str, ledger: Ledger) -> float:
    """The seconds of a run of the task: the median of the last ten."""
    seconds = [float(row["seconds"]) for row in ledger.rows.values() if row["task"] == task]
    return statistics.median(seconds[-10:]) if seconds else GUESS[task]


def start_worker(threads: int) -> None:
    """One thread per process; interruptions are the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def grid(entries: Sequence[Entry], ledger: Ledger, args: argparse.Namespace) -> None:
    """Make runs until none is left, or none would end within the time given."""
    deadline = time.monotonic() + 60 * args.minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, start_worker, (1,)) as pool:
        flying: dict[Future[dict[str, Any]], Run] = {}
        failed: set[Run] = set()
        try:
            while True:
                ready = fitting(entries, ledger, args, {*flying.values(), *failed}, deadline)
                for run in ready[: args.workers - len(flying)]:
                    flying[pool.submit(perform, run, args)] = run
                if not flying:
                    break
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    run = flying.pop(future)
                    if error := future.exception():
                        failed.add(run)
                        log(f"{run.entry.label} {run.task} rate {run.rate:g} seed {run.seed} failed: {error!r}")
                        if isinstance(error, BrokenProcessPool):
                            raise error
                    else:
                        finish(run, future.result(), entries, ledger, args)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
    done = next(pending(entries, ledger, args), None) is None
    log("all runs are done" if done else "the time is up; the same command goes on from the ledger")


def fitting(
    entries: Sequence[Entry], ledger: Ledger, args: argparse.Namespace, passed: set[Run], deadline: float
) -> list[Run]:
    """The runs to make next that are not under way and did not fail, and that would end in time."""
    rest = deadline - time.monotonic()
    waiting = dict.fromkeys(pending(entries, ledger, args))  # a family's choice stands before each of its entries
    return [run for run in waiting if run not in passed and cost(run.task, ledger) <= rest]


def finish(run: Run, found: dict[str, Any], entries: Sequence[Entry], ledger: Ledger, args: argparse.Namespace) -> None:
    """Keep a run, and say what it found and how long the grid still takes."""
    ledger.add(settings_of(run, args), found)
    rest = left(entries, ledger, args) / args.workers / 60
    log(
        f"{time.strftime('%H:%M:%S')} {run.entry.label} {run.task} rate {run.rate:g} seed {run.seed} {run.split}: "
        f"{found['metric']} {found['value']:.4f}, {found['parameters']:,} parameters, {found['seconds']:.0f} s; "
        f"{rest:.0f} min for the whole grid"
    )


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--csv", type=Path, default=DOCS / "data" / "frontier.csv")
    commands = result.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="make the runs that are not in the ledger")
    run.add_argument("--data", required=True, help="a folder with <task>/train.parquet and validation.parquet")
    run.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    run.add_argument(
        "--only", nargs="+", choices=[x.label for x in METHODS], metavar="LABEL", help="these methods, in this order"
    )
    run.add_argument("--choose", action="store_true", help="only the runs that choose the rates")
    run.add_argument("--minutes", type=float, default=math.inf, help="start no run that would end later")
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    run.add_argument("--rows", type=int, help="as many rows of every split, for a quick try")
    run.add_argument("--epochs", type=int, default=2)
    run.add_argument("--batch-size", type=int, default=16)
    run.add_argument("--max-length", type=int, default=64, help="tokens kept: 36%% of RTE, 23%% of MRPC are cut at 64")
    run.add_argument(
        "--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the forward and backward pass"
    )
    run.add_argument("--model", help="a Hugging Face id or folder; by default all-MiniLM-L6-v2")
    run.add_argument("--device", default="cpu")
    run.set_defaults(warmup=0.06, weight_decay=0.0, pad=0)
    plot = commands.add_parser("plot", help="print the table and draw the figure")
    plot.add_argument("--figure", type=Path, default=DOCS / "figures" / "frontier.svg")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ledger = Ledger(args.csv)
    if args.command == "plot":
        rows = list(ledger.rows.values())
        print(table(rows), *goals(rows), sep="\n")
        if any(each.means for each in summaries(rows)):
            draw(rows, args.figure)
        else:
            log("no method has finished all three tasks yet: nothing to draw")
        return 0
    offered = {entry.label: entry for entry in available()}
    entries = [offered[label] for label in args.only or offered if label in offered]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a run in the background is stopped by `kill`
    try:
        log(f"{len(entries)} methods, about {left(entries, ledger, args) / args.workers / 60:.0f} min of training")
        grid(entries, ledger, args)
    except KeyboardInterrupt:
        log(f"interrupted; the same command goes on from {args.csv}")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
