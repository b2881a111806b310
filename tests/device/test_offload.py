"""Offload by accelerate with a device to run on: factors stand where modules run, and the base's weights elsewhere."""

import pytest
import tiny
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from agreement import agree

import tensoradapt as ta

SPEC = ta.preset("lotr_by_role", rank=2, targets=["query", "value"])
PATH = "bert.encoder.layer.1.attention.self.value"


def whole(model, device, folder):
    return model.to(device)


def to_the_cpu(model, device, folder):
    return model if device == "cpu" else cpu_offload(model, device)


def to_disk(model, device, folder):
    return disk_offload(model, folder, device)


def split(model, device, folder):
    """By a map that knows nothing of adapters."""
    places = {"bert.embeddings": device, "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
    places |= {"bert.pooler": device, "classifier": device}
    return dispatch_model(model, places, main_device=device, offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("before", [False, True], ids=["offloaded, then attached", "attached, then offloaded"])
@pytest.mark.parametrize("place", [to_the_cpu, to_disk, split], ids=lambda place: place.__name__)
def test_an_offloaded_model_is_adapted_where_it_runs(place, before, device, tmp_path):
    def job(at: str):
        model = tiny.bert_classifier()
        where = whole if at == "cpu" else place
        model = model if before else where(model, at, tmp_path / "off")
        adapter = ta.attach(model, SPEC)
        tiny.shake(adapter)
        if before:
            where(model, at, tmp_path / "off")
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
        for step in range(2):
            optimizer.zero_grad()
            model(input_ids=tiny.tokens(seed=step).to(at)).logits.square().sum().backward()
            optimizer.step()
        places = {tensor.device.type for tensor in adapter.parameters()}
        assert "meta" not in places and (place is split or places == {torch.device(at).type})
        saved = ta.load(adapter.save(tmp_path / at), tiny.bert_classifier())
        return [adapter.delta(PATH), saved.delta(PATH), model(input_ids=tiny.tokens().to(at)).logits]

    agree(job, device)
