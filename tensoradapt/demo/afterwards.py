"""The demo after its full fine-tuning: what rank the change was, and the adapters that hold it at a trained one's size.

Invariant: an extracted adapter is scored on the full fine-tuning with the base's projections in its place, so that a
row differs from the full fine-tuning by what the adapter lost, and by nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tensoradapt.analysis.report import Report
from tensoradapt.analysis.run import analyze
from tensoradapt.attach import load
from tensoradapt.demo.methods import EXTRACTED, PROJECTIONS
from tensoradapt.extract import extract
from tensoradapt.spec import Spec

ENERGY = "energy_0.95"


@dataclass(frozen=True)
class Change:
    """A model before and after its full fine-tuning, with one head."""

    base: nn.Module
    tuned: nn.Module

    @property
    def sides(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Both as mappings from names to tensors."""
        return self.base.state_dict(), self.tuned.state_dict()

    def bare(self, paths: Sequence[str]) -> nn.Module:
        """The tuned model with the base's weights at some sites."""
        model = copy.deepcopy(self.tuned)
        with torch.no_grad():
            for path in paths:
                model.get_parameter(f"{path}.weight").copy_(self.base.get_parameter(f"{path}.weight"))
        return model


@dataclass(frozen=True)
class Extracted:
    """An extracted adapter: its name, budget (None where its ranks were given), folder, size, error, and its model."""

    label: str
    budget: int | None
    path: Path
    num_parameters: int
    relative_error: float
    model: nn.Module


def analysed(change: Change, out: Path) -> Report:
    """The report of the change of all projections, written to `out` as JSON and as HTML."""
    report = analyze(*change.sides, targets=PROJECTIONS)
    report.to_json(out / "report.json")
    report.to_html(out / "report.html")
    return report


def answer(report: Report) -> dict[str, Any]:
    """The report in short: the change, its ranks, and the candidate to take with the reason."""
    choice = report.choice or {"label": "", "reason": "nothing changed"}
    return {
        "num_sites": len(report.sites),
        "relative_change": report.relative_change,
        "rank_above_noise": _median(report, "noise"),
        "rank_energy_0.95": _median(report, ENERGY),
        "full_rank": median(min(row.shape) for row in report.sites.values()),
        "choice": choice["label"],
        "reason": choice["reason"],
    }


def said(short: Mapping[str, Any]) -> list[str]:
    """The same in two sentences."""
    ranks = f"{short['rank_above_noise']:g} of {short['full_rank']:g} above the rounding noise"
    energy = f"{short['rank_energy_0.95']:g} for 95 % of its energy"
    change = f"{short['num_sites']} projections changed by {100 * short['relative_change']:.0f} %"
    return [f"the full fine-tuning, analysed: {change}; median rank {ranks}, {energy}", short["reason"]]


def _median(report: Report, rule: str) -> float:
    """The median rank; one that is above the values computed counts as all of them."""
    ranks = [(row.ranks[rule], len(row.singular_values)) for row in report.sites.values()]
    return median(computed if rank is None else rank for rank, computed in ranks)


def extracted(change: Change, report: Report, budget: int, folder: Path) -> list[Extracted]:
    """The change of all projections as LoRA and LoTR within a budget, and as the candidate that the report chooses."""
    found = [_extracted(change, label, spec, budget, folder) for label, spec in EXTRACTED.items()]
    if report.choice is not None:
        spec = Spec.from_dict(report.choice["spec"])
        found.append(_extracted(change, report.choice["label"], spec, None, folder))
    return found


def _extracted(change: Change, label: str, spec: Spec, budget: int | None, folder: Path) -> Extracted:
    path = folder / f"extracted-{label.lower().replace(' ', '-')}{f'-{budget}' if budget else ''}"
    result = extract(*change.sides, spec, path, max_parameters=budget, overwrite=True)
    model = change.bare(list(result.report["sites"]))
    if result.path is not None:
        load(path, model)
    return Extracted(f"{label}, extracted", budget, path, result.num_parameters, result.relative_error, model)
