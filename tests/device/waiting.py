"""How often the host waits for a device: counted by the simulated one, or by CUDA's own warnings."""

import linecache
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import simulated
import torch

# torch's eigh and svd wait for themselves on CUDA, wherever they are called, and so does its own start.
SOLVERS = ("gauge/closed.py", "linalg/lapack.py", "torch/cuda/__init__.py")
CALLS = ("torch.linalg.eigh(", "torch.linalg.eigvalsh(", "torch.linalg.svd(", "return function(a, *more)")


class Waits(list[str]):
    """Where the host waited."""

    def table(self) -> str:
        return "\n".join(f"{count:6d}  {text}" for text, count in Counter(self).most_common())


@contextmanager
def waits(device: str, *, copies: bool = False) -> Iterator[Waits]:
    """Collects the places at which the host waits inside the block.

    On a device without float64 its copies to the CPU's small problems are left out, but with `copies`: they are how it
    works.
    """
    found = Waits()
    if device == "sim":
        with simulated.host_syncs() as counted:
            yield found
        found += [str(sync) for sync in counted.waits if copies or simulated.STATE.float64 or sync.kind != "copy"]
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each in (each for each in said if "synchronizing" in str(each.message)):
        solves = any(call in linecache.getline(each.filename, each.lineno) for call in CALLS)
        if not solves and not any(solver in each.filename for solver in SOLVERS):
            found.append(f"{each.filename}:{each.lineno}")
