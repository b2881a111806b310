"""Changes of whole adapters: deltas, files, hooks and optimisers follow; what cannot be changed is refused unharmed."""

import ast
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt.change import Change, combine, orthogonalize, resize, truncate
from tensoradapt.change.targets import named, require_own
from tensoradapt.errors import AdapterError, RankError, SpecError
from tensoradapt.io.saved import as_saved
from tensoradapt.lower import dense

QV = ["query", "value"]


def lora(**more):
    return ta.preset("lora", **{"rank": 4, "targets": QV, **more})


def lotr(**more):
    return ta.preset("lotr", **{"rank": 4, "targets": QV, **more})


HOLES = {"format": "tt", "axes": ("in", "layer", "role", "out"), "start": "nonzero", "rank": 4}
SPECS = {
    "lora": lora(),
    "lotr": lotr(),
    "train": ta.preset("metatt_4d", rank=4, targets=QV),
    "folds": ta.preset("tt_lora", rank=3, targets=QV),
    "cp": ta.preset("lorta", rank=4, targets=QV),
    "slots": ta.preset("fact_tt", rank=3, targets=[*QV, "intermediate.dense"]),
    "tt-matrix": ta.Spec(rules=(ta.Rule(format="ttm", axes=("layer", "out", "in"), rank=3, start="nonzero", targets=QV,
                                        folds={"out": "auto:2", "in": "auto:2"}),)),
    "holes": ta.Spec(rules=(ta.Rule(**HOLES, targets=["re:.*0.*query", "re:.*1.*(query|value)"]),)),
    "half precision": lotr(dtype="bfloat16"),
    "two rules": lotr() + lora(targets=["output.dense"]),
}  # fmt: skip
every = pytest.mark.parametrize("name", SPECS)


def trained(name="lotr", spec=None, **more):
    """A model with an adapter off its start."""
    model = tiny.bert(**more)
    adapter = ta.attach(model, spec or SPECS[name])
    tiny.shake(adapter)
    return model, adapter


def deltas(adapter):
    """Every delta of the stored factors, without the rounding of a sum in their dtype."""
    saved = adapter.as_saved()
    saved = replace(saved, tensors={key: tensor.double() for key, tensor in saved.tensors.items()})
    return {path: saved.delta(path) for path in saved.sites}


def distance(one, two):
    """sqrt(sum ||D - D'||^2 / sum ||D||^2), by numpy."""
    lost = sum(np.square(one[path] - two[path]).sum() for path in one)
    return float(np.sqrt(lost / sum(np.square(value).sum() for value in one.values())))


def loss(model):
    """A function of the output that a layer norm leaves a gradient of."""
    y = model(tiny.tokens())[0]
    return (y * tiny.noise(*y.shape)).sum()


def arrays(adapter):
    return {path: value.numpy() for path, value in deltas(adapter).items()}


def tolerance(adapter):
    return 0.02 if "bfloat16" in {group.rule.dtype for group in adapter.plan.groups} else 1e-6


def assert_whole(model, adapter, folder):
    """Hooks deliver the deltas, the file gives them back, and the plan's spec its diagrams."""
    x = tiny.tokens()
    y = model(x)[0]
    adapter.merge()
    torch.testing.assert_close(model(x)[0], y, rtol=0, atol=max(1e-4, tolerance(adapter)))
    adapter.unmerge()
    again = ta.load(adapter.save(folder), tiny.bert(), name="again")
    assert all(torch.equal(again.delta(path), adapter.delta(path)) for path in deltas(adapter))
    replanned = ta.plan(adapter.plan.spec, model)
    assert [g.diagram for g in replanned.groups] == [g.diagram for g in adapter.plan.groups]
    assert [g.scale for g in replanned.groups] == [g.scale for g in adapter.plan.groups]
    assert adapter.plan.num_trainable == sum(p.numel() for p in adapter.parameters() if p.requires_grad)


# -- gauge --------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("form", ["canonical", "symmetric"])
def test_orthogonalize_keeps_every_delta(name, form, tmp_path):
    model, adapter = trained(name)
    before, held = arrays(adapter), dict(adapter.named_parameters())
    assert orthogonalize(adapter, form) is adapter
    assert distance(before, arrays(adapter)) <= tolerance(adapter)
    assert all(held[key] is p for key, p in adapter.named_parameters() if held[key].shape == p.shape)
    assert_whole(model, adapter, tmp_path)


