"""The simulated accelerator refuses what a GPU refuses, and counts what a GPU waits for."""

import pytest
import simulated
import torch

simulated.register()
A = torch.arange(12.0).reshape(3, 4)


def test_devices_do_not_mix_but_for_a_number_of_the_host():
    first, second = A.to("sim"), A.to("sim:1")
    for other in (A, second):
        with pytest.raises(RuntimeError, match="same device"):
            first + other
        with pytest.raises(RuntimeError, match="same device"):
            first @ other.mT
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([first, other])
    assert (second + torch.tensor(2.0)).device == torch.device("sim:1")
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device="sim", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.zeros(3, device="sim:2")
    with pytest.raises(TypeError, match="numpy"):
        first.numpy()


@pytest.mark.parametrize("device", ["sim", "sim:1"])
def test_values_views_and_gradients_are_those_of_the_cpu(device):
    def job(at: str):
        a = A.to(at).clone().requires_grad_()
        u, s, _ = torch.linalg.svd(a.t()[1:], full_matrices=False)
        (a.view(4, 3).pow(2).sum() + s.sum() + (u.abs() @ torch.ones(3, device=at)).sum()).backward()
        b = A.to(at).clone()
        b.view(4, 3)[1:].t().mul_(2)
        return [
            s.detach(),
            a.grad,
            b,
            torch.linalg.qr(b)[0].abs(),
            b[b > 3],
            torch.linalg.inv(b @ b.mT + torch.eye(3, device=at)),
        ]

    for found, wanted in zip(job(device), job("cpu"), strict=True):
        assert found.device == torch.device(device) if ":" in device else found.device.type == "sim"
        torch.testing.assert_close(found.cpu(), wanted)


def test_no_float64_is_a_mode():
    with simulated.without_float64():
        for make in (lambda: A.to("sim").double(), lambda: torch.zeros(3, dtype=torch.float64, device="sim")):
            with pytest.raises(TypeError, match="doesn't support float64"):
                make()
    assert A.to("sim").double().dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "wait"),
    {
        "item": lambda a: a.sum().item(),
        "item ": lambda a: bool(a[0, 0] > 0),
        "item  ": lambda a: torch.allclose(a, a),
        "copy": lambda a: a.cpu(),
        "copy ": lambda a: a.tolist(),
        "size": lambda a: a.nonzero(),
        "size ": lambda a: a[a > 3],
        "size  ": lambda a: torch.equal(a, a),
        "solver": lambda a: torch.linalg.svd(a),
    }.items(),
)
def test_waits_of_the_host_are_counted_with_their_place(kind, wait):
    a = A.to("sim")
    with simulated.host_syncs() as found:
        wait(a)
    assert [sync.kind for sync in found] == [kind.strip()]
    assert "test_refusals.py" in found[0].lines[0]
    with simulated.host_syncs() as found:
        (a @ a.mT).add_(1).sum().relu_()
        a[0] = 3.0
        torch.linalg.qr(a)
    assert not found
