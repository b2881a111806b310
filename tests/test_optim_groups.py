"""Parameter groups by role, and budgets that fall while an adapter trains."""

import math
from fractions import Fraction

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import tensoradapt as ta
from tensoradapt.errors import AdapterError, RankError, SpecError
from tensoradapt.optim import CubicSchedule, RankSchedule, parameter_groups

QV = ["query", "value"]


def attached(name, **more):
    model = tiny.bert_classifier()
    return model, ta.attach(model, ta.preset(name, **{"rank": 3, "targets": QV, **more}))


def named(adapter, groups):
    """Node or parameter -> (group's name, learning rate), by the adapter's own names."""
    names = {p: n for n, p in adapter.named_parameters()}
    return {names[p].rpartition(".")[2].replace("/", "."): (g["name"], g["lr"]) for g in groups for p in g["params"]}


# -- roles ----------------------------------------------------------------------------------------------------------

ROLES = {
    "lora": {"core_out": "out", "core_in": "in"},
    "lotr": {"core": "core", "factor_out": "out", "factor_in": "in"},
    "lorta": {"factor_in": "in", "factor_head": "out", "factor_head_dim": "out", "factor_layer": "core",
              "factor_role": "core"},
    "metatt_4d": {"core_in": "in", "core_layer": "core", "core_role": "core", "core_out": "out"},
    "tt_lora": {f"core_{side}_{k}": side for side in ("in", "out") for k in range(4)},
    "lokr": {"W1": "core", "W2a": "out", "W2b": "in"},
    "vera": {"d": "core", "b": "out"},
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_nodes_are_grouped_by_the_side_that_they_carry(name):
    _, adapter = attached(name)
    rates = {"in": 2e-3, "out": 6e-3, "core": 10e-3}
    groups = parameter_groups(adapter, 2e-3, multipliers={"out": 3, "core": 5.0})
    found = named(adapter, groups)
    assert found == {node: (role, pytest.approx(rates[role])) for node, role in ROLES[name].items()}


@pytest.mark.parametrize("name", ROLES)
def test_every_trained_parameter_is_in_one_group(name):
    _, adapter = attached(name, train=["classifier"])
    held = [p for group in parameter_groups(adapter, 1e-3) for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in adapter.parameters() if p.requires_grad}
    torch.optim.AdamW(parameter_groups(adapter, 1e-3))


def test_slices_of_one_bank_are_in_one_group():
    model = tiny.bert()
    rule = ta.Rule(
        format="tucker",
        axes=("site", "out", "in"),
        rank=2,
        shapes="slices",
        start="nonzero",
        targets=[*QV, "output.dense"],
    )
    adapter = ta.attach(model, ta.Spec(rules=(rule,)))
    assert len(adapter.groups) > 1
    held = [p for group in parameter_groups(adapter, 1e-3) for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(adapter.parameters())


def test_what_does_not_train_is_in_no_group():
    _, adapter = attached("lora", train=["classifier"])
    still = [adapter.factors(group)["core_in"] for group in adapter.groups]
    for p in still:
        p.requires_grad_(False)
    groups = parameter_groups(adapter, 1e-3)
    assert [g["name"] for g in groups] == ["out", "extra"]


def test_the_ratio_of_lora_plus_is_that_of_b_to_a():
    _, adapter = attached("lora", train=["classifier"])
    groups = parameter_groups(adapter, 1e-3, weight_decay=0.1)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "out": (0.016, 0.1), "in": (1e-3, 0.1), "extra": (1e-3, 0.1)
    }  # fmt: skip
    assert {g["name"]: g["lr"] for g in parameter_groups(adapter, 1e-3, ratio=4.0)}["out"] == 4e-3


def test_nodes_have_multipliers_of_their_own():
    _, adapter = attached("lotr", train=["classifier"])
    groups = parameter_groups(adapter, 1.0, multipliers={"extra": 0.5}, nodes={"factor_in": 3.0, "core": 0.25})
    found = named(adapter, groups)
    assert found["factor_in"] == ("factor_in", 3.0) and found["core"] == ("core", 0.25)
    assert found["factor_out"] == ("out", 16.0) and found["classifier.weight"] == ("extra", 0.5)


def test_a_group_of_its_own_rate_moves_at_that_rate():
    model, adapter = attached("lora")
    tiny.shake(adapter)
    optimizer = torch.optim.SGD(parameter_groups(adapter, 0.5, ratio=8.0))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    model(tiny.tokens()).logits.square().sum().backward()
    optimizer.step()
    for name, p in adapter.named_parameters():
        rate = 4.0 if name.endswith("core_out") else 0.5
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multipliers": {"B": 2.0}}, "no role 'B'(.|\n)*in, out, core, extra"),
        ({"nodes": {"B": 2.0}}, "no node 'B'(.|\n)*core, factor_out, factor_in"),
        ({"lr": 0.0}, "'lr'"),
        ({"ratio": math.inf}, "'ratio'"),
        ({"multipliers": {"out": -1.0}}, "'out'"),
        ({"nodes": {"core": "2"}}, "'core'"),
    ],
)
def test_unknown_roles_and_rates_out_of_range_are_refused(options, says):
    _, adapter = attached("lotr")
    with pytest.raises(SpecError, match=says):
        parameter_groups(adapter, **{"lr": 1e-3, **options})


