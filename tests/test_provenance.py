"""What files say of where they come from: a hub id or a folder's own name, a fingerprint of the base, and no more."""

import copy
import json
import sys
import warnings

import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.io.base import SAMPLES, samples
from tensoradapt.io.native import FILE
from tensoradapt.paths import Origin, origin

SPEC = ta.preset("lora", rank=2, targets=["all-linear"])
MAKES = {make.__name__: make for make in (tiny.bert_classifier, tiny.gpt2, tiny.llama, tiny.mixtral, tiny.t5)}
SECRET = "the-home-of-somebody"


def tuned_of(model):
    """The same with other weights in its layers: changes of rank one."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                a, b = (torch.randn(n, 1, generator=generator) for n in parameter.shape[-2:])
                parameter += 0.05 * a @ b.T
    return model


@pytest.fixture
def home(tmp_path):
    """A home with a base and a tuned model of it, whose names no file may have."""
    home = tmp_path / SECRET
    model = tiny.bert_classifier()
    model.save_pretrained(home / "models" / "base")
    tuned_of(model).save_pretrained(home / "models" / "tuned")
    (home / "out").mkdir()
    return home


def header(path):
    with safe_open(path, "pt") as opened:
        return opened.metadata()


def base_of(path):
    return json.loads(header(path / FILE if path.is_dir() else path)["base"])


def leaks(folder):
    """The files under a folder that have its place in them, as text or as JSON."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    assert files
    return [str(file) for file in files if SECRET.encode() in file.read_bytes()]


COMMANDS = {
    "plan": "plan --model {h}/models/base --preset lora --rank 2 --target query --out {h}/out/spec.yaml",
    "budget": "budget --model {h}/models/base --preset lora --target query --ranks 1:3 --out {h}/out/budget.svg",
    "budget as pdf": "budget --model {h}/models/base --preset lora --target query --ranks 1:3 --out {h}/out/budget.pdf",
    "analyze": "analyze {h}/models/base {h}/models/tuned --out {h}/out/report",
    "analyze a set": "analyze --adapter {h}/out/adapter --adapter {h}/out/again --out={h}/out/set",
    "extract": "extract {h}/models/base {h}/models/tuned --preset lora --rank 1 --target query --out {h}/out/adapter",
    "extract again": "extract {h}/models/base {h}/models/tuned --preset=lora --rank=1 --out={h}/out/again",
    "convert": "convert {h}/out/adapter --preset lotr --rank 2 --out {h}/out/converted",
    "export": "export {h}/out/adapter --to peft --model {h}/models/base --out {h}/out/peft",
    "merge": "merge {h}/models/base {h}/out/adapter --out {h}/out/merged",
    "import": "convert {h}/out/peft --preset lora --rank 1 --out {h}/out/imported",
    "verify": "verify {h}/out/adapter {h}/models/base {h}/models/tuned --tolerance 9 --json",
    "info": "info {h}/out/adapter",
    "plot": "plot {h}/out/report/report.json --out {h}/out/figures",
    "plot one": "plot {h}/out/report/report.json --figure spectra --out {h}/out/spectra.svg",
}


def test_no_file_that_a_command_writes_tells_where_it_was(home, capsys, monkeypatch):
    order = sorted(COMMANDS, key=lambda name: ("extract" not in name, "export" not in name, "plot" in name))
    for name in order:
        words = COMMANDS[name].format(h=home).split()
        monkeypatch.setattr(sys, "argv", ["tensoradapt", *words])
        assert run(words) == 0, (name, capsys.readouterr().err)
    assert leaks(home) == []
    written = {file.name for file in (home / "out").rglob("*")}
    assert {"extraction.json", "report.html", "report.json", "README.md", "adapter_config.json"} <= written


