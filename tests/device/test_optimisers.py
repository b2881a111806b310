"""The library's optimisers on a device: the CPU's steps, none of which the host waits for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import agree
from toys import Toy
from waiting import waits

import tensoradapt as ta
from tensoradapt.gauge import retract_polar, stiefel_tangent
from tensoradapt.linalg import home_of

TREES: dict[str, tuple[str, dict[str, Any], Callable[[Any], Any]]] = {
    "ScaledGD of LoRA": ("lora", {"rank": 3}, lambda a: ta.optim.ScaledGD(a, lr=1e-2)),
    "ScaledGD of LoTR": ("lotr", {"rank": 3}, lambda a: ta.optim.ScaledGD(a, torch.optim.SGD, lr=1e-2)),
    "ScaledGD without damping": (
        "lora",
        {"rank": 3},
        lambda a: ta.optim.ScaledGD(a, torch.optim.SGD, damping=0.0, lr=1e-2),
    ),
    "ScaledGD of CP": ("lorta", {"rank": 3, "heads": 4}, lambda a: ta.optim.ScaledGD(a, lr=1e-2)),
    "LoRAPro of LoRA": ("lora", {"rank": 3}, lambda a: ta.optim.LoRAPro(a, lr=1e-2)),
    "LoRAPro of LoTR": ("lotr", {"rank": 3}, lambda a: ta.optim.LoRAPro(a, lr=1e-2)),
    "LoRAPro of LoTR, min_norm": ("lotr", {"rank": 3}, lambda a: ta.optim.LoRAPro(a, gauge="min_norm", lr=1e-2)),
    "LoRAPro, dense moments": ("lora", {"rank": 3}, lambda a: ta.optim.LoRAPro(a, moments="dense", lr=1e-2)),
    "LoRAPro, plain": ("lora", {"rank": 3}, lambda a: ta.optim.LoRAPro(a, moments=None, lr=1e-2)),
    "Stiefel of LoRA": ("lora", {"rank": 3}, lambda a: ta.optim.Stiefel(a, lr=1e-2)),
    "Stiefel of LoTR": ("lotr", {"rank": 3}, lambda a: ta.optim.Stiefel(a, torch.optim.SGD, lr=1e-2)),
    "Stiefel by QR": ("lotr", {"rank": 3}, lambda a: ta.optim.Stiefel(a, retraction="qr", lr=1e-2)),
}
# Damped, and in short steps: on random gradients others grow without end, and rounding with them.
OTHERS = {"LoRAPro of CP": ("lorta", {"rank": 3, "heads": 4}, lambda a: ta.optim.LoRAPro(a, lr=1e-4, damping=1e-2))}
LOOK = 32  # iterations of conjugate gradients from one question to the next
MOST = ta.optim.LoRAPro.max_iterations // LOOK + 1


def begun(preset: str, options: dict[str, Any], at: str) -> ta.Adapter:
    """An adapter whose factors are all of about one size, by numbers of the CPU's."""
    adapter = ta.attach(Toy(seed=1).to(at), ta.preset(preset, targets=["q_proj", "v_proj"], **options))
    filled(adapter.parameters(), 0)
    return adapter


