"""What is accepted where a spec is meant, presets of one's own, printed values, and tables as CSV and data frames."""

import csv
import io
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import tensorly as tl
import torch

import tensoradapt as ta
from tests.toys import Toy

FIELDS = {"preset": "lora", "rank": 2, "targets": ["q_proj"]}
SAME = ta.preset("lora", rank=2, targets=["q_proj"])


def given(tmp_path):
    """One adapter, said in every way."""
    SAME.save(tmp_path / "spec.yaml")
    SAME.save(tmp_path / "spec.json")
    return {
        "a spec": SAME,
        "a rule": SAME.rules[0],
        "a row": FIELDS,
        "a dictionary": {"rules": [FIELDS]},
        "a dictionary with defaults": {"defaults": {"rank": 2}, "rules": [{"preset": "lora", "targets": "q_proj"}]},
        "a list": [SAME.rules[0]],
        "a file": tmp_path / "spec.yaml",
        "a file's name": str(tmp_path / "spec.json"),
    }


@pytest.mark.parametrize(
    "kind",
    ["a spec", "a rule", "a row", "a dictionary", "a dictionary with defaults", "a list", "a file", "a file's name"],
)
def test_every_door_takes_it(kind, tmp_path):
    spec, model = given(tmp_path)[kind], Toy()
    count = ta.plan(SAME, model).num_trainable
    assert ta.plan(spec, model).num_trainable == count
    assert ta.solve_rank(spec, model, max_parameters=count).rank == 2
    assert [row.num_trainable for row in ta.budget(spec, model, [2]).rows] == [count]
    assert ta.gradients(model, spec, [torch.ones(1, 2, 12)], loss=lambda m, b: m(b).square().sum()).keys()
    adapter = ta.attach(model, spec)
    assert adapter.plan.num_trainable == count
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.normal_()
    assert ta.convert(adapter, spec).relative_error < 1e-6
    base = {f"{path}.weight": torch.zeros(12, 12) for path in adapter.as_saved().sites}
    tuned = {name: adapter.delta(name.removesuffix(".weight")).detach() for name in base}
    assert ta.extract(base, tuned, spec, tmp_path / "out").relative_error < 1e-3


def test_a_name_is_the_preset_with_its_defaults():
    model = Toy()
    assert ta.plan("lotr", model).spec == ta.plan(ta.preset("lotr"), model).spec
    assert {row.spec for row in ta.budget(["lora", "lotr"], model, [1]).rows} == {"lora", "lotr"}
    labels = ta.budget({"small": "lora", "shared": {"preset": "lotr"}}, model, [1])
    assert [row.spec for row in labels.rows] == ["small", "shared"]
    assert ta.plan([SAME, ta.Rule(preset="lora", targets=["v_proj"])], model).num_sites == 6
    assert (SAME + ta.Rule(preset="lora", targets=["v_proj"])).rules[1].preset == "lora"


def test_a_row_takes_a_preset_s_own_parameters():
    spec = {"preset": "lokr", "factor": 4, "rank": 2, "targets": "q_proj"}
    assert (
        ta.plan(spec, Toy()).num_trainable
        == ta.plan(ta.preset("lokr", factor=4, rank=2, targets="q_proj"), Toy()).num_trainable
    )


# -- presets of one's own ------------------------------------------------------------------------------------------


def diagonal(rank: int = 4, wide: bool = False) -> dict:
    """A core for every layer between shared factors."""
    return {
        "format": "network",
        "network": "out a, layer a b, b in -> layer out in",
        "rank": 2 * rank if wide else rank,
        "excess": "cap",
        "init": {"node_0": "normal(1)", "node_1": "zero", "node_2": "normal(1)"},
        "default": "attention",
    }


MINE = ta.Preset(build=diagonal, formula="D[l] = A G[l] B", cite="arXiv:0000.00000")


