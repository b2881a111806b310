"""Changes of whole adapters, and fits of tensors: on a device what they are on the CPU."""

import pytest
import torch
from agreement import agree
from tiny import noise, shake
from toys import Toy

import tensoradapt as ta

PRESETS = {"lora": {"rank": 4}, "lotr": {"rank": 4}, "lorta": {"rank": 4, "heads": 4}}
EDITS = {
    "truncate to a rank": lambda adapter: ta.truncate(adapter, rank=2),
    "truncate to an error": lambda adapter: ta.truncate(adapter, error=0.5),
    "truncate to a budget": lambda adapter: ta.truncate(adapter, max_parameters=adapter.plan.num_trainable * 3 // 4),
    "resize up": lambda adapter: ta.resize(adapter, 6),
    "resize down": lambda adapter: ta.resize(adapter, 2),
    "canonical": lambda adapter: ta.orthogonalize(adapter),
    "balanced": lambda adapter: ta.orthogonalize(adapter, "balanced"),
    "combine": lambda adapter: ta.combine([adapter, adapter.as_saved()], [0.5, 0.25]),
    "combine to a rank": lambda adapter: ta.combine([adapter, adapter.as_saved()], [0.5, 0.25], rank=3),
    "tensorly": lambda adapter: adapter.to_tensorly(),
    "convert": lambda adapter: ta.convert(adapter, ta.preset("lotr", rank=3, targets=["q_proj", "v_proj"])),
}


def edited(adapter, found):
    """The deltas that an edit left, on the adapter or in memory, and its error."""
    held = getattr(found, "adapter", None) or getattr(found, "saved", None) or adapter
    paths = [path for group in held.plan.groups for path in group.paths]
    return {path: held.delta(path) for path in paths}, float(getattr(found, "relative_error", 0.0))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_gives_the_deltas_of_the_cpu(device, edit, preset):
    def job(at):
        model, x = Toy(layers=2).to(at), noise(2, 5, 12).to(at)
        adapter = ta.attach(model, ta.preset(preset, targets=["q_proj", "v_proj"], **PRESETS[preset]))
        shake(adapter)
        try:
            made = edited(adapter, EDITS[edit](adapter))
        except ta.TensorAdaptError as error:
            return {"refused": str(error).partition("\n")[0]}
        assert {t.device.type for t in adapter.tensors().values()} == {at}
        return made, model(x)

    agree(job, device, tolerance=2e-3)


FITS = {
    "tucker": {"rank": {"out": 3, "in": 3}},
    "tucker to an error": {"error": 0.6},
    "tucker of layers too": {"rank": 2},
    "tt": {"rank": 3},
    "tt to an error": {"error": 0.5},
    "tt within parameters": {"max_parameters": 120},
    "cp": {"rank": 3},
    "ttm": {"rank": 2, "folds": {"in": [2, 4], "out": [4, 3]}},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FITS)
def test_a_fit_is_as_good_as_on_the_cpu(device, name, dtype):
    def job(at):
        tensor = noise(3, 12, 8).to(dtype).to(at)
        fit = ta.fit(tensor, name.split()[0], axes=("layer", "out", "in"), **FITS[name])
        assert {t.device.type for t in fit.factors.values()} == {at}
        error = (fit.dense().float().reshape(tensor.shape) - tensor.float()).norm() / tensor.float().norm()
        return float(fit.relative_error), float(error), sorted(fit.diagram.sizes.items())

    agree(job, device, tolerance=2e-3)


@pytest.mark.parametrize("form", ["tucker", "cp", "tt"])
def test_a_stack_of_slices_is_fitted_on_the_asked_device(device, form):
    def job(at):
        slices = [noise(12, 8, seed=k).to("cpu" if at == "cpu" else at) for k in range(4)]
        held = ta.fit(slices, form, axes=("layer", "out", "in"), rank=2)
        asked = ta.fit([s.cpu() for s in slices], form, axes=("layer", "out", "in"), rank=2, device=at)
        assert {t.device.type for t in (*held.factors.values(), *asked.factors.values())} == {at}
        return float(held.relative_error), float(asked.relative_error)

    agree(job, device, tolerance=2e-3)