def test_no_file_that_a_live_model_leads_to_tells_where_it_was(home):
    load = tiny.bert_classifier().from_pretrained
    model, tuned, out = load(home / "models/base"), load(home / "models/tuned"), home / "out"
    adapter = ta.attach(model, SPEC)
    tiny.shake(adapter)
    adapter.save(out / "saved")
    adapter.save(out / "alone.safetensors")
    ta.export_peft(adapter, out / "peft")
    ta.convert(adapter, ta.preset("lora", rank=1), out / "converted")
    ta.import_peft(out / "peft", model=model, out=out / "imported")
    ta.extract(load(home / "models/base"), tuned, SPEC, out / "extracted")
    report = ta.analyze(load(home / "models/base"), tuned)
    report.to_json(out / "report.json")
    report.to_html(out / "report.html")
    adapter.plan.spec.save(out / "spec.yaml")
    assert leaks(home) == []
    for name in ("saved", "alone.safetensors", "converted", "extracted"):
        assert (base_of(out / name)["name"], base_of(out / name)["hub"]) == ("base", False), name


@pytest.mark.parametrize("unknown", [False, True])
def test_notes_in_reports_are_without_paths(unknown, home):
    config = home / "models/tuned/config.json"
    config.write_text(json.dumps({"model_type": "nobody-knows"}) if unknown else "{")
    (home / "models/base/config.json").unlink()
    report = ta.analyze(home / "models/base", home / "models/tuned")
    report.to_html(home / "out/report.html")
    report.to_json(home / "out/report.json")
    assert any("layouts" in note for note in report.match["notes"])
    ta.extract(home / "models/base", home / "models/tuned", SPEC, home / "out/adapter")
    assert leaks(home) == []


# -- names -------------------------------------------------------------------------------------------------------------

ORIGINS = {
    "org/name": Origin("org/name", "", hub=True),
    "org/name@v2": Origin("org/name", "v2", hub=True),
    "gpt2": Origin("gpt2", "", hub=True),
    "/home/me/model": Origin("model"),
    "/home/me/model/": Origin("model"),
    "/home/me/model/config.json": Origin("model"),
    "~/models/mine": Origin("mine"),
    "./org/name": Origin("name"),
    "../name": Origin("name"),
    "a/b/c": Origin("c"),
    "C:\\Users\\me\\model": Origin("model"),
    "/x/hub/models--org--name/snapshots/abc/": Origin("org/name", "abc", hub=True),
    "/x/models--gpt2/snapshots/abc/model.safetensors": Origin("gpt2", "abc", hub=True),
    "/x/two\nlines\t here": Origin("two lines here"),
}


@pytest.mark.parametrize("given", ORIGINS, ids=repr)
def test_an_origin_is_a_hub_id_or_a_name(given):
    assert origin(given) == ORIGINS[given]


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.bert_classifier().save_pretrained("org/name")
    tiny.bert_classifier().save_pretrained("gpt2")
    for given in ("org/name", "gpt2"):
        model = type(tiny.bert_classifier()).from_pretrained(given)
        adapter = ta.attach(model, SPEC)
        tiny.shake(adapter)
        adapter.save("saved")
        ta.export_peft("saved", "peft", overwrite=True)
        monkeypatch.chdir(tmp_path)
        said = base_of(tmp_path / "saved")
        assert (said["name"], said["hub"]) == (given.rpartition("/")[2], False)
        assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] is None
        assert "base_model:" not in (tmp_path / "saved/README.md").read_text()
        assert ta.plan(SPEC, given).model == said["name"]


@pytest.mark.parametrize("given", ["org/name", "gpt2"])
def test_a_hub_id_stays_one(given, tmp_path, monkeypatch):
    model = tiny.bert_classifier()
    model.config._name_or_path = given
    adapter = ta.attach(model, SPEC)
    tiny.shake(adapter)
    adapter.save(tmp_path / "saved")
    (tmp_path / "here" / given).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")  # a folder of the same name does not change what was known
    ta.convert(tmp_path / "saved", ta.preset("lora", rank=1), tmp_path / "converted")
    for name in ("saved", "converted"):
        ta.export_peft(tmp_path / name, tmp_path / "peft", overwrite=True)
        assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == given
        assert f"base_model: {given}" in (tmp_path / name / "README.md").read_text()
    ta.import_peft(tmp_path / "peft", out=tmp_path / "imported")
    monkeypatch.chdir(tmp_path)
    assert (base_of(tmp_path / "converted")["name"], base_of(tmp_path / "converted")["hub"]) == (given, True)


