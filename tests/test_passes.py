"""A delivery that did not happen is told: at the first backward pass, at save and at merge, and by a dry run."""

import copy
import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers
from test_readers import Both, Hidden, Host, Reads, X, hosted
from torch import nn

import tensoradapt as ta


class Sometimes(Hidden):
    """Read past in training alone."""

    def forward(self, x):
        return super().forward(x) if self.training else self.child(x)


class Kept(Reads):
    """Called, and read past as well."""

    def forward(self, x):
        return F.linear(self.child(x), weights(self)[0])


def weights(module):
    return [p for name, p in module.named_parameters() if name == "child.weight"]


def attach(model, targets=("child",), **fields):
    return ta.attach(model, ta.preset("lora", rank=2, targets=targets, **fields))


PAST = "another module reads weights(?s:.*)inner.child(?s:.*)delivery='weight'"


@pytest.mark.parametrize("targets", [["child"], ["child", "first"]], ids=["alone", "with others"])
def test_a_weight_that_is_read_past_is_an_error_at_backward_save_and_merge(targets, tmp_path):
    model = hosted(Hidden)
    adapter = attach(model, targets)
    adapter.save(tmp_path / "fresh")
    y = model(X)
    with pytest.raises(ta.AdapterError, match=PAST):
        y.square().sum().backward()
    with pytest.raises(ta.AdapterError, match=PAST):
        model(X).sum().backward()
    with pytest.raises(ta.AdapterError, match=PAST):
        adapter.save(tmp_path / "trained")
    with pytest.raises(ta.AdapterError, match=PAST):
        adapter.merge()
    assert not adapter.merged and not (tmp_path / "trained").exists()
    adapter.detach()
    attach(model, targets, delivery="weight")
    model(X).sum().backward()


def test_a_pass_without_gradients_is_enough_for_a_merge_to_be_refused():
    model = hosted(Hidden).eval()
    adapter = attach(model)
    with torch.no_grad():
        model(X)
    with pytest.raises(ta.AdapterError, match=PAST):
        adapter.merge()


def test_training_is_watched_after_evaluation():
    model = hosted(Sometimes).eval()
    adapter = attach(model)
    model(X).sum().backward()
    model.train()
    with pytest.raises(ta.AdapterError, match=PAST):
        model(X).sum().backward()
    adapter.detach()
    assert torch.isfinite(model(X)).all()


def test_a_weight_that_is_called_and_read_past_is_one_too():
    model = hosted(Kept)
    attach(model)
    with pytest.raises(ta.AdapterError, match=PAST):
        model(X[0]).sum().backward()


class Structured(Host):
    """An output of several parts."""

    def forward(self, x):
        return {"loss": super().forward(x).square().mean(), "rest": [x, None]}


class Opaque(Host):
    """An output that no one can look into."""

    def forward(self, x):
        return type("Output", (), {"y": super().forward(x)})()


def test_outputs_of_several_parts_are_watched_and_others_are_refused_at_once():
    structured, opaque = Structured(Hidden()), Opaque(Hidden())
    attach(structured)
    loss = structured(X)["loss"]
    with pytest.raises(ta.AdapterError, match=PAST):
        loss.backward()
    attach(opaque)
    with pytest.raises(ta.AdapterError, match=PAST):
        opaque(X)