def test_a_preset_of_one_s_own(tmp_path):
    model = Toy()
    spec = ta.preset(MINE, rank=3, targets=["q_proj", "o_proj"], train=[])
    assert spec.rules[0].family == "diagonal" and MINE.parameters == ("rank", "wide")
    plan = ta.plan(spec, model)
    assert plan.num_trainable == 2 * (12 * 3 + 3 * 3 * 3 + 3 * 12)  # one group for each role
    assert ta.plan(MINE, model).num_sites == 12  # its default: the four of attention
    assert ta.plan(ta.preset(MINE, wide=True), model).groups[0].rank == {"a": 8, "b": 8}
    assert ta.solve_rank(spec, model, max_parameters=plan.num_trainable).rank == 3
    assert ta.budget([MINE, "lora"], model, [1]).rows[0].spec == "diagonal"
    adapter = ta.attach(model, spec)
    with torch.no_grad():
        for tensor in adapter.parameters():
            tensor.normal_()
    delta = adapter.delta("layers.1.o_proj").detach()
    adapter.save(tmp_path / "mine")
    adapter.detach()
    again = ta.load(tmp_path / "mine", model)
    assert torch.equal(again.delta("layers.1.o_proj"), delta)
    assert again.plan.spec.rules[0].family == "diagonal"
    spec.save(tmp_path / "spec.yaml")
    assert ta.Spec.load(tmp_path / "spec.yaml") == spec


PLAIN = {"default": "feed-forward", "init": {"core_out": "zero", "core_in": "normal(1)"}}


def test_a_preset_of_several_rules_with_a_name():
    both = ta.Preset(lambda rank=2: ({**diagonal(rank), "default": "qkv"}, {**PLAIN, "rank": rank}), family="both")
    plan = ta.plan(ta.preset(both, rank=1), Toy())
    assert [rule.family for rule in plan.spec.rules] == ["both", "both"] and plan.num_sites == 15


# -- fits ----------------------------------------------------------------------------------------------------------


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_a_fit_needs_no_axes():
    x = noise(6, 5, 4)
    assert ta.fit(x, "cp", rank=4).diagram.open == ("axis_0", "axis_1", "axis_2")
    assert ta.fit(x[0], "cp", rank=2).diagram.open == ("out", "in")
    assert ta.fit(x, "a r, b r s, s c -> a b c", rank=2).diagram.open == ("a", "b", "c")
    named = [
        ta.fit(x, "tucker", axes=axes, rank=2) for axes in ("layer out in", ("layer", "out", "in"), "layer, out, in")
    ]
    assert len({fit.relative_error for fit in named}) == 1 and named[0].diagram.open == ("layer", "out", "in")
    assert ta.fit(x, "tucker", axes="layer out in", compress="out", rank=2).rank.keys() == {"r_out"}


def test_arrays_are_tensors():
    x = noise(6, 5, 4)
    assert ta.fit(x.numpy(), "tt", rank=2).relative_error == ta.fit(x, "tt", rank=2).relative_error
    assert ta.fit(x.numpy().astype(np.int64), "tt", rank=2).factors
    base, tuned = {"a.weight": x[0].numpy()}, {"a.weight": x[1].numpy()}
    assert ta.analyze(base, tuned).sites["a"].norm == pytest.approx(float((x[1] - x[0]).norm()), rel=1e-5)
    adapter = ta.attach(Toy(), SAME)
    values = np.arange(24, dtype=np.float64).reshape(2, 12)
    adapter.set_factors("layer0_q_proj", {"core_in": values})
    assert np.array_equal(adapter.factors("layer0_q_proj")["core_in"].detach().numpy(), values)


@pytest.mark.parametrize(
    "network",
    [
        "layer a, a out b, b in -> layer out in",
        "x: b in, y: out b a, z: a layer -> layer out in",  # cores in another order, their indices turned
        "z: layer a, y: b a out, x: in b -> layer out in",
        "a b layer, a, b out c, c in -> layer out in",
    ],
)
def test_a_train_in_any_order_is_tensorlys(network):
    if network.startswith("a b"):  # a branch: no train
        found = ta.fit(noise(4, 5, 6), "layer a b, a out, b in -> layer out in", rank=2)
        with pytest.raises(ta.SpecError, match="no class"):
            found.to_tensorly()
        return
    found = ta.fit(noise(4, 5, 6), network, rank=2)
    train = found.to_tensorly()
    assert type(train) is tl.tt_tensor.TTTensor and train.rank == (1, 2, 2, 1)
    with tl.backend_context("pytorch", local_threadsafe=True):
        assert torch.allclose(train.to_tensor(), found.dense(), atol=1e-5)


