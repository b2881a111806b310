"""Ctrl-C after any line: what was interrupted has not happened, or is ended by the next call, and nothing is lost."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt import merging

SOURCE = str(Path(ta.__file__).parent)
X = tiny.noise(3, 8)


class Model(nn.Module):
    """A weight of every delivery, one with row ranges, one that is tied, and a head that is trained whole."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 8)
        self.plain, self.fused = nn.Linear(8, 8), nn.Linear(8, 12)
        self.experts = nn.Parameter(tiny.noise(3, 8, 8))
        self.out = nn.Linear(8, 9, bias=False)
        self.out.weight = self.words.weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = torch.tanh(self.plain(x))
        q, _, v = self.fused(y).split([4, 4, 4], -1)
        y = torch.stack([torch.tanh(y @ w.mT) for w in self.experts]).sum(0) + torch.cat((q, v), -1)
        return self.head(y), self.out(y), self.words(y.argmax(-1))


FIELDS = {"targets": ["plain", "fused[q]", "fused[v]", "experts", "out"], "train": ["head"]}
FIELDS |= {"parts": {"fused": {"q": 4, "k": 4, "v": 4}}}


def spec(**more):
    return ta.preset("lora", rank=2, **FIELDS, **more)


@pytest.fixture
def made():
    """A model with an adapter that moves it; copies of both come from copying the model."""
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tie
        adapter = ta.attach(model, spec())
    tiny.shake(adapter)
    return model


def outputs(model):
    with torch.no_grad():
        return torch.cat([y.flatten() for y in model(X)])


class Lines:
    """The lines of the library that run in a block; KeyboardInterrupt is raised in the place of one of them."""

    def __init__(self, at: int = -1) -> None:
        self.at, self.left, self.seen = at, at, []

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        return self.note if self.at < 0 else self.count

    def note(self, frame, event, arg):
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
        return self.note

    def count(self, frame, event, arg):
        """What runs for every line of every run: no more than a number."""
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.count

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
        torch.set_grad_enabled(True)  # no real interrupt comes between the end of a block and its `__exit__`
        return kind is KeyboardInterrupt


def interrupted(make, act):
    """Models on which `act` was interrupted: at the first and the last time that each of its lines runs."""
    for _ in range(2):  # what is computed once is kept
        model = make()
        with Lines() as lines:
            act(model)
    times = {}
    for at, line in enumerate(lines.seen, 1):
        times.setdefault(line, []).append(at)
    assert len(times) > 10
    for at in sorted({each[k] for each in times.values() for k in (0, -1)}):
        model = make()
        with Lines(at) as lines:
            act(model)
        assert lines.left == 0
        yield model


def adapter_of(model):
    return model.tensoradapt.default


def same(one, two):
    """Whether two models hold the same numbers, bit for bit, with the same ties."""
    a, b = ({n: p for n, p in m.named_parameters(remove_duplicate=False) if "tensoradapt" not in n} for m in (one, two))
    ties = [{(n, k) for n, p in each.items() for k, q in each.items() if p is q} for each in (a, b)]
    return ties[0] == ties[1] and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def right_or_refused(model, base, attached):
    """Whether a model that is not merged computes what it did on its base, or nothing on what is half of one."""
    try:
        return torch.equal(outputs(model), attached) and same(model, base)
    except ta.AdapterError as error:
        return "was interrupted" in str(error)


def merge(keep):
    return lambda model: adapter_of(model).merge(keep, untie=True)


def unmerge(model):
    adapter_of(model).unmerge()


def taken_back(model):
    """The model, unmerged."""
    try:
        unmerge(model)
    except ta.AdapterError as error:
        assert "is not merged" in str(error)
    return model


@pytest.mark.parametrize("keep", ["cpu", "same"])
def test_a_merge_is_undone_or_can_be(made, keep):
    base, attached = copy.deepcopy(made), outputs(made)
    expected = copy.deepcopy(made)
    merge(keep)(expected)

    for number, model in enumerate(interrupted(lambda: taken_back(made), merge(keep))):
        adapter = adapter_of(model)
        assert same(model, expected) if adapter.merged else right_or_refused(model, base, attached)
        if number % 2 and not adapter.merged:
            merge(keep)(model)
            assert adapter.merged and same(model, expected)
        taken_back(model)
        assert not adapter.merged and same(model, base) and torch.equal(outputs(model), attached)


REFUSED = [
    lambda adapter: adapter.merge("cpu"),
    lambda adapter: adapter.unmerge(),
    lambda adapter: setattr(adapter, "scale", 2.0),
    lambda adapter: adapter.set_factors("plain", adapter.factors("plain")),
    lambda adapter: ta.truncate(adapter, rank=1),
    lambda adapter: ta.initialize(adapter, "pissa"),
]


