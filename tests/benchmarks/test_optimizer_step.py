"""A step of the preconditioned optimisers beside AdamW's on the same factors, and their state beside the weights."""

import pytest
import torch
from harness import hardware, interleave, ratio, table
from test_orthogonalize import LAYERS, WIDTH, Layer
from torch import nn

import tensoradapt as ta
from tensoradapt.gauge import implied, pseudo_inverse_cg
from tensoradapt.gauge.metric import Metric
from tensoradapt.lower import dense

# Times AdamW's step, which is some forty operations on three small tensors, 0.1 ms.
MOST = 2.0
BOUNDED = ("ScaledGD", "LoRAPro")
FASTER = 10.0  # times conjugate gradients


def adapted(preset: str = "lotr") -> ta.Adapter:
    """24 sites of width 768 at rank 16, with gradients."""
    torch.manual_seed(0)
    model = nn.ModuleList(Layer() for _ in range(LAYERS))
    adapter = ta.attach(model, ta.preset(preset, rank=16, targets=["query", "value"]))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.randn_like(parameter)
    return adapter


MADE = {
    "AdamW": lambda adapter: torch.optim.AdamW(adapter.parameters(), lr=1e-6),
    "ScaledGD": lambda adapter: ta.optim.ScaledGD(adapter, torch.optim.SGD, lr=1e-6),
    "ScaledGD around AdamW": lambda adapter: ta.optim.ScaledGD(adapter, lr=1e-6),
    "LoRAPro": lambda adapter: ta.optim.LoRAPro(adapter, lr=1e-6),
    "LoRAPro without moments": lambda adapter: ta.optim.LoRAPro(adapter, moments=None, lr=1e-6),
}
SLOW = {
    "LoRAPro, min_norm": lambda adapter: ta.optim.LoRAPro(adapter, gauge="min_norm", lr=1e-6),
    "LoRAPro, min_norm, without moments": lambda adapter: ta.optim.LoRAPro(
        adapter, gauge="min_norm", moments=None, lr=1e-6
    ),
}


@pytest.mark.benchmark
def test_step():
    print(f"\n{hardware()}; one step on LoTR r=16, {2 * LAYERS} sites of width {WIDTH}")
    timings = timed(MADE, 201)
    timed({"AdamW": MADE["AdamW"]} | SLOW, 5)
    for name in BOUNDED:
        assert ratio(timings[name], timings["AdamW"])[0] <= MOST, name


def timed(made, repeats):
    optimizers = {name: make(adapted()) for name, make in made.items()}
    timings = interleave({name: opt.step for name, opt in optimizers.items()}, repeats=repeats, warmup=3)
    print(table(timings, "AdamW"))
    return timings


@pytest.mark.benchmark
def test_closed_form_against_conjugate_gradients():
    """The same projected gradient, to the accuracy that the closed form has in float32."""
    adapter = adapted()
    (group,) = adapter.plan.groups
    wide = {n: t.double().detach().requires_grad_() for n, t in adapter.factors(group.name).items()}
    made = dense(group.diagram, wide)
    steep = dict(
        zip(wide, torch.autograd.grad(made, list(wide.values()), torch.randn(made.shape).double()), strict=True)
    )
    factors, grads = ({n: t.detach().float() for n, t in held.items()} for held in (wide, steep))
    metric = Metric(group.diagram)
    runs = {
        "closed form": lambda: metric.directions(factors, grads),
        "conjugate gradients": lambda: pseudo_inverse_cg(group.diagram, factors, grads, 0.0, 1e-6).factors,
    }
    exact = pseudo_inverse_cg(group.diagram, wide, steep, 0.0, 1e-11).factors
    exact = implied(group.diagram, {n: t.detach() for n, t in wide.items()}, exact)
    off = {
        name: float((implied(group.diagram, factors, run()) - exact).norm() / exact.norm())
        for name, run in runs.items()
    }
    timings = interleave(runs, repeats=7)
    print(f"\n{hardware()}\n{table(timings, 'closed form')}\nerrors: {off}")
    assert off["closed form"] <= 2 * off["conjugate gradients"]
    assert ratio(timings["conjugate gradients"], timings["closed form"])[0] >= FASTER


@pytest.mark.benchmark
def test_state():
    rows = {"AdamW": 2.0, "ScaledGD": 0.0, "LoRAPro": 1.0}
    for name, bound in rows.items():
        adapter = adapted()
        optimizer = MADE[name](adapter)
        optimizer.step()
        held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
        size = sum(p.numel() for p in adapter.parameters())
        print(f"{name}: {held:,} entries of state for {size:,} of factors and {2 * LAYERS * WIDTH**2:,} of weights")
        assert held <= bound * size + 10
