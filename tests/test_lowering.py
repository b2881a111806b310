"""Every way of lowering a network to a chain gives its dense delta, in values and in gradients."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from cases import BY_NAME, CASES, Case, dense, draw, pullback
from torch import nn
from truth import Truth, assert_close, candidates, gradients, line_of, random, tensors

import tensoradapt as ta
from tensoradapt import recipe as recipes
from tensoradapt.chain import staged
from tensoradapt.errors import SpecError
from tensoradapt.lower import chain, line, lower
from tensoradapt.lower import dense as whole

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
some_cases = pytest.mark.parametrize("case", CASES[::7], ids=lambda case: case.name)


@every_case
def test_every_candidate_is_the_dense_delta(case):
    """The chosen lowering is one of the candidates: `test_the_cheapest_candidate_is_chosen`."""
    group = case.groups()[-1]
    for placement in {placement.slots: placement for placement in group.placements}.values():
        truth = Truth(group, placement)
        for candidate in candidates(group, placement):
            truth.check(line_of(group, placement, candidate))


@every_case
def test_every_site_reads_its_own_coordinates(case):
    for group in case.groups():
        factors = draw(group.diagram)
        for placement in group.placements:
            made = lower(group, placement, tensors(factors, grad=False))
            assert_close(made.dense(), dense(group, factors, placement), placement.site.path)


@some_cases
def test_a_site_moves_only_the_factors_that_it_reads(case):
    """Rows of coordinates that no site has, the holes of the grid, get no gradient."""
    for group in case.groups():
        factors = draw(group.diagram)
        read = {node: np.zeros(value.shape, bool) for node, value in factors.items()}
        held = tensors(factors)
        total = sum(lower(group, placement, held).dense().sum() for placement in group.placements)
        for placement in group.placements:
            ones = np.ones(dense(group, factors, placement).shape)
            for node, grad in pullback(group, factors, placement, ones).items():
                read[node] |= grad != 0
        for node, grad in gradients(total, held).items():
            assert not grad[~read[node]].any(), node


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize(
    "case", [c for c in CASES[::5] if "conv" not in c.name and "slots" not in c.name], ids=lambda case: case.name
)
def test_a_tied_module_uses_the_tensor_the_other_way_round(case, kind):
    group = case.groups()[0]
    placement = group.placements[-1]
    truth, made = Truth(group, placement, kind, turned=True), line(group, placement, kind, transpose=True)
    for candidate in [made.recipe, *candidates(group, placement, kind, transpose=True)]:
        truth.check(replace(made, recipe=candidate))


@some_cases
def test_the_dense_tensor_of_a_group_holds_every_site(case):
    for group in case.groups():
        factors = draw(group.diagram)
        tensor = whole(group.diagram, tensors(factors, grad=False)).numpy()
        for placement in (p for p in group.placements if p.slots == (1, 1)):
            index = tuple(placement.index.get(axis, slice(None)) for axis in group.diagram.open)
            sides = [axis for axis in group.diagram.open if axis not in placement.index]
            order = [sides.index(part) for axis in ("out", "in", "kernel") for part in group.diagram.fold(axis)]
            site = tensor[index].transpose(order).reshape(placement.site.out, -1)
            assert_close(site, dense(group, factors, placement))


# -- which lowering is reached ------------------------------------------------------------------------------------

REACHED = {
    "wide-sandwich": lambda r: r.kind == "sandwich" and len(r.stages) == 2,
    "wide-middle": lambda r: r.kind == "sandwich" and len(r.stages) == 3,
    "wide-diagonal": lambda r: r.kind == "sandwich" and r.stages[1].diagonal,
    "wide-absorbed": lambda r: r.kind == "sandwich" and [len(s.weight.nodes) for s in r.stages] == [1, 2],
    "wide-stages": lambda r: r.kind == "stages" and r.stages[0].before > 1 and r.stages[1].after > 1,
    "wide-order": lambda r: r.kind == "stages" and r.order == (1, 0),
    "wide-einsum": lambda r: r.kind == "einsum" and not r.stages,
    "wide-dense": lambda r: r.kind == "dense" and len(r.stages) == 1,
    "wide-kernel": lambda r: r.kind == "stages" and [s.kernel for s in r.stages] == [False, True, False],
    "slots-core-r1": lambda r: r.kind == "sandwich" and len(r.stages) == 3,
    "embedding-r1": lambda r: r.kind == "dense",  # a table of fewer rows than a step has tokens
}


@pytest.mark.parametrize("name", REACHED)
def test_each_kind_of_lowering_is_chosen_where_it_pays(name):
    group = BY_NAME[name].groups()[0]
    made = group.recipe(group.placements[-1])
    assert REACHED[name](made), made


def test_the_table_forces_every_kind_on_many_cases():
    kinds = {"sandwich": 0, "stages": 0, "einsum": 0, "dense": 0}
    for case in CASES[::7]:
        group = case.groups()[0]
        for kind in {c.kind for c in candidates(group, group.placements[0])}:
            kinds[kind] += 1
    assert kinds["dense"] == len(CASES[::7]) and min(kinds.values()) > 20, kinds


def test_what_joins_the_sides_twice_is_absorbed_by_either():
    group = BY_NAME["bridge-r2"].groups()[0]
    made = [c for c in candidates(group, group.placements[0]) if c.kind == "sandwich"]
    assert [[len(s.weight.nodes) for s in c.stages] for c in made] == [[1, 2], [2, 1]]


def test_stages_make_their_axes_in_the_order_that_is_wanted():
    """The node is written `out_1 out_0 a`: its rows are made as `out_0 out_1`, so that nothing is transposed after."""
    group = BY_NAME["rolled-r2"].groups()[0]
    (made,) = [c for c in candidates(group, group.placements[0]) if c.kind == "stages"]
    assert made.order == ()


def test_the_cheapest_candidate_is_chosen():
    for case in CASES[::11]:
        for group in case.groups():
            placement = group.placements[0]
            cost = {c: c.cost * recipes.HANDICAP[c.kind] for c in candidates(group, placement)}
            assert cost[group.recipe(placement)] == min(cost.values())


# -- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("out", "inp", "rank"), [(48, 32, 1), (48, 32, 4), (200, 300, 7)])
def test_flops_of_lora_and_lotr(out, inp, rank):
    site = {"block.0.q": (out, inp)}
    lora = Case("", {"axes": ("out", "in"), "rank": rank}, site).plan()
    lotr = {
        "format": "tucker",
        "axes": ("site", "out", "in"),
        "compress": ("out", "in"),
        "rank": rank,
        "excess": "keep",
    }
    lotr = Case("", lotr, site).plan()
    assert lora.flops_per_token == 2 * rank * (out + inp)
    assert lotr.flops_per_token == 2 * rank * (out + inp + rank)
    formed = -(-2 * rank * out * inp // 1024)  # once in a step of 1024 tokens
    assert lora.dense_flops_per_token == 2 * out * inp + formed
    assert lotr.dense_flops_per_token == 2 * out * inp + -(-2 * rank * min(out, inp) * (rank + max(out, inp)) // 1024)


@pytest.mark.parametrize("preset", ["lora", "lotr", "lotr_by_role", "tt_lora", "lokr"])
@pytest.mark.parametrize("rank", [2, 8, 16, 200])
def test_no_lowering_costs_more_than_the_dense_product(preset, rank):
    """Where a rank is near the sides of a weight, the sandwich of two factors is more work than the delta itself."""
    for model in (tiny.bert(), tiny.gpt2(), tiny.mixtral(), {"layers.0.q_proj": (384, 384)}):
        for group in ta.plan(ta.preset(preset, rank=rank), model).groups:
            assert group.flops_per_token <= group.dense_flops_per_token, group.name


def test_a_lookup_multiplies_nothing_but_the_rank():
    """A row of the factor on the vocabulary's side is taken, and multiplied by the other: 2 r out."""
    tables = {"words": nn.Embedding(5000, 16), "kinds": nn.Embedding(2, 16)}
    plan = ta.plan(ta.preset("lora", rank=4, targets=["words", "kinds"]), nn.ModuleDict(tables))
    words, kinds = sorted(plan.groups, key=lambda group: -group.placements[0].site.inp)
    assert (words.lowering(words.placements[0]), kinds.lowering(kinds.placements[0])) == ("sandwich", "dense")
    assert words.flops_per_token == 2 * 4 * 16
    assert kinds.flops_per_token == 1  # formed once in a step of 1024 tokens: 2 x 2 x 2 x 16 operations