def test_a_merge_without_originals_is_ended(made, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK", 32)  # several blocks of rows in a weight
    expected, attached, halves = copy.deepcopy(made), outputs(made), 0
    merge(None)(expected)
    for model in interrupted(lambda: copy.deepcopy(made), merge(None)):
        adapter = adapter_of(model)
        assert same(model, expected) if adapter.merged else right_or_refused(model, made, attached)
        if not adapter.merged and not same(model, made):
            halves += 1
            with pytest.raises(ta.AdapterError, match=r"was interrupted(?s:.*)merge\(keep=None\) goes on"):
                REFUSED[halves % len(REFUSED)](adapter)
        if not adapter.merged:
            merge(None)(model)
        assert adapter.merged and same(model, expected)
    assert halves > 10


def test_an_unmerge_goes_on(made):
    base, attached = copy.deepcopy(made), outputs(made)
    merge("cpu")(made)
    whole = copy.deepcopy(made)

    def fresh():
        if not adapter_of(made).merged:
            merge("cpu")(made)
        return made

    for number, model in enumerate(interrupted(fresh, unmerge)):
        adapter = adapter_of(model)
        assert same(model, whole) if adapter.merged else right_or_refused(model, base, attached)
        if number % 2:
            fresh()
            assert adapter.merged and same(model, whole)
        taken_back(model)
        assert not adapter.merged and same(model, base) and torch.equal(outputs(model), attached)


# -- attaching, detaching, and changing the factors -------------------------------------------------------------------


def trace_of(model):
    """What an adapter may leave on a model: hooks, frozen parameters, other tables, modules, attributes."""
    return [
        (
            type(m._parameters),
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs),
            len(m._forward_hooks_always_called),
            [*m._modules],
            [p.requires_grad for p in m.parameters(recurse=False)],
        )
        for m in model.modules()
    ]


def bare():
    model = Model()
    model.head.weight.requires_grad = False
    return model


def quietly(act):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return act()


@pytest.mark.parametrize("way", ["attach", "load"])
def test_what_is_not_attached_leaves_no_trace(way, tmp_path):
    quietly(lambda: ta.attach(Model(), spec())).save(tmp_path)
    acts = {"attach": lambda model: ta.attach(model, spec()), "load": lambda model: ta.load(tmp_path, model)}
    clean, before = trace_of(bare()), outputs(bare())
    for model in interrupted(bare, acts[way]):
        if hasattr(model, "tensoradapt"):  # the last line has run
            adapter_of(model).detach()
        assert trace_of(model) == clean and torch.equal(outputs(model), before)


def test_a_detach_is_ended():
    clean, before = trace_of(bare()), outputs(bare())

    def adapted():
        model = bare()
        tiny.shake(quietly(lambda: ta.attach(model, spec())))
        return model

    attached = outputs(adapted())
    for model in interrupted(adapted, lambda model: adapter_of(model).detach()):
        if hasattr(model, "tensoradapt"):
            assert torch.equal(outputs(model), attached)
            adapter_of(model).detach()
        assert trace_of(model) == clean and torch.equal(outputs(model), before)


class Plain(nn.Module):
    """One matrix."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 8)

    def forward(self, x):
        return self.plain(x)


CHANGES = {
    "set_factors": lambda model: adapter_of(model).set_factors(
        "plain", {node: torch.ones_like(t) for node, t in adapter_of(model).factors("plain").items()}
    ),
    "truncate": lambda model: ta.truncate(adapter_of(model), rank=1, optimizer=model.optimizer[0]),
    "initialize": lambda model: ta.initialize(adapter_of(model), "pissa"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_factors_is_whole_or_none(change):
    def adapted():
        torch.manual_seed(0)
        model = Plain()
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=["plain"]))
        tiny.shake(adapter)
        model.optimizer = [torch.optim.Adam(adapter.parameters())]
        model(X).square().sum().backward()
        model.optimizer[0].step()
        return model

    def numbers(model):
        adapter, (optimizer,) = adapter_of(model), model.optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in adapter.parameters() if p.requires_grad]
        states = [optimizer.state.get(p, {}).get("exp_avg") for p in held]
        return [*adapter.tensors().values(), adapter.delta("plain"), model(X), *(s for s in states if s is not None)]

    before, after = numbers(adapted()), adapted()
    change(after)
    after = numbers(after) if change is not CHANGES["initialize"] else [*adapter_of(after).tensors().values()]
    alike = lambda one, two: all(map(torch.equal, one, two))  # noqa: E731
    for model in interrupted(adapted, change):
        tensors = [*adapter_of(model).tensors().values()]
        assert alike(tensors, after) or alike(numbers(model), before)