def test_gradients_of_the_old_factors_are_dropped():
    model, adapter = trained("lotr")
    loss(model).backward()
    orthogonalize(adapter)
    assert all(p.grad is None for p in adapter.parameters())


def test_orthogonalize_makes_isometries_of_all_but_the_centre():
    _, adapter = trained("lotr")
    orthogonalize(adapter, center="core")
    for group in adapter.groups:
        held = adapter.factors(group)
        for node in ("factor_out", "factor_in"):
            eye = torch.eye(held[node].shape[1])
            torch.testing.assert_close(held[node].T @ held[node], eye, rtol=0, atol=1e-6)


def test_groups_of_equal_diagrams_are_brought_into_form_at_once():
    _, adapter = trained(spec=lora(targets=[*QV, "key", "intermediate.dense"]), layers=3)
    before = arrays(adapter)
    orthogonalize(adapter, "hosvd")
    assert distance(before, arrays(adapter)) <= 1e-6
    for group in adapter.groups:
        outer, inner = adapter.factors(group).values()
        torch.testing.assert_close(inner @ inner.T, torch.eye(4), rtol=0, atol=1e-6)
        gram = outer.T @ outer
        torch.testing.assert_close(gram, gram.diag().diag(), rtol=0, atol=1e-5)
        assert (gram.diag().diff() <= 0).all()


def test_a_fresh_adapter_stays_zero_and_can_be_trained():
    model = tiny.bert()
    adapter = ta.attach(model, lotr())
    for form in ("canonical", "hosvd", "symmetric"):
        orthogonalize(adapter, form)
        assert not any(d.any() for d in arrays(adapter).values())
        loss(model).backward()
        assert all(adapter.get_parameter(f"stored.{group}.core").grad.any() for group in adapter.groups)


def test_a_file_is_left_as_it_is(tmp_path):
    _, adapter = trained("lotr")
    path = adapter.save(tmp_path)
    content = path.read_bytes()
    made = orthogonalize(path, "hosvd")
    assert distance(arrays(as_saved(path)), arrays(made)) <= 1e-6
    assert truncate(path, rank=2).adapter is not path and path.read_bytes() == content


# -- truncation ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("how", [{"rank": 2}, {"error": 0.3}, {"max_parameters": 300}], ids=str)
def test_truncate_states_the_error_that_it_makes(name, how, tmp_path):
    model, adapter = trained(name)
    how = {**how, "max_parameters": 500} if "max_parameters" in how and name in ("two rules", "slots") else how
    before, was = arrays(adapter), adapter.plan.num_trainable
    change = truncate(adapter, **how)
    assert change.adapter is adapter
    assert change.relative_error == pytest.approx(distance(before, arrays(adapter)), rel=1e-4, abs=1e-6)
    assert change.relative_error <= how.get("error", 1) + tolerance(adapter)
    assert adapter.plan.num_trainable <= min(was, how.get("max_parameters", was))
    assert change.ranks_after == {group.name: group.rank for group in adapter.plan.groups}
    assert all(max(ranks.values()) <= how.get("rank", 9) for ranks in change.ranks_after.values())
    assert_whole(model, adapter, tmp_path)


def test_an_error_of_lora_is_its_discarded_spectrum():
    """Every weight's best approximation, by numpy: nothing that LoRA can hold at this rank is nearer."""
    _, adapter = trained("lora")
    before = arrays(adapter)
    change = truncate(adapter, rank=2)
    spectra = [np.linalg.svd(delta, compute_uv=False) for delta in before.values()]
    tail = np.sqrt(sum((s[2:] ** 2).sum() for s in spectra) / sum((s**2).sum() for s in spectra))
    assert change.relative_error == pytest.approx(tail, rel=1e-5)


def test_a_budget_goes_where_the_error_is_made():
    """Of two groups, one of rank 1 in truth: it loses its other ranks first."""
    _, adapter = trained("two rules")
    group = adapter.plan.groups[0].name
    core = adapter.factors(group)["core"]
    adapter.set_factors(group, {"core": core.new_zeros(core.shape).index_fill(1, torch.tensor([0]), 1.0)})
    change = truncate(adapter, max_parameters=adapter.plan.num_trainable - 100)
    assert change.ranks_after[group]["r_out"] == 1 and change.relative_error < 1e-6


