"""Where there is nothing to hold: equal checkpoints, adapters that add nothing, adapters of no weight."""

import pytest
import tiny
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.errors import AdapterError
from tensoradapt.io.saved import Saved
from tensoradapt.plan import Plan
from tensoradapt.spec import Spec
from tensoradapt.verify import verify

STATE = {f"layers.{k}.{role}.weight": tiny.noise(8, 8, seed=k) for k in range(2) for role in "qv"}
EMPTY = Saved(Plan(Spec(), ()), {})


@pytest.fixture
def equal(tmp_path) -> list[str]:
    """Two files of one model."""
    for name in ("base", "tuned"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    return [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]


@pytest.mark.parametrize("rule", [[], ["--target", "q"]], ids=["no targets", "targets"])
@pytest.mark.parametrize("goal", [[], ["--error", "0.01"], ["--error", "noise"], ["--max-parameters", "100"]], ids=str)
@pytest.mark.parametrize("form", ["lora", "lotr"])
def test_equal_checkpoints_are_nothing_to_extract(form, goal, rule, equal, tmp_path, capsys):
    """The same words and exit code 0 whatever is asked of them, and no file."""
    assert run(["extract", *equal, "--preset", form, *rule, *goal, "--out", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "note: the checkpoints are equal: nothing to extract"
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.partial").exists()


def adapter_of(size: float) -> Saved:
    plan = ta.plan(ta.preset("lora", rank=1, targets=["q"]), {name.removesuffix(".weight"): (8, 8) for name in STATE})
    return Saved.of(plan, {key: torch.full(f.shape, size) for key, f in plan.factors.items()})


def test_verify_says_that_checkpoints_are_equal(equal, tmp_path, capsys):
    adapter_of(0.0).save(tmp_path / "zero")
    adapter_of(1.0).save(tmp_path / "one")
    for name, code in (("zero", 0), ("one", 1)):
        assert run(["verify", str(tmp_path / name), *equal, "--tolerance", "0.1"]) == code
        assert "the checkpoints are equal: there is no change to hold" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["convert", "export", "verify"])
def test_an_adapter_of_no_weight_is_refused_in_the_same_words(verb, tmp_path):
    acts = {
        "convert": lambda: ta.convert(EMPTY, ta.preset("lora"), tmp_path / "out"),
        "export": lambda: ta.export_peft(EMPTY, tmp_path / "out"),
        "verify": lambda: verify(EMPTY, STATE, STATE),
    }
    with pytest.raises(AdapterError, match=f"adapts no weight: there is nothing to {verb}"):
        acts[verb]()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["convert", "export"])
def test_an_adapter_that_adds_nothing_is_refused_in_the_same_words(verb, tmp_path, capsys):
    adapter_of(0.0).save(tmp_path / "zero")
    options = ["--preset", "lotr"] if verb == "convert" else []
    assert run([verb, str(tmp_path / "zero"), *options, "--out", str(tmp_path / "out")]) == 2
    assert f"every delta is zero: there is nothing to {verb}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_below_every_adapter_says_what_would_do(tmp_path, capsys):
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    save_file(STATE, base)
    save_file({name: tensor + tiny.noise(8, 8, seed=9) for name, tensor in STATE.items()}, tuned)
    arguments = ["extract", str(base), str(tuned), "--preset", "lora", "--out", str(tmp_path / "a")]
    assert run([*arguments, "--max-parameters", "3"]) == 2
    said = capsys.readouterr().err
    assert "at least 16 parameters, which is rank 1 of group" in said
    assert "next: --max-parameters 64 is rank 1 of all 4 groups" in said
    assert run([*arguments, "--max-parameters", "16"]) == 0
    assert run([*arguments, "--max-parameters", "64", "--overwrite"]) == 0
    assert "64 parameters: 25.0 % of the dense change" in capsys.readouterr().out
