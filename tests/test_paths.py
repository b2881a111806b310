"""`~` stands for the home folder wherever a path is taken, and a hub id for its folder in the local cache."""

import json

import huggingface_hub
import pytest
import tiny
import torch
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.paths import expand

LORA = ["--preset", "lora", "--rank", "2", "--target", "q"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with two checkpoints, an adapter between them, and its report; the working folder is another."""
    torch.manual_seed(0)
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    base = {f"layers.{k}.q.weight": torch.randn(12, 10) for k in range(2)}
    tuned = {name: value + torch.randn(12, 2) @ torch.randn(2, 10) for name, value in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (home / name).mkdir(parents=True)
        save_file(state, home / name / "model.safetensors")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    spec = ta.preset("lora", rank=2, targets=["q"])
    ta.extract(base, tuned, spec, "~/adapter")
    ta.analyze("~/base", "~/tuned").to_json("~/report/report.json")
    spec.save("~/spec.yaml")
    yield home
    assert list(elsewhere.iterdir()) == []


COMMANDS = {
    "plan --model=~/base": LORA,
    "plan --model=~/base --spec=~/spec.yaml": [],
    "budget --model=~/base --ranks 1:2 --out=~/OUT.csv --preset lora --target q": [],
    "budget --model=~/base --ranks 1:2 --out=~/OUT.png --preset lora --target q": [],
    "analyze ~/base ~/tuned --out=~/OUT": [],
    "extract ~/base ~/tuned --out=~/OUT": LORA,
    "convert ~/adapter --out=~/OUT": ["--preset", "lotr", "--rank", "4"],
    "export ~/adapter --model=~/base --out=~/OUT": [],
    "merge ~/base ~/adapter --out=~/OUT": [],
    "verify ~/adapter ~/base ~/tuned": [],
    "plot ~/report --figure spectra --out=~/OUT.png": [],
    "plot ~/report/report.json --out=~/OUT": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_the_home_folder(command, home, capsys):
    assert run([*command.split(), *COMMANDS[command]]) == 0, capsys.readouterr().err
    assert list(home.glob("OUT*")) or "OUT" not in command


def test_functions_take_the_home_folder(home):
    saved = ta.open_adapter("~/adapter")
    ta.export_peft("~/adapter", "~/peft")
    assert ta.import_peft("~/peft").plan.num_trainable == saved.plan.num_trainable
    assert ta.Spec.load("~/spec.yaml") == ta.preset("lora", rank=2, targets=["q"])
    ta.merge_folder("~/base", "~/adapter", "~/merged")
    table = ta.budget(ta.Spec.load("~/spec.yaml"), "~/base", [1, 2])
    ta.plots.plot_budget(table, "~/budget.svg")
    ta.analyze("~/base", "~/tuned").to_html("~/report.html")
    model = tiny.llama()
    ta.attach(model, ta.preset("lora", rank=1, targets=["q_proj"])).save("~/mine")
    assert {f"{name}" for name in ("merged", "budget.svg", "report.html", "mine")} <= {f.name for f in home.iterdir()}


def test_a_user_that_there_is_none_of_is_a_path_like_any_other(home):
    assert str(expand("~nobody-here/x")) == "~nobody-here/x"
    for act in (lambda: ta.analyze("~0", "~/tuned"), lambda: ta.plan(ta.preset("lora"), "~0")):
        with pytest.raises(ta.FileError, match="at ~0"):
            act()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache: two revisions of a model's config, and weights by themselves; the network is not asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    for name, commit, layers in (("main", "a" * 40, 2), ("v2", "b" * 40, 3)):
        snapshot = tmp_path / "models--org--name/snapshots" / commit
        tiny.llama(layers).config.save_pretrained(snapshot)
        ref = tmp_path / "models--org--name/refs" / name
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(commit)
    snapshot = tmp_path / "models--org--weights/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--weights/refs").mkdir()
    (tmp_path / "models--org--weights/refs/main").write_text("a" * 40)
    save_file({"layers.0.q.weight": torch.zeros(4, 6)}, snapshot / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(("model", "sites"), [("org/name", 2), ("org/name@v2", 3), ("org/weights", 1)])
def test_a_plan_is_made_of_a_cached_model(model, sites, cache, capsys):
    target = "q" if model == "org/weights" else "q_proj"
    plan = ta.plan(ta.preset("lora", rank=1, targets=[target]), model)
    assert (plan.num_sites, plan.model) == (sites, model)
    assert run(["plan", "--model", model, "--preset", "lora", "--rank", "1", "--target", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_trainable"] == plan.num_trainable
    assert run(["budget", "--model", model, "--preset", "lora", "--target", target, "--ranks", "1:2"]) == 0


def test_what_is_neither_a_path_nor_cached_says_how_to_download_it(cache, capsys):
    for model, command in (("org/other", "hf download org/other"), ("org/name@v3", "org/name --revision v3")):
        assert run(["plan", "--model", model, *LORA]) == 2
        assert command in capsys.readouterr().err
        with pytest.raises(ta.FileError, match=command):
            ta.plan(ta.preset("lora"), model)
    for model in ("./org/name", "nowhere/model.safetensors", "nowhere/config.json", "a/b/c"):
        with pytest.raises(ta.FileError, match="no model at"):
            ta.plan(ta.preset("lora"), model)
