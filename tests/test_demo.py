"""The demo, with few steps: what it writes, that its numbers are those of the plan and of the files, and its errors."""

import copy
import io
import json
import statistics
import sys

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from torch import nn

import tensoradapt as ta
from tensoradapt.demo.afterwards import Change, analysed, answer, extracted
from tensoradapt.demo.data import Split, load
from tensoradapt.demo.methods import FAMILIES, entries
from tensoradapt.demo.model import LAYERS, WIDTH, Attention, build, with_new_head
from tensoradapt.demo.results import Results, Row
from tensoradapt.demo.run import Settings, draw_accuracy, run_demo
from tensoradapt.demo.train import Recipe, accuracy, train
from tensoradapt.errors import FileError, TensorAdaptError

HEAD = 5 * WIDTH + 5
QUICK = Settings(pretrain_steps=3, steps=2, num_seeds=2, budgets=(500, 1_600))


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One quick run: its results, its folder and what it said."""
    out = tmp_path_factory.mktemp("demo") / "a" / "b"
    console = plain_console()
    results = run_demo(out, console=console, settings=QUICK)
    return results, out, console.file.getvalue()


def adapter_rows(results):
    return [row for row in results.rows if row.path and row.num_trainable]


def extracted_rows(results):
    return [row for row in results.rows if row.path and not row.num_trainable]


def test_every_family_is_there_at_every_budget_it_fits(ran):
    results, _, _ = ran
    found = [(row.method, row.budget) for row in results.rows if row.budget and row not in extracted_rows(results)]
    assert found == [(family.label, budget) for budget in QUICK.budgets for family in FAMILIES]
    (left_out,) = [row for row in results.rows if row.note]
    assert (left_out.method, left_out.budget, left_out.accuracy) == ("LoRA", 500, ())
    assert f"{2 * LAYERS * 2 * WIDTH:,}" in left_out.note


def test_the_results_file_holds_the_results(ran):
    results, out, _ = ran
    written = json.loads((out / "results.json").read_text("utf-8"))
    assert written == json.loads(json.dumps(results.to_dict()))
    assert written["rows"][0]["method"] == "head alone" and len(written["rows"][0]["accuracy"]) == 2


@pytest.mark.parametrize("name", ["budget.png", "accuracy.png"])
def test_the_figures_are_pictures(ran, name):
    _, out, _ = ran
    assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_drawn_against_trained_parameters(ran, monkeypatch):
    results, _, _ = ran
    drawn = []
    monkeypatch.setattr(
        "tensoradapt.demo.run.plot_scores", lambda points, *_, **choices: drawn.append((points, choices))
    )
    draw_accuracy(results, None)
    ((points, choices),) = drawn
    trained = {(row.method, row.num_trainable): row.accuracy for row in adapter_rows(results)}
    assert {(p.method, p.num_parameters): tuple(p.scores) for p in points} == {
        key: tuple(100 * share for share in accuracy) for key, accuracy in trained.items()
    }
    assert len(points) == 7
    everything = sum(p.numel() for p in build(5, seed=0).parameters())
    assert set(choices["levels"]) == {f"head alone ({HEAD})", f"full fine-tuning ({everything:,})"}


def test_nothing_else_is_left_in_the_folder(ran):
    results, out, _ = ran
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    trained, extracted = adapter_rows(results), extracted_rows(results)
    assert (len(trained), len(extracted)) == (7, 3)
    adapters = {f"{row.path}/{name}" for row in trained + extracted for name in ("adapter.safetensors", "README.md")}
    adapters |= {f"{row.path}/extraction.json" for row in extracted}
    assert files == adapters | {"accuracy.png", "budget.png", "results.json", "report.json", "report.html"}


def test_counts_are_those_of_the_tensors_in_the_files(ran):
    results, out, _ = ran
    for row in adapter_rows(results):
        with safe_open(out / row.path / "adapter.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).numel() for key in file.keys()}
        head = sum(size for key, size in sizes.items() if key.startswith("extra."))
        assert (row.num_trainable, head) == (sum(sizes.values()), HEAD)
        assert row.num_adapter == sum(sizes.values()) - head <= row.budget


def test_counts_are_those_of_the_plan(ran):
    results, out, _ = ran
    model = with_new_head(build(20, seed=0), 5, seed=0)
    planned = {(entry.family.label, entry.budget): entry for entry in entries(model, QUICK.budgets)}
    for row in adapter_rows(results):
        plan = ta.plan(planned[row.method, row.budget].spec, model)
        assert (row.num_adapter, row.num_trainable) == (plan.num_trainable, plan.num_trainable + plan.num_extra)


def test_the_baselines_train_the_head_alone_and_everything(ran):
    results, _, _ = ran
    counts = {row.method: row.num_trainable for row in results.rows if row.budget is None and row.num_trainable}
    everything = sum(p.numel() for p in build(5, seed=0).parameters())
    assert counts == {"head alone": HEAD, "full fine-tuning": everything, "not pre-trained": everything}


def test_an_adapter_from_its_file_is_as_accurate_as_it_was(ran):
    results, _, _ = ran
    for row in adapter_rows(results) + extracted_rows(results):
        assert row.from_file == row.accuracy[0]


def test_progress_off_a_terminal_is_plain_lines(ran):
    results, out, said = ran
    assert "\x1b" not in said and "\r" not in said
    lines = said.splitlines()
    assert lines[0].startswith("pre-trained") and str(out) in lines[-1]
    assert len(lines) == 2 + 2 + sum(bool(row.accuracy) for row in results.rows)


def test_progress_on_a_terminal_is_a_bar(tmp_path):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    run_demo(tmp_path, console=console, settings=Settings(pretrain_steps=1, steps=1, num_seeds=1, budgets=()))
    assert "pre-training" in console.file.getvalue() and "━" in console.file.getvalue()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_second_run_replaces_the_first_its_seed_fixes_the_results_and_the_global_state_is_left_alone(tmp_path, ran):
    results, _, _ = ran
    (tmp_path / "results.json").write_text("an older run's")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    settings = Settings(QUICK.pretrain_steps, QUICK.steps, num_seeds=1, budgets=(500,))
    again = run_demo(tmp_path, console=plain_console(), settings=settings)
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == 2
    firsts = {(row.method, row.budget): row.accuracy[:1] for row in results.rows}
    within = ("LoRA, extracted", "LoTR, extracted")  # the largest budget is another one here
    assert all(row.accuracy == firsts[row.method, row.budget] for row in again.rows if row.method not in within)
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["seeds"] == [0]


def test_without_scikit_learn_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(TensorAdaptError, match=r'pip install "tensoradapt\[demo\]"') as caught:
        run_demo(tmp_path / "out", console=plain_console(), settings=QUICK)
    assert "scikit-learn" in str(caught.value) and not (tmp_path / "out").exists()


def test_a_file_in_the_folder_s_place_is_refused_and_kept(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(FileError, match="--out"):
        run_demo(tmp_path / "out", console=plain_console(), settings=QUICK)
    assert (tmp_path / "out").read_text() == "mine"


def test_the_table_shows_every_row():
    rows = (
        Row("LoTR", 500, "3", 817, 492, (0.5, 0.75), (0.1, 0.1), 0.5, "adapters/lotr-500"),
        Row("LoRA", 500, note="rank 1 takes 1,536"),
    )
    console = plain_console()
    console.print(Results(rows, (0, 1), {}, {}, 1.0, "out").table())
    said = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert "LoTR 500 3 492 817 62.5 50.0 75.0 50.0" in said
    assert "LoRA 500 - rank 1 takes 1,536" in said


# -- the analysis of its full fine-tuning ------------------------------------------------------------------------------


def test_the_extracted_adapters_are_of_the_largest_size_and_the_choice_of_the_report(ran):
    results, out, _ = ran
    lora, lotr, chosen = extracted_rows(results)
    assert [(row.method, row.budget) for row in (lora, lotr)] == [
        ("LoRA, extracted", 1_600),
        ("LoTR, extracted", 1_600),
    ]
    assert chosen.method == f"{results.analysis['choice']}, extracted" and chosen.budget is None
    for row in (lora, lotr, chosen):
        with safe_open(out / row.path / "adapter.safetensors", "pt") as file:
            assert row.num_adapter == sum(file.get_tensor(key).numel() for key in file.keys())
        assert 0 < row.relative_error < 1 and len(row.accuracy) == 1
    assert max(lora.num_adapter, lotr.num_adapter) <= 1_600


def test_the_short_answer_is_that_of_the_report_in_the_folder(ran):
    results, out, said = ran
    report = json.loads((out / "report.json").read_text("utf-8"))
    sites, short = list(report["sites"].values()), results.analysis
    assert short["num_sites"] == len(sites) == 6 * LAYERS
    assert short["rank_energy_0.95"] == statistics.median(site["ranks"]["energy_0.95"] for site in sites)
    assert short["rank_above_noise"] == statistics.median(site["ranks"]["noise"] for site in sites)
    assert (short["choice"], short["reason"]) == (report["choice"]["label"], report["choice"]["reason"])
    assert short["reason"] in said and f"median rank {short['rank_above_noise']:g} of 64 above" in said
    assert (out / "report.html").read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.fixture
def change():
    """A base, and a fine-tuning of it that changes one projection by rank 2, all others by noise, and the head."""
    base, tuned = build(5, seed=0), build(5, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            value += 1e-4 * torch.randn(value.shape, generator=generator)
            if name == "blocks.3.attn.q.weight":
                value += torch.randn(64, 2, generator=generator) @ torch.randn(2, 64, generator=generator)
    return Change(base, tuned)


def test_undoing_a_projection_undoes_nothing_else(change):
    bare, (base, tuned) = change.bare(["blocks.3.attn.q"]).state_dict(), change.sides
    assert torch.equal(bare["blocks.3.attn.q.weight"], base["blocks.3.attn.q.weight"])
    assert all(torch.equal(bare[name], tuned[name]) for name in bare if name != "blocks.3.attn.q.weight")


def test_an_extracted_adapter_makes_of_the_base_what_was_tuned(change, tmp_path):
    report = analysed(change, tmp_path)
    assert answer(report)["num_sites"] == 36 and report.sites["blocks.3.attn.q"].ranks["energy_0.99"] == 2
    found = extracted(change, report, 3_000, tmp_path)
    assert [each.label for each in found[:2]] == ["LoRA, extracted", "LoTR, extracted"]
    base, tuned = change.sides
    images = torch.randn(7, 8, 8, generator=torch.Generator().manual_seed(1))
    for each in found:
        with torch.no_grad():
            made, wanted, bare = (
                model(images) for model in (each.model, change.tuned, change.bare(list(report.sites)))
            )
        assert (made - wanted).norm() < 0.05 * (bare - wanted).norm()
        ta.load(each.path, fresh := copy.deepcopy(change.base)).merge()
        lost = sum((fresh.state_dict()[f"{p}.weight"] - tuned[f"{p}.weight"]).square().sum() for p in report.sites)
        whole = sum((base[f"{p}.weight"] - tuned[f"{p}.weight"]).square().sum() for p in report.sites)
        assert each.relative_error == pytest.approx(float((lost / whole).sqrt()), rel=1e-3)


# -- its parts --------------------------------------------------------------------------------------------------------


def test_the_splits_share_no_image_and_use_them_all():
    digits = load(seed=0)
    assert len(digits.pretrain.labels) / 4 + sum(len(split.labels) for split in digits[1:]) == 1797
    assert sorted(digits.pretrain.labels.unique().tolist()) == list(range(20))
    assert all(sorted(split.labels.unique().tolist()) == list(range(5)) for split in digits[1:])
    assert all(-1 == split.inputs.min() and split.inputs.max() == 1 for split in digits)
    seen = [{tuple(image.flatten().tolist()) for image in split.inputs} for split in digits[1:]]
    assert not (seen[0] & seen[2] or seen[1] & seen[2] or seen[0] & seen[1])


def test_the_second_task_is_mirrored_digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    originals = {tuple(image.flatten().tolist()): label for image, label in zip(raw.images, raw.target, strict=True)}
    images, labels = load(seed=0).test
    back = [originals[tuple(image.flip(1).flatten().tolist())] for image in (images + 1) * 8]
    assert back == [label + 5 for label in labels.tolist()]


def test_attention_is_softmax_attention_by_heads():
    torch.manual_seed(0)
    attention, x = Attention(12, 3), torch.randn(2, 5, 12)
    oracle = nn.MultiheadAttention(12, 3, batch_first=True)
    parts = (attention.q, attention.k, attention.v)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        oracle.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        oracle.out_proj.load_state_dict(attention.o.state_dict())
        assert torch.allclose(attention(x), oracle(x, x, x)[0], atol=1e-6)


def test_a_patch_is_a_square_of_four_pixels():
    model = build(5, seed=0)
    seen = []
    model.embed.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.arange(64.0).reshape(1, 8, 8))
    assert seen[0].shape == (1, 16, 4) and seen[0][0, 1].tolist() == [2, 3, 10, 11]


def test_training_learns_and_counts_its_steps():
    digits, steps = load(seed=0), []
    some = Split(digits.train.inputs[:20], digits.train.labels[:20])
    model = build(5, seed=0)
    before = accuracy(model, some)
    train(model, some, Recipe(steps=30, rate=2e-3, batch=20), seed=0, on_step=lambda: steps.append(1))
    assert accuracy(model, some) == 1.0 > before and len(steps) == 30


def test_training_leaves_frozen_weights_alone():
    model = build(5, seed=0).requires_grad_(False)
    model.head.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, load(seed=0).train, Recipe(steps=2, rate=0.1), seed=0, on_step=lambda: None)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
