"""Attach, train, merge and unmerge: on a device what they are on the CPU."""

import pytest
import torch
from agreement import agree
from toys import Toy

import tensoradapt as ta

SPECS = {
    "lora": {"rank": 2},
    "lotr": {"rank": 2},
    "tt_lora": {"rank": 2},
    "vera": {"rank": 2},
    "lokr": {"factor": 2},
}


@pytest.mark.parametrize("preset", SPECS)
def test_an_adapter_trains_and_merges_on_a_device_as_on_the_cpu(device, preset):
    def job(at: str):
        model = Toy().to(at)
        adapter = ta.attach(model, ta.preset(preset, targets=["q_proj", "v_proj"], **SPECS[preset]))
        x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0)).to(at)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(x).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        attached, delta = model(x), adapter.delta("layers.0.q_proj")
        adapter.merge()
        merged = model(x)
        adapter.unmerge()
        return attached, delta, merged, model(x)

    agree(job, device)
