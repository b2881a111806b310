"""Weights that only one side holds: named in every output, never silent, and no target."""

import json
import warnings

import pytest
import tiny
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.errors import FileError, SiteError
from tensoradapt.io.saved import Saved
from tensoradapt.verify import verify


def tower(prefix: str, seed: int) -> dict[str, torch.Tensor]:
    roles = {"q": (8, 6), "v": (8, 6), "up": (8, 8)}
    return {
        f"{prefix}.layers.{k}.{role}.weight": tiny.noise(*size, seed=100 * seed + 3 * k + n)
        for k in range(3)
        for n, (role, size) in enumerate(roles.items())
    }


def moved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t + 0.1 * tiny.noise(*t.shape, seed=n + 1) for n, (name, t) in enumerate(state.items())}


BASE = tower("text", 1) | tower("vision", 2) | {"norm.weight": torch.ones(8)}
EXPERTS = {f"m.layers.{k}.experts.{e}.up.weight": tiny.noise(8, 6, seed=9 * k + e) for k in range(2) for e in range(3)}
DENSE = {f"m.layers.{k}.q.weight": tiny.noise(6, 6, seed=50 + k) for k in range(7)}
FUSED = {
    f"m.layers.{k}.experts.up": torch.stack([moved(EXPERTS)[f"m.layers.{k}.experts.{e}.up.weight"] for e in range(3)])
    for k in range(2)
}
RENAMED = {name.replace("vision.", "tower."): tensor for name, tensor in BASE.items()}
# Two sides that have some of their names in common; what changed lies among the others: base, tuned, a name of each.
EQUAL = {
    "a renamed tower": (
        BASE,
        {name: moved({name: t})[name] if "tower" in name else t for name, t in RENAMED.items()},
        ("vision.layers.0.q.weight", "tower.layers.0.q.weight"),
    ),
    "experts fused on one side": (
        DENSE | EXPERTS,
        DENSE | FUSED,
        ("m.layers.0.experts.0.up.weight", "m.layers.0.experts.up"),
    ),
    "experts fused on the other": (
        DENSE | {name: tensor - 1 for name, tensor in FUSED.items()},
        DENSE | EXPERTS,
        ("m.layers.0.experts.up", "m.layers.0.experts.0.up.weight"),
    ),
}


