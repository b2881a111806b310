"""A pool of threads for groups of one delta each: one matrix per core, instead of all cores on one matrix.

Small factorisations do not use a second core as products do; a matrix per core keeps all busy,
and makes the result independent of their number. Invariant: every task computes with one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import torch

MOST = 4  # deltas in memory at a time, at most


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose tasks compute with one thread each; the caller's number of threads is as it was afterwards."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


def each(names: Sequence[str], task: Callable[[str], None]) -> Iterator[str]:
    """Run a task for every name, some at a time; the names as they are done. The first error ends it."""
    if not names:
        return
    with _one_thread_each(min(MOST, torch.get_num_threads(), len(names))) as pool:
        running = {pool.submit(task, name): name for name in names}
        for done in as_completed(running):
            done.result()
            yield running[done]
