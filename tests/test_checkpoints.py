"""Checkpoints: read one tensor at a time from whatever holds them, paired by name, and their differences."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tensoradapt as ta
from tensoradapt.analysis.source import open_source
from tensoradapt.errors import FileError, SiteError
from tensoradapt.io.checkpoint import Checkpoint, open_checkpoint
from tensoradapt.io.pairs import open_deltas
from tensoradapt.scan import scan
from tensoradapt.sites import Site, SiteMap

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def tensors(seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A model's worth of names in an order that no sorting gives."""
    shapes = {"head.weight": (5, 6), "layers.1.q.weight": (6, 6), "layers.0.q.weight": (6, 6), "norm.weight": (6,)}
    return {name: tiny.noise(*shape, seed=seed + k).to(dtype) for k, (name, shape) in enumerate(shapes.items())}


def moved(state: dict, size: float = 0.1, seed: int = 50) -> dict[str, torch.Tensor]:
    return {name: (t + size * tiny.noise(*t.shape, seed=seed)).to(t.dtype) for name, t in state.items()}


def written(folder: Path, state: dict, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / name)
    return folder


def sharded(folder: Path, state: dict, count: int = 2, index: bool = True) -> Path:
    """The tensors dealt out to files like cards, with their index."""
    names = [f"model-{k + 1:05d}-of-{count:05d}.safetensors" for k in range(count)]
    for k, file in enumerate(names):
        written(folder, dict(list(state.items())[k::count]), file)
    if index:
        where = {name: names[k % count] for k, name in enumerate(state)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


class Small(nn.Module):
    def __init__(self, state: dict):
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def state_dict(self, *args, **kwargs):
        return {name: getattr(self, name.replace(".", "_")) for name in tensors()}


SOURCES = {
    "file": lambda tmp, state: written(tmp, state) / "model.safetensors",
    "its path as text": lambda tmp, state: str(written(tmp, state) / "model.safetensors"),
    "folder": written,
    "folder as text": lambda tmp, state: str(written(tmp, state)),
    "shards and index": sharded,
    "index": lambda tmp, state: sharded(tmp, state) / "model.safetensors.index.json",
    "shards without index": lambda tmp, state: sharded(tmp, state, index=False),
    "index of another name": lambda tmp, state: (
        Path(
            shutil.move(sharded(tmp, state) / "model.safetensors.index.json", tmp / "unet.safetensors.index.json")
        ).parent
    ),
    "mapping": lambda tmp, state: dict(state),
    "module": lambda tmp, state: Small(state),
    "list": lambda tmp, state: list(state.items()),
    "tuple": lambda tmp, state: tuple(state.items()),
    "iterator": lambda tmp, state: iter(state.items()),
    "generator": lambda tmp, state: ((name, tensor) for name, tensor in state.items()),
}


# -- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_tensors(kind, tmp_path):
    state = tensors()
    with open_checkpoint(SOURCES[kind](tmp_path / "m", state)) as found:
        assert set(found.entries) == set(state)
        for name, tensor in state.items():
            entry = found.entries[name]
            assert (entry.name, entry.shape, entry.dtype) == (name, tuple(tensor.shape), torch.float32)
            assert torch.equal(found.read(name), tensor)
            assert torch.equal(found.read(name), tensor)  # and again: algorithms make several passes
            assert (entry.file is None) == (not found.files) and entry.file in (*found.files, None)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kind", ["file", "mapping", "iterator"])
def test_values_come_as_they_are_stored(kind, dtype, tmp_path):
    state = {"a": (10 * tiny.noise(3, 5)).to(dtype), "scalar": torch.ones((), dtype=dtype)}
    state |= {"empty": torch.zeros(0, 4, dtype=dtype), "last": torch.ones(1, dtype=dtype)}
    found = open_checkpoint(SOURCES[kind](tmp_path, state))
    for name, tensor in state.items():
        read = found.read(name)
        assert (read.dtype, read.shape) == (dtype, tensor.shape)
        assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8)) if read.dim() else read == tensor


