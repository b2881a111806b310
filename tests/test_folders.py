"""Merging into folders: what the model computes, what stays as it was, and that a failure leaves nothing."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.errors import AdapterError, FileError
from tensoradapt.folders import merge_folder
from tensoradapt.io.saved import Saved, as_saved
from tensoradapt.io.shards import Shard

QV = ["query", "value"]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def base(folder: Path, model: nn.Module, size: str = "20KB") -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer.json").write_text("{}")
    return folder


CASES = {
    "lora": (tiny.bert_classifier, ta.preset("lora", rank=2, targets=QV)),
    "lotr": (tiny.llama, ta.preset("lotr", rank=2, targets=["q_proj", "o_proj"])),
    "tt-matrix": (tiny.llama, ta.preset("mpo_shared", rank=3, targets=["q_proj"])),
    "a difference": (tiny.llama, ta.preset("dota", rank=2, folds="auto:2", targets=["q_proj"])),
    "Conv1D": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn", "mlp.c_fc"])),
    "rows": (tiny.gpt2, ta.preset("lora", rank=2, targets=["c_attn[v]"], parts={"c_attn": ["q", "k", "v"]})),
    "embedding": (tiny.llama, ta.preset("lora", rank=2, targets=["embed_tokens"])),
    "experts": (tiny.gpt_oss, ta.preset("lotr", rank=2, targets=["gate_up_proj"])),
    "both ends of a tie": (tiny.gpt2, ta.preset("lora", rank=2, targets=["wte", "lm_head"])),
    "trained modules": (tiny.bert_classifier, ta.preset("lora", rank=2, targets=QV, train=["classifier"])),
    "half precision factors": (tiny.llama, ta.preset("lotr", rank=2, targets=["q_proj"], dtype="bfloat16")),
}


def prepared(case: str, tmp_path: Path, dtype=torch.float32, size: str = "20KB") -> tuple[Path, Path, nn.Module]:
    """A base folder, an adapter file, and the model with that adapter, merged in memory."""
    make, spec = CASES[case]
    model = make().to(dtype)
    folder = base(tmp_path / "base", model, size)
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    adapter.save(tmp_path / "adapter")
    adapter.merge()
    return folder, tmp_path / "adapter", model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_merged_folder_holds_what_a_merged_model_holds(case, dtype, tmp_path):
    folder, adapter, model = prepared(case, tmp_path, dtype)
    result = merge_folder(folder, adapter, tmp_path / "out")
    wanted, found, before = tiny.base_of(model), stored(tmp_path / "out"), stored(folder)
    assert list(found) == list(before)
    assert all(torch.equal(tensor, wanted[name]) and tensor.dtype == dtype for name, tensor in found.items())
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert result.num_tensors == len(changed) > 0
    assert result.path == tmp_path / "out" and not result.notes
    assert result.num_bytes == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())


def test_the_sum_is_rounded_once(tmp_path):
    """In float64 by hand: W + s B A, rounded to bfloat16."""
    model = nn.Sequential(nn.Linear(40, 30, bias=False)).bfloat16()
    spec = ta.preset("lora", rank=3, targets=["0"], alpha=6)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    (group,) = adapter.groups
    factors = {node: tensor.double() for node, tensor in adapter.factors(group).items()}
    adapter.save(tmp_path / "adapter")
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    out, inner = sorted(factors.values(), key=lambda t: 30 not in t.shape)
    product = (out if out.shape[0] == 30 else out.T) @ (inner if inner.shape[1] == 40 else inner.T)
    wanted = (load_file(tmp_path / "base" / "model.safetensors")["0.weight"].double() + 2 * product).bfloat16()
    found = stored(tmp_path / "out")["0.weight"]
    assert (found != wanted).double().mean() < 0.01  # where float32 and float64 lie on either side of a tie
    torch.testing.assert_close(found, wanted, rtol=0.008, atol=0)


def test_a_merged_folder_is_loaded_by_transformers(tmp_path):
    folder, adapter, model = prepared("lotr", tmp_path)
    merge_folder(str(folder), adapter, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny.tokens()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert not torch.allclose(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(folder)(ids).logits)


@pytest.mark.parametrize("size", ["20KB", "1GB"])
def test_shards_are_laid_out_as_they_were(size, tmp_path):
    """Headers byte for byte, the index, and every byte of what is not adapted."""
    folder, adapter, _ = prepared("lora", tmp_path, size=size)
    merge_folder(folder, adapter, tmp_path / "out")
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert ("model.safetensors.index.json" in names) == (size == "20KB")
    for name in names:
        before, after = (folder / name).read_bytes(), (tmp_path / "out" / name).read_bytes()
        assert len(before) == len(after)
        if not name.endswith(".safetensors"):
            assert before == after
            continue
        begin = 8 + int.from_bytes(before[:8], "little")
        assert before[:begin] == after[:begin]
        for tensor, entry in json.loads(before[8:begin]).items():
            if tensor != "__metadata__" and not any(f"{role}.weight" in tensor for role in QV):
                first, last = (begin + at for at in entry["data_offsets"])
                assert before[first:last] == after[first:last]


def test_an_attached_adapter_and_one_in_memory_are_merged_too(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    model = tiny.bert_classifier()
    attached = ta.load(adapter, model)
    saved = attached.as_saved()
    assert isinstance(saved, Saved)
    for k, source in enumerate((adapter, str(adapter / "adapter.safetensors"), attached, saved)):
        merge_folder(folder, source, tmp_path / f"out{k}")
        assert tiny.same(stored(tmp_path / f"out{k}"), stored(tmp_path / "out0"))


def test_a_scale_that_was_set_is_merged(tmp_path):
    folder, _, _ = prepared("lora", tmp_path)
    model = tiny.bert_classifier()
    adapter = ta.load(tmp_path / "adapter", model)
    adapter.scale = 0.5
    merge_folder(folder, adapter, tmp_path / "out")
    adapter.merge()
    assert all(torch.equal(tensor, tiny.base_of(model)[name]) for name, tensor in stored(tmp_path / "out").items())


@pytest.mark.parametrize("longer", ["base", "adapter"])
def test_names_with_a_prefix_on_one_side(longer, tmp_path):
    """An adapter of a classifier on the folder of its encoder, and the other way round."""
    makes = (tiny.bert_classifier, tiny.bert) if longer == "base" else (tiny.bert, tiny.bert_classifier)
    folder = base(tmp_path / "base", makes[0]())
    model = makes[1]()
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=QV))
    tiny.shake(adapter)
    result = merge_folder(folder, adapter, tmp_path / "out")
    assert result.num_tensors == result.num_sites == 4
    before, after = stored(folder), stored(tmp_path / "out")
    for path in adapter.plan.groups[0].paths:
        name = next(name for name in after if f"{path.removeprefix('bert.')}.weight" in name)
        delta = adapter.delta(path).detach()
        torch.testing.assert_close(after[name] - before[name], delta, rtol=1e-4, atol=1e-6)


def test_one_file_is_a_base_too(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path, size="1GB")
    result = merge_folder(folder / "model.safetensors", adapter, folder / "merged")
    assert result.files == ("model.safetensors",)
    assert tiny.same(stored(folder / "merged"), stored(merge_folder(folder, adapter, tmp_path / "out").path))


def test_float64_bases_and_one_dimensional_convolutions(tmp_path):
    model = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Conv2d(4, 4, 3)).double()
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["0", "1"]))
    tiny.shake(adapter)
    merge_folder(tmp_path / "base", adapter, tmp_path / "out")
    adapter.merge()
    assert tiny.same(stored(tmp_path / "out"), tiny.base_of(model))


def test_what_else_is_in_a_folder(tmp_path):
    """Configs, tokenizers and code go along, also from folders below; other weights, which are now stale, do not."""
    folder, adapter, _ = prepared("lora", tmp_path)
    for name in ("1_Pooling/config.json", "modeling.py", "merges.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("kept")
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "onnx/model.onnx", "other.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("stale")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    (folder / "b.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    result = merge_folder(folder, adapter, tmp_path / "out")
    out = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert {"1_Pooling/config.json", "modeling.py", "merges.txt", "config.json", "tokenizer.json"} <= out
    assert not any("stale" in (tmp_path / "out" / name).read_text("latin1") for name in out)
    assert not {".git", "loop", "pipe"} & {name.split("/")[0] for name in out}
    assert set(result.files) == out and "b.safetensors.index.json" not in out
    assert "pytorch_model.bin" in result.notes[0] and "other.safetensors" in str(result)


def test_a_second_copy_that_the_index_does_not_name_stays_as_it_is(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name = next(name for name in where if "query.weight" in name)
    other = next(file for file in where.values() if file != where[name])
    stale = torch.full((16, 16), 7.0)
    save_file(load_file(folder / other) | {name: stale}, folder / other)
    before = load_file(folder / where[name])[name]
    merge_folder(folder, adapter, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / other)[name], stale)
    assert not torch.equal(load_file(tmp_path / "out" / where[name])[name], before)


def test_what_was_written_is_opened_again(tmp_path, monkeypatch):
    """A folder that is not laid out as its base does not get its name."""
    folder, adapter, _ = prepared("lora", tmp_path, size="1GB")
    head = Shard.head
    monkeypatch.setattr(Shard, "head", lambda shard: head(shard).replace(b"query", b"quary"))
    refused(tmp_path, "was not written as it should be", folder, adapter)


def test_a_revision_of_the_cache_with_links_to_blobs(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    merge_folder(snapshot, adapter, tmp_path / "out")
    merge_folder(folder, adapter, tmp_path / "direct")
    for file in (tmp_path / "out").iterdir():
        assert not file.is_symlink() and file.read_bytes() == (tmp_path / "direct" / file.name).read_bytes()


# -- what is refused ------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, says: str, source, adapter, out: Path | None = None, kind=FileError, **options) -> None:
    """An error, and every file of the folder as it was: no output, nothing temporary."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(kind, match=says):
        merge_folder(source, adapter, out or tmp_path / "out", **options)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {p: t for p, t in after.items() if p.is_file()} == {p: t for p, t in before.items() if p.is_file()}
    assert set(after) == set(before)


