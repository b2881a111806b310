"""FSDP and tensor parallelism: two processes train, write and merge the adapter of one, or are told why they would not.

Two processes over gloo, started once.
"""

from functools import partial
from pathlib import Path

import peft
import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import tensoradapt as ta

RANKS, STEPS, ROWS = 2, 4, 8
SPEC = ta.preset("lotr_by_role", rank=3, targets=["query", "value"], train=["classifier"])  # a core of 2 x 3 x 3
PATHS = [f"bert.encoder.layer.{k}.attention.self.{role}" for k in (0, 1) for role in ("query", "value")]


def attached():
    model = tiny.bert_classifier()
    return model, ta.attach(model, SPEC)


def train(model, parameters, part: slice) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(STEPS):
        tokens = tiny.tokens(ROWS, 6, seed=step)[part]
        loss = model(input_ids=tokens, labels=tokens[:, 0] % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def sharded(model):
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.tokens()).logits.clone()


def refusal(call) -> str:
    try:
        call()
    except ta.TensorAdaptError as error:
        return str(error)
    return "not refused"


def with_ddp(rank: int, part: slice, folder: Path) -> dict:
    model, adapter = attached()
    train(DistributedDataParallel(model), adapter.parameters(), part)
    adapter.save(folder / f"DDP {rank}")
    return {}


def with_fsdp(rank: int, part: slice, folder: Path) -> dict:
    """Every reading after a step and after an evaluation, between which FSDP keeps some tensors whole."""
    model, adapter = attached()
    whole = sharded(model)
    train(whole, adapter.parameters(), part)
    found: dict = {}
    for when in ("step", "evaluation"):
        found[f"delta after a {when}"] = [adapter.delta(path).detach().clone() for path in PATHS]
        written = adapter.save(folder / f"FSDP {when} by {rank}")
        found[f"file after a {when}"] = written.parent.name
        export = ta.export_peft(adapter, folder / f"PEFT {when} by {rank}", extras=True)
        found[f"export after a {when}"] = export.path.name
        found[f"output after a {when}"] = run(whole)
    found["a file that cannot be written"] = refusal(
        lambda: adapter.save(folder / "FSDP step by 0" / "adapter.safetensors" / "x")
    )
    for keep in ("cpu", "same"):
        run(whole)
        adapter.merge(keep)
        found[f"merged, kept {keep}"] = run(whole)
        adapter.unmerge()
        found[f"unmerged, kept {keep}"] = run(whole)
    found["resized"] = refusal(lambda: ta.truncate(adapter, rank=2))
    group = next(iter(adapter.groups))
    node, values = next(iter(adapter.factors(group).items()))
    adapter.set_factors(group, {node: torch.full(values.shape, 0.5)})
    found["set"] = adapter.delta(PATHS[0]).detach().clone()
    adapter.set_factors(group, {node: torch.zeros(values.shape)})
    found["zero"] = adapter.delta(PATHS[0]).detach().clone()
    run(whole)
    found["still zero"] = adapter.delta(PATHS[0]).detach().clone()
    adapter.merge_and_detach()
    found["names left"] = [name for name, _ in model.named_parameters() if "tensoradapt" in name]
    return found


