"""Several threads and tasks on one model: each computes what it would compute alone, and leaves the model as it was."""

import asyncio
import copy
import gc
import sys
import threading
import warnings
from contextlib import ExitStack
from functools import partial

import pytest
import tiny
import torch
from test_own_forward import Squashed
from torch import nn
from torch.nn.parallel import replicate
from torch.utils.checkpoint import checkpoint

import tensoradapt as ta
from tensoradapt.merged import Merge

X = tiny.noise(3, 8)


def together(*calls):
    """What each call returns in a thread of its own."""
    found = [None] * len(calls)

    def run(k, call):
        try:
            found[k] = call()
        except BaseException as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


class Meeting:
    """A place in a forward pass where so many threads wait for each other; nobody waits where there is one."""

    def __init__(self) -> None:
        self.barrier = None

    def __call__(self, *_: object) -> None:
        if self.barrier is not None:
            self.barrier.wait(60)

    def of(self, count):
        self.barrier = threading.Barrier(count)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.barrier = None

    def __deepcopy__(self, memo):
        return self


class Table(nn.Module):
    """A bare matrix, read after all threads are in the call, and again before any is out."""

    def __init__(self, meet):
        super().__init__()
        self.meet = meet
        self.table = nn.Parameter(tiny.noise(8, 8))

    def forward(self, x):
        self.meet()
        y = torch.tanh(x @ self.table)
        self.meet()
        return y @ self.table


class Again(Table):
    """The same, which calls itself."""

    def forward(self, x, depth=2):
        y = super().forward(x)
        return self(y, depth - 1) @ self.table if depth else y


class Named(Table):
    """One that asks for its parameters by name."""

    def forward(self, x):
        self.meet()
        (table,) = (p for name, p in self.named_parameters() if name == "table")
        self.meet()
        return x @ table + x @ self._parameters["table"]


class Model(nn.Module):
    """Deliveries by output, and by weight in three ways; a head that is trained whole."""

    def __init__(self, kind=Table, meet=None):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.inner = kind(meet or Meeting())
        self.own = Squashed(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.own(self.inner(self.first(x))))


TARGETS = ["first", "table", "own"]


def attach(model, targets=TARGETS, seed=0, name="default", **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = ta.attach(model, ta.preset("lora", rank=2, targets=targets, **more), name=name)
    tiny.shake(adapter, seed=seed)
    return adapter


KINDS = {"read twice": Table, "calls itself": Again, "by name": Named}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def kind(request):
    return request.param


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_threads_in_one_call_read_one_delta_each(kind, grad):
    meet = Meeting()
    model = Model(kind, meet)
    adapter = attach(model, train=["head"])
    parameters = dict(model.named_parameters())

    def call():
        with torch.set_grad_enabled(grad):
            y = model(X)
        if grad:
            return [y, *torch.autograd.grad(y.square().sum(), [*adapter.parameters()])]
        return [y]

    expected = call()
    with meet.of(3):
        found = together(call, call, call)
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))
    assert all(p is parameters[n] for n, p in model.named_parameters())


def test_a_module_that_calls_itself_adds_its_delta_once():
    model = Model(Again).eval()
    adapter = attach(model)
    attached = model(X)
    adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)


def test_a_copy_that_is_made_while_a_call_runs_is_whole(kind):
    meet = Meeting()
    model = Model(kind, meet).eval()
    attach(model)
    expected = model(X)
    with meet.of(2):

        def copied():
            meet()
            made = copy.deepcopy(model)
            meet()
            for _ in range(4 if kind is Again else 0):
                meet()
            return made

        _, made = together(partial(model, X), copied)
    assert torch.equal(made(X), expected)
    made.tensoradapt.default.detach()
    model.tensoradapt.default.detach()
    assert torch.equal(made(X), model(X)) and type(made.inner._parameters) is type(model.own._parameters) is dict


# -- the switch -------------------------------------------------------------------------------------------------------


def test_a_thread_that_leaves_a_block_does_not_switch_for_another():
    model = Model().eval()
    adapter = attach(model)
    on = model(X)
    inside, left = threading.Event(), threading.Event()

    def early():
        with adapter.disabled():
            inside.set()
            off = model(X)
        left.set()
        return off

    def late():
        inside.wait(60)
        with adapter.disabled():
            left.wait(60)
            assert not adapter.enabled
            return model(X)

    off, other = together(early, late)
    assert adapter.enabled and torch.equal(model(X), on)
    assert torch.equal(off, other) and not torch.allclose(off, on, atol=1e-3)


