"""One job run on a device and on the CPU, and their answers compared."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def agree(job: Callable[[str], Any], device: str, tolerance: float = 2e-4) -> None:
    """Holds the answers of `job(device)` against those of `job("cpu")`, tensor by tensor and number by number."""
    found, wanted = list(leaves(job(device))), list(leaves(job("cpu")))
    assert [place for place, _ in found] == [place for place, _ in wanted]
    for (place, a), (_, b) in zip(found, wanted, strict=True):
        assert isinstance(a, Tensor) == isinstance(b, Tensor), place
        if isinstance(a, Tensor):
            assert bool(b.isfinite().all()), f"{place}: the job says nothing"
            torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=tolerance, atol=tolerance, msg=_said(place))
        elif isinstance(a, float):
            assert abs(a - b) <= tolerance * max(1.0, abs(b)), (place, a, b)
        else:
            assert a == b, (place, a, b)


def _said(place: str) -> Callable[[str], str]:
    return lambda text: f"{place or 'the answer'}: {text}"


def leaves(value: Any, place: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from leaves(value[key], f"{place}.{key}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from leaves(part, f"{place}[{index}]")
    else:
        yield place, value