def test_scales_stay_the_numbers_they_were():
    """alpha / rank is evaluated once: at half the rank the scale is that of the whole."""
    _, adapter = trained("lora")
    adapter.scale = 3.0
    scales = [group.scale for group in adapter.plan.groups]
    truncate(adapter, rank=2)
    assert [group.scale for group in adapter.plan.groups] == scales and adapter.scale == 3.0
    assert scales[0] == 8.0 / 4


def test_ranks_above_those_there_are_change_nothing():
    _, adapter = trained("lora")
    assert truncate(adapter, rank=99).relative_error < 1e-6
    assert {r for group in adapter.plan.groups for r in group.rank.values()} == {4}


# -- other ranks --------------------------------------------------------------------------------------------------


@every
def test_wider_bonds_change_no_delta_and_can_be_trained(name, tmp_path):
    model, adapter = trained(name)
    before, outputs = arrays(adapter), model(tiny.tokens())[0].detach()
    limit = {group.name: group.rank for group in adapter.plan.groups}
    change = resize(adapter, 7)
    assert change.relative_error == 0 and distance(before, arrays(adapter)) <= 1e-7
    torch.testing.assert_close(model(tiny.tokens())[0], outputs, rtol=0, atol=10 * tolerance(adapter))
    assert any(change.ranks_after[g][b] > size for g, ranks in limit.items() for b, size in ranks.items())
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    grown = truncate(adapter.as_saved(), error=1e-6).ranks_after
    assert any(grown[g][b] > size for g, ranks in limit.items() for b, size in ranks.items())
    assert_whole(model, adapter, tmp_path)


def test_a_mapping_resizes_the_bonds_that_it_names_by_bond_or_axis():
    _, adapter = trained("train")
    resize(adapter, {"r_in": 6})
    (group,) = adapter.plan.groups
    assert group.rank == {"r_in": 6, "r_layer": 4, "r_role": 4}
    resize(adapter, {"layer": 2})
    assert adapter.plan.groups[0].rank == {"r_in": 6, "r_layer": 2, "r_role": 4}
    resize(adapter, [3, 5, 2])
    assert list(adapter.plan.groups[0].rank.values()) == [3, 5, 2]


def test_shrinking_is_optimal_and_growing_back_loses_nothing_more():
    _, one = trained("lora")
    _, two = trained("lora")
    assert resize(one, 2).relative_error == pytest.approx(truncate(two, rank=2).relative_error, rel=1e-6)
    before = arrays(one)
    assert resize(one, 4).relative_error == 0 and distance(before, arrays(one)) <= 1e-7


def test_new_entries_depend_on_the_seed_alone():
    made = [trained("lotr")[1] for _ in range(3)]
    for adapter, seed in zip(made, (0, 0, 1), strict=True):
        resize(adapter, 6, seed=seed)
    one, two, three = (torch.cat([t.flatten() for t in adapter.tensors().values()]) for adapter in made)
    assert torch.equal(one, two) and not torch.equal(one, three)


def test_a_difference_grows_with_its_frozen_copy(tmp_path):
    model = tiny.bert()
    adapter = ta.attach(model, ta.preset("dota", rank=2, folds="auto:2", targets=QV))
    resize(adapter, 3)
    assert not any(delta.any() for delta in arrays(adapter).values())  # bit for bit, as it was
    tiny.shake(adapter, 0.05)
    before = arrays(adapter)
    assert resize(adapter, 4).relative_error == 0
    assert distance(before, arrays(adapter)) <= 1e-6
    assert_whole(model, adapter, tmp_path)


# -- the optimiser ------------------------------------------------------------------------------------------------


def gradients(adapter, probe):
    """Gradients of sum <probe, delta> in every factor."""
    total = sum((adapter.delta(path) * probe[path]).sum() for path in probe)
    named = dict(adapter.stored.named_parameters())
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))


MOVES = {
    "canonical": lambda adapter, opt: orthogonalize(adapter, "canonical", optimizer=opt),
    "symmetric": lambda adapter, opt: orthogonalize(adapter, "symmetric", optimizer=opt),
    "truncated by nothing": lambda adapter, opt: truncate(adapter, error=1e-9, optimizer=opt),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["lora", "lotr", "train", "cp", "tt-matrix", "folds"])
