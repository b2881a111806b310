"""Every start of an adapter, on a device what it is on the CPU."""

import pytest
from agreement import agree
from tiny import noise
from toys import Toy

import tensoradapt as ta

GATHERED = {
    **dict.fromkeys(("lora_ga", "lora_one"), "gradients"),
    **dict.fromkeys(("eva", "corda", "corda_minor"), "activations"),
    "delta": "deltas",
}
METHODS = ("pissa", "minor", "olora", "orthogonal", *GATHERED)
PRESETS = {"lora": {"rank": 4}, "lotr": {"rank": 4}}


def squares(model, batch):
    return model(batch).square().mean()


def gathered(method, model, adapter, at, **more):
    batches = [noise(2, 5, 12, seed=seed).to(at) for seed in range(3)]
    kind = GATHERED.get(method)
    if kind == "gradients":
        return {kind: ta.gradients(model, adapter, batches, squares, **more)}
    if kind == "activations":
        return {kind: ta.activations(model, adapter, batches, **more)}
    shapes = {path: adapter.delta(path).shape for group in adapter.groups.values() for path in group.paths}
    return {kind: {p: noise(*s, seed=k).to(at) for k, (p, s) in enumerate(shapes.items())}} if kind else {}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_start_is_that_of_the_cpu(device, method, preset):
    def job(at):
        model, x = Toy(layers=2).to(at), noise(2, 5, 12).to(at)
        adapter = ta.attach(model, ta.preset(preset, targets=["q_proj", "up_proj"], **PRESETS[preset]))
        ta.initialize(adapter, method, **gathered(method, model, adapter, at))
        value = {}
        for group in adapter.groups.values():
            factors = adapter.factors(group.name)
            assert {t.device.type for t in factors.values()} == {at}
            value |= {f"{group.name}.{node}": t.detach().square().sum() for node, t in factors.items()}
        model(x).square().sum().backward()  # also after the start the factors are on the device
        return value, model(x)

    agree(job, device, tolerance=1e-3)


@pytest.mark.parametrize("more", [{"sketch": 4}, {"rank": 4}], ids=str)
def test_bounded_gatherings_are_those_of_the_cpu(device, more):
    def job(at):
        model = Toy(layers=2).to(at)
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["q_proj"]))
        method = "lora_one" if "sketch" in more else "eva"
        found = gathered(method, model, adapter, at, **more)
        ta.initialize(adapter, method, **found)
        return [t.detach().square().sum() for t in adapter.tensors().values()]

    agree(job, device, tolerance=1e-3)


@pytest.mark.parametrize("name", ["dota", "lora_xs", "quanta"])
def test_laws_that_take_the_weights_are_those_of_the_cpu(device, name):
    if name not in ta.PRESETS:
        pytest.fail(name)
    fields = {"folds": {"in": [4, 3], "out": [3, 4]}} if name in ("quanta", "dota") else {}
    fields |= {"rank": 2} if name != "quanta" else {}

    def job(at):
        model = Toy(layers=2).to(at)
        adapter = ta.attach(model, ta.preset(name, targets=["q_proj"], **fields))
        return [t.detach().square().sum() for t in adapter.tensors().values()], model(noise(2, 5, 12).to(at))

    agree(job, device, tolerance=1e-3)
