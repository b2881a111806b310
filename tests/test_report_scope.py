"""What a report and an extraction say of what they are about: which weights, what is missing, what is a bound."""

import numpy as np
import pytest
import tiny
import torch

import tensoradapt as ta


def changed(model: torch.nn.Module, rank: int = 3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                left, right = (torch.randn(side, rank, generator=generator) for side in parameter.shape)
                parameter.add_(0.05 * left @ right.mT)
    return model


def test_the_pair_of_bases_is_said_to_be_a_bound_and_is_one():
    """Alternating least squares from the higher-order SVD finds a pair that holds as much at least."""
    report = ta.analyze(tiny.bert(), changed(tiny.bert(), 12))
    (group,) = (row for row in report.groups.values() if "query" in " ".join(row.sites))
    deltas = np.stack([_delta(path) for path in group.sites])
    k = group.shared_energy["rank"].index(8)
    u, v = (np.linalg.svd(np.concatenate(list(d), 1))[0][:, :8] for d in (deltas, deltas.transpose(0, 2, 1)))
    start = _held(deltas, u, v)
    assert group.shared_energy["shared"][k] == pytest.approx(start, abs=1e-4)
    for _ in range(50):
        u = np.linalg.svd(np.concatenate([d @ v for d in deltas], 1))[0][:, :8]
        v = np.linalg.svd(np.concatenate([d.T @ u for d in deltas], 1))[0][:, :8]
    assert start + 1e-4 < _held(deltas, u, v) < start + 0.1
    assert "at least so much of the energy is held by one pair" in " ".join(str(report).split())


def _delta(path: str) -> np.ndarray:
    name = f"{path}.weight"
    return (changed(tiny.bert(), 12).state_dict()[name] - tiny.bert().state_dict()[name]).double().numpy()


def _held(deltas: np.ndarray, u: np.ndarray, v: np.ndarray) -> float:
    return float(sum(((u.T @ d @ v) ** 2).sum() for d in deltas) / (deltas**2).sum())


def test_a_head_that_the_base_lacks_is_said_to_be_missing(tmp_path):
    report = ta.analyze(tiny.bert(), changed(tiny.bert_classifier()))
    says = " ".join(str(report).split())
    assert "classifier.weight" in says and "take it from the tuned model, or train an adapter together with it" in says
    result = ta.extract(tiny.bert(), changed(tiny.bert_classifier()), ta.preset("lora", rank=2), tmp_path / "out")
    assert (
        "What is only in the tuned side, a new head say, is in no number here and in no extracted adapter"
        in " ".join(str(result).split())
    )
    assert "in no adapter" not in str(
        ta.extract(tiny.bert(), changed(tiny.bert()), ta.preset("lora"), tmp_path / "two")
    )


def test_the_report_says_which_weights_its_numbers_are_of_and_which_an_extraction_takes(tmp_path):
    base, tuned = tiny.bert(), changed(tiny.bert())
    says = " ".join(str(ta.analyze(base, tuned)).split())
    taken = ta.extract(base, tuned, ta.preset("lora", rank=2), tmp_path / "out").plan.num_sites
    assert f"medians of {taken - 4} weights in the layers" in says  # three tables of embeddings, and the pooler
    assert f"an extraction without targets takes all {taken} weights that differ" in says


def test_tables_of_rows_of_modules_are_embeddings():
    """T5's `shared` is told by its module, not by its name."""
    report = ta.analyze(tiny.t5(), changed(tiny.t5()))
    assert {k: row["weights"] for k, row in report.to_dict()["change"]["kinds"].items() if row["weights"]} == {
        "layers": len(report.sites) - 1,
        "embeddings": 1,
    }
    assert report.sites["shared"].shape == (16, tiny.WORDS)


def test_conv1d_of_modules_is_out_first():
    report = ta.analyze(tiny.gpt2(), changed(tiny.gpt2()))
    assert report.sites["transformer.h.0.mlp.c_fc"].shape == (64, 16)


def test_sides_without_a_name_are_called_by_their_part():
    with pytest.raises(
        ta.FileError, match=r"the base \(mapping of 2 tensors\) and the tuned side \(mapping of 1 tensors"
    ):
        ta.analyze({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4, 4)}, {"c.weight": torch.ones(5, 3)})


def test_words_of_the_tables_are_explained_under_them():
    says = " ".join(str(ta.analyze(tiny.bert(), changed(tiny.bert()))).split())
    assert "of the energy (the squared norm)" in says
    assert "front: no format tried has both fewer parameters and a smaller error" in says
