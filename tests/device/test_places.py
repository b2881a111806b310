"""Models on two devices, and models and adapters that move: the adapter computes where the weight is."""

import copy
import warnings

import pytest
import torch
from agreement import agree
from test_training import OURS, deltas, of, steps
from tiny import noise, shake
from toys import Toy

import tensoradapt as ta


class Split(Toy):
    """A toy whose layers lie on two devices in turn; activations are moved between them."""

    def __init__(self, first, second):
        super().__init__(layers=4)
        self.places = [(first, second)[k % 2] for k in range(4)]
        for layer, place in zip(self.layers, self.places, strict=True):
            layer.to(place)

    def forward(self, x):
        for layer, place in zip(self.layers, self.places, strict=True):
            x = layer(x.to(place))
        return x


def places_of(adapter):
    return {path: adapter.delta(path).device for group in adapter.plan.groups for path in group.paths}


@pytest.mark.parametrize("preset", ["lora", "lotr", "lorta", "vera"])
def test_a_model_on_two_devices_is_adapted_trained_merged_and_changed(device, second, preset, tmp_path):
    def job(at):
        pair = (device, second) if at == device else ("cpu", "cpu")
        model, x = Split(*pair), (0.3 * noise(2, 5, 12)).to(at)
        adapter = ta.attach(model, of(preset))
        shake(adapter, 0.1)
        for name in ("AdamW", *(OURS if preset == "lotr" else ())):
            if name.startswith("GaLore"):
                continue
            made = OURS.get(name, lambda model, adapter: torch.optim.AdamW(adapter.parameters(), lr=0.01))
            steps(model, made(model, adapter), x, count=2)
        found = {"trained": model(x), "deltas": deltas(adapter), "reach": adapter.check(x).reached}
        adapter.merge()
        found["merged"] = model(x)
        adapter.unmerge()
        again = Split(*pair)
        loaded = ta.load(adapter.save(tmp_path / at), again)
        assert torch.equal(again(x), model(x)) and places_of(loaded).keys() == places_of(adapter).keys()
        if preset != "vera":
            ta.orthogonalize(adapter)
            ta.truncate(adapter, rank=2)
            found["truncated"] = model(x)
        return found

    agree(job, device, tolerance=2e-3)


@pytest.mark.parametrize("method", ["pissa", "eva", "lora_ga", "corda"])
@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_a_model_on_two_devices_takes_every_start(device, second, method, preset):
    def job(at):
        model = Split(*((device, second) if at == device else ("cpu", "cpu")))
        adapter = ta.attach(model, ta.preset(preset, rank=4, targets=["q_proj"]))
        batches, loss = [noise(2, 5, 12, seed=k).to(at) for k in range(2)], lambda model, x: model(x).square().mean()
        data = {
            "lora_ga": lambda: {"gradients": ta.gradients(model, adapter, batches, loss)},
            **dict.fromkeys(("eva", "corda"), lambda: {"activations": ta.activations(model, adapter, batches)}),
        }
        ta.initialize(adapter, method, **data.get(method, dict)())
        return model(batches[0]), [t.detach().square().sum() for t in adapter.tensors().values()]

    agree(job, device, tolerance=2e-3)


@pytest.mark.parametrize("swapped", [False, True], ids=["new parameters", "the same parameters"])
def test_a_model_moves_with_its_adapter_and_back(device, swapped, monkeypatch):
    def job(at):
        model, x = Toy(), 0.3 * noise(2, 5, 12)
        adapter = ta.attach(model, of("lotr"))
        shake(adapter, 0.1)
        model.to(at)
        steps(model, ta.optim.Stiefel(adapter, lr=0.01), x.to(at), count=2)
        assert {place.type for place in places_of(adapter).values()} == {at}
        adapter.merge()
        model.to("cpu")
        merged = model(x).detach()  # no graph that holds the weights: torch swaps none that is held
        model.to(at)
        adapter.unmerge()
        trained, bare = model(x.to(at)), model.layers[0].q_proj.weight
        assert torch.equal(bare.cpu(), Toy().layers[0].q_proj.weight)
        adapter.detach()
        return merged, trained, model(x.to(at))

    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        agree(job, device)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_model_that_leaves_the_meta_device_has_the_factors_of_its_seed(device):
    def job(at):
        with torch.device("meta"):
            model = Toy()
        adapter = ta.attach(model, of("lotr"), seed=3)
        model.to_empty(device=at)
        whole = Toy().to(at)
        model.load_state_dict(whole.state_dict(), strict=False)
        x = noise(2, 5, 12).to(at)
        first = model(x)
        drawn = ta.attach(whole, of("lotr"), seed=3)
        assert all(torch.equal(t, drawn.tensors()[key]) for key, t in adapter.tensors().items())
        steps(model, torch.optim.SGD(adapter.parameters(), lr=0.01), x, count=2)
        return first, model(x)

    agree(job, device)


def test_an_adapter_on_another_device_than_its_model_adds_where_the_model_is(device):
    def job(at):
        model, x = Toy().to(at), 0.3 * noise(2, 5, 12).to(at)
        adapter = ta.attach(model, of("lotr"))
        shake(adapter, 0.1)
        adapter.to("cpu")
        before = model(x)
        adapter.merge()
        return before, model(x)

    agree(job, device)


def test_a_dry_run_wakes_no_other_device(device):
    model = Toy().to(device)
    adapter = ta.attach(model, of("lora"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(adapter.check(noise(2, 5, 12).to(device)).reached) == 6


def test_a_copy_of_a_model_on_a_device_is_there(device):
    def job(at):
        model, x = Toy().to(at), noise(2, 5, 12).to(at)
        shake(ta.attach(model, of("lotr")))
        again = copy.deepcopy(model)
        assert torch.equal(again(x), model(x))
        return again(x)

    agree(job, device)
