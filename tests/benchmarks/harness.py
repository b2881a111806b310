"""Side-by-side timing: warm up, interleave, take medians, print ratios. Never a bound on seconds."""

import gc
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """The times of one thing, in seconds."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def interleave(runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, Timing]:
    """Time every run `repeats` times in turn, so that a noisy spell of the machine hits all alike."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        names = list(runs) if turn % 2 == 0 else list(runs)[::-1]
        for name in names:
            gc.disable()
            begin = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - begin)
            gc.enable()
    return {name: Timing(name, tuple(seconds)) for name, seconds in taken.items()}


def ratio(one: Timing, two: Timing) -> tuple[float, float, float]:
    """The median of the turn-by-turn ratios one / two, with their quartiles."""
    ratios = [a / b for a, b in zip(one.seconds, two.seconds, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


def table(timings: Mapping[str, Timing], reference: str) -> str:
    """A Markdown table of medians and ratios to a reference."""
    lines = [f"| run | median ms | ratio to {reference} | quartiles |", "| --- | --: | --: | --- |"]
    for timing in timings.values():
        middle, low, high = ratio(timing, timings[reference])
        lines.append(f"| {timing.name} | {timing.median * 1e3:.2f} | {middle:.3f} | {low:.3f} .. {high:.3f} |")
    return "\n".join(lines)


def hardware() -> str:
    """Hardware and versions, to be printed beside every figure."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}, Python {platform.python_version()}"