@torch.no_grad()
def filled(tensors: Any, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.copy_(0.3 * torch.randn(tensor.shape, generator=random))


def stepped(optimiser: Any, parameters: list[torch.Tensor], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=random).to(p.device)
    optimiser.step()


@pytest.mark.parametrize("name", [*TREES, *OTHERS])
def test_steps_on_a_device_are_those_of_the_cpu(device, name):
    preset, options, make = (TREES | OTHERS)[name]

    def job(at: str) -> dict[str, torch.Tensor]:
        adapter = begun(preset, options, at)
        optimiser = make(adapter)
        for seed in range(4):
            stepped(optimiser, list(adapter.parameters()), seed)
        return {path: adapter.delta(path) for path in ("layers.0.q_proj", "layers.2.v_proj")}

    agree(job, device, tolerance=1e-4)


@pytest.mark.parametrize("name", [*TREES, *OTHERS])
def test_no_step_waits_for_the_device(device, name):
    """But for networks that are no trees, whose conjugate gradients ask now and then whether they are done."""
    preset, options, make = (TREES | OTHERS)[name]
    adapter = begun(preset, options, device)
    optimiser, parameters = make(adapter), list(adapter.parameters())
    stepped(optimiser, parameters, 0)
    for p in parameters:
        p.grad.mul_(0.5)
    with waits(device) as found:
        optimiser.step()
    assert len(found) <= (MOST if name in OTHERS else 0), found.table()


def test_galore_waits_only_where_it_looks_for_its_bases(device):
    weights = [torch.nn.Parameter(torch.randn(16, 12, device=device)) for _ in range(3)]
    optimiser = ta.optim.GaLore(weights, rank=3, gap=50, lr=1e-2)
    stepped(optimiser, weights, 0)
    for p in weights:
        p.grad.mul_(0.5)
    with waits(device) as found:
        optimiser.step()
    assert not found, found.table()


def test_galore_on_a_device_makes_the_steps_of_the_cpu(device):
    def job(at: str) -> list[torch.Tensor]:
        weights = [torch.nn.Parameter(torch.zeros(16, 12, device=at)) for _ in range(2)]
        optimiser = ta.optim.GaLore(weights, torch.optim.SGD, rank=3, gap=2, lr=1e-2, projector="group")
        for seed in range(3):
            stepped(optimiser, weights, seed)
        return [w.detach() for w in weights]

    agree(job, device, tolerance=1e-4)


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_orthonormal_factors_that_are_written_to_are_made_orthonormal_again(device, retraction):
    """The optimiser knows without a look which factors nobody wrote to; it has to look at the others."""
    adapter = begun("lotr", {"rank": 3}, device)
    optimiser = ta.optim.Stiefel(adapter, torch.optim.SGD, retraction=retraction, lr=1e-2)
    (group,) = adapter.groups
    held = {node: 2.0 * t.detach() for node, t in adapter.factors(group).items()}
    adapter.set_factors(group, held)
    stepped(optimiser, list(adapter.parameters()), 0)
    for frame in optimiser.frames:
        factor = adapter.factors(frame.group)[frame.edge.child].detach().cpu()
        gram = factor.mT @ factor
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e2, 1e5])
def test_the_polar_retraction_of_a_step_of_any_length_is_that_of_an_svd(device, size):
    x, step = (torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(k)).double() for k in range(2))
    x = torch.linalg.qr(x)[0]
    step = stiefel_tangent(x, step * size ** torch.linspace(0.0, 1.0, 8, dtype=torch.float64))
    u, _, vh = torch.linalg.svd(x + step, full_matrices=False)
    at = home_of(torch.device(device))
    found = retract_polar(x.to(at), step.to(at)).cpu()
    torch.testing.assert_close(found, u @ vh, rtol=0, atol=1e-9)


def test_factors_that_are_put_in_the_place_of_orthonormal_ones_keep_their_delta(device):
    """As `module.to` puts them: the parameter is the same, and nothing was written to it."""
    adapter = begun("lotr", {"rank": 3}, device)
    optimiser = ta.optim.Stiefel(adapter, torch.optim.SGD, lr=0.0)
    stepped(optimiser, list(adapter.parameters()), 0)
    for frame in optimiser.frames:
        factor = adapter.factors(frame.group)[frame.edge.child]
        factor.data = 2.0 * factor.data
    before = adapter.delta("layers.0.q_proj").cpu()
    stepped(optimiser, list(adapter.parameters()), 1)
    torch.testing.assert_close(adapter.delta("layers.0.q_proj").cpu(), before, rtol=1e-4, atol=1e-5)


def test_conjugate_gradients_on_a_device_end_where_numbers_do(device):
    """What is past the range of float32 in an iteration that nobody asked about leaves the direction as it was."""

    def job(at: str) -> list[torch.Tensor]:
        adapter = begun("lorta", {"rank": 3, "heads": 4}, at)
        optimiser = ta.optim.LoRAPro(adapter, moments=None, damping=0.0, lr=1e-2)
        for p in adapter.parameters():
            p.data.mul_(3e6)
        stepped(optimiser, list(adapter.parameters()), 0)
        return [p.detach().isfinite() for p in adapter.parameters()]

    agree(job, device)


def test_a_rank_schedule_counts_steps_without_a_look_at_the_device(device):
    adapter = begun("lora", {"rank": 3}, device)
    optimiser = torch.optim.SGD(adapter.parameters(), lr=1e-2)
    falling = ta.optim.CubicSchedule(500, 300, total=100)
    schedule = ta.optim.RankSchedule(adapter, optimiser, max_parameters=falling, every=10)
    with waits(device) as found:
        for _ in range(9):
            schedule.step()
    assert not found, found.table()
