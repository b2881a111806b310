"""The results of `finetune_text.py`: a ledger of finished runs that a later call goes on from, and a table of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]


def log(text: str) -> None:
    """Print progress; stdout is kept for the table."""
    print(text, file=sys.stderr, flush=True)


class Ledger:
    """The finished runs, one JSON object per line, found again by their settings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], start=1):
            try:
                record = json.loads(line)
                self.records[json.dumps(record["settings"], sort_keys=True)] = record
            except (json.JSONDecodeError, KeyError, TypeError):
                log(f"{path}:{number} is not a finished run and is passed over")

    def find(self, settings: Record, work: Callable[[], Record]) -> Record:
        """Return the record of these settings; do the work and append its record if there is none."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.records:
            record = {"settings": settings, **work()}
            torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
            with self.path.open("a") as file:
                file.write("\n" * torn + json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.records[key] = record
        return self.records[key]


def environment(device: str) -> Record:
    """Return what the figures depend on beside the settings."""
    names = ("tensoradapt", "torch", "transformers", "peft")
    installed = {each.name: each.version for each in importlib.metadata.distributions()}
    versions = {name: installed.get(name) for name in names}
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"python": platform.python_version(), **versions, "hardware": hardware, "threads": torch.get_num_threads()}


def table(metrics: Sequence[str], results: Sequence[Sequence[Record]]) -> str:
    """Return a Markdown table: one row per method, the first metric seed by seed, then means and deviations."""
    names = ["method", "adapter", "head", "lr", f"{metrics[0]} per seed", *metrics, "minutes"]
    lines = [names, ["---"] + ["--:"] * (len(names) - 1), *(table_row(metrics, records) for records in results)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def table_row(metrics: Sequence[str], records: Sequence[Record]) -> list[str]:
    """Return one method's cells: parameters trained in the adapter and in the head, rate, metrics, minutes per run."""
    first, settings = records[0], records[0]["settings"]
    values = {name: [record["metrics"][name] for record in records if record["metrics"]] for name in metrics}
    seeds = " ".join(f"{record['metrics'][metrics[0]]:.3f}" if record["metrics"] else "diverged" for record in records)
    minutes = statistics.fmean(record["seconds"] for record in records) / 60
    counts = [f"{first['adapter_parameters']:,}", f"{first['head_parameters']:,}"]
    return [settings["method"], *counts, f"{settings['lr']:g}", seeds, *map(spread, values.values()), f"{minutes:.1f}"]


def spread(values: Sequence[float]) -> str:
    """Return the mean, with the sample's standard deviation where there is one."""
    if not values:
        return "diverged"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"
