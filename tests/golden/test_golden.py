"""Files of earlier versions are read to the numbers that they stood for, and interrupted work is gone on with.

`make.py` writes those of a version. The folder `first` has adapters of commit 83cdbca, whose plans do not say what of
their layouts is known, and which kinds of modules are joined.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import plans
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import tensoradapt as ta
from tensoradapt.plots import draw_figure, drawable, read_report
from tensoradapt.version import VERSION

HERE = Path(__file__).parent
VERSIONS = sorted(about.parent for about in HERE.glob("*/about.json"))
ADAPTERS = sorted(HERE.glob("*/adapters/*.safetensors"))
STAMP = 1_700_000_000  # the time of the checkpoints' files when the extraction was begun
SPEC = ta.preset("lora", rank=2, targets=["q"]) + ta.preset("lotr", rank=2, targets=["v"])


def named(path):
    return f"{path.relative_to(HERE).parts[0]} {path.stem}"


def near(found, wanted):
    found = found.detach().float().numpy()
    return found.shape == wanted.shape and np.allclose(found, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def model_for(file, path):
    """A model of the kind that a golden adapter is for, by one of its sites."""
    if path.startswith("encoder."):
        return tiny.bert()
    kinds = {name.replace(" ", "_"): kind for name, (kind, _) in plans.SPECS.items()}
    return plans.MODELS[kinds.get(file.stem, "bert")]()


@pytest.mark.parametrize("file", ADAPTERS, ids=named)
@pytest.mark.filterwarnings("ignore:.*was made on another base")
def test_an_adapter_of_then_has_the_deltas_of_then(file, tmp_path):
    wanted = dict(np.load(file.with_suffix(".npz")))
    saved = ta.open_adapter(file)
    assert str(saved) and str(saved.plan) and set(saved.sites) <= set(wanted)
    assert all(near(saved.delta(path), wanted[path]) for path in saved.sites)
    again = ta.open_adapter(saved.save(tmp_path / "again"))
    assert again.plan == saved.plan and all(torch.equal(t, again.tensors[k]) for k, t in saved.tensors.items())
    stored = load_file(file)
    assert list(stored) == list(load_file(again.path)) and all(
        torch.equal(t, saved.tensors[k]) for k, t in stored.items()
    )
    adapter = ta.load(file, model_for(file, next(iter(wanted))))
    assert all(near(adapter.delta(path), delta) for path, delta in wanted.items())


def brought(folder, tmp_path):
    """An interrupted extraction of then, with its checkpoints, as if it lay here from then on."""
    out = Path(shutil.copytree(folder / "extraction", tmp_path / "extraction"))
    for side in ("base", "tuned"):
        os.utime(out / side / "model.safetensors", (STAMP, STAMP))
    return out


def digests(folder):
    return {file: hashlib.sha256(file.read_bytes()).digest() for file in folder.glob("*.safetensors")}


def part(file):
    """The factors of a group that was done, by the keys of the adapter's file."""
    with safe_open(file, "pt") as opened:
        return {f"{opened.metadata()['name']}.{node}": opened.get_tensor(node) for node in opened.keys()}


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_an_interrupted_extraction_of_then_is_finished_or_refused_with_its_parts_whole(folder, tmp_path):
    out, wanted = brought(folder, tmp_path), dict(np.load(folder / "extraction" / "tensors.npz"))
    parts = digests(out / "out.partial")
    done = {key: tensor for file in parts for key, tensor in part(file).items()}
    assert len(parts) == 2 and all(near(tensor, wanted[key]) for key, tensor in done.items())
    begun_by = json.loads((out / "out.partial" / "work.json").read_text())["versions"]
    if begun_by == {"tensoradapt": VERSION, "torch": torch.__version__}:
        result = ta.extract(out / "base", out / "tuned", SPEC, out / "out")
        found = load_file(result.path)
        assert set(found) == set(wanted) and all(near(tensor, wanted[key]) for key, tensor in found.items())
        assert all(torch.equal(found[key], tensor) for key, tensor in done.items())
    else:
        with pytest.raises(ta.FileError, match="versions"):
            ta.extract(out / "base", out / "tuned", SPEC, out / "out")
        assert digests(out / "out.partial") == parts
    whole = ta.open_adapter(out / "whole.safetensors")
    assert all(near(tensor, wanted[key]) for key, tensor in whole.tensors.items())


@pytest.mark.parametrize("folder", VERSIONS, ids=lambda path: path.name)
def test_a_report_of_then_has_the_numbers_of_then(folder, tmp_path):
    report, rows = (
        read_report(folder / "report" / "report.json"),
        json.loads((folder / "report" / "numbers.json").read_text()),
    )
    assert len(rows) == len(report["sites"]) == 4
    for row in rows:
        site = report["sites"][row["weight"]]
        for name in ("norm", "relative_change", "spectral_norm", "stable_rank", "effective_rank"):
            assert site[name] == pytest.approx(row[name], rel=1e-12)
        assert {rule: row[f"rank.{rule}"] for rule in site["ranks"]} == site["ranks"]
    for name in drawable(report):
        draw_figure(report, name)


def test_there_are_files_of_a_version():
    assert VERSIONS and len(ADAPTERS) > 25 * len(VERSIONS)
    assert sum(file.stat().st_size for file in HERE.rglob("*") if file.is_file()) < 1_000_000 * len(VERSIONS)
