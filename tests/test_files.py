"""Adapter files: what is saved is loaded, damage is named, and a failure leaves file and model as they were."""

import errno
import json
import os
import random
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.io import native
from tensoradapt.writing import atomic

IDS, X = tiny.tokens(), tiny.noise(2, 5, 8)
QV = ["query", "value"]
LAYER = "encoder.layer.0.attention.self"


def hidden(model):
    return model(input_ids=IDS)[0]


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, groups=2))


def fused():
    return tiny.gpt2()


CASES = {
    "lora": (tiny.bert, ta.preset("lora", rank=2, targets=QV), hidden),
    "lotr": (tiny.bert, ta.preset("lotr", rank=2, targets=QV), hidden),
    "lotr in bfloat16": (tiny.bert, ta.preset("lotr", rank=2, targets=QV, dtype="bfloat16"), hidden),
    "two rules": (
        tiny.bert,
        ta.preset("lotr", rank=2, targets=QV) + ta.preset("lora", rank=3, targets=["output.dense"], dropout=0.1),
        hidden,
    ),
    "heads": (tiny.llama, ta.preset("lorta", rank=2, targets=["q_proj", "o_proj"]), hidden),
    "a frozen start": (tiny.bert, ta.preset("quanta", folds="auto:2", targets=QV), hidden),
    "a start from the weights": (tiny.bert, ta.preset("dota", rank=2, folds="auto:2", targets=QV), hidden),
    "frozen nodes from the weights": (tiny.bert, ta.preset("lora_xs", rank=2, targets=QV), hidden),
    "a bank of slices": (tiny.bert, ta.preset("vera", rank=4, targets=[*QV, "intermediate.dense"]), hidden),
    "slots": (tiny.bert, ta.preset("fact_tt", rank=2, targets=[*QV, "intermediate.dense"]), hidden),
    "kronecker factors": (tiny.bert, ta.preset("lokr", rank=1, targets=QV), hidden),
    "extra modules": (
        tiny.bert_classifier,
        ta.preset("lora", rank=2, targets=QV, train=["classifier", "pooler"]),
        hidden,
    ),
    "convolutions": (
        convolutions,
        ta.preset("locon", rank=2, targets=["0"]) + ta.preset("lora", rank=1, targets=["1"]),
        lambda model: model(tiny.noise(1, 2, 6, 6)),
    ),
    "rows": (fused, ta.preset("lora", rank=2, targets=["c_attn[v]"], parts={"c_attn": ["q", "k", "v"]}), hidden),
    "experts": (tiny.mixtral, ta.preset("lotr", rank=2, targets=["gate_up_proj", "down_proj"]), hidden),
    "a tie": (tiny.gpt2, ta.preset("lora", rank=2, targets=["wte", "lm_head"]), hidden),
    "embeddings": (tiny.bert, ta.preset("lora", rank=2, targets=["word_embeddings"]), hidden),
}


def attached(case="lora", seed=0):
    make, spec, call = CASES[case]
    model = make()
    adapter = ta.attach(model, spec, seed=seed)
    tiny.shake(adapter, seed=seed)
    return model, adapter, call


@pytest.fixture
def saved(tmp_path) -> Path:
    """A saved adapter of a two-layer BERT."""
    return attached()[1].save(tmp_path / "adapter")


def unchanged(model: nn.Module, call) -> None:
    """Load fails, and the model is what it was."""
    modules, hooks = list(model.modules()), [len(m._forward_hooks) for m in model.modules()]
    base, flags = tiny.base_of(model), [p.requires_grad for p in model.parameters()]
    call(model)
    assert list(model.modules()) == modules and [len(m._forward_hooks) for m in modules] == hooks
    assert tiny.same(base, tiny.base_of(model)) and [p.requires_grad for p in model.parameters()] == flags


def refused(file: Path, says: str, model: nn.Module | None = None) -> None:
    """Loading is a FileError with this text, and leaves the model as it was."""

    def load(model):
        with pytest.raises(ta.FileError, match=says):
            ta.load(file, model)

    unchanged(model or tiny.bert(), load)


def rewritten(file: Path, change=None, metadata=None) -> Path:
    """The file with its tensors and metadata changed, and no checksums (as by another tool)."""
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    header.pop("crc32", None)
    tensors = load_file(file)
    if change is not None:
        change(tensors)
    if metadata is not None:
        metadata(header)
    save_file(tensors, file, metadata=header)
    return file


