"""Time and memory of extraction over 4 to 32 layers, and a checkpoint pair of 6 GB a side within 3 GB.

`pytest tests/benchmarks/test_scaling.py -n 0 -s`; the large pair needs 12 GB of disk and is removed afterwards.
"""

import shutil

import pytest
from checkpoints import ROLES, watched, write_pair
from harness import hardware

MEGABYTE, GIGABYTE = 2**20, 2**30
IMPORTS = "import torch\nimport tensoradapt as ta\nimport tensoradapt.cli.app\ntorch.set_num_threads(2)"
EXTRACT = """
made = ta.extract({base!r}, {tuned!r}, ta.preset({preset!r}, rank=16, targets={targets!r}), {out!r})
result = {{"error": made.relative_error, "bytes": made.plan.num_bytes}}
"""
ANALYZE = """
report = ta.analyze({base!r}, {tuned!r})
ranks = sorted(row.ranks["noise"] or 999 for row in report.sites.values())
result = {{"rank": ranks[len(ranks) // 2], "sites": len(ranks)}}
"""
TARGETS = [f"*{role}" for role in ROLES]
# Deltas of a format that shares factors are read several times: stacks below 256 MiB are kept in between, larger ones
# are not. The last row keeps none, as if all were large.
NONE_KEPT = "import tensoradapt.analysis.slices\ntensoradapt.analysis.slices.CACHE = 0"
FORMATS = {"lora": ("lora", ""), "lotr": ("lotr", ""), "lotr, no stack kept": ("lotr", NONE_KEPT)}


@pytest.mark.benchmark
@pytest.mark.parametrize("name", FORMATS)
def test_linear_in_the_number_of_layers(name, tmp_path):
    (preset, kept), rows = FORMATS[name], {}
    for layers in (4, 8, 16, 32):
        base, tuned = write_pair(tmp_path / str(layers), layers, 512, 1408)
        known = {"base": str(base), "tuned": str(tuned), "targets": TARGETS, "preset": preset}
        runs = [
            watched(f"{IMPORTS}\n{kept}", EXTRACT.format(**known, out=str(tmp_path / f"{layers}_{k}")))
            for k in range(3)
        ]
        rows[layers] = sorted(runs, key=lambda run: run["seconds"])[1]
        shutil.rmtree(tmp_path / str(layers))
    print(f"\n{hardware()}; two threads; {name} r=16, width 512")
    print("| layers | seconds | per layer | peak anonymous MiB | adapter MiB |\n| --: | --: | --: | --: | --: |")
    for layers, run in rows.items():
        size, peak = run["result"]["bytes"] / MEGABYTE, run["peak"] / MEGABYTE
        print(f"| {layers} | {run['seconds']:.2f} | {run['seconds'] / layers:.4f} | {peak:.0f} | {size:.1f} |")
    assert rows[32]["seconds"] / 32 < 1.5 * rows[4]["seconds"] / 4
    if name != "lotr":
        grown = rows[32]["peak"] - rows[4]["peak"]
        assert grown <= rows[32]["result"]["bytes"] - rows[4]["result"]["bytes"] + 16 * MEGABYTE


@pytest.mark.benchmark
def test_six_gigabytes_within_three(tmp_path):
    base, tuned = write_pair(tmp_path, 16, 4096, 11008)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    known = {"base": str(base), "tuned": str(tuned), "targets": TARGETS, "preset": "lora", "out": str(tmp_path / "a")}
    print(f"\n{hardware()}; two threads; {size / GIGABYTE:.1f} GiB a side")
    print("| run | seconds | peak anonymous MiB | result |\n| --- | --: | --: | --- |")
    for name, body in (("extract lora r=16", EXTRACT), ("extract lotr r=16", EXTRACT), ("analyze", ANALYZE)):
        known |= {"preset": name.split()[1] if " " in name else "", "out": str(tmp_path / name.replace(" ", "_"))}
        run = watched(IMPORTS, body.format(**known))
        print(f"| {name} | {run['seconds']:.0f} | {run['peak'] / MEGABYTE:.0f} | {run['result']} |", flush=True)
        assert run["peak"] < 3 * GIGABYTE
    shutil.rmtree(base)
    shutil.rmtree(tuned)
    assert size >= 6e9
