"""Models that were on the meta device when they were adapted: factors have values where their model has, or say not."""

import pytest
import tiny
import torch
from toys import Toy

import tensoradapt as ta

X = tiny.noise(2, 3, 12)
SPECS = {
    "lora": ta.preset("lora", rank=2, targets=["q_proj"]),
    "lotr": ta.preset("lotr", rank=2, targets=["q_proj", "v_proj"]),
    "tt_lora": ta.preset("tt_lora", rank=2, targets=["q_proj"], folds={"in": [3, 4], "out": [4, 3]}),
    "quanta": ta.preset("quanta", targets=["q_proj"], folds={"in": [3, 4], "out": [3, 4]}),
    "vera": ta.preset("vera", rank=2, targets=["q_proj", "v_proj"]),
}
FROM_WEIGHTS = {
    "lora_xs": ta.preset("lora_xs", rank=2, targets=["q_proj"]),
    "a head": ta.preset("lora", rank=2, targets=["q_proj"], train=["o_proj"]),
}


def on_meta():
    with torch.device("meta"):
        return Toy()


def filled(model):
    """The model on the CPU, as loaders make it: empty, then with the base's weights."""
    model.to_empty(device="cpu")
    model.load_state_dict(Toy().state_dict(), strict=False)
    return model


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_factors_are_drawn_when_a_model_leaves_the_meta_device(spec):
    model, other = on_meta(), Toy()
    adapter, expected = ta.attach(model, spec, seed=3), ta.attach(other, spec, seed=3)
    filled(model)
    for key, tensor in expected.tensors().items():
        assert torch.equal(adapter.tensors()[key], tensor), key
    tiny.shake(adapter), tiny.shake(expected)
    assert torch.equal(model(X), other(X))


def test_what_has_no_law_waits_for_values(tmp_path):
    """Factors from the base's weights cannot be attached there; copies of these, and an adapter's file, have no law."""
    source = ta.attach(Toy(), FROM_WEIGHTS["a head"])
    tiny.shake(source)
    source.save(tmp_path / "adapter")
    makes = {
        "attached": lambda model: ta.attach(model, FROM_WEIGHTS["a head"]),
        "loaded": lambda model: ta.load(tmp_path / "adapter", model),
    }
    for name, make in makes.items():
        model, out = on_meta(), tmp_path / name
        adapter = make(model)
        filled(model)
        for call in (lambda: model(X), adapter.merge, lambda: adapter.save(out)):  # noqa: B023
            with pytest.raises(ta.AdapterError, match="has no values for (?s:.*)meta device(?s:.*)state dictionary"):
                call()
        assert not out.exists()
        model.load_state_dict(source._model[0].state_dict())
        assert torch.equal(model(X), source._model[0](X))
        adapter.save(out)
        adapter.detach()
        assert torch.equal(model(X), Toy()(X))


def test_factors_from_the_weights_are_refused_at_attach():
    with pytest.raises(ta.AdapterError, match="meta device"):
        ta.attach(on_meta(), FROM_WEIGHTS["lora_xs"])


def test_moving_a_model_draws_nothing_anew():
    model = Toy()
    adapter = ta.attach(model, SPECS["lotr"])
    tiny.shake(adapter)
    before = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    model.to(torch.float64).to(torch.float32)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter.tensors().items())
