"""A budget that the deltas share out is worth at least as much as the same number of parameters at one rank for all.

The deltas are hard: their spectra fall off slowly, so that at these budgets most of each is lost.
"""

import pytest
import torch

import tensoradapt as ta
from tensoradapt.errors import RankError

SHAPES = {"q": (48, 48), "v": (48, 48), "up": (96, 48), "down": (48, 96)}
LAYERS = 3


def stacked(form, **fields):
    rule = {"targets": tuple(SHAPES), "format": form, "start": "nonzero", "excess": "cap", **fields}
    return lambda rank: ta.Spec(rules=(ta.Rule(rank=rank, **rule),))


FORMATS = {
    "lotr": lambda rank: ta.preset("lotr", rank=rank, targets=tuple(SHAPES)),
    "tt_lora": lambda rank: ta.preset("tt_lora", rank=rank, targets=tuple(SHAPES)),
    "tucker": stacked("tucker", axes=("layer", "role", "out", "in")),
    "tt": stacked("tt", axes=("out", "layer", "role", "in")),
    "ttm": stacked("ttm", axes=("site", "out", "in"), folds={"out": "auto:3", "in": "auto:3"}),
}


@pytest.fixture(scope="module")
def sides():
    """Two mappings; the change of a weight has singular values k^-0.5, and bases in part its layer's, in part all's."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for role, (out, into) in SHAPES.items():
        common = [torch.randn(size, 12, generator=generator) for size in (out, into)]
        for layer in range(LAYERS):
            name = f"layers.{layer}.{role}.weight"
            own = [torch.randn(size, min(out, into), generator=generator) for size in (out, into)]
            left, right = (
                torch.linalg.qr(o + torch.nn.functional.pad(c, (0, 36)))[0] for o, c in zip(own, common, strict=True)
            )
            size = (1 + layer) * (torch.arange(min(out, into)) + 1.0) ** -0.5
            base[name] = torch.zeros(out, into)
            tuned[name] = left @ torch.diag(size) @ right.mT
    return base, tuned


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_no_worse_than_one_rank_for_all(form, rank, sides, tmp_path):
    even = ta.extract(*sides, FORMATS[form](rank), tmp_path / "even")
    chosen = ta.extract(*sides, FORMATS[form](1), tmp_path / "chosen", max_parameters=even.num_parameters)
    assert chosen.num_parameters <= even.num_parameters
    assert even.relative_error > 0.5
    assert chosen.relative_error <= even.relative_error + 1e-3


@pytest.mark.parametrize("form", FORMATS)
def test_a_budget_below_the_smallest_adapter_is_refused_with_its_size(form, sides, tmp_path):
    with pytest.raises(RankError, match=r"at least \d+ parameters") as caught:
        ta.extract(*sides, FORMATS[form](1), tmp_path / "a", max_parameters=2)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert ta.extract(*sides, FORMATS[form](1), tmp_path / "a", max_parameters=least).num_parameters == least