@pytest.mark.parametrize("known", ["base", "tuned", "neither"])
def test_an_extraction_names_the_base(known, home):
    for side in {"base", "tuned"} - {known}:
        (home / "models" / side / "config.json").unlink()
    result = ta.extract(home / "models/base", home / "models/tuned", ta.preset("lora", rank=1), home / "out/adapter")
    said = base_of(home / "out/adapter")
    record = json.loads((home / "out/adapter/extraction.json").read_text())
    assert (result.plan.model, said["name"], record["base"], record["tuned"]) == ("base", "base", "base", "tuned")
    assert "# Adapter of base" in (home / "out/adapter/README.md").read_text()


def test_a_name_that_no_text_can_hold_is_written(tmp_path):
    name = b"caf\xe9\nbase_model: evil".decode("utf-8", "surrogateescape")
    model = tiny.bert_classifier()
    model.config._name_or_path = str(tmp_path / name)
    ta.attach(model, SPEC).save(tmp_path / "saved")
    assert ta.open_adapter(tmp_path / "saved").base["name"] == "caf? base_model: evil"
    assert "\nbase_model" not in (tmp_path / "saved/README.md").read_text()


# -- fingerprints ------------------------------------------------------------------------------------------------------


def said(act):
    """The warnings that speak of another base."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if "another base" in str(w.message)]


@pytest.fixture(params=MAKES)
def made(request, tmp_path):
    """A model's folder, and an adapter that was made on the loaded model."""
    torch.manual_seed(0)
    model = MAKES[request.param]()
    model.save_pretrained(tmp_path / "base")
    adapter = ta.attach(model, SPEC)
    tiny.shake(adapter)
    adapter.save(tmp_path / "adapter")
    return type(model), tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_base_is_the_same_base(dtype, made):
    kind, folder = made
    model = kind.from_pretrained(folder / "base", dtype=dtype)
    assert said(lambda: ta.load(folder / "adapter", model)) == []
    model.save_pretrained(folder / "cast")
    assert said(lambda: ta.merge_folder(folder / "cast", folder / "adapter", folder / "merged")) == []
    cast = kind.from_pretrained(folder / "cast", dtype=dtype)
    adapter = ta.attach(cast, SPEC)
    tiny.shake(adapter)
    adapter.save(folder / "of_cast")
    for again in (torch.float32, dtype, torch.bfloat16):
        assert said(lambda to=again: ta.load(folder / "of_cast", kind.from_pretrained(folder / "base", dtype=to))) == []
    assert said(lambda: ta.merge_folder(folder / "base", folder / "of_cast", folder / "merged_too")) == []


def test_a_live_model_and_its_folder_have_one_fingerprint(made):
    kind, folder = made
    model = kind.from_pretrained(folder / "base")
    tuned_of(model).save_pretrained(folder / "tuned")
    for size in ("40KB", "5GB"):
        model.save_pretrained(folder / size, max_shard_size=size)
        result = ta.extract(folder / size, folder / "tuned", SPEC, folder / f"extracted_{size}")
        assert result.path is not None
        assert base_of(folder / f"extracted_{size}")["weights"] == base_of(folder / "adapter")["weights"]
        assert said(lambda at=size: ta.merge_folder(folder / at, folder / "adapter", folder / f"merged_{at}")) == []
        assert said(lambda at=size: ta.verify(folder / "adapter", folder / at, folder / "tuned")) == []


def test_another_base_is_told_of_wherever_one_is_at_hand(made):
    kind, folder = made
    model = tuned_of(kind.from_pretrained(folder / "base"))
    model.save_pretrained(folder / "other")
    acts = {
        "load": lambda: ta.load(folder / "adapter", copy.deepcopy(model)),
        "merge": lambda: ta.merge_folder(folder / "other", folder / "adapter", folder / "merged"),
        "verify": lambda: ta.verify(folder / "adapter", folder / "other", folder / "base"),
    }
    for name, act in acts.items():
        (line,) = said(act)
        assert "not as they were" in line and "give the base" in line, name


