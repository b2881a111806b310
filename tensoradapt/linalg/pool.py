"""A pool of threads for matrices that are independent: one matrix per core, instead of all cores on one matrix.

Small factorisations do not use a second core as products do; a matrix per core keeps all busy,
and makes the result independent of their number. Invariant: every task computes with one thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")

MOST = 4  # deltas in memory at a time, at most
LOOK = 0.2  # seconds after which the names of tasks that have begun are told


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose tasks compute with one thread each; the caller's number of threads is as it was afterwards.

    An interruption does not wait for tasks that run: nothing reads what they make.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    patient = True
    try:
        yield pool
    except KeyboardInterrupt:
        patient = False
        raise
    finally:
        pool.shutdown(wait=patient, cancel_futures=True)
        torch.set_num_threads(before)


def mapped(function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """The function's values in the order of the items; some are computed at a time, on one thread each, a few ahead.

    One item alone is computed here, with all threads.
    """
    workers = min(MOST, torch.get_num_threads(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    with _one_thread_each(workers) as pool:
        ahead: deque[Future[T]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def pooled(tasks: Mapping[str, Callable[[], T]], begun: Callable[[str], None] = lambda _: None) -> dict[str, T]:
    """What every task returns, by name in the order of the tasks; some run at a time, on one thread each."""
    found: dict[str, T] = {}

    def run(name: str) -> None:
        found[name] = tasks[name]()

    for _ in each(list(tasks), run, begun):
        pass
    return {name: found[name] for name in tasks}


def each(
    names: Sequence[str], task: Callable[[str], None], begun: Callable[[str], None] = lambda _: None
) -> Iterator[str]:
    """Run a task for every name, some at a time; the names as they are done.

    The first error in the order of the names, of those that ran by then, ends it. `begun` is called
    with the name of a task that has begun, by the caller's thread.
    """
    if not names:
        return
    started: list[str] = []

    def run(name: str) -> None:
        started.append(name)
        task(name)

    with _one_thread_each(min(MOST, torch.get_num_threads(), len(names))) as pool:
        running, told = {pool.submit(run, name): name for name in names}, 0
        while running:
            done, _ = wait(running, timeout=LOOK, return_when=FIRST_COMPLETED)
            new, told = started[told:], len(started)
            for name in new:
                begun(name)
            for future in _until_error(running, done):
                future.result()
                yield running.pop(future)


def _until_error(running: Mapping[Future[None], str], done: Collection[Future[None]]) -> list[Future[None]]:
    """Those that are done, in their order; once one has failed, all before it too, whose error is the one to raise.

    Tasks begin in order, so that those before it run already, and the end of the pool would wait for them as well.
    """
    failed = (k for k, future in enumerate(running) if future in done and future.exception() is not None)
    first = next(failed, 0)
    return [future for k, future in enumerate(running) if future in done or k < first]
