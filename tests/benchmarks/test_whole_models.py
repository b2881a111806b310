"""`tensoradapt analyze` on folders of whole models, embeddings and head included: time, memory, and how both grow.

`pytest tests/benchmarks/test_whole_models.py -n 0 -s`; the pair of a billion weights needs 6 GB of disk and is removed
afterwards. TENSORADAPT_PAIR=base:tuned adds a pair of folders of one's own.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import ROLES, watched
from harness import hardware
from safetensors.torch import save_file

GIGABYTE, MEGABYTE = 2**30, 2**20
IMPORTS = "import torch\nimport tensoradapt as ta\nimport tensoradapt.cli.run.analyze\ntorch.set_num_threads(2)"
ANALYZE = """
report = ta.analyze({base!r}, {tuned!r})
ranks = sorted(row.ranks["noise"] or 999 for row in report.sites.values())
result = {{"rank": ranks[len(ranks) // 2], "sites": len(ranks), "candidates": len(report.candidates)}}
"""


def write_whole(folder, layers, width, inner, vocabulary, *, heads=4, tied=False):
    """Llama's shape in bfloat16: rows of uneven size, deltas of rank 16 with noise, one file for every few tensors."""
    shared = max(1, width // heads)
    sizes = {"width": width, "inner": inner}
    shapes = {"model.embed_tokens": (vocabulary, width)} | ({} if tied else {"lm_head": (vocabulary, width)})
    for layer in range(layers):
        for role, (out, inp) in ROLES.items():
            rows = shared if role[10:] in ("k_proj", "v_proj") else sizes[out]
            shapes[f"model.layers.{layer}.{role}"] = (rows, sizes[inp])
    draw = torch.Generator().manual_seed(0)
    for side in ("base", "tuned"):
        (folder / side).mkdir(parents=True)
    for name, (rows, cols) in shapes.items():
        pair = [torch.empty(rows, cols, dtype=torch.bfloat16) for _ in range(2)]
        low = torch.randn(rows, 16, generator=draw), torch.randn(16, cols, generator=draw) * (3e-4 / 4)
        for start in range(0, rows, 4096):
            part = slice(start, min(start + 4096, rows))
            uneven = torch.where(torch.arange(part.start, part.stop) % 97 == 0, 6.0, 1.0)[:, None]
            pair[0][part] = 0.02 * uneven * torch.randn(len(uneven), cols, generator=draw)
            noise = 2e-5 * torch.randn(len(uneven), cols, generator=draw)
            pair[1][part] = pair[0][part].float() + low[0][part] @ low[1] + noise
        for side, tensor in zip(("base", "tuned"), pair, strict=True):
            save_file({f"{name}.weight": tensor}, folder / side / f"{name}.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "tuned"


def line(name, run):
    print(f"| {name} | {run['seconds']:.1f} | {run['peak'] / MEGABYTE:.0f} | {run['result']} |", flush=True)


HEAD = "| pair | seconds | peak anonymous MiB | result |\n| --- | --: | --: | --- |"


@pytest.mark.benchmark
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_billion_weights_within_three_minutes_and_two_gigabytes(tied, tmp_path):
    base, tuned = write_whole(tmp_path, 16, 2048, 8192, 128_256, tied=tied)
    os.sync()
    print(f"\n{hardware()}; two threads\n{HEAD}")
    runs = [watched(IMPORTS, ANALYZE.format(base=str(base), tuned=str(tuned)), sampled=s) for s in (False, True)]
    shutil.rmtree(tmp_path)
    line("1B, head tied" if tied else "1B, head of its own", {**runs[0], "peak": runs[1]["peak"]})
    assert runs[0]["result"]["candidates"] and runs[0]["result"]["sites"] == 113 + (not tied)
    assert runs[1]["peak"] < 2 * GIGABYTE
    assert runs[0]["whole"] < 180


GROWN = {"layers": [(4, 8192), (8, 8192), (16, 8192)], "vocabulary": [(2, 16_384), (2, 65_536), (2, 262_144)]}


@pytest.mark.benchmark
@pytest.mark.parametrize("what", GROWN)
def test_time_is_linear(what, tmp_path):
    """Twice as many layers, or rows, take at most 1.5 times twice as long; the smallest pair bears the fixed costs."""
    print(f"\n{hardware()}; two threads; width 256\n{HEAD}")
    seconds = []
    for layers, vocabulary in GROWN[what]:
        base, tuned = write_whole(tmp_path / f"{layers}_{vocabulary}", layers, 256, 1024, vocabulary)
        body = ANALYZE.format(base=str(base), tuned=str(tuned))
        run = sorted((watched(IMPORTS, body, sampled=False) for _ in range(3)), key=lambda run: run["seconds"])[1]
        line(f"{layers} layers, {vocabulary:,} rows", run)
        seconds.append(run["seconds"])
    size = [pair[0 if what == "layers" else 1] for pair in GROWN[what]]
    ratio = (seconds[-1] / seconds[0]) / (size[-1] / size[0])
    print(f"{size[-1] / size[0]:.0f} times the {what}: {seconds[-1] / seconds[0]:.2f} times the time")
    assert ratio < 1.5


@pytest.mark.benchmark
@pytest.mark.skipif("TENSORADAPT_PAIR" not in os.environ, reason="TENSORADAPT_PAIR=base:tuned names a pair")
def test_a_small_model_as_a_process_within_fifteen_seconds(tmp_path):
    base, tuned = os.environ["TENSORADAPT_PAIR"].split(":")
    command = [sys.executable, "-m", "tensoradapt", "analyze", base, tuned, "--out", str(tmp_path / "report")]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    seconds = time.perf_counter() - begun
    print(f"\n{hardware()}; two threads; {seconds:.1f} s as a process, with report.json, report.html and report.txt")
    assert {file.name for file in (tmp_path / "report").iterdir()} == {"report.json", "report.html", "report.txt"}
    assert seconds < 15