def refused(rank: int, part: slice, folder: Path) -> dict:
    found = {}
    model = tiny.bert_classifier()
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    found["layers sharded"] = refusal(lambda: ta.attach(model, SPEC))
    fully_shard(model)
    found["model sharded"] = refusal(lambda: ta.load(folder / "DDP 0", model))
    found["replicated"] = refusal(lambda: ta.attach(DistributedDataParallel(tiny.bert_classifier()), SPEC))
    for unused in (False, True):
        wrapper = DistributedDataParallel(tiny.bert_classifier(), find_unused_parameters=unused)
        adapter = ta.attach(wrapper.module, SPEC)
        found[f"attached when wrapped, unused {unused}"] = refusal(lambda: train(wrapper, adapter.parameters(), part))  # noqa: B023
        wrapper = DistributedDataParallel(wrapper.module, find_unused_parameters=unused)
        found[f"wrapped again, unused {unused}"] = refusal(lambda: train(wrapper, adapter.parameters(), part))  # noqa: B023
        ta.truncate(adapter, rank=1)
        found[f"truncated, unused {unused}"] = refusal(lambda: train(wrapper, adapter.parameters(), part))  # noqa: B023
        with adapter.disabled(), torch.no_grad():
            wrapper(input_ids=tiny.tokens())
    for kept in (False, True):
        flat = FullyShardedDataParallel(tiny.bert_classifier(), use_orig_params=kept, device_id=torch.device("cpu"))
        found[f"flattened, kept {kept}"] = refusal(lambda: ta.attach(flat.module, SPEC))  # noqa: B023
    model = tiny.bert_classifier()
    layers = "bert.encoder.layer.*.attention"
    plan = {f"{layers}.self.query": ColwiseParallel(), f"{layers}.output.dense": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    found["tensor parallel"] = refusal(lambda: ta.attach(model, SPEC))
    found["by rows"] = refusal(lambda: ta.attach(model, ta.preset("lora", rank=2, targets=["attention.output.dense"])))
    found["beside it"] = refusal(lambda: ta.attach(model, ta.preset("lora", rank=2, targets=["value"])))
    return found


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    each = ROWS // RANKS
    part = slice(rank * each, (rank + 1) * each)
    found: dict = {}
    for job in (with_ddp, with_fsdp, refused):
        found |= job(rank, part, Path(folder))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_write_and_merge_the_adapter_of_one(tmp_path: Path):
    mp.start_processes(one_of_two, (str(tmp_path),), nprocs=RANKS, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    model, adapter = attached()
    start = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    train(model, adapter.parameters(), slice(None))
    close = partial(torch.allclose, atol=1e-5)
    files = ["DDP 0", "DDP 1", "FSDP step by 0", "FSDP evaluation by 0"]
    for file in files:
        saved = ta.load(tmp_path / file, tiny.bert_classifier())
        for key, tensor in saved.tensors().items():
            assert close(tensor, adapter.tensors()[key]), (file, key)
            assert not close(tensor, start[key]), (file, key)
    adapted, plain = run(model), run(tiny.bert_classifier())
    for found in ranks:
        for when in ("step", "evaluation"):
            deltas = zip(found[f"delta after a {when}"], map(adapter.delta, PATHS), strict=True)
            assert all(type(a) is torch.Tensor and close(a, b) for a, b in deltas)
            assert found[f"file after a {when}"] == f"FSDP {when} by 0"
            assert found[f"export after a {when}"] == f"PEFT {when} by 0"
            assert close(found[f"output after a {when}"], adapted)
        assert "FSDP step by 0" in found["a file that cannot be written"]
        for keep in ("cpu", "same"):
            assert close(found[f"merged, kept {keep}"], adapted) and not close(adapted, plain)
            assert torch.equal(found[f"unmerged, kept {keep}"], found["output after a evaluation"])
        assert "sharded" in found["resized"]
        assert found["set"].any() and not found["zero"].any() and not found["still zero"].any()
        assert found["names left"] == []
        assert "wrapped by fully_shard" in found["layers sharded"] and "attach first" in found["model sharded"]
        assert "query is sharded, by tensor" in found["tensor parallel"] and "DTensor" in found["by rows"]
        assert "wrapped by DistributedDataParallel" in found["replicated"]
        assert found["beside it"] == "not refused"
        for which in (False, True):
            for when in ("attached when wrapped", "truncated"):
                assert "does not know the factors of adapter 'default'" in found[f"{when}, unused {which}"]
            assert found[f"wrapped again, unused {which}"] == "not refused"
            assert "wrapped by FullyShardedDataParallel" in found[f"flattened, kept {which}"]
    assert not list(tmp_path.glob("* by 1"))
    for when in ("step", "evaluation"):
        reader = peft.PeftModel.from_pretrained(tiny.bert_classifier(), tmp_path / f"PEFT {when} by 0")
        assert close(run(reader.eval()), adapted)


def test_factors_that_deepspeed_keeps_elsewhere_are_asked_for_in_words(tmp_path):
    """ZeRO-3 leaves an empty tensor in every parameter's place, with `ds_id` on it, between its uses."""
    for absent in ("base", "factors"):
        model, adapter = attached()
        calls = [adapter.merge]
        for parameter in model.bert.parameters() if absent == "base" else adapter.parameters():
            parameter.ds_id, parameter.data = 0, torch.empty(0)
        if absent == "factors":
            calls += [lambda: adapter.delta(PATHS[0]), adapter.to_tensorly, lambda: adapter.save(tmp_path / "a")]  # noqa: B023
            calls += [lambda: ta.export_peft(adapter, tmp_path / "a")]  # noqa: B023
        for call in calls:
            with pytest.raises(ta.AdapterError, match="has no values here(?s:.*)ZeRO-3(?s:.*)GatheredParameters"):
                call()
        assert not adapter.merged
    assert not (tmp_path / "a").exists()
