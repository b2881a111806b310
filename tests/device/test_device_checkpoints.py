"""What is made of checkpoints and files, computed on a device: what it is on the CPU."""

import copy

import pytest
import torch
from agreement import agree
from tiny import bert, noise, shake, tokens

import tensoradapt as ta

QV = ["query", "value"]


def sides(dtype=torch.float32, size=0.05):
    """A model, and the same with changes of rank 2 and a little of full rank in every matrix."""
    base = bert().to(dtype)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for k, p in enumerate(p for p in tuned.parameters() if p.dim() == 2):
            low = noise(len(p), 2, seed=k) @ noise(2, p.shape[1], seed=k + 99)
            p.add_((size * low + 0.1 * size * noise(*p.shape, seed=k)).to(dtype))
    return base, tuned


def folders(base, tuned, tmp_path):
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
    return tmp_path / "base", tmp_path / "tuned"


HELD = {
    "folders": lambda base, tuned, tmp_path, at: folders(base, tuned, tmp_path),
    "modules on the CPU": lambda base, tuned, tmp_path, at: (base, tuned),
    "modules there": lambda base, tuned, tmp_path, at: (base.to(at), tuned.to(at)),
    "one side there": lambda base, tuned, tmp_path, at: (base.state_dict(), tuned.to(at).state_dict()),
}


def numbers(report):
    rows = report.sites.items()
    return (
        {path: (row.norm, row.relative_change, row.singular_values, dict(row.ranks)) for path, row in rows},
        {name: (g.norm, g.captured, g.mode_spectra, g.noise_edges) for name, g in report.groups.items()},
        {f"{c.preset} {c.rank}": (c.num_parameters, c.relative_error) for c in report.candidates},
    )


@pytest.mark.parametrize(
    ("held", "dtype", "candidates"),
    [
        ("folders", torch.bfloat16, False),
        ("modules on the CPU", torch.float16, False),
        ("modules there", torch.bfloat16, True),
        ("one side there", torch.float32, False),
    ],
)
def test_a_report_has_the_numbers_of_the_cpu(device, held, dtype, candidates, tmp_path):
    def job(at):
        one, two = HELD[held](*sides(dtype), tmp_path, at)
        return numbers(ta.analyze(one, two, device=at, targets=QV, candidates=candidates))

    agree(job, device, tolerance=2e-3)


GOALS = {
    "ranks": {},
    "an error": {"error": 0.3},
    "the noise": {"error": "noise"},
    "a budget": {"max_parameters": 400},
}
SPECS = {
    "lora": ta.preset("lora", rank=4, targets=QV),
    "lotr": ta.preset("lotr", rank=4, targets=QV),
    "lorta": ta.preset("lorta", rank=3, targets=QV, heads=4),
    "vera": ta.preset("vera", rank=4, targets=QV),
}


JOBS = [*[("lora", goal) for goal in GOALS], *[("lotr", goal) for goal in GOALS], ("lorta", "ranks"), ("vera", "ranks")]


@pytest.mark.parametrize(("name", "goal"), JOBS)
def test_an_extraction_holds_what_it_holds_on_the_cpu(device, name, goal, tmp_path):
    def job(at):
        try:
            base, tuned = sides(torch.bfloat16 if goal == "the noise" else torch.float32)
            found = ta.extract(base, tuned, SPECS[name], tmp_path / at, device=at, **GOALS[goal])
        except ta.TensorAdaptError as error:
            return {"refused": str(error).partition("\n")[0]}
        report = ta.verify(found.path, base, tuned, within_targets=True)
        model = bert().to(at)
        adapter = ta.load(found.path, model)
        assert {t.device.type for t in adapter.tensors().values()} == {at}
        return found.relative_error, found.num_parameters, report.relative_error, model(tokens().to(at))[0]

    agree(job, device, tolerance=5e-3)


def test_files_go_in_and_out_of_a_model_on_a_device(device, tmp_path):
    """Saved, exported, imported, converted, verified, merged into a folder: from an adapter that is on the device."""

    def job(at):
        base, _ = sides()
        base.save_pretrained(tmp_path / at / "base")
        model, x = copy.deepcopy(base).to(at), tokens().to(at)
        adapter = ta.attach(model, SPECS["lotr"])
        shake(adapter)
        wanted = model(x)[0]
        exported = ta.export_peft(adapter, tmp_path / at / "peft", model=model)
        again = ta.load(ta.import_peft(exported.path), copy.deepcopy(base).to(at))
        ta.merge_folder(tmp_path / at / "base", adapter, tmp_path / at / "merged")
        merged = type(base).from_pretrained(tmp_path / at / "merged").to(at)
        converted = ta.convert(adapter, SPECS["lora"], tmp_path / at / "lora")
        report = ta.analyze_adapters({"one": adapter, "two": converted.path}, device=at)
        torch.testing.assert_close(merged.eval()(x)[0], wanted, rtol=1e-3, atol=1e-3)
        path = "encoder.layer.0.attention.self.query"
        assert again.delta(path).device.type == at
        return wanted, again.delta(path), converted.relative_error, sorted(report.sites), copied(adapter, at)

    agree(job, device, tolerance=2e-3)


def copied(adapter, at):
    """A deep copy of a model and its adapter stays on the device, and does the same."""
    model = copy.deepcopy(adapter._model[0])
    return model(tokens().to(at))[0]
