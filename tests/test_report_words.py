"""What a report says: every number in its sentences against numpy, and names in the user's words."""

import numpy as np
import pytest
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt.analysis.naming import stack_names
from tensoradapt.sites import from_mapping


def tensors(seed: int, **shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


MODEL = {
    **{f"encoder.layer.{k}.query.weight": (12, 10) for k in range(3)},
    **{f"encoder.layer.{k}.norm.weight": (10,) for k in range(3)},
    **{"embeddings.word_embeddings.weight": (30, 10), "pooler.weight": (10, 10), "pooler.bias": (10,)},
}


def pair(still: tuple[str, ...] = ()):
    """A model of three layers, and a change of all tensors but those that are still."""
    base, change = tensors(0, **MODEL), tensors(1, **MODEL)
    tuned = {name: base[name] + 0.01 * change[name] * (name not in still) for name in base}
    return tuple({n: torch.from_numpy(t).float() for n, t in side.items()} for side in (base, tuned))


# -- the account ------------------------------------------------------------------------------------------------------

KINDS = {
    "layers": ("query",),
    "embeddings": ("embeddings",),
    "outside": ("pooler.weight",),
    "vectors": ("norm", "pooler.bias"),
}


def square(base, tuned, words) -> float:
    """|tuned - base|^2 of the tensors whose names hold one of some words."""
    names = [name for name in base if any(word in name for word in words)]
    return sum(float(((tuned[n].double() - base[n].double()).numpy() ** 2).sum()) for n in names)


def test_every_tensor_is_of_one_kind():
    base, tuned = pair(still=("encoder.layer.1.norm.weight", "pooler.weight"))
    base, tuned = base | {"only.weight": torch.ones(3, 3)}, tuned | {"new.bias": torch.ones(2)}
    report = ta.analyze(base, tuned, candidates=False)
    found, total = report.change, square(base, tuned, MODEL)
    assert (found["tensors"], found["differing"]) == (len(MODEL), len(MODEL) - 2)
    assert found["norm"] == pytest.approx(total**0.5, rel=1e-6)
    assert {kind: row["tensors"] for kind, row in found["kinds"].items()} == {
        "layers": 3, "embeddings": 1, "outside": 1, "vectors": 4
    }  # fmt: skip
    assert [row["differing"] for row in found["kinds"].values()] == [3, 1, 0, 3]
    for kind, words in KINDS.items():
        assert found["kinds"][kind]["share"] == pytest.approx(square(base, tuned, words) / total, rel=1e-5), kind
    assert (report.match["only_base"], report.match["only_tuned"]) == (["only.weight"], ["new.bias"])


def test_what_the_targets_leave_out_is_measured_too():
    base, tuned = pair()
    kinds = ta.analyze(base, tuned, targets=["query"], candidates=False).change["kinds"]
    left = square(base, tuned, ("embeddings", "pooler.weight")) / square(base, tuned, MODEL)
    assert kinds["untargeted"]["tensors"] == 2 and kinds["untargeted"]["weights"] == 0
    assert kinds["untargeted"]["share"] == pytest.approx(left, rel=1e-5)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)


def test_tied_tensors_and_integers_count_once_and_not_at_all():
    base, tuned = pair()
    for side in (base, tuned):
        side["lm_head.weight"] = side["embeddings.word_embeddings.weight"]
    base["position_ids"], tuned["position_ids"] = torch.arange(4), torch.arange(4) + 1
    found = ta.analyze(base, tuned, candidates=False).change
    assert found["tensors"] == len(MODEL) + 1 and found["kinds"]["embeddings"]["tensors"] == 1
    assert found["kinds"]["other"] == {"tensors": 1, "differing": 1, "weights": 0, "share": 0.0}


def test_equal_sides_have_no_shares():
    base, _ = pair()
    found = ta.analyze(base, base).change
    assert found["differing"] == 0 and {row["share"] for row in found["kinds"].values()} == {None}


# -- names ------------------------------------------------------------------------------------------------------------


def test_sides_are_called_as_the_user_knows_them(tmp_path):
    from safetensors.torch import save_file

    base, tuned = pair()
    save_file(base, tmp_path / "base.safetensors")
    named = lambda *sides, **options: (  # noqa: E731
        (found := ta.analyze(*sides, candidates=False, **options)).base,
        found.tuned,
    )
    assert named(base, tuned) == named(list(base.items()), iter(tuned.items())) == ("base", "tuned")
    assert named(base, tuned, names=("v1", "v2")) == ("v1", "v2")
    assert named(tmp_path / "base.safetensors", tuned) == (str(tmp_path / "base.safetensors"), "tuned")
    assert named(nn.Linear(3, 4), nn.Linear(3, 4)) == ("Linear (base)", "Linear (tuned)")
    for wrong in ("ab", ("one",), ("a", 3), ("", "b")):
        with pytest.raises(ta.SpecError, match="names are what the report calls"):
            ta.analyze(base, tuned, names=wrong)


BERT = ("attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value")
NAMES = {
    "one role": ([["layer.0.query", "layer.1.query"]], ["query"]),
    "several roles": ([[f"h.{k}.{r}" for k in (0, 1) for r in ("q_proj", "o_proj")]], ["q_proj+o_proj"]),
    "more roles than a name holds": (
        [[f"layer.0.{r}" for r in BERT], ["layer.0.output.dense"]],
        ["key+query+value+1 more", "output.dense"],
    ),
    "two towers": ([["encoder.block.0.wi"], ["decoder.block.0.wi"]], ["encoder wi", "decoder wi"]),
    "shapes tell them apart": ([["layer.0.up"], ["layer.1.up"]], ["up 4x4", "up 4x8"]),
    "numbers alone": ([["0", "2"], ["3"]], ["layers", "layer 3"]),
    "a sequence": ([["net.0", "net.2"], ["net.4"]], ["net", "net.4"]),
    "outside the layers": ([["layer.0.dense"], ["pooler.dense"], ["lm_head"]], ["dense", "pooler.dense", "lm_head"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_stacks_are_called_by_their_roles(case):
    stacks, wanted = NAMES[case]
    sizes = {p: (4, 4 + 4 * (case.startswith("shapes") and k)) for k, paths in enumerate(stacks) for p in paths}
    sites = {site.path: site for site in from_mapping(sizes).sites}
    assert stack_names([[sites[path] for path in paths] for paths in stacks]) == wanted
