"""Sets of adapters: what is planted across tasks comes out, and no dense delta is formed of products."""

import math

import pytest
import tiny
import torch
from typer.testing import CliRunner

import tensoradapt as ta
from tensoradapt.cli.app import application
from tensoradapt.linalg import Product

WIDTH, RANK, TASKS, LAYERS = 192, 2, 3, 2


def planted(tmp_path) -> dict[str, dict[str, torch.Tensor]]:
    """Saved LoRA adapters whose deltas share one column space over all tasks, layers and roles; their dense deltas."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator))[0]
    dense: dict[str, dict[str, torch.Tensor]] = {}
    for task in range(TASKS):
        model = tiny.bert(LAYERS, hidden_size=WIDTH, intermediate_size=64)
        adapter = ta.attach(model, ta.preset("lora", rank=RANK, targets=["query", "value"]))
        for name in adapter.groups:
            b = shared @ torch.randn(3, RANK, generator=generator)
            a = torch.randn(RANK, WIDTH, generator=generator)
            adapter.set_factors(name, {"core_out": b, "core_in": a})
        adapter.save(tmp_path / f"task{task}")
        paths = [p.site.path for g in adapter.plan.groups for p in g.placements]
        dense[f"task{task}"] = {path: adapter.delta(path).detach().double() for path in paths}
    return dense


def test_the_planted_structure_comes_out(tmp_path, monkeypatch):
    def refuse(self):
        raise AssertionError("a dense delta was formed")

    dense = planted(tmp_path)
    monkeypatch.setattr(Product, "dense", refuse)
    report = ta.analyze_adapters([tmp_path / task for task in dense])
    (group,) = report.groups.values()
    assert set(group.axes) == {"task", "layer", "role", "out", "in"}
    assert group.multilinear_rank["noise"]["out"] == 3
    assert group.captured == pytest.approx(1, abs=1e-5)
    stacked = torch.stack([d for task in dense.values() for d in task.values()])
    assert group.norm == pytest.approx(float(stacked.norm()), rel=1e-5)
    # the spectrum of the mode `task`, from the dense tensor
    by_task = torch.stack([torch.stack(list(task.values())).flatten() for task in dense.values()])
    assert group.mode_spectra["task"] == pytest.approx(torch.linalg.svdvals(by_task).tolist(), rel=1e-4)
    for task, deltas in dense.items():
        for path, delta in deltas.items():
            found = report.sites[f"{task}:{path}"]
            wanted = torch.linalg.svdvals(delta)[:RANK]
            assert found.singular_values[:RANK] == pytest.approx(wanted.tolist(), rel=1e-4)
            assert found.ranks["noise"] == RANK


def test_candidates_are_measured_on_the_dense_tensor_too(tmp_path):
    dense = planted(tmp_path)
    report = ta.analyze_adapters({task: tmp_path / task for task in dense})
    lora = {c.rank: c for c in report.candidates if c.preset == "lora"}
    total = sum(float(d.square().sum()) for task in dense.values() for d in task.values())
    lost = sum(float(torch.linalg.svdvals(d)[1:].square().sum()) for task in dense.values() for d in task.values())
    assert lora[1].relative_error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    assert lora[2].relative_error < 1e-3


def test_one_adapter_is_no_set(tmp_path):
    planted(tmp_path)
    with pytest.raises(ta.AdapterError, match="at least two"):
        ta.analyze_adapters([tmp_path / "task0"])


def test_adapters_of_different_models(tmp_path):
    planted(tmp_path)
    other = ta.attach(tiny.gpt2(), ta.preset("lora", targets=["c_attn"]))
    other.save(tmp_path / "other")
    with pytest.raises(ta.AdapterError, match="share no site"):
        ta.analyze_adapters([tmp_path / "task0", tmp_path / "other"])


def test_the_command(tmp_path):
    planted(tmp_path)
    arguments = ["analyze", *(f"--adapter={tmp_path / f'task{k}'}" for k in range(TASKS)), "--no-candidates"]
    result = CliRunner().invoke(application(), arguments)
    assert result.exit_code == 0, result.output
    assert "3 adapters: task0, task1, task2" in result.stdout
    report = CliRunner().invoke(application(), ["analyze", "base"])
    assert isinstance(report.exception, ta.SpecError)