def test_a_block_switches_its_own_thread_alone(kind):
    meet = Meeting()
    model = Model(kind, meet).eval()
    adapter = attach(model, train=["head"])
    expected = []
    for off in (True, False):
        with ExitStack() as stack:
            if off:
                stack.enter_context(adapter.disabled())
            expected.append(model(X))

    def off():
        with adapter.disabled():
            return model(X)

    with meet.of(2):
        found = together(off, lambda: model(X))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_task_switches_itself_alone():
    model = Model().eval()
    adapter = attach(model)
    on = model(X)
    with adapter.disabled():
        off = model(X)

    async def switched(turn):
        with adapter.disabled():
            await turn.wait()
            return model(X)

    async def plain(turn):
        found = model(X)
        turn.set()
        return found

    async def both():
        turn = asyncio.Event()
        return await asyncio.gather(switched(turn), plain(turn))

    found = asyncio.run(both())
    assert torch.equal(found[0], off) and torch.equal(found[1], on)


def test_enabled_is_for_all_threads():
    model = Model().eval()
    adapter = attach(model)
    with adapter.disabled():
        off = model(X)
        adapter.enabled = True
        assert not adapter.enabled and torch.equal(model(X), off)
    adapter.enabled = False
    assert torch.equal(together(lambda: model(X))[0], off)
    adapter.enabled = True
    assert adapter.enabled and not torch.equal(model(X), off)


def test_a_block_that_is_left_elsewhere_says_so():
    adapter = attach(Model())
    with ExitStack() as stack:
        stack.enter_context(adapter.disabled())
        elsewhere = stack.pop_all()
        with pytest.raises(ta.AdapterError, match="left in another thread or task"):
            together(elsewhere.close)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first one first", "last one first"])
def test_generators_leave_their_blocks_in_any_order(order):
    model = Model().eval()
    adapter = attach(model)
    on = model(X)

    def stream():
        with adapter.disabled():
            yield

    streams = [stream(), stream()]
    for each in streams:
        next(each)
    streams[order[0]].close()
    assert not adapter.enabled
    streams[order[1]].close()
    assert adapter.enabled and torch.equal(model(X), on)


def test_a_generator_that_a_task_drops_leaves_it_on():
    model = Model().eval()
    adapter = attach(model)
    on = model(X)

    async def stream(closed):
        try:
            with adapter.disabled():
                while True:
                    yield model(X)
        finally:
            closed.set()

    async def request():
        closed = asyncio.Event()
        async for found in stream(closed):
            assert not torch.equal(found, on)
            break
        gc.collect()
        await asyncio.wait_for(closed.wait(), 60)  # what closes it is a task of its own
        return adapter.enabled, model(X)

    enabled, found = asyncio.run(request())
    assert enabled and torch.equal(found, on)


def test_replicas_of_data_parallel_are_switched_for_all_or_refused(monkeypatch):
    model = Model().eval()
    adapter = attach(model, ["first"])
    on = model(X)
    broadcast = lambda held, devices, *_, **options: [held for _ in devices]  # noqa: E731
    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", broadcast)

    def replicas():
        return together(*(partial(each, X) for each in replicate(model, [0, 1])))

    assert all(torch.equal(found, on) for found in replicas())
    with adapter.disabled():
        off = model(X)
        with pytest.raises(ta.AdapterError, match=r"threads of its own(?s:.*)adapter\.enabled = False"):
            replicas()
    adapter.enabled = False
    with adapter.disabled():
        assert all(torch.equal(found, off) for found in replicas())


# -- a server ---------------------------------------------------------------------------------------------------------


SERVED = {
    "a toy": (Model, TARGETS, lambda model: model(X), "inner"),
    "one that calls itself": (partial(Model, Again), TARGETS, lambda model: model(X), "first"),
    "experts": (
        tiny.mixtral,
        ["q_proj", "gate_up_proj", "down_proj", "gate"],
        lambda model: model(tiny.tokens(3, 9)).logits,
        "model.layers.0.mlp.experts",
    ),
    "tied": (tiny.gpt2, ["wte", "lm_head", "c_attn"], lambda model: model(tiny.tokens()).logits, "transformer.h.1"),
    "generation": (
        tiny.llama,
        ["embed_tokens", "v_proj", "lm_head"],
        lambda model: model.generate(tiny.tokens(1, 4), max_new_tokens=5, min_new_tokens=5, do_sample=False),
        "model.layers.0",
    ),
}


