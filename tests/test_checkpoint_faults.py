"""Damaged, hostile and odd checkpoints: each of the faults F1 to F27 ends in one typed error, or is handled as said.

No fault opens a pickle, follows a path out of the folder, or takes memory or time that the file's size does not
explain.
"""

import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import tensoradapt as ta
from tensoradapt.errors import FileError, SpecError, TensorAdaptError
from tensoradapt.io.checkpoint import open_checkpoint
from tensoradapt.io.names import plain_names
from tensoradapt.io.pairs import open_deltas
from tensoradapt.sites import from_headers

INDEX = "model.safetensors.index.json"


def state() -> dict[str, torch.Tensor]:
    return {"layers.0.q.weight": tiny.noise(4, 6), "layers.1.q.weight": tiny.noise(4, 6, seed=1)}


@pytest.fixture
def file(tmp_path) -> Path:
    save_file(state(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards and their index."""
    where = {}
    for k, (name, tensor) in enumerate(state().items()):
        where[name] = f"s{k}.safetensors"
        save_file({name: tensor}, tmp_path / where[name])
    index_of(tmp_path, where)
    return tmp_path


def index_of(folder: Path, weight_map) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def raw(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if type(header) is bytes else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(file: Path) -> tuple[dict, bytes]:
    contents = file.read_bytes()
    size = int.from_bytes(contents[:8], "little")
    return json.loads(contents[8 : 8 + size]), contents[8 + size :]


def refused(source, *says: str, where: Path | None = None) -> str:
    """Opening is a FileError that names the file, by every door."""
    with pytest.raises(FileError) as caught:
        open_checkpoint(source)
    for text in (*says, str(where) if where else ""):
        assert text in str(caught.value), caught.value
    return str(caught.value)


# -- F1 to F11: one file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["one byte", "half", "all data", "half the header"])
def test_f1_truncated(lost, file):
    contents = file.read_bytes()
    size = 8 + int.from_bytes(contents[:8], "little")
    kept = {"one byte": len(contents) - 1, "half": len(contents) // 2, "all data": size, "half the header": size // 2}
    file.write_bytes(contents[: kept[lost]])
    refused(file, "damaged", where=file)


@pytest.mark.parametrize("size", [0, 1, 7, 8])
def test_f2_next_to_nothing(size, file):
    file.write_bytes(b"\0" * size)
    refused(file, where=file)


LENGTHS = [2**40, 200_000_000, 100_000_001, 2**63, 2**64 - 1]
OPEN_EACH = """
import resource, sys, time
from pathlib import Path
from tensoradapt.errors import FileError
from tensoradapt.io.checkpoint import open_checkpoint
from tensoradapt.io.names import plain_names
from tensoradapt.sites import from_headers

for path in map(Path, sys.argv[1:]):
    for opened in (open_checkpoint, lambda path: from_headers(path, plain_names)):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            opened(path)
        except FileError as error:
            assert path.name in str(error)
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(more / 1024, time.perf_counter() - start)
"""


def test_f3_a_header_without_end_takes_no_time_and_no_memory(tmp_path):
    """In a process of its own: less than a second each, and no 200 MB."""
    paths = [tmp_path / f"{length}.safetensors" for length in LENGTHS]
    for path, length in zip(paths, LENGTHS, strict=True):
        with path.open("wb") as stream:
            stream.write(struct.pack("<Q", length) + b"{")
            stream.truncate(min(length + 8, 2**41))
    command = [sys.executable, "-c", OPEN_EACH, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(measured) == 2 * len(LENGTHS)
    assert max(memory for memory, _ in measured) < 50 and max(seconds for _, seconds in measured) < 1


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"\xff\xfe{}",
        b"[]",
        b"3",
        b"null",
        b"{",
        b'{"a":',
        "{}".encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 9999,
    ]
    + [b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": NaN}', b'{"a": 3}', b'{"a": {"dtype": "F32"}}'],
    ids=lambda text: text[:12].decode("latin1"),
)
def test_f4_headers_that_are_no_headers(text, file):
    file.write_bytes(raw(text, b"\0" * 16))
    refused(file, where=file)
    with pytest.raises(FileError):
        from_headers(file, plain_names)


def entry(dtype="F32", shape=(2, 2), begin=0, end=16) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


WRONG = {
    "f5 overlap": ({"a": entry(), "b": entry(begin=8, end=24)}, 24),
    "f5 the same bytes twice": ({"a": entry(), "b": entry()}, 16),
    "f6 hole": ({"a": entry(), "b": entry(begin=20, end=36)}, 36),
    "f6 hole at the start": ({"a": entry(begin=4, end=20)}, 20),
    "f7 trailing bytes": ({"a": entry()}, 17),
    "f8 shape and offsets": ({"a": entry(shape=(2, 3))}, 16),
    "f8 negative size": ({"a": entry(shape=(-2, -2))}, 16),
    "f8 fraction": ({"a": entry(shape=(2.0, 2))}, 16),
    "f8 end before begin": ({"a": entry(begin=16, end=0)}, 16),
    "f9 unknown dtype": ({"a": entry(dtype="F31")}, 16),
    "f9 dtype in lower case": ({"a": entry(dtype="f32")}, 16),
    "f10 overflow": ({"a": entry(shape=(2**40, 2**40))}, 16),
    "f10 overflow to the right size": ({"a": entry(shape=(2**62 + 1, 4), end=16)}, 16),
    "metadata that are no text": ({"__metadata__": {"a": 3}}, 0),
    "unknown field": ({"a": {**entry(), "offset": 3}, "b": {"dtype": "F32"}}, 16),
}


@pytest.mark.parametrize("fault", WRONG)
def test_f5_to_f10_headers_that_lie(fault, file):
    header, size = WRONG[fault]
    file.write_bytes(raw(header, b"\0" * size))
    refused(file, "damaged", where=file)


def test_f11_a_name_that_is_in_a_header_twice(file):
    """The library for the format takes the later one without a word."""
    text = json.dumps({"a": entry()}).encode()
    file.write_bytes(raw(text[:-1] + b", " + text[1:], b"\0" * 16))
    refused(file, "'a' is there 2 times", where=file)
    with pytest.raises(FileError, match="'a' is there 2 times"):
        from_headers(file, plain_names)


def test_f11_a_name_that_is_in_an_index_twice(folder):
    (folder / INDEX).write_text('{"weight_map": {"a": "s0.safetensors", "a": "s1.safetensors"}}')
    refused(folder, "'a' is there 2 times", where=folder / INDEX)


@pytest.mark.parametrize("make", [list, tuple, iter])
def test_f11_a_name_that_is_in_a_stream_twice(make):
    refused(make([("a", torch.ones(2)), ("b", torch.ones(2)), ("a", torch.zeros(2))]), "'a' is there twice")


def test_f11_a_name_that_is_in_two_files(folder):
    (folder / INDEX).unlink()
    save_file(state(), folder / "s2.safetensors")
    refused(folder, "'layers.0.q.weight' is in two files", "s0.safetensors and s2.safetensors")


# -- F12 to F16: the index ------------------------------------------------------------------------------------------


def test_f12_all_missing_shards_are_listed_before_any_is_read(folder):
    (folder / "s1.safetensors").write_bytes(b"damaged")
    index_of(folder, {"a": "s1.safetensors", "b": "s2.safetensors", "c": "s3.safetensors", "d": "s2.safetensors"})
    refused(folder, "2 of 3 shards", "s2.safetensors, s3.safetensors", where=folder / INDEX)


def test_f13_an_index_that_names_what_its_shard_lacks(folder):
    index_of(folder, {"layers.0.q.weight": "s1.safetensors", "more": "s0.safetensors"})
    refused(folder, "2 tensors", "layers.0.q.weight in s1.safetensors, more in s0.safetensors")


def test_f13_a_shard_with_more_than_the_index_names_is_noted(folder):
    save_file({"layers.0.q.weight": torch.zeros(4, 6), "stray.weight": torch.ones(2, 2)}, folder / "s0.safetensors")
    found = open_checkpoint(folder)
    assert list(found.entries) == list(state())
    (note,) = open_deltas(folder, state()).match.notes
    assert "1 tensors" in note and "stray.weight" in note


TRAVERSALS = ["../s0.safetensors", "/etc/passwd.safetensors", "a/s0.safetensors", "..", ".", "", "s0.safetensors/.."]
TRAVERSALS += ["C:\\s0.safetensors", "C:s0.safetensors", "..\\s0.safetensors", "s0.safetensors\0", "s0\n.safetensors"]
TRAVERSALS += ["\\\\host\\s0.safetensors", "x" * 300 + ".safetensors", "s0.bin", "file://s0.safetensors"]


@pytest.mark.parametrize("name", TRAVERSALS, ids=repr)
def test_f14_an_index_reaches_nothing_outside_its_folder(name, folder):
    """Whether or not there is something to be read."""
    inside = folder / "inside"
    inside.mkdir()
    (inside / "a").mkdir()
    save_file(state(), inside / "a" / "s0.safetensors")
    index_of(inside, {"layers.0.q.weight": name})
    refused(inside, "outside its folder", "'layers.0.q.weight'", where=inside / INDEX)


def test_f14_files_that_are_links_are_read(folder):
    """As the hub's cache has them: the name is plain, the contents lie elsewhere."""
    inside = folder / "snapshot"
    inside.mkdir()
    for name in ("s0.safetensors", "s1.safetensors", INDEX):
        (inside / name).symlink_to(folder / name)
    found = open_checkpoint(inside)
    assert torch.equal(found.read("layers.1.q.weight"), state()["layers.1.q.weight"])


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", "null", "", "not json", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "s0.safetensors"}']
    + ['{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["s0.safetensors"]}}']
    + [
        '{"weight_map": {"a": {"b": "s0.safetensors"}}}',
        "[" * 100_000,
        '{"weight_map":' * 20_000,
        '{"a": 1' + "0" * 5000 + "}",
    ],
    ids=lambda text: text[:32],
)
def test_f15_an_index_that_is_none(text, folder):
    (folder / INDEX).write_text(text)
    refused(folder, where=folder / INDEX)


def test_f15_an_index_of_a_gigabyte_is_not_read(folder):
    with (folder / INDEX).open("wb") as stream:
        stream.truncate(2**30)
    start = time.perf_counter()
    refused(folder, "too large", where=folder / INDEX)
    assert time.perf_counter() - start < 1


def test_f15_an_index_of_a_million_names_is_judged(folder):
    index_of(folder, {f"t{k}": "s0.safetensors" for k in range(1_000_000)})
    start = time.perf_counter()
    message = refused(folder, "1000000 tensors", "t0 in s0.safetensors", "and 999950 more")
    assert len(message) < 10_000 and time.perf_counter() - start < 20


def test_several_indexes_are_a_question(folder):
    (folder / INDEX).rename(folder / "a.safetensors.index.json")
    (folder / "b.safetensors.index.json").write_text("{}")
    refused(folder, "several indexes", "a.safetensors.index.json, b.safetensors.index.json")
    assert len(open_checkpoint(folder / "a.safetensors.index.json").entries) == 2


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path)


