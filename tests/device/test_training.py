"""Attach, train, merge, save and load: on a device what they are on the CPU."""

import tempfile

import pytest
import torch
from agreement import agree
from tiny import mixtral, noise, shake, tokens
from torch import nn
from toys import Convolutions, Toy

import tensoradapt as ta
from tensoradapt.optim import CubicSchedule, GaLore, LoRAPro, RankSchedule, ScaledGD, Stiefel, parameter_groups

FOLDS = {"in": [4, 3], "out": [3, 4]}
SPECS = {
    "lora": {"rank": 2},
    "lotr": {"rank": 3},
    "lorta": {"rank": 3, "heads": 4},
    "tt_lora": {"rank": 3, "folds": FOLDS},
    "fact_tk": {"rank": 3},
    "lora_xs": {"rank": 2},
    "vera": {"rank": 3},
    "loha": {"rank": 2},
    "lokr": {"factor": 2},
    "quanta": {"folds": FOLDS},
}


def of(preset, **more):
    return ta.preset(preset, **{"targets": ["q_proj", "v_proj"], **SPECS[preset], **more})


def steps(model, optimiser, x, after=lambda: None, count=3):
    """A few steps; with a closure, as some optimisers want."""

    def loss():
        optimiser.zero_grad()
        found = (model(x) - 1).square().mean()
        found.backward()
        return found

    for _ in range(count):
        optimiser.step(loss)
        after()


def deltas(adapter):
    return {path: adapter.delta(path) for group in adapter.plan.groups for path in group.paths}


@pytest.mark.parametrize("preset", SPECS)
def test_an_adapter_trains_merges_is_saved_and_loaded(device, preset):
    def job(at):
        model, x = Toy().to(at), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of(preset))
        steps(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), x)
        attached = model(x)
        found = {"attached": attached, "deltas": deltas(adapter), "reach": adapter.check(x).reached}
        for keep in ("cpu", "same"):
            adapter.merge(keep=keep)
            found[keep] = model(x)
            adapter.unmerge()
        assert torch.equal(model(x), attached)
        with tempfile.TemporaryDirectory() as folder:
            again = ta.load(adapter.save(folder), (fresh := Toy().to(at)))
        assert torch.equal(fresh(x), attached) and again.delta("layers.0.q_proj").device.type == torch.device(at).type
        adapter.merge_and_detach()
        return found | {"plain": model(x)}

    agree(job, device)


KINDS = {
    "a bare parameter of experts": (
        lambda: (model := mixtral()).set_experts_implementation("eager") or model,
        {"targets": ["gate_up_proj"]},
        lambda at: tokens().to(at),
    ),
    "convolutions": (Convolutions, {"targets": ["conv1", "conv2"]}, lambda at: noise(2, 4, 9, 9).to(at)),
    "an embedding, and a head trained whole": (
        lambda: nn.Sequential(nn.Embedding(11, 12, padding_idx=0), nn.Linear(12, 3)),
        {"targets": ["0"], "train": ["1"]},
        lambda at: (tokens() % 11).to(at),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_delivery_trains_and_merges(device, kind):
    make, rule, batch = KINDS[kind]

    def job(at):
        torch.manual_seed(0)
        model = make().to(at)
        adapter = ta.attach(model, ta.preset("lora", rank=2, **rule))
        shake(adapter, 0.1)
        x = batch(at)
        call = lambda: getattr(model(x), "logits", None) if hasattr(model, "config") else model(x)  # noqa: E731
        call().square().sum().backward()
        found = {"attached": call(), "gradients": [p.grad for p in adapter.parameters() if p.requires_grad]}
        adapter.merge()
        found["merged"] = call()
        adapter.detach()
        return found | {"bare": call()}

    agree(job, device)


TORCHS = {
    "SGD": {"momentum": 0.9},
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop"), {}),
    **dict.fromkeys(("ASGD", "Adafactor"), {}),
    "LBFGS": {"max_iter": 2},
}


@pytest.mark.parametrize("name", TORCHS)
def test_the_optimisers_of_torch_make_the_steps_of_the_cpu(device, name):
    def job(at):
        model, x = Toy().to(at), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of("lotr"))
        shake(adapter, 0.1)
        trained = [p for p in adapter.parameters() if p.requires_grad]
        steps(model, getattr(torch.optim, name)(trained, lr=0.01, **TORCHS[name]), x)
        return deltas(adapter)

    agree(job, device)


def test_the_shortest_steps_are_those_of_the_cpu(device):
    def job(at):
        model, x = Toy().to(at), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of("lora"))
        shake(adapter, 0.1)
        steps(model, LoRAPro(adapter, lr=0.01, gauge="min_norm"), x)
        return deltas(adapter)

    agree(job, device)


def galore(model, adapter, **more):
    weight = model.layers[0].up_proj.weight.requires_grad_()
    return GaLore([{"params": [weight], "rank": 3}, {"params": list(adapter.parameters())}], lr=0.01, gap=2, **more)


OURS = {
    "LoRAPro": lambda model, adapter: LoRAPro(adapter, lr=0.01),
    "LoRAPro of SGD": lambda model, adapter: LoRAPro(adapter, torch.optim.SGD, lr=0.01),
    "ScaledGD": lambda model, adapter: ScaledGD(adapter, torch.optim.SGD, lr=0.01),
    "ScaledGD of AdamW": lambda model, adapter: ScaledGD(adapter, lr=0.01),
    "Stiefel": lambda model, adapter: Stiefel(adapter, lr=0.01),
    "Stiefel by QR": lambda model, adapter: Stiefel(adapter, lr=0.01, retraction="qr"),
    "rates by role": lambda model, adapter: torch.optim.AdamW(parameter_groups(adapter, lr=0.01)),
    "GaLore": galore,
    # Adam divides what is nearly zero by itself: with its usual eps, rounding alone moves these steps by 4e-3.
    "GaLore of a group": lambda model, adapter: galore(model, adapter, projector="group", eps=1e-3),
}


@pytest.mark.parametrize("preset", ["lora", "lotr"])
@pytest.mark.parametrize("name", OURS)
def test_our_optimisers_make_the_steps_of_the_cpu(device, name, preset):
    def job(at):
        model, x = Toy().to(at), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of(preset))
        shake(adapter, 0.1)
        steps(model, OURS[name](model, adapter), x)
        return deltas(adapter), model(x)

    agree(job, device)


SCHEDULES = {
    "ranks": {"rank": CubicSchedule(2, 1, 4)},
    "parameters": {"max_parameters": CubicSchedule(200, 150, 4)},
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_ranks_fall_while_an_adapter_trains(device, name, wrapped):
    def job(at):
        model, x = Toy().to(at), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of("lora"))
        shake(adapter, 0.1)
        optimiser = LoRAPro(adapter, lr=0.01) if wrapped else torch.optim.AdamW(adapter.parameters(), lr=0.01)
        schedule = RankSchedule(adapter, optimiser, **SCHEDULES[name])
        steps(model, optimiser, x, schedule.step, count=5)
        return deltas(adapter), {name: dict(group.rank) for name, group in adapter.groups.items()}

    agree(job, device, tolerance=2e-3)
