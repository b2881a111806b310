"""Gradients of single examples: right under torch.func, refused where Opacus would take them from modules' calls."""

import pytest
import tiny
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from toys import Toy

import tensoradapt as ta

X = tiny.noise(5, 3, 12)
TARGETS = {"targets": ["q_proj", "v_proj"]}
SPECS = {
    "lora": ta.preset("lora", rank=2, **TARGETS),
    "lotr": ta.preset("lotr", rank=2, **TARGETS),
    "tt_lora": ta.preset("tt_lora", rank=2, folds={"in": [3, 4], "out": [4, 3]}, **TARGETS),
}


def made(spec):
    model = Toy(layers=2)
    adapter = ta.attach(model, spec)
    tiny.shake(adapter)
    return model, adapter


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_torch_func_has_the_gradients_of_every_example(spec):
    model, _ = made(spec)
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(factors, x):
        return functional_call(model, factors, (x[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(factors, X)
    trained = [p for p in model.parameters() if p.requires_grad]
    for k, x in enumerate(X):
        alone = torch.autograd.grad(model(x[None]).square().sum(), trained)
        for name, gradient in zip(factors, alone, strict=True):
            size = float(gradient.abs().max())
            assert size and torch.allclose(found[name][k], gradient, rtol=1e-3, atol=1e-4 * size), name


class Sampler:
    """What Opacus' `make_private` does to a model: hooks on the call of every module that holds trained parameters."""

    __module__ = "opacus.grad_sample.grad_sample_module"

    def __init__(self, model):
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                module.register_forward_hook(self.capture)

    def capture(self, module, args, output):
        module.activations = args


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opacus_is_told_at_the_door_that_banks_are_not_called(spec):
    with pytest.raises(ta.AdapterError, match="Opacus has no gradients of single examples(?s:.*)torch.func"):
        Sampler(made(spec)[0])


def test_other_hooks_on_every_module_are_left_alone():
    model, _ = made(SPECS["lora"])
    seen = []
    handles = [module.register_forward_hook(lambda module, *_: seen.append(module)) for module in model.modules()]
    model(X)
    assert any(isinstance(module, nn.Linear) for module in seen)
    for handle in handles:
        handle.remove()