KINDS = {"fifo": fifo, "device": device, "directory": Path.mkdir, "loop": loop}


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and devices among the files")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("door", ["file", "folder", "index", "the index itself"])
def test_f16_what_is_no_file_is_not_opened(kind, door, tmp_path, folder):
    """Opening a pipe would wait for ever, and a device never ends."""
    odd = folder / {"the index itself": INDEX, "index": "s0.safetensors"}.get(door, "model.safetensors")
    odd.unlink(missing_ok=True)
    if door in ("file", "folder"):
        (folder / INDEX).unlink()
    KINDS[kind](odd)
    source = odd if door == "file" else folder
    if kind == "directory" and door == "file":
        refused(source, "no .safetensors file")
    elif kind == "loop" and door == "index":
        refused(source, "1 of 2 shards", odd.name)
    else:
        refused(source, where=odd)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes and devices among the files")
def test_f16_a_plan_opens_no_device_either(tmp_path):
    device(tmp_path / "model.safetensors")
    with pytest.raises(FileError, match="is no file"):
        from_headers(tmp_path, plain_names)


# -- F17 to F20: time, pickles, secrets, names ----------------------------------------------------------------------


def rewritten(file: Path) -> None:
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))


def replaced(file: Path) -> None:
    stat = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("change", [rewritten, replaced, truncated, Path.unlink])
