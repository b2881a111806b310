"""How often a whole job waits for a device: a bounded number of times for a weight, whatever the format."""

import copy

import pytest
import torch
from tiny import bert, noise
from toys import Toy
from waiting import waits

import tensoradapt as ta

FORMATS = {"lora": {"rank": 3}, "lotr": {"rank": 3}, "lorta": {"rank": 3, "heads": 4}}
OF_A_WEIGHT = (
    3  # its delta is formed (is it finite?), it or its stack is fitted, and what the factors leave is measured
)
OF_A_TENSOR = 2
OF_A_GROUP = 8  # its factors are checked, and written


@pytest.mark.parametrize("preset", FORMATS)
def test_a_merge_waits_once_for_a_weight(device, preset):
    adapter = ta.attach(Toy().to(device), ta.preset(preset, targets=["q_proj", "v_proj"], **FORMATS[preset]))
    sites = sum(len(group.placements) for group in adapter.plan.groups)
    with waits(device, copies=True) as found:
        adapter.merge(keep="same")
    assert len(found) <= sites, found.table()
    with waits(device, copies=True) as found:
        adapter.unmerge()
    assert not found, found.table()


@pytest.mark.parametrize("preset", FORMATS)
def test_an_extraction_waits_a_few_times_for_a_weight(device, preset, tmp_path):
    """Beside those of reading: of every tensor of both sides it is asked whether it differs, and by how much."""
    base = bert()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for k, p in enumerate(p for p in tuned.parameters() if p.dim() == 2):
            p.add_(0.05 * noise(*p.shape, seed=k))
    spec = ta.preset(preset, targets=["query", "value"], **FORMATS[preset])
    with waits(device) as found:
        made = ta.extract(base.state_dict(), tuned.state_dict(), spec, tmp_path / "out", device=device)
    sites, groups, tensors = len(made.report["sites"]), len(made.report["groups"]), len(base.state_dict())
    assert len(found) <= OF_A_WEIGHT * sites + OF_A_GROUP * groups + OF_A_TENSOR * tensors, found.table()