def test_the_head_that_is_tied_to_an_embedding_multiplies():
    model = tiny.gpt2()
    alone = ta.plan(ta.preset("lora", rank=2, targets=["wte"]), model)
    both = ta.plan(ta.preset("lora", rank=2, targets=["wte", "lm_head"]), model)
    assert alone.flops_per_token == -(-2 * 2 * 16 * tiny.WORDS // 1024)  # fewer rows than a step has tokens
    assert both.flops_per_token == alone.flops_per_token + 2 * 2 * (16 + tiny.WORDS)
    assert ta.Plan.from_dict(both.to_dict()).flops_per_token == both.flops_per_token


def test_weights_that_are_formed_at_use_cost_their_forming():
    """Experts: the delta is added to the weight, which is multiplied with or without it."""
    plan = ta.plan(ta.preset("lora", rank=2, targets=["down_proj"]), tiny.mixtral())
    assert plan.flops_per_token == plan.num_sites * -(-2 * 2 * 16 * 24 // 1024)


def test_flops_of_stages_and_of_a_difference():
    folds = {"out": [6, 4], "in": [6, 6]}
    kron = {"format": "ttm", "axes": ("out", "in"), "folds": folds, "rank": 1}
    site = {"block.0.q": (24, 36)}
    # W2 (4 x 6) on each of 6 rows, then W1 (6 x 6) on each of 4 columns
    assert Case("", kron, site).plan().flops_per_token == 2 * (6 * 4 * 6 + 6 * 6 * 4)
    assert Case("", {**kron, "start": "difference"}, site).plan().flops_per_token == 3 * 2 * (6 * 4 * 6 + 6 * 6 * 4)


def test_flops_of_a_convolution_count_each_position_once():
    group = BY_NAME["wide-kernel"].groups()[0]
    assert group.recipe(group.placements[0]).flops == 2 * (2 * 36 + 2 * 18 + 24 * 2)


# -- differences, dtypes, dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES[::3], ids=lambda case: case.name)
def test_a_difference_is_the_delta_minus_its_start(case):
    group = case.groups()[0]
    placement = group.placements[-1]
    truth = Truth(group, placement, difference=True)
    start = tensors(draw(group.diagram, 5), grad=False)
    for candidate in candidates(group, placement):
        made = line_of(group, placement, candidate)
        truth.check(made)
        assert not chain(made, start, start)(truth.x, truth.step).any(), candidate.kind


def test_a_small_difference_loses_no_digits():
    """N(theta) - N(theta0) subtracted in float32 would keep two digits of a step this small; the product rule all."""
    group = BY_NAME["wide-stages"].groups()[0]
    placement = group.placements[0]
    begun = draw(group.diagram)
    now = {node: value + 1e-5 * np.sign(value) for node, value in begun.items()}
    start32 = {node: torch.from_numpy(value).float() for node, value in begun.items()}
    now32 = {node: torch.from_numpy(value).float() for node, value in now.items()}
    exact = dense(group, {n: t.double().numpy() for n, t in now32.items()}, placement)
    exact -= dense(group, {n: t.double().numpy() for n, t in start32.items()}, placement)
    found = chain(line(group, placement), now32, start32).dense().double().numpy()
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


@some_cases
def test_a_chain_is_cast_to_the_dtype_it_is_asked_for(case):
    group = case.groups()[0]
    placement = group.placements[-1]
    factors = tensors(draw(group.diagram))
    made = chain(line(group, placement), factors, like=torch.empty(0, dtype=torch.float32))
    assert {weight.dtype for weight in made.weights} == {torch.float32}
    expected = dense(group, draw(group.diagram), placement)
    np.testing.assert_allclose(made.dense().detach(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_dropout_at_the_code_acts_between_the_core_and_out():
    """With every code but the dropped one intact, the output is a sum of columns of the last factor."""
    rule = {"format": "tucker", "axes": ("site", "out", "in"), "compress": ("out", "in"), "rank": 3}
    group = Case("", {**rule, "dropout": 0.5, "dropout_at": "code"}).groups()[0]
    placement = group.placements[0]
    factors = draw(group.diagram)
    x = torch.ones(1, 4, dtype=torch.float64)
    code = factors["core"][0] @ (factors["factor_in"].T @ x[0].numpy())
    kept = {tuple(np.round(factors["factor_out"] @ (2 * code * mask), 9)) for mask in np.ndindex(2, 2, 2)}
    torch.manual_seed(0)
    made = lower(group, placement, tensors(factors))
    found = {tuple(np.round(made(x, staged, 0.5).detach().numpy()[0], 9)) for _ in range(200)}
    assert found == kept


@pytest.mark.parametrize("name", ["wide-dense", "wide-einsum", "wide-stages"])
def test_dropout_at_the_code_is_refused_where_there_is_no_code(name):
    case = BY_NAME[name]
    rule = {**case.rule, "dropout": 0.1, "dropout_at": "code"}
    group = replace(case, rule=rule).groups()[0]
    with pytest.raises(SpecError, match="code"):
        group.recipe(group.placements[0])
    with pytest.raises(SpecError, match="dropout_at: in"):
        line(group, group.placements[0])


def test_dropout_at_the_code_keeps_the_code_where_dense_would_be_cheaper():
    rule = {"axes": ("out", "in"), "rank": 4, "dropout": 0.1, "dropout_at": "code"}
    group = Case("", rule).groups()[0]
    assert group.recipe(group.placements[0]).kind == "sandwich"
    without = Case("", {**rule, "dropout": 0.0}).groups()[0]
    assert without.recipe(without.placements[0]).kind == "dense"


GRADCHECKED = ("tt-layer-in-out-role-r2", "tucker-heads-r2", "cp-heads-r2", "ttm2-layer-out-in-r2", "gates-r1")


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name):
    group = BY_NAME[name].groups()[0]
    placement = group.placements[-1]
    held = tensors(draw(group.diagram))
    x = random(1, 1, placement.site.inp).requires_grad_()
    for candidate in candidates(group, placement):
        made = line_of(group, placement, candidate)

        def apply(x, *values, made=made):
            return chain(made, dict(zip(held, values, strict=True)))(x)

        assert torch.autograd.gradcheck(apply, (x, *held.values())), candidate.kind
