"""Fits on a device: the CPU's, after one wait where the tensor is small, and where it is not."""

from typing import Any

import pytest
import torch
from agreement import agree
from waiting import waits

import tensoradapt as ta
from tensoradapt.linalg import home, truncated_svd

AXES = ("layer", "out", "in")
RANK = {"layer": 3, "out": 3, "in": 3}
FITS: dict[str, tuple[str, dict[str, Any]]] = {
    "tucker": ("tucker", {"rank": RANK}),
    "tt": ("tt", {"rank": 3}),
    "cp": ("cp", {"rank": 3}),
    "ttm": ("ttm", {"rank": 2, "axes": ("out", "in"), "folds": {"out": [4, 5], "in": [4, 4]}}),
    "network": ("layer a b, out a c, in b c -> layer out in", {"rank": 2}),
    "by error": ("tt", {"error": 0.2}),
    "by budget": ("tucker", {"max_parameters": 150}),
}


def noisy(*shape: int) -> torch.Tensor:
    """Three rank-one terms, each half the one before, and a little noise."""
    random = torch.Generator().manual_seed(0)
    letters = "abcd"[: len(shape)]
    made = 0.05 * torch.randn(*shape, generator=random)
    for size in (1.0, 0.5, 0.25):
        made += size * torch.einsum(
            f"{','.join(letters)}->{letters}", *[torch.randn(n, generator=random) for n in shape]
        )
    return made


def given(name: str, at: str) -> torch.Tensor:
    return (noisy(20, 16) if "axes" in FITS[name][1] else noisy(4, 20, 16)).to(at)


def fitted(name: str, tensor: torch.Tensor) -> ta.Fit:
    form, options = FITS[name]
    return ta.fit(tensor, form, **{"axes": AXES, **options})


@pytest.fixture(params=["small", "large"])
def size(request, monkeypatch) -> str:
    """Whether a tensor counts as small, which goes to the CPU, or as large, which stays on the device."""
    if request.param == "large":
        monkeypatch.setattr(home, "SMALL", 0)
    return request.param


@pytest.mark.parametrize("name", FITS)
def test_fits_on_a_device_are_those_of_the_cpu(device, size, name):
    """To what one more step of an iteration changes: an accelerator is not asked after every one."""

    def job(at: str) -> torch.Tensor:
        found = fitted(name, given(name, at))
        assert {factor.device.type for factor in found.factors.values()} == {at}
        errors[at] = found.relative_error
        return found.dense()

    errors: dict[str, float] = {}
    agree(job, device, tolerance=5e-3)
    assert errors[device] == pytest.approx(errors["cpu"], rel=1e-4)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_of_a_small_tensor_waits_once(device, name):
    tensor = given(name, device)
    with waits(device, copies=True) as found:
        fitted(name, tensor)
    assert len(found) <= 1, found.table()


@pytest.mark.parametrize("form", ["tucker", "cp"])
def test_a_fit_of_a_small_stream_waits_once_for_a_slice(device, form):
    slices = list(noisy(4, 20, 16).to(device))
    with waits(device, copies=True) as found:
        ta.fit(slices, form, axes=AXES, rank=3)
    assert len(found) <= len(slices), found.table()


def test_a_fit_of_a_large_cp_waits_for_no_sweep(device):
    """The core between its bases is small: its sweeps are the CPU's. CUDA counts what is uploaded too."""
    tensor = noisy(6, 400, 300).to(device)
    assert tensor.numel() > home.SMALL
    with waits(device) as found:
        fit = ta.fit(tensor, "cp", axes=AXES, rank=3)
    assert len(fit.history) > 4 and len(found) <= (36 if device == "cuda" else 30), found.table()


WIDE: dict[str, dict[str, Any]] = {
    "tucker": {"rank": 3},
    "tt": {"rank": 3},
    "cp": {"rank": 3},
    FITS["network"][0]: {"rank": 2},
    "tt, by error": {"error": 0.5},
    "tucker, by budget": {"max_parameters": 4000},
}


@pytest.mark.parametrize("form", WIDE)
def test_a_fit_of_a_large_stack_waits_less_than_once_for_a_weight(device, form):
    """A bounded number of times, however many weights there are. CUDA counts what is uploaded too."""
    tensor = noisy(32, 160, 120).to(device)
    assert tensor.numel() > home.SMALL
    with waits(device) as found:
        ta.fit(tensor, form.partition(", by")[0], axes=AXES, **WIDE[form])
    assert len(found) <= len(tensor), found.table()


@pytest.mark.parametrize("form", ["tucker", "tt"])
def test_a_fit_of_a_large_stream_waits_less_than_once_for_a_slice(device, form):
    slices = list(noisy(32, 160, 120).to(device))
    with waits(device) as found:
        ta.fit(slices, form, axes=AXES, rank=3)
    assert len(found) <= len(slices), found.table()


@pytest.mark.parametrize("method", ["exact", "gram", "krylov"])
@pytest.mark.parametrize("shape", [(120, 40), (40, 120), (2, 60, 30)])
def test_truncated_svds_on_a_device_are_those_of_the_cpu(device, method, shape):
    def job(at: str) -> tuple[torch.Tensor, ...]:
        found = truncated_svd(noisy(*shape).to(at), 3, method=method)
        return found.dense(), found.s, found.residual, found.total.float()

    agree(job, device, tolerance=1e-4)
