"""What an adapter holds of the whole change, judged by subtracting with numpy; and the sentences that say so."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.extract.words import percent
from tensoradapt.io.saved import Saved, as_saved
from tensoradapt.verify import verify

State = dict[str, torch.Tensor]


def changed(base: State, *names: str, size: float = 0.1) -> State:
    """A copy with some tensors changed at full rank."""
    found = {name: tensor.clone() for name, tensor in base.items()}
    for k, name in enumerate(names):
        found[name] = found[name] + size * tiny.noise(*found[name].shape, seed=100 + k)
    return found


def tables() -> State:
    shapes = {
        "embed_tokens.weight": (30, 8),
        **{f"layers.{k}.{role}.weight": (8, 8) for k in range(2) for role in "qv"},
        **{f"layers.{k}.experts.up": (3, 12, 8) for k in range(2)},
        **{f"layers.{k}.c_attn.weight": (24, 8) for k in range(2)},
        "norm.weight": (8,),
        "head.bias": (30,),
    }
    return {name: tiny.noise(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}


def squared(base: State, tuned: State) -> dict[str, float]:
    """|tuned - base|^2 of every tensor that differs, in numpy."""
    both = {name: (base[name].double().numpy(), tuned[name].double().numpy()) for name in base if name in tuned}
    return {name: float(np.square(t - b).sum()) for name, (b, t) in both.items() if (b != t).any()}


def lost(base: State, tuned: State, saved: Saved, deltas: dict[str, tuple[str, tuple]]) -> float:
    """The squared change that is left of all tensors once an adapter's deltas are taken from parts of some."""
    left = {name: tuned[name].double().numpy() - base[name].double().numpy() for name in base if name in tuned}
    for path, (name, part) in deltas.items():
        left[name][part] -= saved.delta(path).double().numpy()
    return sum(float(np.square(rest).sum()) for rest in left.values())


EVERY = tuple(slice(None) for _ in range(2))
CASES = {
    "some weights": ({"targets": ["q"]}, {f"layers.{k}.q": (f"layers.{k}.q.weight", EVERY) for k in range(2)}),
    "some experts": (
        {"targets": [f"layers.{k}.experts.up[1]" for k in range(2)]},
        {f"layers.{k}.experts.up[1]": (f"layers.{k}.experts.up", (1,)) for k in range(2)},
    ),
    "some rows": (
        {"targets": ["c_attn[q]", "c_attn[v]"], "parts": {"c_attn": ["q", "k", "v"]}},
        {
            f"layers.{k}.c_attn[{part}]": (f"layers.{k}.c_attn.weight", (slice(8 * row, 8 * row + 8),))
            for k in range(2)
            for row, part in ((0, "q"), (2, "v"))
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_error_over_the_whole_change(case, tmp_path):
    rule, parts = CASES[case]
    base = tables()
    tuned = changed(base, *(name for name in base if name != "layers.0.v.weight"))
    result = ta.extract(base, tuned, ta.preset("lora", rank=2, **rule), tmp_path / "a")
    squares = squared(base, tuned)
    left, total = lost(base, tuned, as_saved(result.path), parts), sum(squares.values())
    assert result.whole_error == pytest.approx(math.sqrt(left / total), rel=1e-5)
    inside = sum(float(np.square((tuned[n] - base[n]).double().numpy()[part]).sum()) for n, part in parts.values())
    assert result.change.held_share == pytest.approx(inside / total, rel=1e-5)
    own = {name for name, _ in parts.values()}
    assert result.change.held_tensors == len(own) and result.change.changed_tensors == len(squares) == len(base) - 1
    shares = {name: squares[name] / total for name in squares if name not in own}
    assert {n: row["share"] for n, row in result.change.not_held.items()} == pytest.approx(shares, rel=1e-5)
    assert result.change.dense_parameters == sum(tuned[n][part].numel() for n, part in parts.values())
    assert result.model_share == pytest.approx(result.num_parameters / sum(t.numel() for t in tuned.values()))
    found = verify(result.path, base, tuned)
    assert found.whole_error == pytest.approx(result.whole_error, rel=1e-5)
    assert found.held_share == pytest.approx(result.change.held_share, rel=1e-5)


def test_an_exact_adapter_of_all_that_differs_has_no_error(tmp_path):
    """Nothing is subtracted of large numbers: the error over the whole is as small as that over the sites."""
    base = tables()
    tuned = changed(base, "layers.0.q.weight", "layers.1.c_attn.weight", "embed_tokens.weight")
    result = ta.extract(base, tuned, ta.preset("lora", targets=["*"]), tmp_path / "a", error=0)
    assert result.whole_error < 1e-6 and result.change.held_share == 1.0 and not result.change.not_held


def test_the_last_lines_answer_the_question(tmp_path):
    base = tables()
    tuned = changed(base, *base) | {"classifier.weight": torch.ones(2, 8)}
    base["pooler.weight"] = torch.ones(8, 8)
    result = ta.extract(base, tuned, ta.preset("lora", rank=1, targets=["q", "v"]), tmp_path / "a")
    text = str(result).splitlines()
    squares = squared(base, tuned)
    share = sum(squares[f"layers.{k}.{role}.weight"] for k in range(2) for role in "qv") / sum(squares.values())
    assert text[-4] == f"held: 4 of 11 changed tensors, {100 * share:.1f} % of the squared change"
    assert (
        text[-3]
        == f"relative error: {result.relative_error:.4g} over these, {result.whole_error:.4g} over the whole change"
    )
    model = sum(t.numel() for t in tuned.values())
    assert (
        text[-2] == f"64 parameters: {100 * 64 / 256:.1f} % of the dense change, {100 * 64 / model:.1f} % of the model"
    )
    assert text[-1] == f"written to {result.path}"
    wanted = "not compared: 1 only in the base, 1 only in the tuned side: pooler.weight; classifier.weight"
    assert wanted in " ".join(" ".join(text).split())
    assert all(len(line) <= 80 for line in text[:-1])


def test_a_change_without_low_rank_is_said(tmp_path):
    """An adapter of twice the size of the weights that it replaces is no result to be proud of."""
    base = tables()
    tuned = changed(base, "layers.0.q.weight", "layers.1.q.weight")
    result = ta.extract(base, tuned, ta.preset("lora", targets=["q"]), tmp_path / "a", error=0.001)
    assert result.dense_share == pytest.approx(result.num_parameters / 128) and result.dense_share > 1.5
    assert f"this change has no low rank: {result.dense_share:.1f} times its dense size (128 entries)" in str(result)
    small = ta.extract(base, tuned, ta.preset("lora", rank=1, targets=["q"]), tmp_path / "b")
    assert "no low rank" not in str(small)


def test_json_has_the_numbers_of_the_sentences(tmp_path, capsys):
    base = tables()
    tuned = changed(base, *base)
    result = ta.extract(base, tuned, ta.preset("lora", rank=1, targets=["q"]), tmp_path / "a")
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert (found["whole_error"], found["dense_share"]) == (result.whole_error, result.dense_share)
    assert found["change"]["held_share"] == result.change.held_share
    assert found["change"]["not_held"]["norm.weight"]["reason"].startswith("1-D")
    assert found["change"]["not_held"]["layers.0.v.weight"]["reason"] == "not among the targets"
    assert json.loads((tmp_path / "a" / "extraction.json").read_text()) == found | {"path": "adapter.safetensors"}


def test_tensors_that_cannot_be_measured_are_named(tmp_path):
    base = tables() | {"mask": torch.full((4,), -math.inf), "steps": torch.tensor([1, 2])}
    tuned = changed(base, "layers.0.q.weight") | {"mask": torch.full((4,), -math.inf), "steps": torch.tensor([1, 3])}
    result = ta.extract(base, tuned, ta.preset("lora", targets=["q"]), tmp_path / "a", error=0)
    assert result.change.unmeasured == {"steps": "holds int64"} and result.change.changed_tensors == 1
    assert result.whole_error < 1e-6 and "not compared: steps, holds int64" in str(result)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.5, "50.0 %"), (0.9999, "99.99 %"), (0.00012, "0.01 %"), (1.19, "119 %")],
)
def test_shares_are_told_from_nothing_and_from_all(share, text):
    assert percent(share) == text