# -- the cubic schedule ---------------------------------------------------------------------------------------------


def test_the_cubic_schedule_starts_ends_and_halves_as_published():
    b = CubicSchedule(initial=900, final=100, total=130, warmup=20, tail=10)
    assert [b(t) for t in (0, 19, 20)] == [900, 900, 900]
    assert b(70) == 100 + 800 // 8  # half the way
    assert [b(t) for t in (120, 121, 130, 10_000)] == [100] * 4
    assert b(119) == 100 and b(100) == 100 + math.floor(800 * (20 / 100) ** 3)
    assert b.end == 120


@given(
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    st.tuples(st.integers(0, 50), st.integers(1, 300), st.integers(0, 50)),
)
def test_the_cubic_schedule_is_monotone_and_its_formula(initial, final, spans):
    warmup, length, tail = spans
    b = CubicSchedule(initial, final, sum(spans), warmup, tail)
    values = [b(t) for t in range(sum(spans) + 3)]
    steps = [y - x for x, y in zip(values, values[1:], strict=False)]
    assert all(s <= 0 for s in steps) if initial >= final else all(s >= 0 for s in steps)
    assert values[: warmup + 1] == [initial] * (warmup + 1) and set(values[warmup + length :]) == {final}
    for t in range(warmup, warmup + length):
        exact = final + (initial - final) * (1 - Fraction(t - warmup, length)) ** 3
        assert abs(values[t] - exact) < 1 and abs(values[t] - final) <= abs(exact - final)


@pytest.mark.parametrize(
    "options", [{"warmup": 60, "tail": 40}, {"final": 0}, {"initial": 10.0}, {"warmup": -1}, {"total": 0}]
)
def test_a_schedule_without_steps_between_or_numbers_out_of_range_is_refused(options):
    with pytest.raises(SpecError, match="cubic schedule"):
        CubicSchedule(**{"initial": 90, "final": 10, "total": 100, **options})


# -- ranks while training -------------------------------------------------------------------------------------------


class Task:
    """A model that learns the logits of another one of its kind, whose deltas have a rank of 1."""

    def __init__(self, name="lora", rank=6, base=torch.optim.AdamW, **more):
        teacher = tiny.bert_classifier()
        tiny.shake(ta.attach(teacher, ta.preset("lora", rank=1, targets=QV, alpha=4.0)), 0.5, seed=3)
        self.x = tiny.tokens(24, 6)
        self.y = teacher(self.x).logits.detach()
        self.model, self.adapter = attached(name, rank=rank, **more)
        self.optimizer = base(parameter_groups(self.adapter, 1e-2, ratio=1.0))

    def step(self):
        self.optimizer.zero_grad()
        value = (self.model(self.x).logits - self.y).square().mean()
        value.backward()
        self.optimizer.step()
        return value.item()

    def factors(self):
        return sum(t.numel() for group in self.adapter.groups for t in self.adapter.factors(group).values())