class Experts(nn.Module):
    """Experts, of which one gets no token."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, x):
        return self.experts[0](x) + self.experts[2](x)


def test_what_a_model_skips_is_named_once(tmp_path):
    model = hosted(Experts)
    adapter = attach(model, ["re:.*experts.*"])
    with pytest.warns(UserWarning, match=r"has reached 1 of 3 sites(?s:.*)inner\.experts\.1\.") as caught:
        model(X).sum().backward()
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X).sum().backward()
        adapter.save(tmp_path)
        adapter.merge()


WELL = [
    (hosted(Both), (X,)),
    (tiny.bert_classifier(), (tiny.tokens(),)),
    (tiny.gpt2(), (tiny.tokens(),)),
    (tiny.llama(), (tiny.tokens(),)),
    (tiny.mixtral(), (tiny.tokens(3, 9),)),
    (nn.Linear(8, 8), (X,)),
    (
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Conv2d(4, 4, 1)),
        (tiny.noise(1, 3, 5, 5),),
    ),
]


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_all_is_well(tmp_path):
    for model, inputs in WELL:
        targets = ["c_attn", "c_proj"] if hasattr(model, "transformer") else ["re:.*"]
        adapter = ta.attach(model.train(), ta.preset("lora", rank=1, targets=targets))
        for _ in range(3):
            found = model(*inputs)
            (found if torch.is_tensor(found) else next(iter(found.values()))).sum().backward()
        assert adapter.passes.settled == {True}
        adapter.save(tmp_path)
        adapter.merge()


@pytest.mark.filterwarnings("ignore:.*is tied to")
@pytest.mark.filterwarnings("error:no forward pass")
def test_a_tied_weight_that_its_other_module_uses_is_not_read_past():
    model = tiny.gpt2().train()
    attach(model, ["wte"])
    model(tiny.tokens()).logits.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_deliver_once_for_every_reading(reentrant):
    model = tiny.llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["q_proj", "embed_tokens"]))
    for _ in range(2):
        model(tiny.tokens()).logits.sum().backward()
    assert not adapter.passes.past and not adapter.passes.unreached


def test_two_adapters_on_one_weight_are_watched_apart():
    model = hosted(Reads)
    for name, delivery in (("one", ""), ("two", "weight")):
        ta.attach(model, ta.preset("lora", rank=1, targets=["first", "child"], delivery=delivery), name=name)
    model(X).sum().backward()


# -- the dry run ------------------------------------------------------------------------------------------------------


class Keyword(Host):
    def forward(self, x, scale=1.0):
        return super().forward(x) * scale


@pytest.mark.parametrize("batch", [X, (X,), [X, 2.0], {"x": X, "scale": 2.0}], ids=["tensor", "tuple", "list", "dict"])
def test_a_dry_run_says_what_it_reaches_and_changes_nothing(batch):
    torch.manual_seed(0)
    model = Keyword(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(5), Hidden())).train()
    model.inner[2].eval()
    adapter = attach(model, ["first", "child", "last"])
    before = copy.deepcopy(model.state_dict())
    state = torch.random.get_rng_state()
    found = adapter.check(batch)
    assert found.reached == ("first", "last") and found.unreached == ("inner.2.child",) == found.past
    assert "2 of 3 sites reached" in str(found) and "inner.2.child" in str(found) and "delivery='weight'" in str(found)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and not model.inner[2].training and model.inner[0].training
    assert tiny.same(before, model.state_dict())
    assert adapter.check(batch, train=True, grad=True).reached == ("first", "last")
    assert tiny.same(before, model.state_dict())


@pytest.mark.parametrize(("make", "reached"), [(Hidden, True), (Reads, True), (Experts, False)])
def test_a_dry_run_of_deliveries_by_weight_asks_whether_they_are_read(make, reached):
    model = hosted(make)
    adapter = attach(model, ["re:.*(child|experts.1)"], delivery="weight")
    found = adapter.check(X)
    assert bool(found.reached) == reached != bool(found.unreached) and not found.past


def test_a_dry_run_needs_an_adapter_that_adds():
    model = hosted(Reads)
    adapter = attach(model)
    adapter.merge()
    with pytest.raises(ta.AdapterError, match="merged or switched off"):
        adapter.check(X)


def test_a_dry_run_on_half_of_a_model():
    model = tiny.t5()
    adapter = ta.attach(model, ta.preset("lora", rank=1, targets=["q", "wi"]))
    found = adapter.check({"input_ids": tiny.tokens(), "decoder_input_ids": tiny.tokens()})
    assert len(found.reached) == adapter.plan.num_sites and not found.unreached
    states = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=tiny.noise(2, 5, 16))
    found = adapter.check({"encoder_outputs": states, "decoder_input_ids": tiny.tokens()})
    assert found.unreached and all(path.startswith("encoder.") for path in found.unreached)


def test_functional_readers_of_a_compiled_model_are_left_alone():
    model = hosted(Both)
    adapter = attach(model)
    compiled = torch.compile(model, backend="eager")
    compiled(X).sum().backward()
    assert F.linear(X, torch.eye(8)).shape == X.shape and not adapter.passes.settled
