"""Budgets: tables over ranks, and the largest ranks within a number of parameters, against brute force."""

import csv
import io
import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tensoradapt as ta
from tensoradapt.knapsack import cheapest, programme

MODEL = {f"layers.{i}.{r}": s for i in range(2) for r, s in {"q": (16, 16), "v": (8, 16), "up": (40, 16)}.items()}
SIDES = {"q": 32, "v": 24, "up": 56}


def lora_count(ranks):
    """The trained entries of LoRA at ranks by group name `layer<i>_<role>`."""
    return sum(rank * SIDES[name.rpartition("_")[2]] for name, rank in ranks.items())


@pytest.mark.parametrize("limit", [112, 113, 300, 555, 700])
def test_solved_ranks_are_the_best_by_brute_force(limit):
    solved = ta.solve_rank(ta.preset("lora", targets=["q", "v"]), MODEL, max_parameters=limit)
    names = list(solved.ranks)
    every = itertools.product(range(1, 11), repeat=4)
    fits = [c for c in every if lora_count(dict(zip(names, c, strict=True))) <= limit]
    uniform = max(min(c) for c in fits)
    best = max(sum(c) for c in fits if min(c) >= uniform)
    assert solved.rank == uniform
    assert sum(solved.ranks.values()) == best
    assert lora_count(solved.ranks) == solved.num_trainable <= limit


def test_a_solved_spec_is_a_spec():
    solved = ta.solve_rank(ta.preset("lora", targets=["q", "v"]), MODEL, max_parameters=300)
    plan = ta.plan(solved, MODEL)
    assert plan.num_trainable == solved.num_trainable == 296
    assert {group.name: group.rank["r_out"] for group in plan.groups} == solved.ranks
    assert ta.plan(ta.Spec.from_dict(json.loads(json.dumps(solved.to_dict()))), MODEL).num_trainable == 296


@pytest.mark.parametrize("name", ["lotr", "tt_lora", "lokr", "loha", "metatt_4d", "vera", "loretta"])
@pytest.mark.parametrize("limit", [700, 2_000, 20_000])
def test_no_answer_exceeds_its_budget_and_the_next_rank_would(name, limit):
    spec = ta.preset(name, targets=["q", "v"])
    solved = ta.solve_rank(spec, MODEL, max_parameters=limit)
    count, more = (row.num_trainable for row in ta.budget(spec, MODEL, [solved.rank, solved.rank + 1]).rows)
    assert ta.plan(solved, MODEL).num_trainable == solved.num_trainable <= limit
    assert count <= limit
    assert more > limit or more == count


tables = st.lists(st.lists(st.integers(1, 30), max_size=4), min_size=1, max_size=4)


def best_sum(costs, spare):
    choices = itertools.product(*[range(len(table)) for table in costs])
    return max(sum(c) for c in choices if sum(t[k] for t, k in zip(costs, c, strict=True)) <= spare)


@settings(deadline=None)
@given(tables, st.integers(0, 80))
def test_the_programme_equals_brute_force(steps, spare):
    costs = [[0, *itertools.accumulate(table)] for table in steps]
    taken = programme(costs, spare)
    assert sum(t[k] for t, k in zip(costs, taken, strict=True)) <= spare
    assert sum(taken) == best_sum(costs, spare)


@settings(deadline=None)
@given(tables, st.integers(0, 80))
def test_the_cheapest_increments_equal_brute_force_where_costs_are_convex(steps, spare):
    costs = [[0, *itertools.accumulate(sorted(table))] for table in steps]
    taken = cheapest(costs, spare)
    assert sum(t[k] for t, k in zip(costs, taken, strict=True)) <= spare
    assert sum(taken) == best_sum(costs, spare)


def test_the_table_equals_the_plans():
    specs = {"a": ta.preset("lora", targets=["q", "up"]), "b": ta.preset("krona", targets=["q"])}
    found = ta.budget(specs, MODEL, range(1, 4))
    assert [(row.spec, row.rank) for row in found.rows] == [("a", 1), ("a", 2), ("a", 3), ("b", None)]
    for row in found.rows[:3]:
        plan = ta.plan(ta.preset("lora", rank=row.rank, targets=["q", "up"]), MODEL)
        assert (row.num_trainable, row.num_bytes) == (plan.num_trainable, plan.num_bytes)
        assert row.flops_per_token == 2 * plan.num_trainable
        assert row.shares == {"q": 2 * 32 * row.rank, "up": 2 * 56 * row.rank}


def test_the_table_as_json_csv_and_text():
    found = ta.budget(ta.preset("lora", targets=["q"]), MODEL, [1, 2])
    assert [row["num_trainable"] for row in json.loads(found.to_json())["rows"]] == [64, 128]
    assert [row["num_trainable"] for row in csv.DictReader(io.StringIO(found.to_csv()))] == ["64", "128"]
    assert str(found).splitlines()[-1].split() == ["2", "128"]
    assert found.text(wide=True).splitlines()[2].split()[:3] == ["lora", "2", "128"]


def test_bad_budgets_say_what_to_do():
    spec = ta.preset("lora", targets=["q"])
    with pytest.raises(ta.RankError, match=r"below the smallest adapter[\s\S]*at least 64"):
        ta.solve_rank(spec, MODEL, max_parameters=63)
    with pytest.raises(ta.SpecError, match="no rank to solve for"):
        ta.solve_rank(ta.preset("quanta", targets=["q"], folds="auto:2"), MODEL, max_parameters=10_000)
    for ranks in ([], [0], [1.5]):
        with pytest.raises(ta.RankError, match="ranks are positive integers"):
            ta.budget(spec, MODEL, ranks)


LLAMA_405B = {
    f"model.layers.{i}.{path}": shape
    for i in range(126)
    for path, shape in {
        "self_attn.q_proj": (16384, 16384),
        "self_attn.k_proj": (1024, 16384),
        "self_attn.v_proj": (1024, 16384),
        "self_attn.o_proj": (16384, 16384),
        "mlp.gate_proj": (53248, 16384),
        "mlp.up_proj": (53248, 16384),
        "mlp.down_proj": (16384, 53248),
    }.items()
}


def test_every_preset_that_fits_plans_a_405b_model_without_a_weight():
    heads = {"heads": 128, "kv_heads": 8}
    for name, row in ta.PRESETS.items():
        if name == "locon":  # there is no convolution to adapt
            continue
        options = {key: value for key, value in heads.items() if key in row.parameters}
        plan = ta.plan(ta.preset(name, **options), LLAMA_405B)
        assert plan.num_sites % 126 == 0
        assert 0 < plan.num_trainable < plan.num_sites * 16384 * 53248


def test_a_budget_for_slices_of_one_bank_is_kept():
    """VeRA's groups share one pair of frozen factors, and with them the rank: raising one group's would raise all."""
    shapes = {f"layers.{k}.{role}": (height, 64) for k in range(3) for role, height in (("q", 64), ("v", 16))}
    for limit in range(300, 340):
        found = ta.solve_rank(ta.preset("vera", targets=["q", "v"]), shapes, max_parameters=limit)
        assert found.num_trainable <= limit
        assert ta.plan(found, shapes).num_trainable == found.num_trainable