def test_a_merged_adapter_makes_another_base(made):
    kind, folder = made
    model = kind.from_pretrained(folder / "base")
    first = ta.load(folder / "adapter", model)
    first.merge()
    assert len(said(lambda: ta.load(folder / "adapter", model, name="second"))) == 1
    first.unmerge()
    assert said(lambda: ta.load(folder / "adapter", model, name="third")) == []
    first.merge()
    first.save(folder / "merged_when_saved")
    assert base_of(folder / "merged_when_saved")["weights"] == base_of(folder / "adapter")["weights"]


def test_a_small_change_of_every_weight_is_seen(made):
    kind, folder = made
    model = kind.from_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 2**-9
    assert len(said(lambda: ta.load(folder / "adapter", model))) == 1


def test_what_stays_of_an_adapter_keeps_its_fingerprint(made):
    kind, folder = made
    before = base_of(folder / "adapter")
    ta.convert(folder / "adapter", ta.preset("lora", rank=2), folder / "converted")
    ta.open_adapter(folder / "adapter").save(folder / "copied")
    ta.load(folder / "adapter", kind.from_pretrained(folder / "base")).save(folder / "loaded")
    for name in ("converted", "copied", "loaded"):
        assert base_of(folder / name)["weights"] == before["weights"], name


def test_names_with_a_prefix_more_or_less_are_the_same_weights(tmp_path):
    model = tiny.bert_classifier()
    ta.attach(copy.deepcopy(model).bert, ta.preset("lora", rank=1, targets=["query"])).save(tmp_path / "inner")
    assert said(lambda: ta.load(tmp_path / "inner", copy.deepcopy(model))) == []
    assert len(said(lambda: ta.load(tmp_path / "inner", tuned_of(model)))) == 1


def test_files_without_a_fingerprint_load_in_silence(tmp_path):
    model = tiny.bert_classifier()
    adapter = ta.attach(copy.deepcopy(model), SPEC)
    tiny.shake(adapter)
    adapter.save(tmp_path / "a")
    tensors, metadata = load_file(tmp_path / "a" / FILE), header(tmp_path / "a" / FILE)
    for base in ({"name": "/home/me/model", "revision": ""}, {}):
        (tmp_path / "old").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "old" / FILE, metadata=metadata | {"base": json.dumps(base)})
        assert said(lambda: ta.load(tmp_path / "old", tuned_of(model))) == []
        ta.open_adapter(tmp_path / "old").save(tmp_path / "again")
        assert b"/home/me" not in (tmp_path / "again" / FILE).read_bytes()


@pytest.mark.parametrize("layers", [8, 64, 80])
def test_every_role_is_looked_at_in_a_large_model(layers):
    model = nn.ModuleList(nn.ModuleDict({f"r{k}": nn.Linear(4, 4) for k in range(7)}) for _ in range(layers))
    adapter = ta.attach(model, SPEC)
    found = list(adapter.base["weights"])
    assert {path.rpartition(".")[2] for path in found} == {f"r{k}" for k in range(7)} and 48 <= len(found) <= 64
    assert len({path.partition(".")[0] for path in found}) > min(layers, 64) // 2


def test_a_fingerprint_reads_a_few_entries_alone():
    """Of a weight that is larger than memory: its pages are made up as they are read."""
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    assert samples(huge).shape == (SAMPLES,)
    square = torch.arange(35.0).reshape(5, 7)
    taken = samples(square)
    golden = [((k * 0x9E3779B97F4A7C15) % 2**64 * 35) // 2**64 for k in range(1, SAMPLES + 1)]
    assert np.array_equal(taken.numpy(), np.arange(35.0)[golden]) and len(set(golden)) > SAMPLES // 2
    assert torch.equal(samples(square.T.contiguous().T), taken)  # however it lies in memory