@pytest.mark.parametrize("delivery", ["", "weight"])
@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_a_server_with_an_adapter_for_each_thread(case, delivery):
    make, targets, call, where = case
    names = ["one", "two", "three", "four"]
    model, alone = make().eval(), [make().eval() for _ in names]
    for each in (model, *alone):
        each.requires_grad_(False)
    meet = Meeting()
    model.get_submodule(where).register_forward_pre_hook(meet)
    adapters = [attach(model, targets, k, name, delivery=delivery) for k, name in enumerate(names)]
    for k, each in enumerate(alone):
        attach(each, targets, k, delivery=delivery)

    def serve(mine):
        with ExitStack() as stack:
            for other in adapters:
                if other is not mine:
                    stack.enter_context(other.disabled())
            return [call(model) for _ in range(2)]

    with torch.no_grad():
        expected = [call(each) for each in alone]
        with meet.of(len(names)):
            found = together(*(partial(torch.no_grad()(serve), adapter) for adapter in adapters))
    for each, right in zip(found, expected, strict=True):
        assert all(torch.equal(y, right) for y in each)
    assert len({tuple(each.flatten().tolist()) for each in expected}) > 1
    assert all(adapter.enabled for adapter in adapters)


# -- parts that are computed again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("off", [True, False], ids=["pass off", "backward off"])
def test_what_is_computed_again_is_what_the_pass_computed(off, reentrant):
    class Checkpointed(Model):
        def forward(self, x):
            y = checkpoint(super().forward, x, use_reentrant=reentrant) if self.training else super().forward(x)
            return y.square().sum()

    gradients = []
    for checkpointed in (False, True):
        model = Checkpointed().train(checkpointed)
        adapter = attach(model)
        x = X.clone().requires_grad_()
        with ExitStack() as stack:
            if off:
                stack.enter_context(adapter.disabled())
            y = model(x)
        with ExitStack() as stack:
            if not off:
                stack.enter_context(adapter.disabled())
            y.backward()
        gradients.append([x.grad, *(p.grad for p in adapter.parameters())])
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None) and (one is None or torch.allclose(one, two, atol=1e-6))
    assert any(g is not None for g in gradients[0][1:]) != off


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_sum_that_was_formed_outside_is_formed_again_in_a_part(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = tiny.bert_classifier(3).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        adapter = attach(model, ["query"], delivery="weight")
        model(tiny.tokens()).logits.square().sum().backward()
        gradients.append([p.grad for p in adapter.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


# -- merging ----------------------------------------------------------------------------------------------------------


def test_a_model_is_not_written_while_a_pass_runs():
    meet = Meeting()
    model = Model(meet=meet).eval()
    adapter, other = attach(model), attach(model, seed=1, name="other")
    base, attached = tiny.base_of(model), model(X)

    def write():
        meet()
        said = []
        for act in (adapter.merge, other.merge, adapter.detach):
            with pytest.raises(ta.AdapterError, match="a forward pass of the model is running") as caught:
                act()
            said.append(caught)
        meet()
        return said

    with meet.of(2):
        y, said = together(lambda: model(X), write)
    assert len(said) == 3 and torch.equal(y, attached) and tiny.same(base, tiny.base_of(model))
    adapter.merge()
    assert torch.allclose(model(X), attached, atol=1e-5)
    adapter.unmerge()
    assert tiny.same(base, tiny.base_of(model))


def test_a_pass_waits_for_a_merge(monkeypatch):
    model = Model().eval()
    adapter = attach(model)
    attached, begun, tried = model(X), threading.Event(), threading.Event()
    run = Merge.run

    def slow(*args):
        begun.set()
        assert not tried.wait(0.2)
        run(*args)

    monkeypatch.setattr(Merge, "run", slow)

    def call():
        begun.wait(60)
        y = model(X)
        tried.set()
        return y

    _, y = together(adapter.merge, call)
    assert adapter.merged and torch.allclose(y, attached, atol=1e-5)


def test_two_threads_that_merge_do_it_one_after_the_other():
    for _ in range(5):
        model = Model().eval()
        one, two = attach(model), attach(model, seed=1, name="two")
        base, attached = tiny.base_of(model), model(X)
        together(one.merge, two.merge)
        assert one.merged and two.merged and torch.allclose(model(X), attached, atol=1e-5)
        for name in reversed(model.tensoradapt.merged):
            getattr(model.tensoradapt, name).unmerge()
        assert tiny.same(base, tiny.base_of(model))


# -- a pass that is interrupted ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_pass_that_is_interrupted_leaves_nothing(kind, error):
    model = Model(kind)
    adapter = attach(model)
    parameters, kept = dict(model.named_parameters()), []
    expected = model(X)

    def interrupt(module, args):
        raise error

    handle = model.inner.register_forward_pre_hook(interrupt)  # after the parameter is replaced
    for _ in range(2):
        with pytest.raises(error) as caught:
            model(X)
        kept.append(caught)  # with its stack
    handle.remove()
    assert all(p is parameters[n] for n, p in model.named_parameters())
    tiny.shake(adapter, seed=3)
    moved = model(X)
    assert not torch.allclose(moved, expected, atol=1e-3)
    adapter.merge()
    assert torch.allclose(model(X), moved, atol=1e-5)
