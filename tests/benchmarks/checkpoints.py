"""Llama-shaped checkpoints of chosen size, base and tuned, shard by shard; and what is measured of a process."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

ROLES = {
    **{f"self_attn.{name}_proj": ("width", "width") for name in "qkvo"},
    **{"mlp.gate_proj": ("inner", "width"), "mlp.up_proj": ("inner", "width"), "mlp.down_proj": ("width", "inner")},
}


def write_pair(
    folder: Path, layers: int, width: int, inner: int, rank: int = 16, noise: float = 2e-5
) -> tuple[Path, Path]:
    """A base with N(0, 0.02) weights and a tuned one that differs by a rank-16 delta plus noise, both bfloat16."""
    torch.manual_seed(0)
    sides = folder / "base", folder / "tuned"
    sizes = {"width": width, "inner": inner}
    index: dict[str, str] = {}
    for side in sides:
        side.mkdir(parents=True)
    for layer in range(layers):
        base, tuned = {}, {}
        for role, (out, inp) in ROLES.items():
            name = f"model.layers.{layer}.{role}.weight"
            weight = (0.02 * torch.randn(sizes[out], sizes[inp])).bfloat16()
            low = torch.randn(sizes[out], rank) @ torch.randn(rank, sizes[inp]) * (3e-4 / rank**0.5)
            base[name] = weight
            tuned[name] = (weight.float() + low + noise * torch.randn_like(low)).bfloat16()
            index[name] = f"model-{layer:05d}.safetensors"
        for side, tensors in zip(sides, (base, tuned), strict=True):
            save_file(tensors, side / f"model-{layer:05d}.safetensors", metadata={"format": "pt"})
    for side in sides:
        total = sum(f.stat().st_size for f in side.glob("*.safetensors"))
        content = {"metadata": {"total_size": total}, "weight_map": index}
        (side / "model.safetensors.index.json").write_text(json.dumps(content))
    return sides


# A process that runs a script and prints its peak of anonymous memory beyond what the imports took, by sampling.
# Reading /proc walks every page of the mapped checkpoints, a hundred times a second: time is taken without it.
_WATCHED = """
import json, os, sys, threading, time
begin = time.perf_counter()
{imports}
def anonymous():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
imported, first, peak, running = time.perf_counter() - begin, anonymous(), [0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], anonymous() - first)
        time.sleep(0.01)
thread = threading.Thread(target=watch if {sampled} else int, daemon=True); thread.start()
start = time.perf_counter()
{body}
seconds = time.perf_counter() - start
running[0] = False; thread.join()
print(json.dumps({{"seconds": seconds, "imports": imported, "peak": peak[0], "result": result}}))
"""


def watched(imports: str, body: str, threads: int = 2, *, sampled: bool = True) -> dict:
    """Run a script in a process of its own: seconds, seconds of imports, peak anonymous bytes, and its `result`."""
    script = _WATCHED.format(imports=imports, body=textwrap.dedent(body), sampled=sampled)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "whole": time.perf_counter() - begin}