def test_a_tie_is_not_merged_in_silence(tmp_path):
    model = tiny.gpt2()
    folder = base(tmp_path / "base", model)
    with pytest.warns(UserWarning, match="tied to lm_head"):
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["wte"]))
    tiny.shake(adapter)
    refused(tmp_path, "tied to lm_head(.|\n)*tied=True", folder, adapter, kind=AdapterError)
    result = merge_folder(folder, adapter, tmp_path / "out", tied=True)
    assert result.num_tensors == 1


def test_a_base_of_another_model(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    other = base(tmp_path / "other", tiny.llama())
    refused(tmp_path, r"lacks 4 of the 4 weights(.|\n)*query(.|\n)*model\.", other, adapter)
    wide = base(tmp_path / "wide", tiny.bert(hidden_size=32))
    refused(tmp_path, r"4 of the 4 weights .* have another shape", wide, adapter)


@pytest.mark.parametrize("size", ["8KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_that_the_base_lacks_is_added(size, dtype, tmp_path):
    """The bare encoder's folder becomes what the classifier computes, read by transformers from one file or several."""
    _, adapter, model = prepared("trained modules", tmp_path, dtype, size)
    headless = base(tmp_path / "headless", model.bert.__class__(model.config).to(dtype), size)
    save_over(headless, {f"{k.removeprefix('bert.')}": t for k, t in stored(tmp_path / "base").items() if "bert." in k})
    result = merge_folder(headless, adapter, tmp_path / "out")
    assert "classifier.weight, classifier.bias; load the folder with the class" in str(result)
    assert result.num_tensors == 6
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3)
    assert loaded.classifier.weight.dtype == dtype and torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)
    index = tmp_path / "out" / "model.safetensors.index.json"
    if size == "8KB":
        total = sum(tensor.numel() * tensor.itemsize for tensor in stored(tmp_path / "out").values())
        assert json.loads(index.read_text())["metadata"]["total_size"] == total


def save_over(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put these tensors in the place of those of the same names."""
    for file in folder.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(file)}, file, metadata={"format": "pt"})


def test_a_trained_norm_under_another_name_is_no_module_to_add(tmp_path):
    model = tiny.bert()
    folder = base(tmp_path / "base", model, "1GB")
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=QV, train=["embeddings.LayerNorm"]))
    state = load_file(folder / "model.safetensors")
    renamed = {name.replace("s.LayerNorm.weight", "s.LayerNorm.gamma"): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors")
    ta.merge_folder(folder, adapter, tmp_path / "merged")  # transformers knows the old name, and the file keeps it
    trained = adapter.as_saved().tensors["extra.embeddings.LayerNorm.weight"]
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["embeddings.LayerNorm.gamma"], trained)
    (folder / "config.json").unlink()
    refused(tmp_path, r"lacks 1 of the 6(.|\n)*no embeddings.LayerNorm.weight", folder, adapter)


def test_heads_beside_the_model_in_a_container_are_not_added_to_its_files(tmp_path):
    model = nn.Sequential(tiny.bert(), nn.ModuleDict({"linear": nn.Linear(16, 3)}))
    adapter = ta.attach(model, ta.preset("lora", rank=2, targets=QV, train=["1.linear"]))
    folder = base(tmp_path / "base", tiny.bert())
    refused(
        tmp_path, r"trains 1.linear.weight, 1.linear.bias, which the base lacks(.|\n)*merge_and_detach", folder, adapter
    )


def test_quantised_bases(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path, size="1GB")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "query.weight" in name)
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    refused(tmp_path, rf"{name} of .* is quantised", folder, adapter)


def test_dtypes_that_are_not_adapted_are_copied(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path, size="1GB")
    state = load_file(folder / "model.safetensors") | {"packed": torch.ones(3).to(torch.float8_e5m2)}
    save_file(state, folder / "model.safetensors")
    merge_folder(folder, adapter, tmp_path / "out")
    assert stored(tmp_path / "out")["packed"].dtype == torch.float8_e5m2


@pytest.mark.parametrize("what", ["base", "overflow", "trained"])
def test_results_that_are_not_finite(what, tmp_path):
    folder, adapter, _ = prepared("trained modules", tmp_path, torch.float16, size="1GB")
    adapter = as_saved(adapter)
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "query.weight" in name)
    if what == "base":
        state[name][3, 3] = torch.nan
        save_file(state, folder / "model.safetensors")
    else:
        first = adapter.plan.groups[0].name
        keys = ["extra.classifier.bias"] if what == "trained" else [f"{first}.{n}" for n in adapter.factors(first)]
        changes = {key: torch.full_like(adapter.tensors[key], 1e5, dtype=torch.float32) for key in keys}
        adapter = Saved.of(adapter.plan, {**adapter.tensors, **changes})
    refused(tmp_path, "not( be)? finite", folder, adapter, kind=AdapterError)


@pytest.mark.parametrize("out", ["base", "base/inside", ".", "base/../base"])
def test_the_output_is_not_the_input(out, tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    for overwrite in (False, True):
        refused(tmp_path, "lie in each other", folder, adapter, tmp_path / out, overwrite=overwrite)


def test_an_output_that_is_there(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    merge_folder(folder, adapter, tmp_path / "out")
    refused(tmp_path, "is there already", folder, adapter)
    (tmp_path / "out" / "config.json").write_text("older")
    merge_folder(folder, adapter, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() != "older"
    (tmp_path / "out" / "notes.txt").write_text("the user's own")
    refused(tmp_path, "holds other files(.|\n)*notes.txt", folder, adapter, overwrite=True)
    (tmp_path / "file").write_text("a file")
    refused(tmp_path, "is no folder", folder, adapter, tmp_path / "file", overwrite=True)


def test_a_base_in_memory(tmp_path):
    _, adapter, model = prepared("lora", tmp_path)
    refused(tmp_path, "is no folder", model, adapter)


@pytest.mark.parametrize("left", [0, 3], ids=["after its last tensor", "before others"])
def test_a_base_that_changes_meanwhile(left, tmp_path):
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(left + 1)))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["0"]))

    def change(*_):
        os.utime(tmp_path / "base" / "model.safetensors", ns=(1, 1))

    with pytest.raises(FileError, match="was changed since it was opened"):
        merge_folder(tmp_path / "base", adapter, tmp_path / "out", progress=change)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_seen_before_the_work(tmp_path, monkeypatch):
    folder, adapter, _ = prepared("lora", tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    refused(tmp_path, "cannot be written(.|\n)*no room: .* 1,000 are free", folder, adapter)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_disk_that_becomes_full(limit, tmp_path, monkeypatch):
    folder, adapter, _ = prepared("lora", tmp_path, size="1GB")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        refused(tmp_path, "cannot be written", folder, adapter)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_places_that_cannot_be_written(tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    (tmp_path / "file").write_text("")
    refused(tmp_path, "cannot be written", folder, adapter, tmp_path / "file" / "out")
    refused(tmp_path, "cannot be written", folder, adapter, Path("/proc/out"))


KILLED = """
import os, sys
from tensoradapt.folders import merge_folder
at = int(sys.argv[4])
def stop(name, done, total):
    if done == at:
        os.kill(os.getpid(), 9)
merge_folder(*sys.argv[1:4], overwrite=True, progress=stop)
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_kill_leaves_the_old_folder_or_none(there, tmp_path):
    folder, adapter, _ = prepared("lora", tmp_path)
    out = tmp_path / "out"
    if there:
        merge_folder(folder, adapter, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()} if there else None
    done = subprocess.run([sys.executable, "-c", KILLED, folder, adapter, out, "2"], capture_output=True)
    assert done.returncode == -9
    assert ({file.name: file.read_bytes() for file in out.iterdir()} if out.exists() else None) == before
    merge_folder(folder, adapter, out, overwrite=True)  # and what it left behind is in nobody's way


MEASURE = """
import sys
from tensoradapt.folders import merge_folder

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024

seen = []
merge_folder(*sys.argv[1:4], progress=lambda *_: seen.append(anonymous()))
print(max(seen) - min(seen), max(seen), len(seen))
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures memory as Linux shows it")
def test_the_memory_of_a_merge_is_one_tensor(tmp_path):
    """However many there are in a shard: after each of eight, no more is held than after the first."""
    size = 2000
    shapes = {f"layers.{k}.q.weight": (size, size) for k in range(8)}
    (tmp_path / "base").mkdir()
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "base" / "model.safetensors")
    plan = ta.plan(ta.preset("lora", rank=1, targets=["q"]), {n.removesuffix(".weight"): s for n, s in shapes.items()})
    tensors = {key: torch.ones(factor.shape) for key, factor in plan.factors.items()}
    Saved.of(plan, tensors).save(tmp_path / "adapter")
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("base", "adapter", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    spread, _, count = map(float, done.stdout.split())
    tensor = size * size * 4 / 2**20
    assert count == 8 and spread < 2 * tensor
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as found:
        assert all((found.get_tensor(name) == plan.groups[0].scale).all() for name in shapes)


# -- the command line -----------------------------------------------------------------------------------------------


def test_merge_on_the_command_line(tmp_path, capsys):
    folder, adapter, _ = prepared("lora", tmp_path)
    command = ["merge", str(folder), str(adapter), "--out", str(tmp_path / "out")]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["num_tensors"] == 4 and found["path"] == str(tmp_path / "out")
    assert run(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert run([*command, "--overwrite"]) == 0
    assert "4 sites merged into 4 tensors" in capsys.readouterr().out
    assert tiny.same(stored(tmp_path / "out"), stored(merge_folder(folder, adapter, tmp_path / "direct").path))


def test_merge_takes_a_peft_folder(tmp_path, capsys):
    folder, adapter, _ = prepared("lora", tmp_path)
    ta.export_peft(adapter, tmp_path / "peft")
    assert run(["merge", str(folder), str(tmp_path / "peft"), "--out", str(tmp_path / "out")]) == 0
    direct = stored(merge_folder(folder, adapter, tmp_path / "direct").path)
    for name, tensor in stored(tmp_path / "out").items():
        torch.testing.assert_close(tensor, direct[name], rtol=1e-4, atol=1e-6)


def test_merge_has_help(capsys):
    assert run(["merge", "--help"]) == 0
    assert "Example:" in capsys.readouterr().out