@pytest.mark.parametrize("name", ["lora", "lotr", "metatt_4d", "lorta"])
def test_training_ends_at_the_budget_and_goes_on_learning(name):
    task = Task(name, train=["classifier"])
    begun = task.factors()
    budget = CubicSchedule(begun, begun // 2, total=40, warmup=10, tail=6)
    schedule = RankSchedule(task.adapter, task.optimizer, max_parameters=budget, every=4)
    losses, made = [], []
    for step in range(1, 81):
        losses.append(task.step())
        change = schedule.step()
        made += [step] if change else []
        assert step % 4 and step != 34 or task.factors() <= budget(step)
    assert 0.35 * begun <= task.factors() <= begun // 2
    assert 2 <= len(made) and 10 < made[0] and made[-1] <= 36
    held = {p for group in task.optimizer.param_groups for p in group["params"]}
    assert held == {p for p in task.adapter.parameters() if p.requires_grad}
    assert set(task.optimizer.state) == held
    assert all(task.optimizer.state[p]["exp_avg"].shape == p.shape for p in held)
    after = min(losses[34:40])
    assert losses[-1] < 0.8 * after and losses[-1] < 0.2 * losses[0], (losses[0], after, losses[-1])


def test_the_parameters_after_the_last_change_are_those_that_train():
    task = Task()
    for _ in range(4):
        task.step()
    old = set(task.adapter.parameters())
    schedule = RankSchedule(
        task.adapter, task.optimizer, max_parameters=CubicSchedule(task.factors(), task.factors() // 2, total=1)
    )
    change = schedule.step()
    assert change is not None and change.relative_error < 1
    assert set(change.ranks_after) == set(task.adapter.groups) and change.ranks_before != change.ranks_after
    new = [p for p in task.adapter.parameters() if p not in old]
    before = [p.detach().clone() for p in new]
    assert new
    task.step()
    assert not any(torch.equal(p, b) for p, b in zip(new, before, strict=True))
    assert schedule.step() is None  # the budget is kept already: not even another gauge
    task.step()


def test_a_budget_that_is_kept_changes_nothing():
    task = Task()
    task.step()
    held = {n: (p, p.detach().clone(), p.grad) for n, p in task.adapter.named_parameters()}
    schedule = RankSchedule(
        task.adapter, task.optimizer, max_parameters=CubicSchedule(task.factors(), 256, total=9, warmup=3)
    )
    assert schedule.step() is None
    assert all(p is held[n][0] and torch.equal(p, held[n][1]) and p.grad is held[n][2]
               for n, p in task.adapter.named_parameters())  # fmt: skip


def test_the_end_of_a_schedule_is_reached_between_two_changes():
    task = Task()
    budget = CubicSchedule(task.factors(), task.factors() // 3, total=7)
    schedule = RankSchedule(task.adapter, task.optimizer, max_parameters=budget, every=4)
    made = []
    for step in range(1, 8):
        task.step()
        made += [step] if schedule.step() else []
    assert made == [4, 7] and task.factors() <= budget.final


def test_ranks_fall_and_grow_by_a_schedule_of_ranks():
    task = Task("lotr", rank=6)
    down = RankSchedule(task.adapter, task.optimizer, rank=CubicSchedule(6, 2, total=6), every=2)
    losses, ranks = [], []
    for _ in range(8):
        losses.append(task.step())
        down.step()
        ranks.append(next(iter(task.adapter.groups.values())).rank["r_out"])
    assert ranks == [6, 3, 3, 2, 2, 2, 2, 2]
    up = RankSchedule(task.adapter, task.optimizer, rank=CubicSchedule(2, 5, total=3))
    for _ in range(3):
        before = {path: task.adapter.delta(path) for path in task.adapter._lines}
        up.step()
        for path, delta in before.items():
            torch.testing.assert_close(task.adapter.delta(path), delta, rtol=0, atol=1e-6)
        losses.append(task.step())
    assert next(iter(task.adapter.groups.values())).rank == {"r_out": 5, "r_in": 5}
    assert up.step() is None
    for _ in range(60):
        losses.append(task.step())
    assert losses[-1] < 0.2 * losses[0]


def test_a_schedule_goes_on_from_its_state():
    task = Task()
    budget = CubicSchedule(task.factors(), 256, total=10)
    one = RankSchedule(task.adapter, task.optimizer, max_parameters=budget, every=6)
    for _ in range(4):
        one.step()
    two = RankSchedule(task.adapter, task.optimizer, max_parameters=budget, every=6)
    two.load_state_dict(one.state_dict())
    assert two.step() is None and two.step() is not None and two.steps == 6
    with pytest.raises(AdapterError, match="no state of a rank schedule"):
        two.load_state_dict({"step": 3})


def test_what_a_schedule_cannot_do_is_said_before_training():
    task = Task()
    budget = CubicSchedule(task.factors(), 256, total=10)
    with pytest.raises(RankError, match="below rank 1"):
        RankSchedule(task.adapter, task.optimizer, max_parameters=CubicSchedule(900, 5, total=10))
    for both in ({}, {"max_parameters": budget, "rank": budget}):
        with pytest.raises(SpecError, match="one thing"):
            RankSchedule(task.adapter, task.optimizer, **both)
    with pytest.raises(SpecError, match="every"):
        RankSchedule(task.adapter, task.optimizer, max_parameters=budget, every=0)
    for number in (300, lambda step: 300):
        with pytest.raises(SpecError, match="with `end` from which one on"):
            RankSchedule(task.adapter, task.optimizer, max_parameters=number)
    _, frozen = attached("vera")
    with pytest.raises(SpecError, match="frozen"):
        RankSchedule(frozen, task.optimizer, max_parameters=budget)
    with pytest.raises(SpecError, match="frozen"):
        RankSchedule(frozen, task.optimizer, rank=CubicSchedule(3, 2, total=10))


def test_an_optimiser_of_something_else_is_refused_and_nothing_changes():
    task = Task()
    task.step()
    other = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])
    before, held = task.factors(), tiny.base_of(task.adapter)
    budget = CubicSchedule(before, 256, total=1)
    for stranger in (other, None):
        with pytest.raises(AdapterError, match="none of the factors"):
            RankSchedule(task.adapter, stranger, max_parameters=budget)
    schedule = RankSchedule(task.adapter, task.optimizer, max_parameters=budget)
    schedule.optimizer = other
    with pytest.raises(AdapterError, match="none of the factors"):
        schedule.step()
    assert task.factors() == before and tiny.same(held, tiny.base_of(task.adapter))