def test_entries_are_in_stored_order(tmp_path):
    state = tensors()
    assert list(open_checkpoint(state).entries) == list(state)
    assert list(open_checkpoint(iter(state.items())).entries) == list(state)
    file = written(tmp_path, state) / "model.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    offsets = {name: entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    assert list(open_checkpoint(file).entries) == sorted(offsets, key=offsets.get)


def test_a_header_of_any_length_is_read(tmp_path):
    """The format does not demand that tensors begin at a multiple of their size."""
    file = written(tmp_path, state := tensors()) / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + size].rstrip()
    header += b" " * ((3 - len(header)) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    found = open_checkpoint(file)
    assert all(torch.equal(found.read(name), tensor) for name, tensor in state.items())


def test_a_checkpoint_passes_through(tmp_path):
    found = open_checkpoint(written(tmp_path, tensors()))
    assert open_checkpoint(found) is found


def test_reading_maps_and_does_not_reach_the_file(tmp_path):
    file = written(tmp_path, state := tensors()) / "model.safetensors"
    before = file.read_bytes()
    read = open_checkpoint(file).read("head.weight")
    read.zero_()
    assert file.read_bytes() == before
    assert torch.equal(open_checkpoint(file).read("head.weight"), state["head.weight"])


def test_tensors_outlive_their_checkpoint(tmp_path):
    for source in (written(tmp_path, tensors()), iter(tensors().items())):
        with open_checkpoint(source) as found:
            read = found.read("head.weight")
        assert torch.equal(read, tensors()["head.weight"])


def test_a_file_larger_than_memory_is_opened(tmp_path):
    """Sparse, so that it takes no room on the disk either."""
    rows = 2**36 // 4096
    entry = {"a.weight": {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, 2 * rows * 4096]}}
    header = json.dumps(entry).encode()
    with (tmp_path / "huge.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 2 * rows * 4096)
    found = open_checkpoint(tmp_path / "huge.safetensors")
    assert found.entries["a.weight"].shape == (rows, 4096)
    found.identity()


def test_a_tensor_that_is_not_there(tmp_path):
    with pytest.raises(FileError, match=r"has no tensor 'x'"):
        open_checkpoint(written(tmp_path, tensors())).read("x")


@pytest.mark.parametrize("source", [3, None, 1.5], ids=str)
def test_what_is_no_checkpoint(source):
    with pytest.raises(FileError, match="this is no checkpoint"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "source", ["", "nowhere/at/all", "./nothing", "no.safetensors", "a\0b", Path("none"), "x" * 300]
)
def test_paths_where_there_is_nothing(source):
    with pytest.raises(FileError):
        open_checkpoint(source)


def test_names_in_messages_are_as_the_user_wrote_them(tmp_path, monkeypatch):
    written(tmp_path / "m", tensors())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("m").name == "m"
    assert open_checkpoint("~/m").name == "~/m"
    assert open_checkpoint(tensors()).name == "the mapping of 4 tensors"


# -- tied and streamed tensors --------------------------------------------------------------------------------------


def test_tied_tensors_are_one(tmp_path):
    weight = tiny.noise(5, 4)
    state = {"embed.weight": weight, "other": tiny.noise(5, 4), "head.weight": weight, "view": weight[:2]}
    found = open_checkpoint(state)
    assert found.aliases == {"head.weight": "embed.weight"}
    assert open_checkpoint(tiny.gpt2()).aliases == {"lm_head.weight": "transformer.wte.weight"}


def test_a_stream_is_read_once_and_one_tensor_at_a_time():
    """No earlier tensor is alive when the next one is asked for."""
    seen = []

    def stream():
        for k in range(5):
            tensor = torch.full((3, 3), float(k))
            assert not any(ref() is not None for ref in seen[:-1])
            seen.append(weakref.ref(tensor))
            yield f"w{k}.weight", tensor

    found = open_checkpoint(stream())
    assert [float(found.read(f"w{k}.weight")[0, 0]) for k in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("end", ["close", "forget", "fail"])
def test_a_stream_is_kept_in_a_file_without_a_name(end, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def failing():
        yield "a", torch.ones(2)
        raise RuntimeError("the user's own")

    if end == "fail":
        with pytest.raises(RuntimeError, match="the user's own"):
            open_checkpoint(failing())
    else:
        found = open_checkpoint(iter(tensors().items()))
        assert list(tmp_path.iterdir()) == []
        if end == "close":
            found.close()
            with pytest.raises(FileError, match="closed"):
                found.read("head.weight")
        else:
            del found
    assert list(tmp_path.iterdir()) == []


# -- identity -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_identity_is_of_what_is_in_it(kind, tmp_path):
    make = SOURCES[kind]
    one = open_checkpoint(make(tmp_path / "a", tensors()))
    assert one.identity() == one.identity()
    if not one.files:  # a stream that is given again is the same, wherever it was spooled
        assert open_checkpoint(make(tmp_path / "a", tensors())).identity() == one.identity()
    other = open_checkpoint(make(tmp_path / "b", moved(tensors())))
    assert other.identity() != one.identity()


def test_identity_changes_with_a_file_that_was_written_again(tmp_path):
    folder = written(tmp_path, tensors())
    before = open_checkpoint(folder).identity()
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert open_checkpoint(folder).identity() != before


def test_identity_is_kept_by_a_folder_that_was_moved(tmp_path):
    before = open_checkpoint(sharded(tmp_path / "a", tensors())).identity()
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_checkpoint(tmp_path / "b").identity() == before


# -- the hub's cache ------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache with two revisions of one model, files linked to blobs as the hub does."""
    root = tmp_path / "models--org--name"
    for k, revision in enumerate(("a" * 40, "b" * 40)):
        blob = written(root / "blobs" / revision[:1], tensors(seed=k)) / "model.safetensors"
        snapshot = root / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    (root / "refs" / "v2").write_text("b" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("source", "revision", "seed", "name"),
    [
        ("org/name", None, 0, "org/name"),
        ("org/name@v2", None, 1, "org/name@v2"),
        ("org/name", "v2", 1, "org/name@v2"),
        ("org/name@v2", "v2", 1, "org/name@v2"),
        ("org/name", "b" * 40, 1, "org/name@" + "b" * 40),
    ],
)
def test_ids_of_the_hub_are_read_from_its_cache(source, revision, seed, name, cache):
    found = open_checkpoint(source, revision)
    assert (found.name, found.revision) == (name, name.partition("@")[2] or None)
    assert torch.equal(found.read("head.weight"), tensors(seed=seed)["head.weight"])


@pytest.mark.parametrize(
    ("source", "revision", "says"),
    [
        ("org/other", None, "hf download org/other"),
        ("org/name", "v3", "--revision v3"),
        ("org/name@v2", "main", "has two revisions"),
    ],
)
def test_what_the_cache_has_not_is_not_downloaded(source, revision, says, cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("asked the network"))
    with pytest.raises(FileError, match=says):
        open_checkpoint(source, revision)


def test_a_revision_of_what_has_none_is_not_ignored(tmp_path):
    folder = written(tmp_path, tensors())
    for source in (str(folder), folder, tensors(), iter(tensors().items())):
        with pytest.raises(FileError, match="revision"):
            open_checkpoint(source, "main")


# -- matching -------------------------------------------------------------------------------------------------------


def test_matching_puts_every_tensor_in_one_place():
    base = tensors() | {"old.weight": tiny.noise(2, 2), "scalar": torch.ones(()), "void.weight": torch.zeros(0, 3)}
    tuned = moved(base) | {"new.weight": tiny.noise(2, 2), "ids.position": torch.ones(2, 2, dtype=torch.int64)}
    base |= {"ids.position": torch.ones(2, 2, dtype=torch.int64)}
    del tuned["old.weight"]
    found = open_deltas(base, tuned).match
    assert [pair.site.path for pair in found.pairs] == ["head", "layers.1.q", "layers.0.q"]
    assert (found.only_base, found.only_tuned) == (("old.weight",), ("new.weight",))
    assert found.refused == {
        "norm.weight": "1-D: a norm, a bias or a scale",
        "scalar": "a scalar",
        "void.weight": "empty",
        "ids.position": "holds int64",
    }
    said = json.loads(json.dumps(found.to_dict()))
    assert said["matched"] == ["head", "layers.1.q", "layers.0.q"] and said["only_tuned"] == ["new.weight"]
    assert set(said) == {"matched", "only_base", "only_tuned", "reshaped", "refused", "notes"}


NAMED = {
    "layers.0.q.weight": ((3, 4), "layers.0.q", "as stored", "linear"),
    "layers.0.q": ((3, 4), "layers.0.q", "as stored", "linear"),
    "in_proj_weight": ((3, 4), "in_proj_weight", "as stored", "linear"),
    "conv.weight": ((3, 4, 2, 2), "conv", "out in", "conv"),
    **{
        f"{path}.weight": ((7, 4), path, "as stored", "embedding")  # a kind to group by: the layout is not believed
        for path in ("model.embed_tokens", "bert.embeddings.word_embeddings", "wte", "transformer.wpe", "embed_in")
    },
    **{
        f"{path}.weight": ((7, 4), path, "as stored", "linear")
        for path in ("lm_head", "embed_out", "unembed", "time_embedding.linear_1")
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_sites_by_name_and_shape(name):
    shape, path, layout, kind = NAMED[name]
    found = open_deltas({name: torch.zeros(shape)}, {name: torch.ones(shape)})
    (site,) = found.sites
    fields = (site.path, site.shape, site.layout, site.tensor, site.owner, site.kind, site.index)
    assert fields == (path, shape, layout, name, path, kind, None)


def test_experts_in_one_tensor_are_sites():
    base = {"layers.0.mlp.experts.up": tiny.noise(3, 4, 5)}
    tuned = moved(base)
    found = open_deltas(base, tuned)
    assert [site.path for site in found.sites] == [f"layers.0.mlp.experts.up[{k}]" for k in range(3)]
    assert [dict(site.coordinates)["expert"] for site in found.sites] == [0, 1, 2]
    for k, (site, delta) in enumerate(found):
        assert site.shape == (4, 5)
        assert torch.equal(delta, tuned["layers.0.mlp.experts.up"][k] - base["layers.0.mlp.experts.up"][k])


MODELS = [tiny.gpt2, tiny.bert, tiny.llama, tiny.t5, tiny.gpt_oss]


def folders(tmp_path: Path, make) -> tuple[Path, Path, nn.Module]:
    """A model on disk in small shards, and in one file after it has been changed."""
    model = make()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * tiny.noise(*parameter.shape, seed=k))
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned", model


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_a_model_folder_gives_the_sites_of_its_model(make, tmp_path):
    """What the config says of layouts, experts and ties is used, and both sides may be cut into shards as they like.

    A weight that is tied on both sides is one site with all of its modules.
    """
    base, tuned, model = folders(tmp_path, make)
    found = open_source(str(base), tuned)
    wanted = {site.path: site for site in scan(model).sites}
    stored = set(load_file(tuned / "model.safetensors"))
    assert len(found.base.files) > 1 and len(found.tuned.files) == 1
    joined = {
        path: replace(site, joined=site.aliases, joined_kinds=tuple(wanted[alias].kind for alias in site.aliases))
        for path, site in wanted.items()
    }
    assert {site.path: site for site in found.sites} == {
        path: site for path, site in joined.items() if f"{path}.weight" in stored or site.owner in stored
    }
    assert found.match.sites.heads == 4 and all(" is tied to " in note for note in found.match.notes)
    parameters = dict(model.named_parameters())
    before = open_checkpoint(base)
    for site, delta in found:
        now, then = parameters[site.tensor].detach(), before.read(site.tensor)
        now, then = (now, then) if site.index is None else (now[site.index], then[site.index])
        wanted_delta = (now - then).T if site.layout == "in out" else now - then
        assert torch.equal(delta, wanted_delta) and delta.is_contiguous()


def test_without_a_config_layouts_are_not_known(tmp_path):
    base, tuned, model = folders(tmp_path, tiny.gpt2)
    for folder in (base, tuned):
        (folder / "config.json").unlink()
    found = {site.path: site for site in open_source(base, tuned).sites}
    assert found["transformer.h.0.attn.c_attn"].shape == (16, 48)  # a Conv1D is not told from a Linear
    assert found["transformer.wte"].shape == (tiny.WORDS, 16) and found["transformer.wte"].kind == "embedding"
    assert {site.layout for site in found.values()} == {"as stored"}


def test_a_config_that_cannot_be_used_is_said(tmp_path):
    base, tuned, _ = folders(tmp_path, tiny.llama)
    for folder in (base, tuned):
        (folder / "config.json").write_text('{"model_type": "of my own"}')
    found = open_source(base, tuned)
    assert len(found) == 16 and "layouts are not known" in found.match.notes[-1]


def test_sites_that_the_config_does_not_know_are_said(tmp_path):
    """Experts stay under the names on the disk where the config says that there are fewer of them."""
    base, tuned, _ = folders(tmp_path, tiny.mixtral)
    for folder in (base, tuned):
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"num_local_experts": 3', '"num_local_experts": 2'))
    found = open_source(base, tuned)
    assert len(found) == 16
    note = found.match.notes[-1]
    assert note.startswith("9 sites have other names in the model") and "experts.0.w1" in note


def renamed(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize("longer", ["base", "tuned"])
@pytest.mark.parametrize("given", ["auto", "bert", "bert."])
def test_a_prefix_of_one_side_is_found(longer, given):
    base, tuned = tensors(), moved(tensors())
    heads = {"classifier.weight": tiny.noise(3, 6)}
    base, tuned = (renamed(base, "bert."), tuned) if longer == "base" else (base, renamed(tuned, "bert.") | heads)
    found = open_deltas(base, tuned, prefix=given)
    assert [site.path for site in found.sites] == [f"bert.{p}" for p in ("head", "layers.1.q", "layers.0.q")]
    assert found.match.only_base == () and found.match.only_tuned == (() if longer == "base" else tuple(heads))
    assert "'bert.'" in found.match.notes[0]
    assert torch.equal(found.delta("bert.head"), moved(tensors())["head.weight"] - tensors()["head.weight"])


def test_a_tensor_has_one_counterpart():
    """The prefix decides where a side has a name with it and without."""
    tuned = renamed(moved(tensors()), "bert.") | {"head.weight": tiny.noise(5, 6)}
    found = open_deltas(tensors(), tuned)
    assert found.match.only_tuned == ("head.weight",)
    assert [pair.tuned_name for pair in found.match.pairs if pair.base_name == "head.weight"] == ["bert.head.weight"]


def test_a_prefix_as_models_have_it(tmp_path):
    tiny.bert().save_pretrained(tmp_path / "base")
    tiny.bert_classifier().save_pretrained(tmp_path / "tuned")
    found = open_source(tmp_path / "base", tmp_path / "tuned")
    assert found.sites[0].path.startswith("bert.") and found.match.only_tuned == (
        "classifier.bias",
        "classifier.weight",
    )
    assert [s.kind for s in found.sites if "word_embeddings" in s.path] == ["embedding"]
    assert len(found) == 16
    turned = open_source(tmp_path / "tuned", tmp_path / "base")
    assert not turned.sites[0].path.startswith("bert.") and len(turned) == 16


def test_a_prefix_is_not_made_up():
    """Two names that happen to end alike bring no namespaces together."""
    base = {f"a{k}.weight": tiny.noise(2, 2) for k in range(6)}
    tuned = {**moved(base), "extra.a1.weight": tiny.noise(2, 2)}
    found = open_deltas(base, tuned)
    assert len(found) == 6 and found.match.only_tuned == ("extra.a1.weight",) and not found.match.notes
    few = {f"b{k}.weight": tiny.noise(2, 2) for k in range(4)}
    with pytest.raises(FileError, match="different models"):  # six of ten bring no namespaces together either
        open_deltas(base | few, renamed(base, "m.") | {f"c{k}.weight": tiny.noise(2, 2) for k in range(4)})
    with pytest.raises(FileError, match="'none.'"):
        open_deltas(base, tuned, prefix="none")
    with pytest.raises(FileError, match="different models"):
        open_deltas(tensors(), renamed(tensors(), "bert."), prefix="")


TIED = {"wte.weight": ["wte.weight", "head.weight"]}


@pytest.mark.parametrize("untied", ["neither", "base file", "tuned file", "base", "tuned"])
def test_tied_tensors_are_matched_once(untied):
    """Whichever side keeps both names, or only one of them as files do."""
    weight, other = tiny.noise(5, 4), tiny.noise(5, 4, seed=1)
    both = lambda t: {"wte.weight": t, "head.weight": t, "l.weight": other}  # noqa: E731
    sides = {"base": both(weight), "tuned": both(other)}
    side, _, file = untied.partition(" ")
    if file:
        del sides[side]["head.weight"]
    elif side in sides:
        sides[side]["head.weight"] = tiny.noise(5, 4, seed=2)
    found = open_deltas(sides["base"], sides["tuned"])
    distinct = ["wte", "head", "l"] if side in sides and not file else ["wte", "l"]
    assert [site.path for site in found.sites] == distinct
    assert (found.match.only_base, found.match.only_tuned) == ((), ())
    if untied in ("neither", "base file"):
        assert found.sites[0].aliases == ("head",)


@pytest.mark.parametrize(
    "other", [tiny.gpt2, lambda: tiny.llama(hidden_size=32), lambda: {}, lambda: {"z": torch.ones(2)}]
)
def test_other_models_are_refused_with_counts_and_names(other, tmp_path):
    with pytest.raises(FileError) as caught:
        open_deltas(tiny.llama(), other())
    assert "different models" in str(caught.value) or "have another shape" in str(caught.value)
    assert "16" in str(caught.value) and "model." in str(caught.value)


def test_a_checkpoint_of_a_few_layers_is_matched():
    base = {f"layers.{k}.q.weight": tiny.noise(3, 3, seed=k) for k in range(20)}
    tuned = moved({name: base[name] for name in ("layers.3.q.weight", "layers.7.q.weight")})
    assert [site.path for site in open_deltas(base, tuned).sites] == ["layers.3.q", "layers.7.q"]


# -- added rows -----------------------------------------------------------------------------------------------------


def with_rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    state = {
        "embed_tokens.weight": (count, 4),
        "head.weight": (count, 4),
        "head.bias": (count,),
        "l.0.q.weight": (4, 4),
    }
    return {name: tiny.noise(*shape, seed=seed) for name, shape in state.items()}


@pytest.mark.parametrize("more", ["base", "tuned"])
@pytest.mark.parametrize("rows", ["error", "truncate", "pad"])
def test_added_token_rows(rows, more):
    base, tuned = with_rows(9 if more == "base" else 7, 0), with_rows(7 if more == "base" else 9, 1)
    if rows == "error":
        with pytest.raises(FileError, match=r'embed_tokens.weight \(\d, 4\) and \(\d, 4\)(.|\n)*rows="truncate"'):
            open_deltas(base, tuned)
        return
    found = open_deltas(base, tuned, rows=rows)
    height = 7 if rows == "truncate" else 9
    assert [(r.name, r.done) for r in found.match.reshaped] == [("embed_tokens.weight", rows), ("head.weight", rows)]
    assert json.dumps(found.match.to_dict()["reshaped"][0]["base"]) == str(list(base["embed_tokens.weight"].shape))
    assert {site.path: site.shape for site in found.sites} == {
        "embed_tokens": (height, 4),
        "head": (height, 4),
        "l.0.q": (4, 4),
    }
    wanted = np.zeros((height, 4), np.float32)
    for i in range(height):
        for j in range(4):
            new = tuned["head.weight"][i, j].item() if i < len(tuned["head.weight"]) else None
            old = base["head.weight"][i, j].item() if i < len(base["head.weight"]) else 0.0
            wanted[i, j] = 0 if new is None else np.float32(new) - np.float32(old)
    np.testing.assert_array_equal(found.delta("head").numpy(), wanted)
    np.testing.assert_array_equal(found.delta("embed_tokens").numpy(), wanted)
    assert "(9,)" in found.match.refused["head.bias"] and "(7,)" in found.match.refused["head.bias"]


@pytest.mark.parametrize("rows", ["truncate", "pad"])
def test_only_rows_outside_the_layers_may_differ(rows):
    base = {"l.0.q.weight": tiny.noise(4, 4), "l.1.q.weight": tiny.noise(4, 4), "head.weight": tiny.noise(4, 4)}
    for name, shape in (("l.0.q.weight", (6, 4)), ("head.weight", (4, 6)), ("head.weight", (6, 6))):
        with pytest.raises(FileError, match="have another shape"):
            open_deltas(base, base | {name: tiny.noise(*shape)}, rows=rows)


def test_unknown_choices():
    for wrong in ({"rows": "cut"}, {"nonfinite": "zero"}):
        with pytest.raises(FileError, match="is no choice"):
            open_deltas(tensors(), tensors(), **wrong)


# -- deltas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tuned_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("asked", [torch.float32, torch.float64], ids=str)
def test_deltas_of_all_dtypes(base_dtype, tuned_dtype, asked):
    """In float64 by numpy, rounded once."""
    base = {"a.weight": tiny.noise(6, 7).to(base_dtype)}
    tuned = {"a.weight": tiny.noise(6, 7, seed=1).to(tuned_dtype)}
    wanted = tuned["a.weight"].double().numpy() - base["a.weight"].double().numpy()
    found = open_deltas(base, tuned).delta("a", asked)
    assert found.dtype == asked
    precise = torch.float64 in (base_dtype, tuned_dtype, asked)
    kind = np.float64 if asked == torch.float64 else np.float32
    if precise:
        np.testing.assert_array_equal(found.numpy(), wanted.astype(kind))
    else:
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1000, 700), (700, 3), (3, 400_000), (1, 9), (9, 1), (64, 32, 3, 3), (2, 2, 300, 300)]
)
@pytest.mark.parametrize("name", ["a.weight", "embed.weight"])
def test_deltas_of_all_sizes(shape, name, tmp_path):
    """Larger than a block and smaller, as they lie and turned."""
    base, tuned = {name: tiny.noise(*shape).bfloat16()}, {name: tiny.noise(*shape, seed=1).bfloat16()}
    known = SiteMap((Site("embed", shape[::-1], layout="in out", owner="embed"),)) if len(shape) == 2 else None
    found = open_deltas(written(tmp_path / "a", base), written(tmp_path / "b", tuned), model=known)
    (site,) = found.sites
    wanted = tuned[name].float().numpy() - base[name].float().numpy()
    turned = site.layout == "in out"
    assert turned == (name == "embed.weight" and len(shape) == 2)
    delta = found.delta(site.path)
    np.testing.assert_array_equal(delta.numpy(), wanted.T if turned else wanted)
    assert delta.is_contiguous() and tuple(delta.shape) == site.shape
    old, new = found.weights(site.path)
    assert old.dtype == torch.bfloat16 and tuple(old.shape) == tuple(new.shape) == site.shape
    assert torch.equal(new.float() - old.float(), delta)


def test_deltas_of_one_dimensional_convolutions():
    base = {"conv.weight": tiny.noise(5, 3, 2), "l.weight": tiny.noise(2, 2)}
    site = Site("conv", (5, 3, 1, 2), owner="conv", tensor="conv.weight", kind="conv")
    model = scan(nn.ModuleDict({"conv": nn.Conv1d(3, 5, 2), "l": nn.Linear(2, 2)}))
    found = open_deltas(base, moved(base), model=model)
    assert (found.sites[0].path, found.sites[0].shape) == (site.path, site.shape)
    delta = found.delta("conv")
    assert torch.equal(delta.squeeze(2), moved(base)["conv.weight"] - base["conv.weight"])
    assert [part.shape for part in found.weights("conv")] == [(5, 3, 1, 2)] * 2


def test_weights_are_no_copies():
    state = tensors()
    found = open_deltas(state, state)
    for part in found.weights("head"):
        assert part.data_ptr() == state["head.weight"].data_ptr()


def test_identical_checkpoints_are_no_error(tmp_path):
    found = open_deltas(written(tmp_path, tensors()), tmp_path)
    assert len(found) == 3 and all(not delta.any() for _, delta in found)


def test_a_site_that_is_none():
    with pytest.raises(SiteError, match="norm is no site"):
        open_deltas(tensors(), tensors()).delta("norm")


def test_closing_closes_both():
    with open_deltas(iter(tensors().items()), iter(tensors().items())) as found:
        assert isinstance(found.base, Checkpoint) and found.delta("head").shape == (5, 6)
    for side in (found.base, found.tuned):
        with pytest.raises(FileError, match="closed"):
            side.read("head.weight")


DOORS = {
    "analyze": lambda base, tuned, folder: ta.analyze(base, tuned),
    "extract": lambda base, tuned, folder: ta.extract(base, tuned, ta.preset("lora", rank=2, targets="q"), folder),
    "change": lambda base, tuned, folder: [open_source(base, tuned).change(name) for name in base],
    "fold": lambda base, tuned, folder: [open_source(base, tuned).delta(f"layers.{k}.q") for k in (0, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("door", DOORS)
def test_tensors_that_are_compared_stay_as_they_are(door, dtype, tmp_path):
    base = tensors(dtype=dtype)
    tuned = moved(base)
    before = [{name: tensor.clone() for name, tensor in side.items()} for side in (base, tuned)]
    DOORS[door](base, tuned, tmp_path / "out")
    for side, kept in zip((base, tuned), before, strict=True):
        assert all(torch.equal(side[name], kept[name]) for name in kept)


MEASURE = """
import sys, threading, torch
from tensoradapt.io.pairs import open_deltas

def anonymous():
    with open("/proc/self/smaps_rollup") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024

deltas = open_deltas(sys.argv[1], sys.argv[2])
deltas.delta("small")
for path in ("a", "embed"):
    start, seen, done = anonymous(), [0.0], threading.Event()
    def watch():
        while not done.is_set():
            seen.append(anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    for _ in range(3):
        delta = deltas.delta(path)
        seen.append(anonymous())
        del delta
    done.set()
    thread.join()
    print(max(seen) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures memory as Linux shows it")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_memory_of_a_delta_is_one_matrix(dtype, tmp_path):
    """As it lies and turned, not of both sides; pages of files are not counted, as they can be dropped."""
    shapes = {
        "a.weight": (3000, 4000),
        "embed.weight": (4000, 3000),
        "small.weight": (600, 600),
        "b.weight": (3000, 4000),
    }
    for k, side in enumerate("ab"):
        state = {n: torch.full(shape, float(k), dtype=dtype) for n, shape in shapes.items()}
        written(tmp_path / side, state)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a"), str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    matrix = 3000 * 4000 * 4 / 2**20
    assert all(0.9 * matrix < float(peak) < matrix + 8 for peak in done.stdout.split())
