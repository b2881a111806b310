"""Trainers of several processes: two ranks over gloo train the adapter that one process trains."""

import os
import socket
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tensoradapt as ta

RANKS, STEPS, ROWS = 2, 4, 8
SPEC = ta.preset("lotr_by_role", rank=3, targets=["query", "value"], train=["classifier"])  # a core of 2 x 3 x 3


def train(model, parameters, part: slice) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(STEPS):
        tokens = tiny.tokens(ROWS, 6, seed=step)[part]
        loss = model(input_ids=tokens, labels=tokens[:, 0] % 3).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def wrapped(how: str, model):
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def rank_of_two(rank: int, how: str, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    model = tiny.bert_classifier()
    adapter = ta.attach(model, SPEC)
    each = ROWS // RANKS
    train(wrapped(how, model), adapter.parameters(), slice(rank * each, (rank + 1) * each))
    adapter.save(f"{folder}/{rank}")
    if how == "FSDP2":
        with pytest.raises(ta.AdapterError, match="sharded"):
            adapter.merge()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_two_processes_train_the_adapter_of_one(how, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(rank_of_two, (how, port, str(tmp_path)), nprocs=RANKS, start_method="spawn")
    model = tiny.bert_classifier()
    adapter = ta.attach(model, SPEC)
    start = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    train(model, adapter.parameters(), slice(None))
    for rank in range(RANKS):
        saved = ta.load(tmp_path / str(rank), tiny.bert_classifier())
        for key, tensor in saved.tensors().items():
            assert torch.allclose(tensor, adapter.tensors()[key], atol=1e-5), key
            assert not torch.allclose(tensor, start[key], atol=1e-5), key