def test_added_rows_are_part_of_the_change(tmp_path):
    """A head that a base lacks is in no number; rows that were added count as the user says."""
    base = tables()
    tuned = changed(base, "layers.0.q.weight")
    tuned["embed_tokens.weight"] = torch.cat([base["embed_tokens.weight"], torch.ones(2, 8)])
    result = ta.extract(base, tuned, ta.preset("lora", targets=["q"]), tmp_path / "a", error=0, rows="pad")
    total = squared({"q": base["layers.0.q.weight"]}, {"q": tuned["layers.0.q.weight"]})["q"] + 16
    assert result.whole_error == pytest.approx(math.sqrt(16 / total), rel=1e-5)


def test_a_tolerance_is_for_the_whole_change_on_the_command_line(tmp_path, capsys):
    base = tables()
    tuned = changed(base, "layers.0.q.weight", "norm.weight")
    for name, state in (("base", base), ("tuned", tuned)):
        save_file(state, tmp_path / f"{name}.safetensors")
    sides = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    arguments = [
        "extract",
        *sides,
        "--preset",
        "lora",
        "--target",
        "q",
        "--error",
        "0.001",
        "--out",
        str(tmp_path / "a"),
    ]
    assert run(arguments) == 0
    assert run(["verify", str(tmp_path / "a"), *sides, "--tolerance", "0.01"]) == 1
    assert "over the whole change, tolerance 0.01: missed" in capsys.readouterr().out
    assert run(["verify", str(tmp_path / "a"), *sides, "--tolerance", "0.01", "--within-targets"]) == 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 3, 0), (0,)])
@pytest.mark.parametrize("form", ["states", "files"])
def test_a_tensor_of_no_numbers_is_no_change_and_in_nobodys_way(shape, form, tmp_path):
    """Models narrower than the number of their coordinates have tables of width 0 (LayoutLMv3)."""
    base = tables() | {"coordinates.weight": torch.zeros(shape)}
    sides = base, changed(base, *(f"layers.{k}.q.weight" for k in range(2)))
    if form == "files":
        for name, side in zip(("base", "tuned"), sides, strict=True):
            save_file(side, tmp_path / f"{name}.safetensors")
        sides = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    result = ta.extract(*sides, ta.preset("lora", rank=8, targets=["q"]), tmp_path / "a")
    assert result.relative_error < 1e-6 and result.whole_error < 1e-6
    rows = ta.analyze(*sides).sites
    assert {path for path in rows if rows[path].norm} == {"layers.0.q", "layers.1.q"}