def test_f17_a_file_that_changed_since_it_was_opened(change, file):
    found = open_checkpoint(file)
    deltas = open_deltas(found, state())
    found.read("layers.0.q.weight")
    change(file)
    for use in (lambda: found.read("layers.0.q.weight"), lambda: deltas.delta("layers.0.q"), found.identity):
        with pytest.raises((FileError, FileNotFoundError), match=r"model\.safetensors"):
            use()


def test_f17_a_file_that_changes_while_it_is_read(file, monkeypatch):
    """The pages may be of both versions: what was made of them is thrown away."""
    deltas = open_deltas(state(), file)
    read = type(deltas.tuned).read

    def late(checkpoint, name, index=None):
        found = read(checkpoint, name, index)
        if checkpoint is deltas.tuned:
            rewritten(file)
        return found

    monkeypatch.setattr(type(deltas.tuned), "read", late)
    with pytest.raises(FileError, match="was changed since it was opened"):
        deltas.delta("layers.0.q")


class Payload:
    """What a pickle of an attacker does: something at once, when it is opened."""

    def __reduce__(self):
        return (Path.touch, (Path("executed"),))


def pickled(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:  # as torch.save writes them
        archive.writestr("archive/data.pkl", pickle.dumps(Payload()))
    return path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.pkl"])
@pytest.mark.parametrize("door", ["file", "folder", "plain pickle", "in the clothes of safetensors"])
def test_f18_pickles_are_refused_and_never_opened(name, door, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pickled(tmp_path / name)
    if door == "plain pickle":
        path.write_bytes(pickle.dumps(Payload()))
    if door == "in the clothes of safetensors":
        refused(path.rename(tmp_path / "model.safetensors"), "no safetensors file")
    else:
        os.chmod(path, 0)
        refused(tmp_path if door == "folder" else path, "is a pickle", "save_pretrained", name)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload()))  # and this one would have been seen
    assert (tmp_path / "executed").exists()