def test_first_moments_follow_as_gradients_do(name, move):
    """Momentum that is the gradient of a function of the deltas is its gradient in the new factors, too."""
    rules = tuple(rule.model_copy(update={"dtype": "float64"}) for rule in SPECS[name].rules)
    model, adapter = trained(spec=ta.Spec(rules=tuple(ta.Rule(**r.model_dump(exclude_unset=True)) for r in rules)))
    truncate(adapter, error=1e-9)  # bonds of full rank
    probe = {path: torch.randn_like(delta) for path, delta in deltas(adapter).items()}
    opt = torch.optim.Adam(adapter.parameters())
    for key, grad in gradients(adapter, probe).items():
        adapter.stored.get_parameter(key).grad = grad
    opt.step()
    assert distance(arrays(adapter), arrays(adapter)) == 0
    held = {key: adapter.stored.get_parameter(key) for key in gradients(adapter, probe)}
    for key, grad in gradients(adapter, probe).items():
        opt.state[held[key]]["exp_avg"] = grad.clone()
    MOVES[move](adapter, opt)
    wanted = gradients(adapter, probe)
    for key, grad in wanted.items():
        state = opt.state[adapter.stored.get_parameter(key)]
        torch.testing.assert_close(state["exp_avg"], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()))
        assert (state["exp_avg_sq"] >= 0).all() and state["exp_avg_sq"].shape == grad.shape and state["step"] == 1


def test_second_moments_follow_through_squares():
    """Exact where a change only scales and sorts: CP's columns."""
    model, adapter = trained("cp")
    opt = torch.optim.Adam(adapter.parameters())
    (group,) = adapter.groups
    for tensor in adapter.parameters():
        tensor.grad = torch.randn_like(tensor)
    opt.step()
    for p in adapter.parameters():
        opt.state[p]["exp_avg_sq"] = opt.state[p]["exp_avg"].square()
    orthogonalize(adapter, "symmetric", optimizer=opt)
    for p in adapter.parameters():
        torch.testing.assert_close(opt.state[p]["exp_avg_sq"], opt.state[p]["exp_avg"].square())


