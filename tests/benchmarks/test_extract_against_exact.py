"""LoRA extraction from Llama-shaped bfloat16 checkpoints against one exact SVD per matrix, both streamed.

`pytest tests/benchmarks/test_extract_against_exact.py -n 0 -s`; figures are ratios within one run.
"""

import os
import shutil

import pytest
from checkpoints import ROLES, watched, write_pair
from harness import hardware

RANK = 32
MEGABYTE = 2**20

EXACT = """
import json, os
from safetensors import safe_open
from safetensors.torch import save_file
import torch
torch.set_num_threads(2)
"""
EXACT_BODY = """
factors, lost, total = {{}}, 0.0, 0.0
folders = {base!r}, {tuned!r}
index = json.load(open(folders[0] + "/model.safetensors.index.json"))["weight_map"]
for name, file in index.items():
    with safe_open(folders[0] + "/" + file, "pt") as one, safe_open(folders[1] + "/" + file, "pt") as two:
        delta = two.get_tensor(name).float() - one.get_tensor(name).float()
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    root = s[:{rank}].sqrt()
    factors[name + ".B"] = (u[:, :{rank}] * root).contiguous()
    factors[name + ".A"] = (root[:, None] * vh[:{rank}]).contiguous()
    total += float(s.double().square().sum()); lost += float(s[{rank}:].double().square().sum())
os.makedirs({out!r}, exist_ok=True)
save_file(factors, {out!r} + "/factors.safetensors")
result = {{"error": (lost / total) ** 0.5}}
"""
OURS = "import torch\nimport tensoradapt as ta\nimport tensoradapt.cli.app\ntorch.set_num_threads(2)"
OURS_BODY = """
spec = ta.preset("lora", rank={rank}, targets={targets!r})
made = ta.extract({base!r}, {tuned!r}, spec, {out!r})
result = {{"error": made.relative_error, "bytes": made.plan.num_bytes}}
"""

# layers, width, inner, times faster in compute, times faster as a whole process
SHAPES = {
    "8 layers of width 1024": (8, 1024, 2816, 12.0, None),
    "4 layers of width 2048": (4, 2048, 5632, 25.0, 8.0),
    "1 layer of width 4096": (1, 4096, 11008, None, None),
}


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SHAPES)
def test_extraction_against_exact(name, tmp_path):
    layers, width, inner, wanted, wanted_whole = SHAPES[name]
    base, tuned = write_pair(tmp_path, layers, width, inner)
    targets = [f"*{role}" for role in ROLES]
    known = {"base": str(base), "tuned": str(tuned), "rank": RANK, "targets": targets}
    os.sync()  # what was just written is on the disk before anybody is timed

    def extracted(turn, sampled=False):
        return watched(OURS, OURS_BODY.format(**known, out=str(tmp_path / f"ours{turn}")), sampled=sampled)

    ours = [extracted(0)]
    exact = watched(EXACT, EXACT_BODY.format(**known, out=str(tmp_path / "exact")), sampled=False)
    ours += [extracted(1), extracted(2)]
    peak = extracted(3, sampled=True)["peak"]
    shutil.rmtree(base)
    shutil.rmtree(tuned)
    middle = sorted(ours, key=lambda run: run["seconds"])[1]
    whole = sorted(run["whole"] for run in ours)[1]
    allowed = 4 * width * inner * 4 + middle["result"]["bytes"] + 64 * MEGABYTE
    print(f"\n{hardware()}; two threads; {name}, {7 * layers} matrices, rank {RANK}")
    print("| run | compute s | whole process s | relative error |\n| --- | --: | --: | --: |")
    for label, run, process in (("exact", exact, exact["whole"]), ("ours", middle, whole)):
        print(f"| {label} | {run['seconds']:.2f} | {process:.2f} | {run['result']['error']:.5f} |")
    compute, process = exact["seconds"] / middle["seconds"], exact["whole"] / whole
    residual = middle["result"]["error"] / exact["result"]["error"]
    print(
        f"compute {compute:.1f} times, whole process {process:.1f} times, residual {residual:.5f} of the optimal one,"
    )
    print(f"anonymous memory beyond the imports {peak / MEGABYTE:.0f} MiB, {allowed / MEGABYTE:.0f} allowed,", end=" ")
    print(f"imports {middle['imports']:.2f} s")
    assert residual <= 1.002
    assert peak <= allowed
    assert wanted is None or compute >= wanted
    assert wanted_whole is None or process >= wanted_whole