def contents(file: Path) -> tuple[dict, bytes]:
    """The header, whose order safetensors leaves to chance, and the bytes behind it."""
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:end]), raw[end:]


# -- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_loaded(case, tmp_path):
    model, adapter, call = attached(case)
    file = adapter.save(tmp_path / "a")
    assert file == tmp_path / "a" / "adapter.safetensors" and sorted(os.listdir(tmp_path / "a")) == [
        "README.md",
        file.name,
    ]
    other = CASES[case][0]()
    loaded = ta.load(tmp_path / "a", other)
    assert torch.equal(call(other), call(model))
    assert tiny.same(loaded.state_dict(), adapter.state_dict())
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
        n: p.requires_grad for n, p in adapter.named_parameters()
    }
    assert loaded.plan.to_dict() == adapter.plan.to_dict()
    again = loaded.save(tmp_path / "b")
    assert contents(again) == contents(file)


@pytest.mark.parametrize("case", ["lotr", "a frozen start", "extra modules", "rows"])
def test_training_goes_on_from_a_file(case, tmp_path):
    model, adapter, call = attached(case)
    adapter.save(tmp_path)
    other = CASES[case][0]()
    results = []
    for net, mine in ((model, adapter), (other, ta.load(tmp_path, other))):
        optimiser = torch.optim.SGD([p for p in mine.parameters() if p.requires_grad], lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            (call(net) * torch.linspace(-1, 1, call(net).numel()).view_as(call(net))).sum().backward()
            optimiser.step()
        results.append({n: p.detach() for n, p in mine.named_parameters()})
    assert all(torch.allclose(results[0][n], results[1][n], atol=1e-6) for n in results[0])
    assert any(not torch.equal(t, load_file(native.file_of(tmp_path))[k]) for k, t in adapter.tensors().items())


def test_the_scale_that_was_set_is_part_of_what_is_saved(tmp_path):
    model, adapter, call = attached("two rules")
    adapter.scale = 0.25
    other = tiny.bert()
    loaded = ta.load(adapter.save(tmp_path), other)
    assert torch.allclose(call(other), call(model), atol=1e-6)
    assert loaded.scale * next(iter(loaded.groups.values())).scale == 0.25 * next(iter(adapter.groups.values())).scale


def test_a_merged_adapter_is_saved_as_it_is(tmp_path):
    model, adapter, call = attached()
    before = call(model)
    adapter.merge()
    other = tiny.bert()
    assert not ta.load(adapter.save(tmp_path), other).merged
    assert torch.equal(call(other), before)


def test_an_adapter_that_changed_its_dtype(tmp_path):
    model, adapter, call = attached("lotr")
    model.to(torch.bfloat16)
    other = tiny.bert().to(torch.bfloat16)
    loaded = ta.load(adapter.save(tmp_path), other)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(call(other), call(model))


def test_loading_beside_another_adapter(saved):
    model, first, call = attached(seed=1)
    one = call(model)
    second = ta.load(saved, model, name="second")
    assert not torch.equal(call(model), one)
    with pytest.raises(ta.AdapterError, match="has an adapter 'second' already"):
        ta.load(saved, model, name="second")
    second.detach()
    assert torch.equal(call(model), one)


def test_a_file_or_its_folder(tmp_path):
    _, adapter, _ = attached()
    assert adapter.save(tmp_path / "x" / "y" / "mine.safetensors") == tmp_path / "x" / "y" / "mine.safetensors"
    assert adapter.save(str(tmp_path / "folder")) == tmp_path / "folder" / "adapter.safetensors"
    for path in (tmp_path / "x/y/mine.safetensors", str(tmp_path / "folder"), tmp_path / "folder/adapter.safetensors"):
        ta.load(path, tiny.bert())


# -- the format, read without this library ----------------------------------------------------------------------------


def test_the_file_explains_itself(tmp_path):
    """By safetensors, json and einsum alone: every factor once, and from them every delta."""
    _, adapter, _ = attached("two rules")
    adapter.scale = 0.5
    with safe_open(adapter.save(tmp_path), "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}
    plan = json.loads(metadata["tensoradapt"])
    assert metadata["version"] == "1" and json.loads(metadata["base"])["name"] == "BertModel"
    assert sum(t.numel() for t in tensors.values()) == adapter.plan.num_parameters == plan["num_parameters"]
    seen = set()
    for group in plan["groups"]:
        nodes, axes = group["diagram"]["nodes"], group["diagram"]["open"]
        letters = {name: chr(97 + k) for k, name in enumerate(group["diagram"]["sizes"])}
        spelled = ["".join(letters[i] for i in indices) for indices in nodes.values()]
        factors = [tensors[group["store"][node]] for node in nodes]
        whole = torch.einsum(f"{','.join(spelled)}->{''.join(letters[a] for a in axes)}", *factors)
        for site in group["sites"]:
            part = whole[tuple(site["place"].get(axis, slice(None)) for axis in axes)]
            assert [a for a in axes if a not in site["place"]] == ["out", "in"]
            assert torch.allclose(group["scale"] * part, adapter.delta(site["path"]), atol=1e-5)
            seen.add(site["path"])
    assert len(seen) == adapter.plan.num_sites == 8


def test_keys_are_groups_and_nodes(tmp_path):
    keys = load_file(attached("lotr")[1].save(tmp_path / "a")).keys()
    assert set(keys) == {"query_value.core", "query_value.factor_in", "query_value.factor_out"}
    keys = load_file(attached("extra modules")[1].save(tmp_path / "b")).keys()
    assert {k for k in keys if k.startswith("extra.")} == {
        f"extra.{name}"
        for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias")
    }
    keys = load_file(attached("a frozen start")[1].save(tmp_path / "c")).keys()
    assert all(f"{key}__start" in keys for key in keys if not key.endswith("__start"))


def test_nothing_of_the_base_is_in_the_file(tmp_path):
    _, adapter, _ = attached("lora")
    assert adapter.save(tmp_path).stat().st_size < 4 * adapter.plan.num_parameters + 20_000


# -- other models -----------------------------------------------------------------------------------------------------

OTHERS = {
    "a layer less": (
        "lora",
        lambda: tiny.bert(layers=1),
        r"adapts encoder\.layer\.1\.attention\.self\.query, which the model",
    ),
    "another architecture": ("lora", tiny.gpt2, f"adapts {LAYER}.query, which the model lacks"),
    "another width": ("lora", lambda: tiny.bert(hidden_size=32), f"{LAYER}.query has another shape"),
    "no such head": (
        "extra modules",
        tiny.bert,
        r"trains classifier\.(weight|bias), (.|\n)*got: a BertModel(.|\n)*load it onto the class that has 'classifier'",
    ),
    "another head": (
        "extra modules",
        lambda: relabelled(5),
        r"trains classifier\.(weight|bias), which the model lacks or has in another shape",
    ),
    "fewer experts": ("experts", lambda: experts(2), r"adapts .*\[2\], which the model lacks"),
    "narrower rows": ("rows", lambda: tiny.gpt2(n_embd=8), r"c_attn\[v\] has another shape"),
    "fewer rows": ("rows", lambda: with_rows(40), r"c_attn\[v\] has another shape"),
    "another kernel": ("convolutions", lambda: kernels(), "0 has another shape"),
}


def relabelled(labels):
    model = tiny.bert_classifier()
    model.classifier = nn.Linear(16, labels)
    return model


def experts(count):
    model = tiny.mixtral()
    for name in ("gate_up_proj", "down_proj"):
        held = model.model.layers[0].mlp.experts._parameters
        held[name] = nn.Parameter(held[name][:count].detach().clone())
    return model


def with_rows(rows):
    model = tiny.gpt2()
    for block in model.transformer.h:
        block.attn.c_attn.weight = nn.Parameter(torch.ones(16, rows))
    return model


def kernels():
    return nn.Sequential(nn.Conv2d(2, 4, 5), nn.Conv2d(4, 6, 3, groups=2))


def test_a_tied_head_that_the_model_lacks_is_left_out(tmp_path):
    """The weight's delta reaches the modules that there are; a head of another kind in its place is refused."""
    file = attached("a tie")[1].save(tmp_path)
    whole, headless = tiny.gpt2(), tiny.gpt2()
    headless.lm_head = nn.Identity()
    ta.load(file, whole)
    assert set(ta.load(file, headless)._lines) == {"transformer.wte"}
    ids = tiny.tokens()
    assert torch.equal(headless.transformer(ids)[0], whole.transformer(ids)[0])
    headless = tiny.gpt2()
    headless.lm_head = nn.Bilinear(16, 16, 4)
    refused(file, "adapts lm_head, which no adapter can change in this model", headless)


@pytest.mark.parametrize(("case", "make", "says"), OTHERS.values(), ids=OTHERS)
def test_another_model_is_refused(case, make, says, tmp_path):
    file = attached(case)[1].save(tmp_path)
    refused(file, says, make())
    with pytest.raises(ta.FileError, match=f"{file}(?s:.*)next:"):
        ta.load(file, make())


def test_a_model_with_more_in_it_is_not_another(saved):
    ta.load(saved, tiny.bert(layers=3))


# -- damaged files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.3, 0.6, 0.9, -1])
def test_truncated_files(saved, kept):
    raw = saved.read_bytes()
    saved.write_bytes(raw[: int(kept * len(raw)) if isinstance(kept, float) else kept])
    refused(saved, "adapter.safetensors is damaged or no safetensors file(?s:.*)copy or save it again")


def test_files_with_something_behind_them(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    refused(saved, "adapter.safetensors is damaged")


def test_any_byte_that_changes_is_noticed(tmp_path):
    """A changed byte is an error, or lies where nothing is read from (the base's name, say)."""
    model = nn.Sequential(nn.Linear(4, 3))
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["0"]))
    tiny.shake(adapter)
    file = adapter.save(tmp_path)
    raw, plan = file.read_bytes(), native.read(file).plan
    chance = random.Random(0)
    harmless = 0
    for position in sorted(chance.sample(range(len(raw)), 500)) + list(range(len(raw) - 28, len(raw))):
        damaged = bytearray(raw)
        damaged[position] ^= chance.randrange(1, 256)
        file.write_bytes(bytes(damaged))
        try:
            found = native.read(file)
        except ta.FileError:
            continue
        harmless += 1
        assert found.plan.groups == plan.groups and tiny.same(
            dict(found.tensors), {k: t.detach() for k, t in adapter.tensors().items()}
        )
    assert harmless < 60


def test_a_changed_factor_is_named(saved):
    raw = bytearray(saved.read_bytes())
    raw[-3] ^= 1  # the last factor's last entry but for its sign
    saved.write_bytes(bytes(raw))
    refused(
        saved, r"'layer1_value.core_\w+' in .*adapter.safetensors is not what was saved(?s:.*)copy or save it again"
    )


FACTOR = "layer1_value.core_out"


def nan(tensors):
    tensors[FACTOR][3, 1] = float("nan")


def infinite(tensors):
    tensors[FACTOR][0, 0] = float("-inf")


def missing(tensors):
    del tensors[FACTOR]


def additional(tensors):
    tensors["layer7_value.core_out"] = torch.zeros(2)


def wide(tensors):
    tensors[FACTOR] = torch.zeros(16, 3)


def turned(tensors):
    tensors[FACTOR] = tensors[FACTOR].T.contiguous()


def integers(tensors):
    tensors[FACTOR] = tensors[FACTOR].int()


CHANGES = {
    nan: "'layer1_value.core_out' of .*adapter.safetensors is not finite(?s:.*)1 of 32 entries",
    infinite: "'layer1_value.core_out' of .*adapter.safetensors is not finite",
    missing: "adapter.safetensors lacks key 'layer1_value.core_out'",
    additional: "adapter.safetensors has an unknown key 'layer7_value.core_out'",
    wide: r"'layer1_value.core_out' in .*adapter.safetensors has another shape(?s:.*)\(16, 3\)(?s:.*)\(16, 2\)",
    turned: "'layer1_value.core_out' in .*adapter.safetensors has another shape",
    integers: "'layer1_value.core_out' in .*adapter.safetensors holds int32",
}


@pytest.mark.parametrize(("change", "says"), CHANGES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_changed_tensors_are_named(change, says, saved):
    refused(rewritten(saved, change), says)


def test_a_file_without_checksums_is_read(saved):
    ta.load(rewritten(saved), tiny.bert())


DAMAGED_PLAN = "the plan in .*adapter.safetensors is damaged"


def plan_with(change):
    def act(metadata):
        plan = json.loads(metadata["tensoradapt"])
        change(plan)
        metadata["tensoradapt"] = json.dumps(plan)

    return act


HEADERS = {
    "newer": (lambda m: m.update(version="2"), "has format version 2(?s:.*)at most 1(?s:.*)newer tensoradapt"),
    "no version": (lambda m: m.pop("version"), "has format version unknown"),
    "version in words": (lambda m: m.update(version="one"), "has format version one"),
    "version of nobody": (lambda m: m.update(version="²"), "has format version ²"),
    "version zero": (lambda m: m.update(version="0"), "has format version 0"),
    "no plan": (lambda m: m.pop("tensoradapt"), "holds no tensoradapt plan(?s:.*)import_peft"),
    "no json": (lambda m: m.update(tensoradapt="{"), DAMAGED_PLAN),
    "deep json": (lambda m: m.update(tensoradapt="[" * 100_000), DAMAGED_PLAN),
    "a list": (lambda m: m.update(tensoradapt="[]"), DAMAGED_PLAN),
    "base in words": (lambda m: m.update(base="bert"), "the base in .*adapter.safetensors is damaged"),
    "base is a number": (lambda m: m.update(base="3"), "the base in .*adapter.safetensors is damaged"),
    "checksums in a list": (lambda m: m.update(crc32="[1]"), "the crc32 in .*adapter.safetensors is damaged"),
    "no groups": (plan_with(lambda p: p.pop("groups")), DAMAGED_PLAN),
    "no such rule": (plan_with(lambda p: p["groups"][0].update(rule=9)), DAMAGED_PLAN),
    "scale in words": (plan_with(lambda p: p["groups"][0].update(scale="big")), DAMAGED_PLAN),
    "unknown field": (
        plan_with(lambda p: p["spec"]["rules"][0].update(colour=1)),
        "the plan in .*damaged(?s:.*)colour",
    ),
    "no nodes": (plan_with(lambda p: p["groups"][0]["diagram"].update(nodes={})), "adapter.safetensors"),
    "other sizes": (plan_with(lambda p: p["groups"][0]["diagram"]["sizes"].update(out=7)), DAMAGED_PLAN),
    "huge": (plan_with(lambda p: p["groups"][0]["diagram"]["sizes"].update(out=10**15)), DAMAGED_PLAN),
}


@pytest.mark.parametrize(("change", "says"), HEADERS.values(), ids=HEADERS)
def test_changed_headers_are_named(change, says, saved):
    refused(rewritten(saved, metadata=change), says)


def test_paths_without_an_adapter(tmp_path, saved):
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "missing", tmp_path / "missing.safetensors"):
        refused(path, f"no adapter at {path}(?s:.*)adapter.safetensors")
    (tmp_path / "notes").write_text("an adapter? no")
    refused(tmp_path / "notes", "no adapter at .*notes")
    (tmp_path / "notes.safetensors").write_text("an adapter? no")
    refused(tmp_path / "notes.safetensors", "damaged or no safetensors file")
    save_file({"model.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "holds no tensoradapt plan")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_not_saved(saved):
    old = saved.read_bytes()
    _, adapter, _ = attached(seed=1)
    with torch.no_grad():
        adapter.factors("layer0_query")["core_out"][2, 1] = float("nan")
    with pytest.raises(ta.FileError, match="'layer0_query.core_out' of the adapter is not finite(?s:.*)next:"):
        adapter.save(saved)
    assert saved.read_bytes() == old


def test_an_adapter_on_the_meta_device_is_not_saved(tmp_path):
    with torch.device("meta"):
        model = tiny.bert()
    adapter = ta.attach(model, ta.preset("lora", targets=["query"]))
    with pytest.raises(ta.FileError, match="layer0_query.core_out has no values to save(?s:.*)meta"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_paths_that_cannot_be_folders(tmp_path):
    _, adapter, _ = attached()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.safetensors" / "inside").mkdir(parents=True)
    says = {
        "file": "is a file, not a folder",
        "file/below": "cannot be written",
        "folder.safetensors": "cannot be written",
    }
    for path, what in says.items():
        with pytest.raises(ta.FileError, match=f"{tmp_path}\\S* {what}(?s:.*)next:"):
            adapter.save(tmp_path / path)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.safetensors", "inside"]


def test_what_one_may_not_read_is_said_to_be_that(saved, monkeypatch):
    """Who may read anything is told by the same question, which is answered for the test."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != saved or not mode & os.R_OK)
    for read in (ta.open_adapter, lambda path: ta.load(path, tiny.bert()), lambda path: ta.plan("lora", path)):
        with pytest.raises(ta.FileError, match="cannot be read(?s:.*)permission"):
            read(saved)


def test_a_link_to_what_a_process_has_open_is_not_replaced(tmp_path):
    """`--out /dev/stdout > file`: the name that all processes share would lead to a file of one of them."""
    link, file = tmp_path / "stdout", tmp_path / "file"
    with file.open("w") as held:
        link.symlink_to(f"/proc/self/fd/{held.fileno()}")
        for path in (link, Path(f"/proc/self/fd/{held.fileno()}")):
            with pytest.raises(ta.FileError, match="what a process has open"), atomic.atomic(path):
                pass
    assert link.is_symlink() and file.read_text() == "" and len(list(tmp_path.iterdir())) == 2


def test_folders_that_cannot_be_written_to(tmp_path):
    """One that the system itself refuses: without permission, or, for who may do anything, below /proc."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    path = folder / "a" if os.geteuid() else Path("/proc/a")
    with pytest.raises(ta.FileError, match="cannot be written(?s:.*)choose another folder"):
        attached()[1].save(path)


@pytest.mark.parametrize("step", ["save_file", "mkdir", "flush", "replace", "half"])
def test_a_failing_disk_leaves_the_old_file(step, saved, monkeypatch):
    old = saved.read_bytes()

    def full(*args, **kwargs):
        if step == "half":
            Path(args[1]).write_bytes(b"\x10\0\0")
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"save_file": native, "half": native, "mkdir": Path, "flush": atomic, "replace": os}[step]
    monkeypatch.setattr(where, "save_file" if step == "half" else step, full)
    with pytest.raises(ta.FileError, match="cannot be written(?s:.*)No space left(?s:.*)free some space"):
        attached(seed=1)[1].save(saved.parent)
    monkeypatch.undo()
    assert saved.read_bytes() == old and sorted(os.listdir(saved.parent)) == ["README.md", saved.name]


KILLED = """
import os, pathlib, shutil, signal, sys
import torch
import tensoradapt as ta
from tensoradapt.io import native
from tensoradapt.writing import atomic

def adapter(value):
    model = torch.nn.Sequential(torch.nn.Linear(300, 200))
    made = ta.attach(model, ta.preset("lora", rank=8, targets=["0"]))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def before(function):
    return lambda *args, **kwargs: (die(), function(*args, **kwargs))

def after(function):
    return lambda *args, **kwargs: (function(*args, **kwargs), die())

def part(share):
    def write(tensors, path, metadata):
        save_file(tensors, path, metadata=metadata)
        raw = pathlib.Path(path).read_bytes()
        pathlib.Path(path).write_bytes(raw[: int(share * len(raw))])
        die()
    save_file = native.save_file
    return lambda _: write

POINTS = {
    "before writing": (native, "save_file", before),
    "nothing written": (native, "save_file", part(0)),
    "half written": (native, "save_file", part(0.5)),
    "almost written": (native, "save_file", part(0.999)),
    "written": (native, "save_file", after),
    "before flushing": (atomic, "flush", before),
    "flushed": (atomic, "flush", after),
    "before renaming": (os, "replace", before),
    "renamed": (os, "replace", after),
}
root = pathlib.Path(sys.argv[1])
one, two = adapter(1.0), adapter(2.0)
one.save(root / "old"), two.save(root / "new")
for name, (module, function, how) in POINTS.items():
    for start in ("old", "none"):
        folder = root / f"{name}, {start}"
        shutil.copytree(root / "old", folder) if start == "old" else folder.mkdir()
        child = os.fork()
        if not child:
            setattr(module, function, how(getattr(module, function)))
            two.save(folder)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=120, start_new_session=True)
    old, new = (contents(native.file_of(tmp_path / name)) for name in ("old", "new"))
    folders = [folder for folder in tmp_path.iterdir() if "," in folder.name]
    assert len(folders) == 18 and signal.SIGKILL == 9
    for folder in folders:
        file, begun = native.file_of(folder), folder.name.endswith("old")
        expected = new if folder.name.startswith("renamed") else old if begun else None
        assert (contents(file) if file.exists() else None) == expected, folder.name
        model = nn.Sequential(nn.Linear(300, 200))
        adapter = ta.attach(model, ta.preset("lora", rank=8, targets=["0"]))
        adapter.save(folder)  # what a killed process left behind is in nobody's way
        ta.load(folder, nn.Sequential(nn.Linear(300, 200)))


def test_saving_over_a_file_of_another_adapter(saved):
    _, other, call = attached("lotr")
    other.save(saved.parent)
    model = tiny.bert()
    ta.load(saved.parent, model)
    assert torch.equal(call(model), call(other._model[0]))


def test_a_header_is_of_use_alone(saved):
    """Names, shapes and plan are in the first bytes: a tool lists an adapter without reading its tensors."""
    raw = saved.read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert header["layer0_query.core_in"]["shape"] == [2, 16]
    assert json.loads(header["__metadata__"]["tensoradapt"])["num_sites"] == 4