OPTIMISERS = {name: getattr(torch.optim, name) for name in ("AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "SGD")}
OPTIMISERS |= {"momentum": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_optimisers_go_on_with_the_new_parameters(make):
    model, adapter = trained("lotr")
    opt = make(list(adapter.parameters()))

    def step():
        opt.zero_grad()
        loss(model).backward()
        opt.step()

    for change in (
        lambda: None,
        lambda: resize(adapter, 6, optimizer=opt),
        lambda: truncate(adapter, rank=3, optimizer=opt),
        lambda: orthogonalize(adapter, optimizer=opt),
    ):
        step()
        change()
        held = {id(p) for group in opt.param_groups for p in group["params"]}
        assert held == {id(p) for p in adapter.parameters()}
        assert set(map(id, opt.state)) <= held
        before = arrays(adapter)
        step()
        assert distance(before, arrays(adapter)) > 0


def test_moments_of_wider_bonds_are_zero_and_the_others_stay():
    model, adapter = trained("lotr")
    opt = torch.optim.Adam(adapter.parameters())
    loss(model).backward()
    opt.step()
    old = {key: opt.state[p]["exp_avg"].clone() for key, p in adapter.named_parameters()}
    resize(adapter, 6, optimizer=opt)
    for key, p in adapter.named_parameters():
        found = opt.state[p]["exp_avg"]
        corner = tuple(map(slice, old[key].shape))
        assert found.shape == p.shape and torch.equal(found[corner], old[key])
        assert (found != 0).sum() == (old[key] != 0).sum()


def test_an_optimiser_of_something_else_is_refused():
    model, adapter = trained("lotr")
    other = torch.optim.Adam(nn.Linear(2, 2).parameters())
    before = arrays(adapter)
    with pytest.raises(AdapterError, match="holds none of the factors of 'default'"):
        truncate(adapter, rank=2, optimizer=other)
    assert distance(before, arrays(adapter)) == 0 and adapter.plan.groups[0].rank["r_out"] == 4
    with pytest.raises(AdapterError, match="an optimiser can follow an attached adapter only"):
        truncate(adapter.as_saved(), rank=2, optimizer=other)


# -- sums ---------------------------------------------------------------------------------------------------------


@every
def test_a_sum_has_the_weighted_deltas(name):
    """Of adapters at several ranks and scales, one of them subtracted."""
    _, one = trained(name)
    _, two = trained(name)
    tiny.shake(two, seed=1)
    resize(two, 5)
    two.scale = 0.5
    made = combine([one, two], [2.0, -0.7])
    wanted = {path: 2 * delta - 0.7 * arrays(two)[path] for path, delta in arrays(one).items()}
    assert distance(wanted, arrays(made)) <= 10 * tolerance(one)
    model = tiny.bert()
    assert distance(arrays(made), arrays(ta.load(made, model))) == 0


@every
def test_a_sum_with_itself_needs_no_more_rank(name):
    if name == "half precision":
        return
    _, adapter = trained(name)
    ranks = truncate(adapter.as_saved(), error=1e-7).ranks_after
    made = combine([adapter, adapter.as_saved()])
    assert made.ranks_after.keys() == ranks.keys()
    assert all(size <= ranks[g][b] for g, found in made.ranks_after.items() for b, size in found.items())


def test_a_sum_of_what_has_no_truncation_is_left_as_wide_as_its_terms():
    _, adapter = trained(spec=SHARED)
    made = combine([adapter, adapter], [1, 0.5])
    assert distance({path: 1.5 * delta for path, delta in arrays(adapter).items()}, arrays(made)) <= 1e-6
    wide = {group.name: {bond: 2 * size for bond, size in group.rank.items()} for group in adapter.plan.groups}
    assert made.relative_error == 0 and made.ranks_after == wide


@pytest.mark.parametrize("how", [{"rank": 2}, {"error": 0.2}], ids=str)
def test_a_sum_is_rounded_and_says_so(how, tmp_path):
    _, one = trained("lotr")
    _, two = trained("lotr")
    tiny.shake(two, seed=1)
    exact = {path: delta + arrays(two)[path] for path, delta in arrays(one).items()}
    made = combine([one.save(tmp_path / "one"), two], **how)
    assert made.relative_error == pytest.approx(distance(exact, arrays(made)), rel=1e-3)
    assert 0 < made.relative_error <= how.get("error", 1)


def plain(*axes):
    return ta.Spec(rules=(ta.Rule(name="a", axes=axes, start="nonzero", targets=QV),))


MIXED = {
    "groups": (lotr(), lora(), "differ in groups"),
    "sites": (lotr(targets=["query"], name="a"), lotr(targets=["value"], name="a"), "differ in the sites of group"),
    "networks": (plain("out", "in"), plain("in", "out"), "differ in the network of group"),
}


@pytest.mark.parametrize("case", MIXED)
def test_adapters_of_different_plans_have_no_sum(case):
    one, two, says = MIXED[case]
    with pytest.raises(AdapterError, match=f"adapters of different plans have no sum: they {says}"):
        combine([trained(spec=one)[1], trained(spec=two)[1]])


def test_heads_trained_beside_the_factors_have_no_sum():
    spec = lora(train=["classifier"])
    made = []
    for seed in (0, 1):
        adapter = ta.attach(tiny.bert_classifier(), spec)
        tiny.shake(adapter, seed=seed)
        made.append(adapter)
    with pytest.raises(AdapterError, match="differ in extra parameters"):
        combine(made)
    assert combine([made[0], made[0]]).as_saved().tensors.keys() == made[0].tensors().keys()


@pytest.mark.parametrize(
    ("count", "weights"), [(0, None), (2, [1.0]), (1, [float("nan")]), (2, [None, 1]), (2, ["a", "b"])]
)
def test_sums_of_nothing_are_refused(count, weights):
    adapter = trained("lora")[1]
    with pytest.raises(AdapterError, match="a sum needs adapters, and a finite weight for each"):
        combine([adapter] * count, weights)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (lambda a: (a,), "the adapters of a sum"),
        (lambda a: (a, a), "the adapters of a sum"),
        (lambda a: (a.as_saved(),), "the adapters of a sum"),
        (lambda a: ("adapter",), "the adapters of a sum"),
        (lambda a: ({"one": a, "two": a},), "the adapters of a sum"),
        (lambda a: ([a, a], 0.5), "the weights of a sum"),
        (lambda a: ([a, a], {0: 0.5, 1: 0.5}), "the weights of a sum"),
    ],
)
def test_one_thing_in_the_place_of_a_list_is_refused(given, what):
    with pytest.raises(AdapterError, match=rf"(?s){what} come as a list.*next: write ta.combine\(\["):
        combine(*given(trained("lora")[1]))


# -- what is refused, unharmed ------------------------------------------------------------------------------------

VERA = ta.preset("vera", rank=4, targets=QV)
BANK = ta.Spec(rules=(ta.Rule(format="network", network="site out a, a b, b in -> site out in", rank=2, shapes="slices",
                              targets=[*QV, "intermediate.dense"], start="nonzero"),))  # fmt: skip
LORA_XS = ta.preset("lora_xs", rank=2, targets=QV)
LOHA = ta.preset("loha", rank=2, targets=QV)
DOTA = ta.preset("dota", rank=3, folds="auto:2", targets=QV)
SHARED = ta.preset("mpo_shared", rank=3, targets=QV)


def cut(adapter):
    return truncate(adapter, rank=1)


REFUSED = {
    "frozen": (LORA_XS, cut, "^cannot truncate group 'layer0_query': its nodes A, B are frozen"),
    "frozen form": (LORA_XS, orthogonalize, "^cannot change the gauge of group .*are frozen, and must stay as drawn"),
    "frozen sum": (LORA_XS, lambda a: combine([a, a]), "^cannot add up group '"),
    "frozen growth": (LORA_XS, lambda a: resize(a, 3), "'A' is frozen"),
    "vera": (VERA, cut, "are frozen"),
    "bank": (BANK, cut, "slices of a bank that other groups use too"),
    "bank growth": (BANK, lambda a: resize(a, 3), "^cannot resize group .*slices of a bank"),
    "difference": (DOTA, cut, "a difference"),
    "difference form": (DOTA, orthogonalize, "a difference from a fr"),
    "smaller difference": (DOTA, lambda a: resize(a, 2), "a difference"),
    "product": (LOHA, cut, "no bond joins"),
    "product form": (LOHA, orthogonalize, "group '.*': a canonical form needs a tree"),
    "shared core": (SHARED, cut, "shared across the axis"),
    "shared centre": (SHARED, lambda a: orthogonalize(a, center="core_1"),
                      "'core_1' cannot be the centre: it is shared across the axis 'layer'"),
    "sum of products": (LOHA, lambda a: combine([a, a]), "needs bonds that join all"),
    "rank 0": (lotr(), lambda a: truncate(a, rank=0), "cannot have rank 0"),
    "rank True": (lotr(), lambda a: truncate(a, rank=True), "cannot have rank True"),
    "resize to 0": (lotr(), lambda a: resize(a, 0), "cannot have rank 0"),
    "no seed": (lotr(), lambda a: resize(a, 6, seed="x"), "a seed is an integer"),
    "no optimiser": (lotr(), lambda a: resize(a, 6, optimizer="adam"), "holds none of the factors"),
    "above the limit": (lotr(), lambda a: resize(a, {"out": 17}), "rank 17 of bond 'r_out' of gr"),
    "above a limit in a list": (SPECS["train"], lambda a: resize(a, [4, 99, 4]), "rank 99 of bond 'r_layer' of"),
    "no such bond": (lotr(), lambda a: truncate(a, rank={"layer": 2}), "has no bond 'layer'"),
    "list": (lotr(), lambda a: truncate(a, rank=[2]), "the list of ranks does not fit"),
    "two ways": (lotr(), lambda a: truncate(a, rank=2, error=0.1), "say in one way how far to truncate"),
    "no way": (lotr(), lambda a: truncate(a), "say in one way how far to truncate"),
    "error 1": (lotr(), lambda a: truncate(a, error=1.0), "a number from 0 up to 1"),
    "error nan": (lotr(), lambda a: truncate(a, error=float("nan")), "a number from 0 up to 1"),
    "budget 0": (lotr(), lambda a: truncate(a, max_parameters=0), "max_parameters is a positive integer"),
    "budget": (lotr(), lambda a: truncate(a, max_parameters=5), "the budget is below rank 1 on every bond"),
    "form": (lotr(), lambda a: orthogonalize(a, "qr"), "no form is called 'qr'"),
    "centre": (lotr(), lambda a: orthogonalize(a, center="heart"), "the centre 'heart' is no node"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(case):
    spec, attempt, says = REFUSED[case]
    _, adapter = trained(spec=spec)
    before = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    with pytest.raises((SpecError, RankError, AdapterError), match=says):
        attempt(adapter)
    assert tiny.same(before, adapter.tensors())


@pytest.mark.parametrize(("ranks", "name"), [({"out": 17}, "lotr"), ([99], "lora"), ([4, 99, 4], "train")])
def test_ranks_above_a_limit_are_answered_with_ranks_that_there_are(ranks, name):
    """What the next step says can be done, word for word."""
    _, adapter = trained(name)
    with pytest.raises(RankError) as said:
        resize(adapter, ranks)
    assert "excess" not in str(said.value)
    made = re.search(r"next: use rank=(\{.*\}), or one number", str(said.value))[1]
    assert set(resize(adapter, ast.literal_eval(made)).ranks_after) == set(adapter.groups)
    resize(adapter, 99)


@pytest.mark.parametrize("name", ["loha", "shared"])
def test_a_refused_form_shows_the_users_own_network(name):
    _, adapter = trained(spec={"loha": LOHA, "shared": SHARED}[name])
    with pytest.raises(SpecError) as said:
        orthogonalize(adapter, "hosvd")
    network = next(iter(adapter.groups.values())).diagram
    assert f"got: {network}" in str(said.value) and "stacked networks" not in str(said.value)


def test_a_message_names_its_group_once():
    _, adapter = trained(spec=BANK)
    (group, *_) = adapter.plan.groups
    with pytest.raises(SpecError) as said, named(group):
        require_own(group, "cannot turn")
    assert str(said.value).count(f"group {group.name!r}") == 1


@pytest.mark.parametrize(
    "attempt", [orthogonalize, cut, lambda a: resize(a, 5)], ids=["orthogonalize", "cut", "resize"]
)
def test_a_merged_adapter_is_not_changed(attempt):
    model, adapter = trained("lotr")
    adapter.merge()
    with pytest.raises(AdapterError, match=r"(?s)'default' is merged into the weights.*unmerge\(\) first"):
        attempt(adapter)
    adapter.unmerge()


ON_META = {
    "cut": cut,
    "error": lambda a: truncate(a, error=0.1),
    "narrower": lambda a: resize(a, 2),
    "wider": lambda a: resize(a, 6),
    "form": orthogonalize,
    "sum": lambda a: combine([a, a]),
    "saved": lambda a: cut(a.as_saved()),
}


@pytest.mark.parametrize("case", ON_META)
def test_factors_without_values_are_not_changed(case):
    with torch.device("meta"):
        model = tiny.bert()
    adapter = ta.attach(model, lotr())
    with pytest.raises(AdapterError, match="on the meta device"):
        ON_META[case](adapter)


def test_networks_without_a_truncation_can_still_grow_and_be_centred():
    """Rings, products and shared cores: wider bonds need no gauge."""
    for spec in (SHARED, LOHA):
        _, adapter = trained(spec=spec)
        before = arrays(adapter)
        resize(adapter, 4)
        assert distance(before, arrays(adapter)) <= 1e-7
    _, adapter = trained(spec=SHARED)
    before = arrays(adapter)
    for center in (None, "core_0", "core_2"):
        orthogonalize(adapter, center=center)
        assert distance(before, arrays(adapter)) <= 1e-6


def test_what_is_no_adapter_is_refused():
    with pytest.raises(AdapterError, match="this is no adapter"):
        truncate(nn.Linear(2, 2), rank=1)


def test_a_change_can_be_saved_and_loaded(tmp_path):
    _, adapter = trained("lotr")
    change = truncate(adapter.as_saved(), rank=2)
    assert isinstance(change, Change)
    again = ta.load(change.save(tmp_path), tiny.bert())
    assert distance(arrays(change.adapter), arrays(again)) == 0
    (path, *_) = deltas(again)
    torch.testing.assert_close(change.delta(path), again.delta(path))
    group = again.plan.groups[0]
    assert dense(group.diagram, again.factors(group.name)).shape[0] == len(group.paths)