def written(sides, place) -> list[str]:
    for name, state in zip(("base", "tuned"), sides, strict=True):
        save_file({n: t.contiguous().clone() for n, t in state.items()}, place / f"{name}.safetensors")
    return [str(place / f"{name}.safetensors") for name in ("base", "tuned")]


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("case", EQUAL)
def test_nothing_is_said_to_be_equal_where_half_is_not_compared(case, tmp_path, capsys):
    """The line of counts and names in text, JSON and page; the words and exit codes are not those of equality."""
    base, tuned, names = EQUAL[case]
    files = written((base, tuned), tmp_path)
    lone = [len(set(one) - set(two)) for one, two in ((base, tuned), (tuned, base))]
    line = f"{lone[0]} only in the base, {lone[1]} only in the tuned side: "
    assert run(["analyze", *files, "--out", str(tmp_path / "report")]) == 1
    out, err = map(flat, capsys.readouterr())
    page = flat((tmp_path / "report" / "report.html").read_text())
    for text in (out, err, page):
        assert line in text and all(name in text for name in names)
        assert "no weight differs" not in text and "checkpoints are equal" not in text
    assert out.startswith("What rank is it? not known: the weights that both sides hold are equal")
    assert run(["analyze", *files, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [len(report["match"][key]) for key in ("only_base", "only_tuned")] == lone
    for goal in ([], ["--error", "0.1"], ["--dry-run"]):
        assert run(["extract", *files, "--preset", "lora", *goal, "--out", str(tmp_path / "a")]) == 2
        out, err = map(flat, capsys.readouterr())
        assert line in err and "nothing to extract" not in out + err
        assert f"{names[0]} in the base may be {names[1].partition('.')[0]}" in err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("case", EQUAL)
@pytest.mark.filterwarnings("ignore:only .* weights have a counterpart")
def test_a_target_that_one_side_lacks_is_an_error(case, tmp_path):
    base, tuned, names = EQUAL[case]
    tuned = moved(tuned)
    target = "q" if "tower" in case else "up"
    spec = ta.preset("lora", rank=2, targets=[target])
    with pytest.raises(SiteError, match="that only one side holds") as caught:
        ta.extract(base, tuned, spec, tmp_path / "a")
    assert all(name in str(caught.value) for name in names) and "prefix=" in str(caught.value)
    apart = ["re:(vision|tower).*"] if "tower" in case else []
    result = ta.extract(base, tuned, ta.preset("lora", rank=2, targets=["q"], exclude=apart), tmp_path / "a")
    assert len(result.report["sites"]) == (3 if "tower" in case else 7)
    assert result.change.only_base and result.change.only_tuned


def test_what_both_sides_hold_is_extracted_beside_what_they_do_not(tmp_path, capsys):
    base, tuned, (one, two) = BASE, moved(RENAMED), EQUAL["a renamed tower"][2]
    files = written((base, tuned), tmp_path)
    assert run(["extract", *files, "--preset", "lora", "--rank", "4", "--out", str(tmp_path / "a")]) == 0
    out, err = map(flat, capsys.readouterr())
    line = "9 only in the base, 9 only in the tuned side: "
    assert line in out and line in err and err.count("warning: only 9 of 18 weights have a counterpart") == 1
    assert "over the whole change" in out and "1-D: a norm, a bias or a scale: norm.weight" in out
    found = json.loads((tmp_path / "a" / "extraction.json").read_text())
    assert one in found["change"]["only_base"] and two in found["change"]["only_tuned"]
    assert sorted(found["sites"]) == sorted(n.removesuffix(".weight") for n in base if n.startswith("text"))
    assert run(["verify", str(tmp_path / "a"), *files, "--tolerance", "1"]) == 0
    out, err = map(flat, capsys.readouterr())
    assert line in out and "warning: only 9 of 18" in err
    assert run(["verify", str(tmp_path / "a"), *files, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["only_tuned"]) == 9


def test_a_new_head_is_no_cause_for_alarm(tmp_path, capsys):
    """An unchanged body under a new head: what both hold is equal, which is said, and the head is named."""
    files = written((BASE, BASE | {"classifier.weight": tiny.noise(3, 8)}), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(["extract", *files, "--preset", "lora", "--out", str(tmp_path / "a")]) == 0
    out = flat(capsys.readouterr().out)
    assert "what both checkpoints hold is equal" in out and "1 only in the tuned side: classifier.weight" in out
    assert "the checkpoints are equal" not in out
    assert run(["analyze", *files]) == 0
    out = flat(capsys.readouterr().out)
    assert "no weight differs" not in out and "1 only in the tuned side: classifier.weight" in out
    with pytest.raises(SiteError, match=r"targets mean 1 weight that only one side holds(.|\n)*classifier"):
        ta.extract(*files, ta.preset("lora", targets=["q", "classifier"]), tmp_path / "a")


def test_verify_does_not_call_half_of_two_models_equal():
    plan = ta.plan(ta.preset("lora", rank=1, targets=["text.layers.0.q"]), {"text.layers.0.q": (8, 6)})
    zero = Saved.of(plan, {key: torch.zeros(f.shape) for key, f in plan.factors.items()})
    with pytest.warns(UserWarning, match="only 9 of 18 weights have a counterpart"):
        said = flat(str(verify(zero, BASE, EQUAL["a renamed tower"][1])))
    assert "the checkpoints are equal" not in said and "9 only in the base, 9 only in the tuned side" in said


@pytest.mark.parametrize("form", ["module", "state dict"])
def test_an_adapter_that_is_not_merged_is_no_tuned_model(form, tmp_path):
    base, tuned = tiny.llama(1), tiny.llama(1)
    adapter = ta.attach(tuned, ta.preset("lora", rank=2, targets=["q_proj"]))
    tiny.shake(adapter)
    given = (lambda: tuned) if form == "module" else (lambda: dict(tuned.state_dict()))
    for act in (lambda: ta.analyze(base, given()), lambda: ta.extract(base, given(), "lora", tmp_path / "a")):
        with pytest.raises(FileError, match=r"not merged(.|\n)*adapter\.merge"):
            act()
    adapter.merge()
    assert ta.extract(base, given(), ta.preset("lora", rank=2), tmp_path / "a").whole_error < 1e-5
    adapter.unmerge()
    assert ta.analyze(given(), base).answer is None  # a base's own weights are what they are


def test_what_no_adapter_reaches_is_refused_with_the_reason(tmp_path):
    """Weights of a fused kernel are matrices in a file; the model that they are loaded onto tells what they are."""
    model = torch.nn.ModuleDict({"rnn": torch.nn.GRU(4, 4), "out": torch.nn.Linear(4, 4)})
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ta.extract(state, moved(state), ta.preset("lora", rank=2), tmp_path / "a")
    with pytest.raises(FileError, match=r"no adapter can change in this model(.|\n)*GRU hands its weights"):
        ta.load(tmp_path / "a", model)
