"""What is asked of a device is computed there: the simulated accelerator tells which operations it made."""

import pytest
import simulated
import torch
from test_device_checkpoints import sides
from test_on_a_gpu import analysed, fitted

import tensoradapt as ta
from tensoradapt.analysis.noise import noise_of
from tensoradapt.analysis.source import open_source

DTYPES = [torch.bfloat16, torch.float32, torch.float64]
QV = ["query", "value"]
PLACES = "sim", "cpu"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoints_are_subtracted_and_their_noise_is_summed_on_the_asked_device(device, dtype):
    base, tuned = sides(dtype)
    with simulated.operations() as seen:
        report = ta.analyze(base, tuned, device=device, targets=QV, candidates=False)
    wide = dtype == torch.float64 and not simulated.STATE.float64  # such weights do not go there
    assert seen["sub"] >= (0 if wide else len(report.sites))
    if dtype == torch.float64:
        return  # which has no noise
    assert seen["bitwise_and"]  # the exponents of stored numbers
    with simulated.operations() as seen:
        found, wanted = (
            noise_of(*(side.encoder.layer[0].output.dense.weight for side in (base, tuned)), torch.device(at))
            for at in PLACES
        )
        assert found.rows.tolist() == pytest.approx(wanted.rows.tolist(), rel=1e-5) and found.single == pytest.approx(
            wanted.single
        )
    assert seen["bitwise_and"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_extraction_subtracts_on_the_asked_device(device, dtype, tmp_path):
    base, tuned = sides(dtype)
    with simulated.operations() as seen:
        ta.extract(base, tuned, ta.preset("lora", rank=2, targets=QV), tmp_path, device=device)
    wide = dtype == torch.float64 and not simulated.STATE.float64
    assert bool(seen["sub"]) != wide


def test_a_delta_comes_from_the_device_whatever_was_stored(device):
    for one in DTYPES:
        for two in DTYPES:
            found = open_source(sides(one)[0], sides(two)[1]).on(torch.device(device))
            wanted = open_source(sides(one)[0], sides(two)[1])
            for site in found.sites[:4]:
                delta = found.delta(site.path)
                assert delta.device.type == "sim" and delta.dtype == torch.float32
                assert torch.equal(delta.cpu(), wanted.delta(site.path))
                strip = found.strip(site.path, slice(1, 3))
                assert strip.device.type == "sim" and torch.equal(strip.cpu(), wanted.strip(site.path, slice(1, 3)))
            for name in found.match.names:
                differs, square = found.change(name)
                assert differs == wanted.change(name)[0]
                assert square == pytest.approx(wanted.change(name)[1], rel=1e-4)


def test_strips_of_a_weight_on_a_device_copy_it_once(device):
    """A head is read in hundreds of strips: each of them copied all of it."""
    here, there = (side.state_dict() for side in sides(torch.float32))
    found = open_source(*({name: tensor.to(device) for name, tensor in side.items()} for side in (here, there)))
    path = found.sites[0].path
    with simulated.host_syncs() as counted:
        strips = [found.strip(path, slice(at, at + 1)) for at in range(4)]
    assert sum(sync.kind == "copy" for sync in counted.waits) == 2, counted.table()
    wanted = open_source(here, there)
    for at, strip in enumerate(strips):
        assert torch.equal(strip, wanted.strip(path, slice(at, at + 1)))


def test_the_benchmarks_of_a_gpu_run_there_at_small_sizes(device):
    assert fitted((3, 48, 32), device)[1] < 0.5
    assert analysed((1, 32, 48, 64), device)[2] == 9