def test_a_train_whose_axes_are_permuted_is_not_given_in_silence():
    found = ta.fit(noise(4, 5, 6), "out a, a layer b, b in -> layer out in", rank=2)
    with pytest.raises(ta.SpecError, match="order of its cores"):
        found.to_tensorly()


# -- prints and tables ---------------------------------------------------------------------------------------------


def test_what_is_printed_is_short(tmp_path):
    model = Toy()
    adapter = ta.attach(model, ta.preset("cara", rank=2))
    adapter.save(tmp_path / "a")
    shown = {
        "spec": ta.preset("lora", rank=2, targets=["query", "value"], dropout=0.1, train=["classifier"]),
        "two rules": ta.preset("cara"),
        "ten rules": ta.Spec(rules=SAME.rules * 10),
        "solved": ta.solve_rank("lora", model, max_parameters=3000),
        "fit": ta.fit(noise(6, 5, 4), "tucker", axes="layer out in", rank=2),
        "saved": ta.open_adapter(tmp_path / "a"),
        "budget": ta.budget(["lora", "lotr"], model, range(1, 193)),
    }
    for name, value in shown.items():
        lines = [line for line in str(value).splitlines() if str(tmp_path) not in line]
        assert 1 <= len(lines) <= 20 and max(map(len, lines)) <= 80, (name, lines)
        assert "tensor(" not in str(value) and "tensor(" not in repr(value), name
    assert str(shown["spec"]) == (
        "lora on query, value; rank 2; scale alpha/rank with alpha 8; dropout 0.1;\n  classifier trained beside it"
    )
    assert "rank 12: 1,728 trainable" in str(shown["solved"])
    assert "tucker of layer=6 out=5 in=4: relative error 0." in str(shown["fit"])
    assert str(tmp_path / "a") in str(shown["saved"]) and "cara on q_proj" in str(shown["saved"])
    assert "9 of 192 ranks" in str(shown["budget"])
    assert len(repr(ta.preset("lora").rules[0])) < 300


def tables(tmp_path):
    x = noise(2, 8, 8)
    sides = [{f"layer.{n}.query.weight": x[n] * k for n in range(2)} for k in (1, 2)]
    return {
        "budget": ta.budget(["lora", "krona"], Toy(), [1, 2]),
        "plan": ta.plan("vera", Toy()),
        "report": ta.analyze(*sides, candidates=False),
    }


@pytest.mark.parametrize("name", ["budget", "plan", "report"])
def test_tables_are_csv_and_frames(name, tmp_path, monkeypatch):
    table = tables(tmp_path)[name]
    records = table.records()
    text = table.to_csv(tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == text == table.to_csv()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [{k: "" if v is None else str(v) for k, v in r.items()} for r in records] == rows and rows
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ta.TensorAdaptError, match="pip install pandas"):
        table.to_dataframe()
    pandas = ModuleType("pandas")
    pandas.DataFrame = type("DataFrame", (), {"from_records": staticmethod(list)})
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    assert table.to_dataframe() == records


def test_the_columns_hold_what_the_objects_say(tmp_path):
    found = tables(tmp_path)
    assert [r["num_trainable"] for r in found["budget"].records()] == [r.num_trainable for r in found["budget"].rows]
    plan = ta.plan("lora", Toy())
    assert sum(row["num_trainable"] for row in plan.records()) == plan.num_trainable
    row = found["report"].records()[0]
    assert row["weight"] == "layer.0.query" and row["layer"] == 0 and (row["out"], row["in"]) == (8, 8)
    assert row["rank.energy_0.95"] == found["report"].sites["layer.0.query"].ranks["energy_0.95"]
    assert json.loads(json.dumps(plan.records()))
