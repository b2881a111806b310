"""The demo as a whole: pre-train, fine-tune in every way at every budget, and write what came of it into a folder."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console

from tensoradapt.analysis.report import Report
from tensoradapt.demo.afterwards import Change, Extracted, analysed, answer, extracted, said
from tensoradapt.demo.data import CLASSES, Digits, load
from tensoradapt.demo.methods import BUDGETS, FAMILIES, Entry, entries
from tensoradapt.demo.model import VisionTransformer, build
from tensoradapt.demo.progress import Log
from tensoradapt.demo.results import Results, Row, percent
from tensoradapt.demo.runs import Bench, Score, pretrain, score_file, train_afresh, tune_adapter, tune_all, tune_head
from tensoradapt.demo.train import accuracy
from tensoradapt.errors import FileError
from tensoradapt.plots import Scored, plot_budget, plot_scores
from tensoradapt.plots.words import some
from tensoradapt.scan import budget
from tensoradapt.textfiles import write_text
from tensoradapt.version import VERSION
from tensoradapt.writing.folder import claimed

ADAPTERS, RESULTS, BUDGET, ACCURACY = "adapters", "results.json", "budget.png", "accuracy.png"
RANKS = (1, 2, 4, 8, 16, 32, 64)  # of the figure


@dataclass(frozen=True)
class Settings:
    """How much work the demo does: steps of pre-training and of each fine-tuning, seeds, budgets."""

    pretrain_steps: int = 200
    steps: int = 80
    num_seeds: int = 2
    budgets: tuple[int, ...] = BUDGETS


def run_demo(out: Path, *, seed: int = 0, console: Console | None = None, settings: Settings = Settings()) -> Results:
    """Train adapters of four families beside full fine-tuning, and write results, figure and adapters into `out`.

    Progress goes to `console` (stderr where none is given); the table is `results.table()`. Raises TensorAdaptError
    where scikit-learn is missing, FileError where the folder cannot be made.
    """
    digits = load(seed)
    _make_folder(out)
    with claimed(out):
        return _run(digits, out, seed, console, settings)


def _run(digits: Digits, out: Path, seed: int, console: Console | None, settings: Settings) -> Results:
    start = time.perf_counter()
    model = build(CLASSES, seed)
    planned = entries(model, settings.budgets)
    draw_budget(model, out / BUDGET, max(settings.budgets, default=None))
    runs = 2 + sum(entry.spec is not None for entry in planned)
    total = settings.pretrain_steps + settings.steps * settings.num_seeds * runs
    with _one_thread(), Log(console or Console(stderr=True), total) as log:
        log.begin("pre-training")
        base = pretrain(digits, settings.pretrain_steps, seed, log.step)
        facts = {"num_parameters": _size(base), "pretrain_accuracy": accuracy(base, digits.pretrain)}
        log.line(
            f"pre-trained: {facts['num_parameters']:,} parameters, {percent([facts['pretrain_accuracy']])} % right"
        )
        bench = Bench(digits, base, settings.steps, log.step)
        seeds = tuple(range(seed, seed + settings.num_seeds))
        changes: dict[int, Change] = {}
        rows = _rows(bench, planned, seeds, out, log, changes)
        report = _analysis(changes[seed], out, log)
        rows += _afterwards(bench, changes[seed], report, max(settings.budgets, default=None), out, log)
        results = Results(rows, seeds, facts, _versions(), time.perf_counter() - start, out, answer(report))
        draw_accuracy(results, out / ACCURACY)
        _write(results, out / RESULTS)
        files = f"{ACCURACY}, {BUDGET}, {RESULTS} and report.html"
        log.line(f"{len(rows)} rows in {results.seconds:.0f} s; adapters, {files} are in {out}")
    return results


def draw_budget(model: VisionTransformer, path: Path, limit: int | None) -> None:
    """The figure of parameters against rank, a line per family, with the largest budget as a limit."""
    table = budget({family.label: family.spec for family in FAMILIES}, model, RANKS)
    plot_budget(table, path, max_parameters=limit, rank=8)


def draw_accuracy(results: Results, path: Path) -> None:
    """The figure of accuracy against trained parameters, the head's with them: a line per family, in per cent."""
    families = [row for row in results.rows if row.num_adapter and row.num_trainable]
    levels = [row for row in results.rows if row.method in ("head alone", "full fine-tuning")]
    seeds = some(len(results.seeds), "seed")
    if families:
        plot_scores(
            [Scored(row.method, row.num_trainable or 0, [100 * share for share in row.accuracy]) for row in families],
            path,
            levels={f"{row.method} ({row.num_trainable:,})": [100 * mean(row.accuracy)] for row in levels},
            names=("trained parameters, the new head's with them", f"test accuracy, %, mean and range of {seeds}"),
        )


