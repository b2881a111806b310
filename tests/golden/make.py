"""Write the golden files: adapters of every format, an interrupted extraction and a report, with what they stand for.

`python tests/golden/make.py` is run once for a version whose files are to be kept, and refuses a working tree that is
not committed. What was written by an earlier version stays: files lie in a folder of their version.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

import numpy as np
import plans
import tiny
import torch
from safetensors.torch import load_file, save_file

import tensoradapt as ta
from tensoradapt.extract.journal import Journal
from tensoradapt.version import VERSION

HERE = Path(__file__).parent
SPEC = ta.preset("lora", rank=2, targets=["q"]) + ta.preset("lotr", rank=2, targets=["v"])
STAMP = 1_700_000_000  # the time of the checkpoints' files, by which an extraction knows them again


def commit() -> str:
    """The commit of the tree, which has to be clean."""
    git = ["git", "-C", str(HERE)]
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    if changed:
        sys.exit(f"the tree is not committed, and golden files say of which commit they are:\n{changed}")
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def adapters(out: Path) -> None:
    """Every format's file, and the deltas that it stands for."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in plans.seeds(Path(folder)):
            name = seed.name.replace(" ", "_")
            file = Path(shutil.copyfile(seed.file, out / f"{name}.safetensors"))
            model = seed.model()
            adapter = ta.load(file, model)
            deltas = {path: adapter.delta(path).detach().float().numpy() for path in adapter._lines}
            np.savez_compressed(out / f"{name}.npz", **deltas)


def sides(out: Path) -> tuple[Path, Path]:
    """Two checkpoints, whose files have a time that can be set again."""
    base = {f"layers.{i}.{r}.weight": tiny.noise(8, 6, seed=i) for i in (0, 1) for r in "qv"}
    tuned = {name: t + 0.1 * tiny.noise(8, 6, seed=10 + k) for k, (name, t) in enumerate(base.items())}
    for name, state in (("base", base), ("tuned", tuned)):
        (out / name).mkdir()
        save_file(state, out / name / "model.safetensors")
        os.utime(out / name / "model.safetensors", (STAMP, STAMP))
    return out / "base", out / "tuned"


def extraction(out: Path) -> None:
    """An extraction that was interrupted after its second group of three, and the adapter that a whole one gives."""
    write, parts = Journal.write, []

    def stopped(journal: Journal, *given: object) -> None:
        write(journal, *given)
        parts.append(given)
        if len(parts) == 2:
            raise KeyboardInterrupt

    both = sides(out)
    with patch.object(Journal, "write", stopped), suppress(KeyboardInterrupt):
        ta.extract(*both, SPEC, out / "out")
    with tempfile.TemporaryDirectory() as folder:
        whole = ta.extract(*both, SPEC, Path(folder) / "out")
        shutil.copyfile(whole.path, out / "whole.safetensors")
    np.savez_compressed(
        out / "tensors.npz", **{k: t.float().numpy() for k, t in load_file(out / "whole.safetensors").items()}
    )


def report(out: Path, both: Path) -> None:
    """A report, and its numbers by weight."""
    found = ta.analyze(both / "base", both / "tuned")
    found.to_json(out / "report.json")
    (out / "numbers.json").write_text(json.dumps(found.records(), indent=1))


def main() -> None:
    made, out = commit(), HERE / VERSION
    torch.manual_seed(0)
    shutil.rmtree(out, ignore_errors=True)
    for name, write in (("adapters", adapters), ("extraction", extraction)):
        (out / name).mkdir(parents=True)
        write(out / name)
    (out / "report").mkdir()
    report(out / "report", out / "extraction")
    about = {"version": VERSION, "commit": made, "torch": torch.__version__}
    (out / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{size:,} bytes in {out}")


if __name__ == "__main__":
    main()
