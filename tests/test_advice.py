"""Every preset says when to take it; the rates that it suggests are those that the measurements chose."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

import tensoradapt as ta
from tensoradapt.presets.advice import ADVICE

DATA = Path(__file__).parents[1] / "docs" / "data"
CLOSE = 0.011
FAMILY = {"lora": "LoRA r=8 qv", "lotr": "LoTR 1/10", "lotr_by_role": "LoTR 1/10 by role", "lorta": "LoRTA 1/10"}
FAMILY |= {"tt_lora": "TT-LoRA 1/10", "metatt_4d": "MetaTT 1/10"}


def rows(name: str) -> list[dict[str, str]]:
    with (DATA / name).open(newline="") as file:
        return list(csv.DictReader(file))


def on_sst2() -> dict[str, float]:
    """By preset the lowest rate within CLOSE of the best, where at least three rates were tried."""
    scores: dict[str, dict[float, float]] = defaultdict(dict)
    for row in rows("preset-rates.csv"):
        scores[row["preset"]][float(row["rate"])] = float(row["score"])
    done = {name: by_rate for name, by_rate in scores.items() if len(by_rate) >= 3}
    return {name: min(r for r in found if found[r] >= max(found.values()) - CLOSE) for name, found in done.items()}


def on_the_frontier(label: str) -> float:
    """The rate with the best mean over the held-out runs of a method."""
    scores: dict[float, list[float]] = defaultdict(list)
    for row in rows("frontier.csv"):
        if (row["method"], row["split"], row["seed"]) == (label, "held-out", "0") and row["task"] in ("mrpc", "cola"):
            scores[float(row["rate"])].append(float(row["value"]))
    return max(scores, key=lambda rate: statistics.fmean(scores[rate]))


def test_every_preset_says_when_to_take_it():
    assert set(ADVICE) == set(ta.PRESETS)
    assert all(row.use and not row.use.endswith(".") for row in ta.PRESETS.values())


@pytest.mark.parametrize("name", FAMILY)
def test_rates_of_the_frontier(name):
    assert ta.PRESETS[name].rate == on_the_frontier(FAMILY[name])


def test_rates_of_the_others():
    measured = on_sst2()
    for name, rate in measured.items():
        if name not in FAMILY:
            assert ta.PRESETS[name].rate == rate, name
    assert set(measured) == set(ta.PRESETS)


def test_readme_and_tutorials_show_a_preset_that_learned():
    """The published start of LoTR learned CoLA at no rate: no first example may take it."""
    root = DATA.parents[1]
    scores = [
        float(r["value"]) for r in rows("frontier.csv") if r["method"] == "LoTR 1/10 by role" and r["task"] == "cola"
    ]
    assert max(scores) > 0.1
    for page in ("README.md", "docs/tutorials/build.md", "docs/notebooks/build.ipynb"):
        text = (root / page).read_text("utf-8")
        assert "lotr_by_role" in text and 'ta.attach(model, ta.preset(\\"lotr\\"' not in text, page
