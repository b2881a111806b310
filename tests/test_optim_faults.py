"""What goes wrong around a step: replaced factors, a step that fails, factors that are not finite, wrong arguments."""

import copy

import pytest
import torch
from test_optim import Toy, adapted, backward, batch, deltas, factors, flat, fresh

import tensoradapt as ta
from tensoradapt.optim import LoRAPro, ScaledGD, Stiefel, parameter_groups

WRAPPERS = {"LoRAPro": LoRAPro, "ScaledGD": ScaledGD, "Stiefel": Stiefel}
KINDS = {"zero": {}, "min_norm": {"gauge": "min_norm"}, "dense": {"moments": "dense"}}


@pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("change", [lambda a: ta.resize(a, 3), lambda a: ta.truncate(a, rank=1)])
def test_a_step_after_a_change_that_the_optimiser_did_not_follow_is_refused(make, change):
    model, adapter = adapted("lora")
    optimizer = make(adapter, lr=1e-2)
    change(adapter)
    backward(model, optimizer, batch())
    before = deltas(adapter).detach()
    with pytest.raises(ta.AdapterError, match="other factors than this optimiser holds") as caught:
        optimizer.step()
    assert "pass optimizer= to ta.resize" in str(caught.value)
    assert torch.equal(deltas(adapter), before)
    backward(model, fresh_one := make(adapter, lr=1e-2), batch())
    fresh_one.step()
    assert not torch.equal(deltas(adapter), before)


def test_factors_that_were_never_trained_may_be_replaced():
    _, adapter = adapted("lora")
    group, *others = [group.name for group in adapter.plan.groups]
    optimizer = ScaledGD(adapter, params=[*adapter.factors(group).values()], lr=1e-2)
    ta.resize(adapter, 3, optimizer=optimizer)
    for parameter in adapter.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = adapter.delta(adapter.groups[group].paths[0]).detach()
    optimizer.step()
    assert others and not torch.equal(adapter.delta(adapter.groups[group].paths[0]), before)


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["step", "directions"])
def test_moments_outlive_a_step_that_fails(how, error, where, monkeypatch):
    (model, adapter), (other, twin) = adapted(), adapted()
    one, two = LoRAPro(adapter, lr=1e-2, **how), LoRAPro(twin, lr=1e-2, **how)
    for made, optimizer in ((model, one), (other, two)):
        for seed in range(3):
            backward(made, optimizer, batch(seed=seed))
            optimizer.step()
        backward(made, optimizer, batch(seed=3))
    with monkeypatch.context() as broken, pytest.raises(error):
        broken.setattr(*((one.base, "step") if where == "step" else (one, "finish")), _raising(error))
        if where == "directions":
            broken.setattr(one, "directions", _after(one.directions, error))
        gradients = [p.grad.clone() for p in factors(adapter)]
        one.step()
    assert all(map(torch.equal, gradients, [p.grad for p in factors(adapter)]))
    one.step()
    two.step()
    assert torch.equal(deltas(adapter), deltas(twin))


def _raising(error):
    def call(*_):
        raise error

    return call


def _after(call, error):
    """Work that is lost in its last moment."""

    def broken():
        call()
        raise error

    return broken


@pytest.mark.parametrize("damping", [0.0, 1e-4])
@pytest.mark.parametrize("gauge", [None, "min_norm"])
@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_factors_that_are_nan_stay_nan_without_a_foreign_error(preset, gauge, damping):
    model, adapter = adapted(preset)
    optimizer = LoRAPro(adapter, gauge=gauge, damping=damping, lr=1e-3)
    with torch.no_grad():
        factors(adapter)[0].fill_(torch.nan)
    backward(model, optimizer, batch())
    optimizer.step()
    assert factors(adapter)[0].isnan().all()


@pytest.mark.parametrize("damping", [1e-4, 1e-8, 1e-14])
@pytest.mark.parametrize("preset", ["lora", "lotr"])
@pytest.mark.parametrize("make", [ScaledGD, lambda *a, **k: LoRAPro(*a, moments=None, **k)], ids=["scaled", "pro"])
def test_a_damping_below_the_rounding_of_degenerate_factors_still_descends(make, preset, damping):
    """Columns that are multiples of one another, whose Gram matrix float32 makes indefinite."""
    model, adapter = adapted(preset, torch.float32)
    with torch.no_grad():
        for factor in adapter.parameters():
            factor.copy_(0.3 * torch.randn(factor.shape, generator=torch.Generator().manual_seed(1)))
            thin = factor if factor.shape[-1] < 12 else factor.mT
            thin[..., 1] = 0.3 * thin[..., 0]
    optimizer = make(adapter, torch.optim.SGD, damping=damping, lr=1.0)
    backward(model, optimizer, batch(torch.float32))
    directions = optimizer.directions()
    assert sum(float((p.grad.double() * d).sum()) for p, d in directions.items()) > 0
    assert max(float(d.abs().max()) for d in directions.values()) < 1e8


@pytest.mark.parametrize("make", [LoRAPro, ScaledGD])
@pytest.mark.parametrize("preset", ["lora", "lotr", "lorta"])
def test_gradients_that_are_nan_are_seen_in_the_factors(make, preset):
    options = {"moments": None} if make is LoRAPro else {}
    model, adapter = adapted(preset)
    optimizer = make(adapter, torch.optim.SGD, lr=1e-3, **options)
    backward(model, optimizer, batch())
    spoiled = factors(adapter)[0]
    spoiled.grad[..., 0] = torch.nan
    optimizer.step()
    assert spoiled.isnan().any()


@pytest.mark.parametrize("how", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("preset", ["lora", "lotr"])
def test_a_saved_state_of_half_precision_factors_goes_on_to_the_last_bit(how, preset):
    model, adapter = adapted(preset, dtype=torch.bfloat16)
    optimizer = LoRAPro(adapter, lr=1e-2, **how)
    for seed in range(3):
        backward(model, optimizer, batch(torch.bfloat16, seed))
        optimizer.step()
    other, twin = adapted(preset, dtype=torch.bfloat16)
    for one, two in zip(factors(adapter), factors(twin), strict=True):
        two.data.copy_(one)
    again = LoRAPro(twin, lr=1e-2, **how)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    for seed in range(3, 6):
        for made, each in ((model, optimizer), (other, again)):
            backward(made, each, batch(torch.bfloat16, seed))
            each.step()
    assert (flat(p.float() for p in factors(adapter)) == flat(p.float() for p in factors(twin))).all()


WRONG = {
    "a model": (lambda a: LoRAPro(Toy(2, 12), lr=1e-3), "LoRAPro needs an attached adapter"),
    "a folder": (lambda a: ScaledGD("run/adapter", lr=1e-3), "ScaledGD needs an attached adapter"),
    "a rate in the place of the optimiser": (lambda a: LoRAPro(a, 1e-3), "LoRAPro goes around an optimiser"),
    "a name": (lambda a: Stiefel(a, "adamw", lr=1e-3), "Stiefel goes around an optimiser"),
    "words for damping": (lambda a: LoRAPro(a, damping="little", lr=1e-3), "a number from 0 on"),
    "one beta": (lambda a: LoRAPro(a, betas=0.9, lr=1e-3), "betas are from 0"),
    "groups of a model": (lambda a: parameter_groups(Toy(2, 12), 1e-3), "parameter_groups needs an attached adapter"),
}


@pytest.mark.parametrize(("call", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_in_words(call, words):
    _, adapter = fresh()
    with pytest.raises(ta.TensorAdaptError, match=words):
        call(adapter)
