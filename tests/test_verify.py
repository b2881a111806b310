"""Verifying: the error of an adapter against two checkpoints, and what they changed beside it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.errors import FileError, SpecError
from tensoradapt.folders import merge_folder
from tensoradapt.io.saved import Saved, as_saved
from tensoradapt.verify import verify

QV = ["query", "value"]
CASES = {
    "lora": (tiny.bert_classifier, ta.preset("lora", rank=2, targets=QV)),
    "tt-matrix": (tiny.llama, ta.preset("mpo_shared", rank=3, targets=["q_proj"])),
    "a difference": (tiny.llama, ta.preset("dota", rank=2, folds="auto:2", targets=["q_proj"])),
    "Conv1D": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn"])),
    "rows": (
        tiny.gpt2,
        ta.preset("lora", rank=2, targets=["c_attn[q]", "c_attn[v]"], parts={"c_attn": ["q", "k", "v"]}),
    ),
    "embedding": (tiny.llama, ta.preset("lora", rank=2, targets=["embed_tokens"])),
    "experts": (tiny.gpt_oss, ta.preset("lotr", rank=2, targets=["gate_up_proj"])),
    "trained modules": (tiny.bert_classifier, ta.preset("lora", rank=2, targets=QV, train=["classifier"])),
}


def prepared(case: str, tmp_path: Path) -> tuple[Path, Path, Path, nn.Module]:
    """An adapter, a base folder, a folder with exactly that adapter merged, and the attached model."""
    make, spec = CASES[case]
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    adapter.save(tmp_path / "adapter")
    merge_folder(tmp_path / "base", adapter, tmp_path / "tuned")
    return tmp_path / "adapter", tmp_path / "base", tmp_path / "tuned", model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def sites_of(adapter: Path) -> list[str]:
    plan = as_saved(adapter).plan
    return [path for group in plan.groups for path in group.paths] + list(plan.extras)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", ["with a config", "without"])
def test_what_was_merged_is_verified(case, config, tmp_path):
    adapter, base, tuned, _ = prepared(case, tmp_path)
    if config == "without":  # the layouts are then not known, and the adapter knows them
        for folder in (base, tuned):
            (folder / "config.json").unlink()
    found = verify(adapter, base, tuned, tolerance=1e-4)
    assert found.passed and found.relative_error < 1e-5
    assert sorted(found.sites) == sorted(sites_of(adapter))
    assert max(found.sites.values()) < 1e-5
    assert found.changed == {} and found.only_tuned == ()


def tables(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    shapes = {
        "layers.0.q.weight": (6, 5),
        "layers.1.q.weight": (6, 5),
        "layers.0.v.weight": (4, 5),
        "norm.weight": (5,),
    }
    return {name: scale * tiny.noise(*shape, seed=seed + k) for k, (name, shape) in enumerate(shapes.items())}


def saved_for(state: dict[str, torch.Tensor], targets: list[str], seed: int = 5) -> Saved:
    shapes = {name.removesuffix(".weight"): tuple(t.shape) for name, t in state.items() if t.dim() > 1}
    plan = ta.plan(ta.preset("lora", rank=2, targets=targets), shapes)
    tensors = {key: 0.3 * tiny.noise(*f.shape, seed=seed + k) for k, (key, f) in enumerate(plan.factors.items())}
    return Saved.of(plan, tensors)


def test_errors_are_those_of_the_definition():
    """By loops over entries, in numpy."""
    base = tables(0)
    tuned = {name: tensor + 0.1 * tables(20)[name] for name, tensor in base.items()}
    saved = saved_for(base, ["q"])
    found = verify(saved, base, tuned)
    lost = whole = 0.0
    for path in ("layers.0.q", "layers.1.q"):
        name = f"{path}.weight"
        delta = tuned[name].double().numpy() - base[name].double().numpy()
        guess = saved.delta(path).double().numpy()
        mine = sum((delta[i, j] - guess[i, j]) ** 2 for i in range(6) for j in range(5))
        of = sum(delta[i, j] ** 2 for i in range(6) for j in range(5))
        assert found.sites[path] == pytest.approx(math.sqrt(mine / of), rel=1e-5)
        lost, whole = lost + mine, whole + of
    assert found.relative_error == pytest.approx(math.sqrt(lost / whole), rel=1e-5)
    changes = {name: np.linalg.norm((tuned[name] - base[name]).double().numpy()) for name in base}
    wanted = {"layers.0.v": changes["layers.0.v.weight"], "norm.weight": changes["norm.weight"]}
    assert found.changed == pytest.approx(wanted, rel=1e-5)
    beside = sum(change**2 for change in wanted.values())
    assert found.whole_error == pytest.approx(math.sqrt((lost + beside) / (whole + beside)), rel=1e-5)
    assert found.held_share == pytest.approx(whole / (whole + beside), rel=1e-5)


@pytest.mark.parametrize(("tolerance", "passed"), [(None, True), (100.0, True), (0.001, False), (0, False)])
def test_a_tolerance_is_kept_or_missed(tolerance, passed):
    base = tables(0)
    found = verify(saved_for(base, ["q"]), base, tables(9), tolerance=tolerance)
    assert (found.passed, found.tolerance) == (passed, tolerance)
    assert ("missed" in str(found)) == (not passed) and ("passed" in str(found)) == (passed and tolerance is not None)


@pytest.mark.parametrize("tolerance", [-0.1, math.nan, math.inf])
def test_a_tolerance_that_is_none(tolerance):
    with pytest.raises(SpecError, match="a tolerance is a number"):
        verify(saved_for(tables(0), ["q"]), tables(0), tables(0), tolerance=tolerance)


def test_checkpoints_that_are_equal():
    """A delta where there should be none has no relative error; a delta of zero is right."""
    base = tables(0)
    found = verify(saved_for(base, ["q"]), base, base, tolerance=1)
    assert found.relative_error == math.inf and not found.passed
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["relative_error"] is None
    zero = saved_for(base, ["q"])
    zero = Saved.of(zero.plan, {key: torch.zeros_like(tensor) for key, tensor in zero.tensors.items()})
    found = verify(zero, base, base, tolerance=0)
    assert found.passed and "the checkpoints are equal" in str(found)


def test_the_whole_change_is_judged_unless_asked_otherwise():
    """An adapter that holds its own weights exactly, of a change that lies elsewhere for the most part."""
    base = tables(0)
    saved = saved_for(base, ["q"])
    tuned = {name: tensor + 0.1 * tables(20)[name] for name, tensor in base.items()}
    tuned |= {f"{path}.weight": base[f"{path}.weight"] + saved.delta(path) for path in ("layers.0.q", "layers.1.q")}
    found = verify(saved, base, tuned, tolerance=0.01)
    assert found.relative_error < 1e-5 and found.whole_error > 0.1
    assert not found.passed and found.judged_error == found.whole_error
    lines = str(found).splitlines()
    assert "over the whole change, tolerance 0.01: missed" in lines[0] and "over its own weights" in lines[1]
    within = verify(saved, base, tuned, tolerance=0.01, within_targets=True)
    assert within.passed and within.judged_error == within.relative_error == found.relative_error
    assert "over its own weights, tolerance 0.01: passed" in str(within).splitlines()[0]


def test_what_has_no_measure_is_in_no_error():
    """Integers that differ, and names that one side lacks; masks of infinite entries that agree are no change."""
    base, tuned = tables(0), tables(0)
    base |= {"mask": torch.full((4,), -math.inf), "steps": torch.tensor([1, 2]), "old.weight": torch.ones(2, 2)}
    tuned |= {"mask": torch.full((4,), -math.inf), "steps": torch.tensor([1, 9]), "new.weight": torch.ones(3, 3)}
    tuned["norm.weight"] = tuned["norm.weight"] + 1
    saved = saved_for(tables(0), ["q"])
    zero = Saved.of(saved.plan, {key: torch.zeros_like(tensor) for key, tensor in saved.tensors.items()})
    found = verify(zero, base, tuned)
    assert (found.relative_error, found.whole_error) == (0.0, 1.0) and list(found.changed) == ["norm.weight"]
    assert found.unmeasured == {"steps": "holds int64"}
    assert (found.only_base, found.only_tuned) == (("old.weight",), ("new.weight",))
    text = " ".join(str(found).split())
    assert (
        "1 only in the base, 1 only in the tuned side: old.weight; new.weight" in text and "steps, holds int64" in text
    )


def test_what_changed_beside_the_adapter_is_listed(tmp_path):
    adapter, base, tuned, _ = prepared("lora", tmp_path)
    merged = stored(tuned)
    name = "bert.encoder.layer.1.output.dense.weight"
    merged[name] = merged[name] + 1
    merged["classifier.bias"] = merged["classifier.bias"] - 2
    merged["added.weight"] = torch.ones(2, 2)
    found = verify(adapter, base, merged, tolerance=1e-4, within_targets=True)
    assert found.passed and not verify(adapter, base, merged, tolerance=1e-4).passed
    assert found.changed == pytest.approx(
        {name.removesuffix(".weight"): math.sqrt(16 * 32), "classifier.bias": 12**0.5}
    )
    assert found.only_tuned == ("added.weight",)
    text = str(found)
    assert "changed, and not in the adapter" in text and "1 only in the tuned side: added.weight" in text
    assert text.index("output.dense") < text.index("classifier.bias")


def test_rows_that_the_adapter_does_not_reach_are_listed(tmp_path):
    adapter, base, tuned, _ = prepared("rows", tmp_path)
    merged = stored(tuned)
    name = "transformer.h.0.attn.c_attn.weight"
    merged[name][:, 16:32] += 1  # the keys
    found = verify(adapter, tiny.gpt2(), merged, tolerance=1e-4, within_targets=True)
    assert found.passed and found.changed == pytest.approx({"transformer.h.0.attn.c_attn (other rows)": 16.0})


def test_trained_modules_count(tmp_path):
    adapter, base, tuned, _ = prepared("trained modules", tmp_path)
    merged = stored(tuned)
    merged["classifier.weight"] = merged["classifier.weight"] * 1.5
    found = verify(adapter, base, merged, tolerance=1e-4)
    assert not found.passed and found.sites["classifier.weight"] > 0.1 and found.sites["classifier.bias"] < 1e-6
    del merged["classifier.weight"]
    with pytest.raises(FileError, match="classifier.weight, which was trained whole, is not in"):
        verify(adapter, base, merged)


def test_a_trained_module_that_the_base_lacks(tmp_path):
    adapter, _, tuned, _ = prepared("trained modules", tmp_path)
    tiny.bert().save_pretrained(tmp_path / "headless")
    found = verify(adapter, tmp_path / "headless", tuned, tolerance=1e-4)
    assert found.passed and found.only_tuned == () and "classifier.weight" in found.sites


def test_tied_ends_are_one(tmp_path):
    """An adapter of lm_head, which is stored as the embedding, the other way round."""
    model = tiny.gpt2()
    model.save_pretrained(tmp_path / "base")
    spec = ta.preset("lora", rank=2, targets=["wte", "lm_head"])
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    merge_folder(tmp_path / "base", adapter, tmp_path / "tuned")
    assert verify(adapter, tmp_path / "base", tmp_path / "tuned").relative_error < 1e-5


def test_an_end_of_a_tie_that_the_adapter_knows_nothing_of(tmp_path):
    """An adapter made from shapes alone adapts lm_head; the files have it as the embedding."""
    model = tiny.gpt2()
    model.save_pretrained(tmp_path / "base")
    saved = saved_for({"lm_head.weight": torch.empty(tiny.WORDS, 16)}, ["lm_head"])
    with torch.no_grad():
        model.lm_head.weight += saved.delta("lm_head")
    model.save_pretrained(tmp_path / "tuned")
    found = verify(saved, tmp_path / "base", tmp_path / "tuned")
    assert found.relative_error < 1e-5 and found.changed == {}


def test_extracted_adapters_are_verified(tmp_path):
    """The error that an extraction reports is the one that is found."""
    base = {name: tensor for name, tensor in tables(0).items()}
    tuned = {name: tensor + 0.1 * tables(30)[name] for name, tensor in base.items()}
    result = ta.extract(base, tuned, ta.preset("lora", rank=2, targets=["q"]), tmp_path / "adapter")
    found = verify(tmp_path / "adapter", base, tuned)
    assert found.relative_error == pytest.approx(result.relative_error, rel=1e-4)


def test_an_adapter_of_another_model():
    with pytest.raises(FileError, match=r"2 of the 2 sites(.|\n)*layers.0.q"):
        verify(saved_for(tables(0), ["q"]), {"a.weight": torch.ones(2, 2)}, {"a.weight": torch.ones(2, 2)})
    wide = {name: torch.ones(2 * t.shape[0], *t.shape[1:]) for name, t in tables(0).items()}
    with pytest.raises(FileError, match="another shape"):
        verify(saved_for(tables(0), ["q"]), wide, wide)


def test_options_of_reading_are_passed_on():
    base, tuned = tables(0), tables(9)
    tuned["layers.0.v.weight"][0, 0] = torch.nan
    with pytest.raises(FileError, match="layers.0.v is not finite"):
        verify(saved_for(base, ["q"]), base, tuned)
    found = verify(saved_for(base, ["q"]), base, tuned, nonfinite="skip")
    assert "left out: layers.0.v" in found.notes[-1]


def test_progress_is_told():
    base, told = tables(0), []
    verify(saved_for(base, ["q"]), base, tables(9), progress=lambda *step: told.append(step))
    assert [step[1:] for step in told] == [(0, 3), (1, 3), (2, 3), (3, 3)]  # what is at work, and that all is done


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> list[str]:
    base = tables(0)
    save_file(base, tmp_path / "base.safetensors")
    save_file(tables(9), tmp_path / "tuned.safetensors")
    saved_for(base, ["q"]).save(tmp_path / "adapter")
    return [str(tmp_path / name) for name in ("adapter", "base.safetensors", "tuned.safetensors")]


@pytest.mark.parametrize(("options", "code"), [([], 0), (["--tolerance", "50"], 0), (["--tolerance", "0.01"], 1)])
def test_verify_says_by_its_exit_code_whether_the_tolerance_was_kept(options, code, files, capsys):
    assert run(["verify", *files, *options]) == code
    assert "relative error" in capsys.readouterr().out
    assert run(["verify", *files, *options, "--json"]) == code
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] == (code == 0)
    known = {"relative_error", "whole_error", "judged_error", "held_share", "tolerance", "within_targets", "passed"}
    assert set(found) == known | {"sites", "changed", "unmeasured", "only_base", "only_tuned", "notes"}
    wanted = verify(*files)
    assert found["relative_error"] == pytest.approx(wanted.relative_error)
    assert found["judged_error"] == found["whole_error"] == pytest.approx(wanted.whole_error)


def test_within_targets_on_the_command_line(files, capsys):
    """A tolerance between both errors."""
    found = verify(*files)
    tolerance = str((found.relative_error + found.whole_error) / 2)
    codes = [run(["verify", *files, "--tolerance", tolerance, *more]) for more in ([], ["--within-targets"])]
    assert sorted(codes) == [0, 1] and (codes[0] == 1) == (found.whole_error > found.relative_error)


def test_bad_input_is_not_a_missed_tolerance(files, capsys):
    assert run(["verify", files[0], files[1], "nowhere"]) == 2
    assert run(["verify", *files, "--tolerance", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_verify_has_help(capsys):
    assert run(["verify", "--help"]) == 0
    assert "Example:" in capsys.readouterr().out