def _rows(
    bench: Bench, planned: list[Entry], seeds: tuple[int, ...], out: Path, log: Log, changes: dict[int, Change]
) -> tuple[Row, ...]:
    head = _over_seeds("head alone", lambda seed: tune_head(bench, seed), seeds, log)
    adapted = [_adapter_row(bench, entry, seeds, out, log) for entry in planned]
    full = _over_seeds("full fine-tuning", lambda seed: tune_all(bench, seed, changes), seeds, log)
    fresh = _over_seeds("not pre-trained", lambda seed: train_afresh(bench, seed), seeds, log)
    return (head, *adapted, full, fresh)


def _analysis(change: Change, out: Path, log: Log) -> Report:
    """The report of the full fine-tuning, written and, in short, said."""
    log.begin("analysis")
    report = analysed(change, out)
    for line in said(answer(report)):
        log.line(line)
    return report


def _afterwards(
    bench: Bench, change: Change, report: Report, budget: int | None, out: Path, log: Log
) -> tuple[Row, ...]:
    """What the full fine-tuning is worth without its projections, and with the adapters that are extracted of them."""
    if budget is None:
        return ()
    log.begin("extraction")
    bare = accuracy(change.bare(list(report.sites)), bench.digits.test)
    rows = [Row("full, projections undone", num_adapter=0, accuracy=(bare,), relative_error=1.0)]
    rows += [_extracted_row(bench, found, out) for found in extracted(change, report, budget, out / ADAPTERS)]
    for row in rows:
        log.line(f"{row.method}: {row.num_adapter:,} parameters, {percent(row.accuracy)} % right")
    return tuple(rows)


def _extracted_row(bench: Bench, found: Extracted, out: Path) -> Row:
    """The scores of an extracted adapter, which was loaded from its file."""
    test, validation = (accuracy(found.model, split) for split in (bench.digits.test, bench.digits.validation))
    return Row(
        found.label,
        found.budget,
        num_adapter=found.num_parameters,
        accuracy=(test,),
        validation_accuracy=(validation,),
        relative_error=found.relative_error,
        from_file=test,
        path=str(found.path.relative_to(out)),
    )


def _over_seeds(method: str, tune: Callable[[int], Score], seeds: tuple[int, ...], log: Log, **fields: Any) -> Row:
    name = f"{method} within {fields['budget']:,}" if "budget" in fields else method
    log.begin(name)
    scores = [tune(seed) for seed in seeds]
    test, validation = tuple(s.test for s in scores), tuple(s.validation for s in scores)
    log.line(f"{name}: {scores[0].num_trainable:,} trained, {percent(test)} % right")
    return Row(method, num_trainable=scores[0].num_trainable, accuracy=test, validation_accuracy=validation, **fields)


def _adapter_row(bench: Bench, entry: Entry, seeds: tuple[int, ...], out: Path, log: Log) -> Row:
    """A family at a budget: every seed trained, the first one's adapter saved and tried from its file."""
    family, spec = entry.family, entry.spec
    if spec is None:
        return Row(family.label, entry.budget, note=f"rank 1 takes {entry.smallest:,}")
    path = out / ADAPTERS / entry.slug

    def tune(seed: int) -> Score:
        return tune_adapter(bench, spec, family.rate, seed, path if seed == seeds[0] else None)

    fields = {"budget": entry.budget, "rank": entry.rank, "num_adapter": spec.num_trainable}
    row = _over_seeds(family.label, tune, seeds, log, **fields, path=str(path.relative_to(out)))
    return replace(row, from_file=score_file(bench, path))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: a second brings nothing to matrices this small, and sums stay the same on all machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _make_folder(out: Path) -> None:
    """Make the folder before the work begins rather than fail after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"{out} cannot be made a folder", got=error.strerror, hint="choose another with --out"
        ) from None


def _write(results: Results, path: Path) -> None:
    write_text(path, json.dumps(results.to_dict(), indent=2) + "\n")


def _versions() -> dict[str, str]:
    packages = {"torch": torch.__version__, "scikit-learn": version("scikit-learn")}
    return {"python": platform.python_version(), "tensoradapt": VERSION, **packages}


def _size(model: VisionTransformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
