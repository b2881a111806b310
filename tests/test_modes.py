"""Files that a colleague can read: every writer leaves the modes that the user's mask and older files ask for."""

import os
import stat
from pathlib import Path

import pytest
import tiny
import torch

import tensoradapt as ta
from tensoradapt.plots import plot_budget

SPEC = ta.preset("lora", rank=2, targets=["query"])
NAME = "encoder.layer.0.attention.self.query.weight"


def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    base = {key: value.clone() for key, value in tiny.bert().state_dict().items()}
    return base, base | {NAME: base[NAME] + tiny.noise(16, 1) @ tiny.noise(1, 16, seed=1)}


def adapter() -> ta.Adapter:
    made = ta.attach(tiny.bert(), SPEC)
    tiny.shake(made)
    return made


def merged(out: Path) -> None:
    base = out.parent / "base"
    (base / "more").mkdir(parents=True, exist_ok=True)
    tiny.bert().save_pretrained(base)
    (base / "more" / "notes.txt").write_text("kept")
    ta.merge_folder(base, adapter(), out, overwrite=True)


WRITERS = {
    "save": lambda out: adapter().save(out),
    "save to a file": lambda out: adapter().save(out / "a.safetensors"),
    "extract": lambda out: ta.extract(*pair(), SPEC, out, overwrite=True),
    "convert": lambda out: ta.convert(adapter(), ta.preset("lotr", rank=2, targets=["query"]), out),
    "export": lambda out: ta.export_peft(adapter(), out, overwrite=True),
    "merge": merged,
    "a spec as YAML": lambda out: SPEC.save(out / "spec.yaml"),
    "a spec as JSON": lambda out: SPEC.save(out / "spec.json"),
    "a report": lambda out: ta.analyze(*pair()).to_json(out / "report.json"),
    "a page": lambda out: ta.analyze(*pair()).to_html(out / "report.html"),
    "a figure": lambda out: plot_budget(ta.budget({"lora": SPEC}, tiny.bert(), [1, 2]), out / "budget.png"),
}


def modes(folder: Path) -> dict[str, int]:
    return {str(found): stat.S_IMODE(found.stat().st_mode) for found in (folder, *folder.rglob("*"))}


def usual(folder: Path, mask: int) -> dict[str, int]:
    """What the system makes of `open` and `mkdir` under a mask."""
    return {str(p): (0o777 if p.is_dir() else 0o666) & ~mask for p in (folder, *folder.rglob("*"))}


@pytest.fixture
def masked():
    """A function that sets the process' mask, which is put back afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077], ids=oct)
@pytest.mark.parametrize("writer", WRITERS)
def test_the_mask_decides(writer, mask, masked, tmp_path):
    masked(mask)
    out = tmp_path / "out"
    if "spec" in writer:
        out.mkdir()
    WRITERS[writer](out)
    assert len(modes(out)) > 1 and modes(out) == usual(out, mask)
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "base"}


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "convert"])
def test_what_is_replaced_keeps_its_mode(writer, masked, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    WRITERS[writer](out)
    for k, found in enumerate(sorted(out.rglob("*"))):
        found.chmod(0o750 if found.is_dir() else (0o640, 0o600, 0o664)[k % 3])
    out.chmod(0o2770)
    before = modes(out)
    masked(0o077)
    WRITERS[writer](out)
    assert modes(out) == before
