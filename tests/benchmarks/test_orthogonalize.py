"""Bringing a trained LoTR into canonical form: cheap enough to be done at every few steps of training."""

import pytest
import torch
from harness import hardware, interleave
from torch import nn

import tensoradapt as ta
from tensoradapt.change import orthogonalize

WIDTH, LAYERS = 768, 12
BOUND = 0.020  # seconds, on two cores of a server CPU


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))


@pytest.mark.benchmark
@pytest.mark.parametrize("form", ["canonical", "symmetric"])
def test_orthogonalize(form):
    model = nn.ModuleList(Layer() for _ in range(LAYERS))
    adapter = ta.attach(model, ta.preset("lotr", rank=16, targets=["query", "value"]))
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    (group,) = adapter.plan.groups
    assert len(group.paths) == 24
    before = adapter.delta(group.paths[0]).detach()
    timing = interleave({form: lambda: orthogonalize(adapter, form)}, repeats=21)[form]
    print(f"\n{hardware()}; orthogonalize ({form}) LoTR r=16, 24 sites of width {WIDTH}: {timing.median * 1e3:.2f} ms")
    torch.testing.assert_close(adapter.delta(group.paths[0]), before, rtol=0, atol=1e-4 * float(before.abs().max()))
    assert timing.median < BOUND