def test_f18_safetensors_beside_a_pickle_are_read(file):
    pickled(file.with_name("pytorch_model.bin"))
    assert len(open_checkpoint(file.parent).entries) == 2


def test_f19_credentials_of_an_address_are_not_repeated():
    message = refused("https://user:hf_secret@huggingface.co/org/name?token=hf_secret")
    assert "secret" not in message and "https" in message


def test_f20_names_that_look_alike_are_kept_apart(tmp_path, monkeypatch):
    """Also where names would be no file names, or escape the temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()
    names = [
        "a.weight",
        "A.weight",
        "\u0430.weight",
        "a .weight",
        "../../x.weight",
        "/abs.weight",
        "con.weight",
        "e\u0301.weight",
    ]
    names += ["\u00e9.weight", "", "n" * 5000 + ".weight"]
    named = {name: torch.full((2, 2), float(k)) for k, name in enumerate(names)}
    save_file(named, tmp_path / "x.safetensors")
    for source in (named, iter(named.items()), tmp_path / "x.safetensors"):
        found = open_checkpoint(source)
        assert {name: found.read(name)[0, 0].item() for name in names} == {n: float(k) for k, n in enumerate(names)}
        deltas = open_deltas(found, {n: t + 1 for n, t in named.items()})
        assert len({site.path for site in deltas.sites}) == len(names)
    assert {path.name for path in tmp_path.iterdir()} == {"spool", "x.safetensors"}


def test_f20_two_tensors_of_one_path_are_refused():
    both = {"a": torch.ones(2, 2), "a.weight": torch.ones(2, 2)}
    with pytest.raises(FileError, match="a and a.weight are both the site a"):
        open_deltas(both, both)


# -- F21 to F27: numbers --------------------------------------------------------------------------------------------


def with_values(values: dict, dtype=torch.float32, shape=(300, 900)) -> dict[str, torch.Tensor]:
    tensor = torch.ones(shape, dtype=dtype)
    for where, value in values.items():
        tensor[where] = value
    return {"l.0.q.weight": tensor, "l.1.q.weight": torch.ones(2, 2), "embed.weight": tensor.clone()}


NONFINITE = {
    "base": ({(3, 4): torch.nan}, {}, r"1 of 270000 in l.0.q.weight of the mapping"),
    "tuned": ({}, {(3, 4): torch.inf, (299, 899): -torch.inf}, r"2 of 270000"),
    "both": ({(0, 0): torch.inf}, {(0, 0): torch.inf, (1, 1): torch.nan}, r"1 of 270000 .* 2 of 270000"),
    "opposed": ({(0, 0): torch.inf, (0, 1): -torch.inf}, {}, r"2 of 270000"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("case", NONFINITE)
def test_f21_values_that_are_not_finite_are_counted_and_named(case, dtype):
    base, tuned, says = NONFINITE[case]
    found = open_deltas(with_values(base, dtype), with_values(tuned, dtype))
    for path in ("l.0.q", "embed"):
        with pytest.raises(FileError, match=f"{path} is not finite(.|\n)*{says.replace('l.0.q', path)}"):
            found.delta(path)
    assert not found.delta("l.1.q").any()


def test_f21_values_that_are_not_finite_can_be_left_out():
    base, tuned = with_values({(3, 4): torch.nan}), with_values({(5, 5): torch.inf, (5, 6): torch.inf})
    found = open_deltas(base, tuned, nonfinite="skip")
    assert [site.path for site in found.sites] == ["l.1.q"] == [pair.site.path for pair in found.match.pairs]
    assert found.match.refused["l.0.q"] == "not finite: 1 entries of the base, 2 of the tuned side"
    assert "2 sites with NaN or infinite entries" in found.match.notes[-1]
    json.dumps(found.match.to_dict())
    assert len(open_deltas(with_values({}), with_values({}), nonfinite="skip")) == 3


def test_f21_padded_rows_are_looked_at_too():
    base, tuned = torch.ones(4, 3), torch.ones(6, 3)
    tuned[5, 2] = torch.nan
    with pytest.raises(FileError, match="1 of 18 in head.weight"):
        open_deltas({"head.weight": base}, {"head.weight": tuned}, rows="pad").delta("head")
    assert not open_deltas({"head.weight": base}, {"head.weight": tuned}, rows="truncate").delta("head").any()


def test_f22_differences_beyond_half_precision():
    base = with_values({(0, 0): -65504}, torch.float16)
    found = open_deltas(base, with_values({(0, 0): 65504}, torch.float16)).delta("l.0.q")
    assert found[0, 0] == 131008 and found.dtype == torch.float32


@pytest.mark.parametrize("path", ["l.0.q", "embed"])
def test_f22_sums_beyond_single_precision_are_no_fault(path):
    """Finite values whose sum is not; and a difference that single precision cannot hold is."""
    large = {(k, j): 3e38 for k in range(3) for j in range(3)}
    found = open_deltas(with_values({}), with_values(large))
    assert found.delta(path).max() == 3e38
    beyond = open_deltas(with_values({(0, 0): -3e38}), with_values(large))
    with pytest.raises(FileError, match="a difference beyond float32"):
        beyond.delta(path)
    assert beyond.delta(path, torch.float64).max().item() == pytest.approx(6e38)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_f25_rows_and_columns_are_matrices(shape):
    found = open_deltas({"a.weight": torch.zeros(shape)}, {"a.weight": torch.ones(shape)})
    assert torch.equal(found.delta("a"), torch.ones(shape))


REFUSED = {"scalar": (), "1-D": (3,), "empty": (0, 3), "3-D": (2, 2, 2), "5-D": (1, 1, 1, 1, 1)}


@pytest.mark.parametrize("what", REFUSED)
def test_f25_what_has_no_two_sides_is_refused_by_name(what):
    extra = {"a.weight": torch.ones(2, 2), "x.weight": torch.ones(REFUSED[what])}
    found = open_deltas(extra, extra)
    assert [site.path for site in found.sites] == ["a"]
    assert what in found.match.refused["x.weight"]


def test_f25_checkpoints_of_nothing_but_vectors_are_no_error():
    found = open_deltas({"norm.weight": torch.ones(3)}, {"norm.weight": torch.ones(3)})
    assert len(found) == 0 and list(found.match.refused) == ["norm.weight"]


PACKED = {
    "bnb": ("l.0.q.weight", torch.uint8, (12, 1)),
    "int8": ("l.0.q.weight", torch.int8, (4, 6)),
    "gptq": ("l.0.q.qweight", torch.int32, (1, 6)),
    "float8": ("l.0.q.weight", torch.float8_e4m3fn, (4, 6)),
    "float8 range": ("l.0.q.weight", torch.float8_e5m2, (4, 6)),
    "bool": ("l.0.q.weight", torch.bool, (4, 6)),
}


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
def test_f26_packed_weights_are_refused_by_name(packed, side):
    name, dtype, shape = PACKED[packed]
    whole = {"l.0.q.weight": tiny.noise(4, 6)}
    cut = {name: torch.zeros(shape).to(dtype), "l.0.q.scales": torch.ones(6)}
    sides = (cut if side != "tuned" else whole, cut if side != "base" else whole)
    with pytest.raises(
        FileError, match=rf"{name} of .* is quantised; give the dequantised base(.|\n)*{str(dtype)[6:]}"
    ):
        open_deltas(*sides)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0"])
def test_f26_dtypes_that_torch_lacks(dtype, file):
    size = {"F4": 12, "F6_E2M3": 18, "F8_E8M0": 24}[dtype]
    file.write_bytes(raw({"layers.0.q.weight": entry(dtype, (4, 6), 0, size)}, b"\0" * size))
    with pytest.raises(FileError, match=r"layers.0.q.weight of .* is quantised"):
        open_deltas(file, state())
    with pytest.raises(FileError, match=dtype):
        open_checkpoint(file).read("layers.0.q.weight")


def test_f26_integers_and_masks_that_are_no_weights_are_no_fault():
    more = {"ids": torch.ones(2, 3, dtype=torch.int64), "attn.bias": torch.ones(1, 1, 3, 3, dtype=torch.bool)}
    more |= {"phase": torch.ones(2, 2, dtype=torch.complex64), "count": torch.ones((), dtype=torch.int64)}
    found = open_deltas(state() | more, state() | more)
    assert len(found) == 2 and found.match.refused["phase"] == "holds complex64"
    assert set(found.match.refused) == set(more)


@pytest.mark.parametrize("tensor", [torch.empty(2, 2, device="meta"), torch.ones(2, 2).to_sparse()])
def test_f26_tensors_without_values(tensor):
    for source in ({"a.weight": tensor}, iter([("a.weight", tensor)])):
        refused(source, "'a.weight' has no values")


@pytest.mark.parametrize("pair", [3, ("a",), ("a", torch.ones(2), 1), (1, torch.ones(2)), ("a", [1.0]), "ab", None])
def test_streams_of_something_else(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for make in (list, iter):
        refused(make([("x", torch.ones(1)), pair]))
    assert list(tmp_path.iterdir()) == []


def test_f27_mixed_dtypes_are_computed_in_the_finer():
    base, tuned = tiny.noise(4, 6).bfloat16(), tiny.noise(4, 6, seed=1)
    found = open_deltas({"q.weight": base}, {"q.weight": tuned})
    assert torch.equal(found.delta("q"), tuned - base.float())
    (pair,) = found.match.pairs
    assert (pair.base_dtype, pair.tuned_dtype) == (torch.bfloat16, torch.float32)


def test_a_full_disk_ends_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for make in (full, lambda **_: open("/dev/full", "w+b")):
        monkeypatch.setattr("tempfile.TemporaryFile", make)
        with pytest.raises(FileError, match=r"No space left(.|\n)*TMPDIR"):
            open_checkpoint(iter(state().items()))
    assert list(tmp_path.iterdir()) == []


# -- anything else --------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
sizes = st.integers(-1, 3) | st.sampled_from([2**31, 2**32, 2**63, 2**64 - 1])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "U8", "F4", "F8_E4M3", "BOOL", "I64", "C64", "X"]),
        "shape": st.lists(sizes, max_size=4),
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2),
    }
)
headers = st.dictionaries(st.text(max_size=6), entries | json_values, max_size=3).map(lambda h: json.dumps(h).encode())


def survives(path: Path) -> None:
    """Either every tensor can be read and compared, or the error is one of ours."""
    try:
        with open_checkpoint(path) as found:
            found.identity()
            for name, entry in found.entries.items():
                assert tuple(found.read(name).shape) == entry.shape
            for _, delta in open_deltas(found, found):
                assert bool(torch.isfinite(delta).all())
    except TensorAdaptError as error:
        assert str(error)


@settings(max_examples=300)
@given(
    header=headers | st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()),
    data=st.binary(max_size=40),
)
def test_f54_only_our_errors_leave_a_header(header, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(raw(header, data))
    survives(path)
    try:
        from_headers(path, plain_names)
    except TensorAdaptError:
        pass


@settings(max_examples=200)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4), cut=st.integers(0, 400))
def test_f54_only_our_errors_leave_a_file_with_changed_bytes(changes, cut, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    save_file(state(), path)
    contents = bytearray(path.read_bytes())
    for where, value in changes:
        contents[where % len(contents)] = value
    path.write_bytes(contents[: len(contents) - cut % 3 * cut])
    survives(path)


@settings(max_examples=200)
@given(
    text=st.binary(max_size=60)
    | json_values.map(lambda v: json.dumps(v).encode())
    | st.dictionaries(
        st.sampled_from([*state(), "x"]), st.sampled_from(["s0.safetensors", "s1.safetensors"]) | json_values
    ).map(lambda m: json.dumps({"weight_map": m}).encode())
)
def test_f54_only_our_errors_leave_an_index(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "indexed"
    if not path.exists():
        path.mkdir()
        for k, (name, tensor) in enumerate(state().items()):
            save_file({name: tensor}, path / f"s{k}.safetensors")
    (path / INDEX).write_bytes(text)
    survives(path)


@settings(max_examples=200)
@given(source=st.text(max_size=30) | json_values | st.binary(max_size=9))
def test_f54_only_our_errors_leave_a_source(source):
    try:
        open_checkpoint(source).close()
    except TensorAdaptError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + bytes(40), "is a pickle"),
        (b"GGUF" + bytes(40), "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff" * 40, "no header and"),
    ],
    ids=["a zipped pickle", "GGUF", "a pointer", "noise"],
)
def test_a_plans_model_that_is_no_safetensors_file_is_called_what_it_is(content, said, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=said) as caught:
        ta.plan(ta.preset("lora", targets=["q"]), path)
    assert "bytes with" not in str(caught.value)


@pytest.mark.parametrize(("device", "meant"), [("gpu", "cuda"), ("cud:0", "cuda"), ("metal", "mps")])
def test_a_device_that_is_none_is_answered_with_the_one_that_is_meant(device, meant):
    sides = [{"layers.0.q.weight": torch.ones(4, 4)}] * 2
    with pytest.raises(SpecError, match=f"did you mean {meant}") as caught:
        ta.analyze(*sides, device=device)
    assert len(str(caught.value)) < 150
