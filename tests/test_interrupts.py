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
        self.at, self.seen = at, []

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self.seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.seen) == self.at:
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, kind, error, trace):
        sys.settrace(None)
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
        assert len(lines.seen) == at
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
        assert not adapter.merged and right_or_refused(model, base, attached)
        if number % 2:
            merge(keep)(model)
            assert adapter.merged and same(model, expected)
        taken_back(model)
        assert not adapter.merged and same(model, base) and torch.equal(outputs(model), attached)


def test_a_merge_without_originals_is_ended(made, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK", 32)  # several blocks of rows in a weight
    expected, attached, halves = copy.deepcopy(made), outputs(made), 0
    merge(None)(expected)
    for model in interrupted(lambda: copy.deepcopy(made), merge(None)):
        adapter = adapter_of(model)
        assert not adapter.merged and right_or_refused(model, made, attached)
        if not same(model, made):
            halves += 1
            with pytest.raises(ta.AdapterError, match=r"was interrupted(?s:.*)merge\(keep=None\) goes on"):
                adapter.merge("cpu") if halves % 2 else adapter.unmerge()
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
