"""What users write by mistake: every misuse of the public functions is one of our errors, in words that help.

Each case is a function that gets a workplace (a model, an attached adapter, checkpoints, a folder), the error, and
words that it says.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorly as tl
import torch

import tensoradapt as ta
from tests.toys import Toy

SHAPES = {f"layer.{n}.{role}": (8, 8) for n in range(2) for role in ("query", "value")}


@dataclass
class Place:
    """What a case may use."""

    folder: Path
    model: Toy = field(default_factory=Toy)
    spec: ta.Spec = field(default_factory=lambda: ta.preset("lora", rank=2))

    @property
    def adapter(self) -> ta.Adapter:
        if not hasattr(self, "_adapter"):
            self._adapter = ta.attach(self.model, self.spec)
        return self._adapter

    @property
    def saved(self) -> Path:
        self.adapter.save(self.folder / "saved")
        return self.folder / "saved"

    def side(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {f"{path}.weight": torch.randn(shape, generator=generator) for path, shape in SHAPES.items()}

    @property
    def base(self) -> dict[str, torch.Tensor]:
        return self.side(0)

    @property
    def tuned(self) -> dict[str, torch.Tensor]:
        return self.side(1)

    @property
    def out(self) -> Path:
        return self.folder / "out"


def network(text: str) -> ta.Rule:
    return ta.Rule(format="network", network=text, targets=["query"])


T3 = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
ANY, SPEC, RANK, SITE, SHAPE, FILE, ADAPTER = (
    *(ta.TensorAdaptError, ta.SpecError, ta.RankError, ta.SiteError, ta.ShapeError, ta.FileError, ta.AdapterError),
)

CASES: dict[str, tuple[Any, type[Exception], tuple[str, ...]]] = {
    # specs
    "attach: spec first": (lambda p: ta.attach(p.spec, p.model), ADAPTER, ("no model", "ta.attach(model, spec)")),
    "attach: no spec": (lambda p: ta.attach(p.model, None), SPEC, ("no spec", "NoneType", "ta.attach(model, spec)")),
    "attach: a number": (lambda p: ta.attach(p.model, 8), SPEC, ("no spec", "int")),
    "attach: an empty list": (lambda p: ta.attach(p.model, []), SPEC, ("no spec",)),
    "attach: an empty dictionary": (lambda p: ta.attach(p.model, {}), ANY, ("targets",)),
    "attach: a misspelt name": (lambda p: ta.attach(p.model, "lotrr"), SPEC, ("lotrr", "did you mean lotr")),
    "attach: a plan": (lambda p: ta.attach(p.model, ta.plan(p.spec, p.model)), SPEC, ("no spec", "Plan")),
    "attach: a path that is none": (lambda p: ta.attach(p.model, "nowhere.yaml"), FILE, ("nowhere.yaml",)),
    "attach: a folder's name": (lambda p: ta.attach("bert-base-uncased", p.spec), ADAPTER, ("no model", "str")),
    "attach: a mapping of shapes": (lambda p: ta.attach(SHAPES, p.spec), ADAPTER, ("no model",)),
    "attach: a name that is none": (lambda p: ta.attach(p.model, p.spec, name="my adapter"), ADAPTER, ("my adapter",)),
    "attach: a name that is a number": (lambda p: ta.attach(p.model, p.spec, name=3), ADAPTER, ("no adapter name",)),
    "attach: a seed in words": (lambda p: ta.attach(p.model, p.spec, seed="one"), ANY, ("seed",)),
    "attach: a seed below zero": (lambda p: ta.attach(p.model, p.spec, seed=-1), ANY, ("seed",)),
    "attach: twice": (lambda p: (p.adapter, ta.attach(p.model, p.spec)), ADAPTER, ("already",)),
    "attach: a string for a rank": (lambda p: ta.attach(p.model, {"preset": "lora", "rank": "8"}), RANK, ("'8'",)),
    "attach: a row with a foreign key": (
        lambda p: ta.attach(p.model, {"preset": "lora", "rnk": 8}),
        SPEC,
        ("rnk", "rank"),
    ),
    "attach: rules that are none": (lambda p: ta.attach(p.model, {"rules": "lora"}), SPEC, ("list of rules",)),
    "plan: model first": (lambda p: ta.plan(p.model, p.spec), SPEC, ("no spec", "Toy", "ta.plan(spec, model)")),
    "plan: two specs": (lambda p: ta.plan(p.spec, p.spec), FILE, ("no model", "ta.plan(spec, model)")),
    "plan: no model": (lambda p: ta.plan(p.spec, None), FILE, ("no model", "NoneType")),
    "plan: a class for a model": (lambda p: ta.plan(p.spec, Toy), FILE, ("no model",)),
    "plan: shapes with names": (lambda p: ta.plan(p.spec, {"query": "8x8"}), SHAPE, ("query", "(out, in)")),
    "plan: a tensor for a shape": (lambda p: ta.plan(p.spec, {"query": torch.zeros(8, 8)}), ANY, ("query",)),
    "plan: numbers for paths": (lambda p: ta.plan(p.spec, {0: (8, 8)}), ANY, ("0",)),
    "plan: an empty model": (lambda p: ta.plan(p.spec, {}), SITE, ("query-value",)),
    "plan: a path with a hole": (lambda p: ta.plan(p.spec, "a\0b"), FILE, ("a",)),
    "plan: an empty path": (lambda p: ta.plan(p.spec, ""), FILE, ("path",)),
    "solve: model first": (
        lambda p: ta.solve_rank(p.model, p.spec, max_parameters=99),
        SPEC,
        ("ta.solve_rank(spec, model",),
    ),
    "solve: 30k": (lambda p: ta.solve_rank(p.spec, SHAPES, max_parameters="30k"), RANK, ("30k", "30_000")),
    "solve: a fraction": (lambda p: ta.solve_rank(p.spec, SHAPES, max_parameters=0.5), RANK, ("0.5", "whole number")),
    "solve: nothing": (lambda p: ta.solve_rank(p.spec, SHAPES, max_parameters=None), RANK, ("None",)),
    "solve: below the smallest": (lambda p: ta.solve_rank(p.spec, SHAPES, max_parameters=3), RANK, ("at least",)),
    "solve: below zero": (lambda p: ta.solve_rank(p.spec, SHAPES, max_parameters=-3), RANK, ("-3",)),
    "solve: no rank": (lambda p: ta.solve_rank("krona", SHAPES, max_parameters=99), SPEC, ("no rank",)),
    "budget: model first": (lambda p: ta.budget(p.model, p.spec, [1]), SPEC, ("ta.budget(specs, model, ranks)",)),
    "budget: a number for ranks": (lambda p: ta.budget(p.spec, SHAPES, 8), RANK, ("ranks", "range(1, 65)")),
    "budget: a string for ranks": (lambda p: ta.budget(p.spec, SHAPES, "1:8"), RANK, ("ranks", "1:8")),
    "budget: fractions for ranks": (lambda p: ta.budget(p.spec, SHAPES, [0.5]), RANK, ("ranks", "0.5")),
    "budget: no ranks": (lambda p: ta.budget(p.spec, SHAPES, []), RANK, ("ranks",)),
    "budget: no specs": (lambda p: ta.budget([], SHAPES, [1]), SPEC, ("no spec",)),
    "budget: a list with a number": (lambda p: ta.budget([p.spec, 4], SHAPES, [1]), SPEC, ("no spec", "int")),
    "budget: csv into a folder that is not": (
        lambda p: ta.budget("lora", SHAPES, [1]).to_csv(p.folder / "no" / "a.csv"),
        FILE,
        ("cannot be written",),
    ),
    "spec: a sum with a string": (lambda p: p.spec + 3, SPEC, ("no spec", "int")),
    "spec: saved to a number": (lambda p: p.spec.save(3), FILE, ("no path",)),
    "spec: loaded from a number": (lambda p: ta.Spec.load(3), FILE, ("no path",)),
    "spec: rules in words": (lambda p: ta.Spec(rules="lora"), SPEC, ("rules",)),
    "spec: from a list": (lambda p: ta.Spec.from_dict([1]), SPEC, ("mapping",)),
    # presets and rules
    "preset: no name": (lambda p: ta.preset(None), SPEC, ("no preset None",)),
    "preset: a function": (lambda p: ta.preset(len), SPEC, ("no preset", "ta.Preset")),
    "preset: r": (lambda p: ta.preset("lora", r=8), SPEC, ("you mean rank",)),
    "preset: lora_alpha": (lambda p: ta.preset("lora", lora_alpha=16), SPEC, ("you mean alpha",)),
    "preset: target_modules": (lambda p: ta.preset("lora", target_modules=["q"]), SPEC, ("you mean targets",)),
    "preset: lora_dropout": (lambda p: ta.preset("lora", lora_dropout=0.1), SPEC, ("you mean dropout",)),
    "preset: modules_to_save": (lambda p: ta.preset("lora", modules_to_save=["head"]), SPEC, ("you mean train",)),
    "preset: use_rslora": (lambda p: ta.preset("lora", use_rslora=True), SPEC, ("alpha/sqrt(rank)",)),
    "preset: bias": (lambda p: ta.preset("lora", bias="none"), SPEC, ("biases are not adapted",)),
    "preset: layers_to_transform": (lambda p: ta.preset("lora", layers_to_transform=[0]), SPEC, ("targets=",)),
    "preset: init_lora_weights": (lambda p: ta.preset("lora", init_lora_weights="pissa"), SPEC, ("ta.initialize",)),
    "preset: task_type": (lambda p: ta.preset("lora", task_type="CAUSAL_LM"), SPEC, ("PEFT's word",)),
    "rule: r": (lambda p: ta.Rule(r=8), SPEC, ("you mean rank",)),
    "rule: target_modules": (lambda p: ta.Rule(target_modules="q"), SPEC, ("you mean targets",)),
    "preset: a parameter of another": (lambda p: ta.preset("lora", tt_rank=2), SPEC, ("tt_rank", "its own: rank")),
    "preset: a rank of zero": (lambda p: ta.preset("lora", rank=0), RANK, ("rank 0",)),
    "preset: a rank below zero": (lambda p: ta.preset("lora", rank=-4), RANK, ("rank -4",)),
    "preset: a fraction for a rank": (lambda p: ta.preset("lora", rank=1.5), RANK, ("1.5",)),
    "preset: a rank in words": (lambda p: ta.preset("lora", rank="eight"), RANK, ("eight",)),
    "preset: no rank": (lambda p: ta.preset("lora", rank=None), RANK, ("None",)),
    "preset: a truth for a rank": (lambda p: ta.preset("lora", rank=True), RANK, ("True",)),
    "preset: targets in a number": (lambda p: ta.preset("lora", targets=3), SPEC, ("targets",)),
    "preset: a default that is none": (lambda p: ta.preset("lora", default="everything"), SPEC, ("query-value",)),
    "preset: laws that are none": (lambda p: ta.preset("lora", init="zero"), SPEC, ("init",)),
    "preset: excludes that are none": (lambda p: ta.preset("cara", exclude=3), SPEC, ("exclude",)),
    "preset: a dropout of 2": (lambda p: ta.preset("lora", dropout=2.0), SPEC, ("dropout",)),
    "preset: alpha in words": (lambda p: ta.preset("lora", alpha="16"), SPEC, ("alpha",)),
    "preset: an unknown scale": (lambda p: ta.preset("lora", scale="rslora"), SPEC, ("scale", "alpha/sqrt(rank)")),
    "preset: an unknown dtype": (lambda p: ta.preset("lora", dtype="fp16"), SPEC, ("dtype",)),
    "preset: a torch dtype": (lambda p: ta.preset("lora", dtype=torch.float16), SPEC, ("dtype",)),
    "preset: folds that are a number": (lambda p: ta.preset("tt_lora", folds=4), SPEC, ("folds",)),
    "preset: folds of one side": (lambda p: ta.preset("tt_lora", folds={"in": [2, 4]}), SPEC, ("both sides",)),
    "preset: a form that is none": (lambda p: ta.preset("tenslora_qkv", form="tt"), SPEC, ("tucker or cp",)),
    "preset: folds in other words": (lambda p: ta.plan(ta.preset("krona", folds="twice"), SHAPES), SPEC, ("twice",)),
    "preset: two positional": (lambda p: ta.preset("lora", 8), TypeError, ()),
    "own preset: no function": (lambda p: ta.Preset(build=3), SPEC, ("function",)),
    "own preset: no default": (lambda p: ta.Preset(build=lambda rank: {}, family="mine"), SPEC, ("'rank' has none",)),
    "own preset: no name": (lambda p: ta.Preset(build=lambda rank=1: {}), SPEC, ("family=",)),
    "own preset: no rows": (
        lambda p: ta.preset(ta.Preset(build=lambda: 3, family="mine")),
        SPEC,
        ("fields of a rule",),
    ),
    "own preset: foreign rows": (lambda p: ta.preset(ta.Preset(lambda: {"rnk": 3}, family="mine")), SPEC, ("rnk",)),
    "rule: axes that are none": (lambda p: ta.Rule(axes=["out", "in", "depth"]), SPEC, ("depth", "layer")),
    "rule: integer axes": (lambda p: ta.Rule(axes=(0, 1)), SPEC, ("axes",)),
    "rule: a side missing": (lambda p: ta.Rule(axes=["layer", "out"]), SPEC, ("lacks the axis 'in'",)),
    "rule: an axis twice": (lambda p: ta.Rule(axes=["out", "in", "in"]), SPEC, ("twice",)),
    "rule: an unknown format": (lambda p: ta.Rule(format="mps"), SPEC, ("format", "tucker")),
    "rule: no targets": (lambda p: ta.plan(ta.Rule(rank=2), SHAPES), SITE, ("no targets", "all-linear")),
    "rule: positional": (lambda p: ta.Rule("lora"), TypeError, ()),
    "network: empty": (lambda p: network(""), SPEC, ("needs a network",)),
    "network: no arrow": (lambda p: network("out a, a in"), SPEC, ("nodes -> axes",)),
    "network: no axes": (lambda p: network("out a, a in ->"), SPEC, ("nodes -> axes",)),
    "network: an open bond": (lambda p: network("out a, b in -> out in"), SPEC, ("'a' ends nowhere",)),
    "network: loose nodes": (lambda p: network("out a, a in, b c, b c -> out in"), SPEC, ("node_2, node_3", "no axis")),
    "network: an axis on no node": (
        lambda p: network("out a, a in -> layer out in"),
        SPEC,
        ("'layer' sits on no node",),
    ),
    "network: no in": (lambda p: network("out a, a layer -> layer out"), SPEC, ("lacks the axis 'in'",)),
    "network: no out": (lambda p: network("layer a, a in -> layer in"), SPEC, ("lacks the axis 'out'",)),
    "network: an output twice": (lambda p: network("out a, a in -> out in in"), SPEC, ("twice",)),
    "network: an index twice": (lambda p: network("out out a, a in -> out in"), SPEC, ("each once",)),
    "network: an unknown axis": (
        lambda p: network("out a, depth a in -> depth out in"),
        SPEC,
        ("unknown axis 'depth'",),
    ),
    "network: an empty node": (lambda p: network("out a, , a in -> out in"), SPEC, ("node_1",)),
    "network: a name twice": (lambda p: network("x: out a, x: a in -> out in"), SPEC, ("twice",)),
    "network: einsum's own": (lambda p: network("oa,ai->oi"), SPEC, ("axis 'oi'", "spaces")),
    "network: with another format": (lambda p: ta.Rule(network="out a, a in -> out in"), SPEC, ("format: network",)),
    # fits
    "fit: a TensorLy tensor": (
        lambda p: ta.fit(tl.cp_tensor.CPTensor((None, [np.ones((3, 2))] * 2)), "cp"),
        ANY,
        ("TensorLy",),
    ),
    "fit: no tensor": (lambda p: ta.fit(None, "cp"), SHAPE, ("no tensor",)),
    "fit: words": (lambda p: ta.fit("weights.pt", "cp"), SHAPE, ("no tensor",)),
    "fit: format first": (lambda p: ta.fit("cp", T3), SHAPE, ("no tensor", "ta.fit(tensor, format)")),
    "fit: an unknown format": (lambda p: ta.fit(T3, "parafac"), SPEC, ("parafac", "cp")),
    "fit: no format": (lambda p: ta.fit(T3, None), SPEC, ("format",)),
    "fit: integer axes": (lambda p: ta.fit(T3, "cp", axes=(0, 1, 2)), SPEC, ("axes", "names")),
    "fit: an axis too few": (lambda p: ta.fit(T3, "cp", axes=("out", "in")), SHAPE, ("axes",)),
    "fit: an axis twice": (lambda p: ta.fit(T3, "cp", axes="layer out out"), SHAPE, ("each once",)),
    "fit: axes that are none": (lambda p: ta.fit(T3, "cp", axes=3), SPEC, ("axes",)),
    "fit: ranks of another count": (lambda p: ta.fit(T3, "tt", rank=[2, 2, 2]), RANK, ("bonds",)),
    "fit: a rank in words": (lambda p: ta.fit(T3, "cp", rank="4"), RANK, ("rank",)),
    "fit: a rank of zero": (lambda p: ta.fit(T3, "cp", rank=0), RANK, ("rank",)),
    "fit: a fraction for a rank": (lambda p: ta.fit(T3, "cp", rank=2.5), RANK, ("rank",)),
    "fit: rank and error": (lambda p: ta.fit(T3, "cp", rank=2, error=0.1), RANK, ("one of",)),
    "fit: an error above one": (lambda p: ta.fit(T3, "cp", error=3.0), ANY, ("error",)),
    "fit: an error in words": (lambda p: ta.fit(T3, "cp", error="1%"), ANY, ("error",)),
    "fit: a budget in words": (lambda p: ta.fit(T3, "cp", max_parameters="30k"), RANK, ("30k",)),
    "fit: a TT-matrix without folds": (lambda p: ta.fit(torch.randn(16, 16), "ttm", rank=2), SPEC, ("folds", "auto")),
    "fit: an unknown option": (lambda p: ta.fit(T3, "cp", iterations=9), SPEC, ("iterations", "sweeps")),
    "fit: a number": (lambda p: ta.fit(torch.tensor(3.0), "cp"), SHAPE, ("axes",)),
    "fit: complex numbers": (lambda p: ta.fit(T3.to(torch.complex64), "cp"), SHAPE, ("real",)),
    "fit: nothing in it": (lambda p: ta.fit(torch.zeros(0, 3), "cp"), SHAPE, ("real",)),
    "fit: NaN": (lambda p: ta.fit(T3 * float("nan"), "cp"), SHAPE, ("not finite",)),
    "fit: an iterator": (lambda p: ta.fit(iter([T3[0]]), "cp"), SHAPE, ("several times",)),
    "fit: strings in a list": (lambda p: ta.fit(["a", "b"], "cp"), SHAPE, ("no tensor",)),
    "fit: slices of two shapes": (lambda p: ta.fit([np.ones((2, 3)), np.ones((3, 2))], "cp"), SHAPE, ("one shape",)),
    "fit: a device that is none": (lambda p: ta.fit(T3, "cp", device="gpu"), ANY, ("gpu", "cuda")),
    "fit: folds of no axis": (lambda p: ta.fit(T3, "tt", folds={"depth": [2, 2]}), ANY, ("depth",)),
    "fit: folds that do not multiply": (
        lambda p: ta.fit(T3, "tt", axes="layer out in", folds={"out": [3, 3]}),
        SHAPE,
        ("multiply",),
    ),
    # checkpoints
    "analyze: spec first": (lambda p: ta.analyze(p.spec, p.tuned), FILE, ("Spec",)),
    "analyze: numbers": (lambda p: ta.analyze(1, 2), FILE, ("checkpoint",)),
    "analyze: one side None": (lambda p: ta.analyze(None, p.tuned), FILE, ("checkpoint",)),
    "analyze: a file that is not": (lambda p: ta.analyze("nowhere", p.tuned), FILE, ("nowhere",)),
    "analyze: no user": (lambda p: ta.analyze("~0", p.tuned), FILE, ("~0",)),
    "analyze: lists in a mapping": (lambda p: ta.analyze({"a.weight": [[1.0]]}, p.tuned), FILE, ("a.weight",)),
    "analyze: a device that is none": (lambda p: ta.analyze(p.base, p.tuned, device="gpu"), ANY, ("gpu", "cuda")),
    "analyze: an option that is none": (lambda p: ta.analyze(p.base, p.tuned, target="q"), SPEC, ("targets",)),
    "analyze: targets that match nothing": (lambda p: ta.analyze(p.base, p.tuned, targets=["qery"]), SITE, ("query",)),
    "analyze: targets that are a number": (lambda p: ta.analyze(p.base, p.tuned, targets=3), SPEC, ("targets",)),
    "analyze: nothing in common": (lambda p: ta.analyze({"x.weight": torch.ones(2, 2)}, p.tuned), ANY, ("x",)),
    "extract: spec first": (
        lambda p: ta.extract(p.spec, p.base, p.tuned, p.out),
        SPEC,
        ("ta.extract(base, tuned, spec",),
    ),
    "extract: no spec": (lambda p: ta.extract(p.base, p.tuned, None, p.out), SPEC, ("no spec",)),
    "extract: out is a number": (lambda p: ta.extract(p.base, p.tuned, p.spec, 3), FILE, ("no path",)),
    "extract: an error in words": (
        lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, error="1%"),
        ANY,
        ("1%", "noise"),
    ),
    "extract: an error below zero": (lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, error=-1), ANY, ("error",)),
    "extract: an error of NaN": (
        lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, error=float("nan")),
        ANY,
        ("error",),
    ),
    "extract: 30k": (lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, max_parameters="30k"), RANK, ("30k",)),
    "extract: a small budget": (
        lambda p: ta.extract(p.base, p.tuned, "lotr", p.out, max_parameters=0),
        RANK,
        ("max_parameters",),
    ),
    "extract: both goals": (
        lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, error=0.1, max_parameters=99),
        ANY,
        ("error", "max_parameters"),
    ),
    "extract: a device that is none": (
        lambda p: ta.extract(p.base, p.tuned, p.spec, p.out, device="gpu"),
        ANY,
        ("gpu",),
    ),
    "verify: no adapter": (lambda p: ta.verify(p.base, p.base, p.tuned), ADAPTER, ("no adapter",)),
    "verify: a tolerance in words": (
        lambda p: ta.verify(p.saved, p.base, p.tuned, tolerance="1%"),
        SPEC,
        ("tolerance",),
    ),
    # adapters
    "load: model first": (lambda p: ta.load(p.model, p.saved), ADAPTER, ("no model", "ta.load(path, model)")),
    "load: a path that is none": (lambda p: ta.load(p.folder / "no", p.model), FILE, ("no",)),
    "load: a number": (lambda p: ta.load(3, p.model), ADAPTER, ("no adapter",)),
    "load: another model": (lambda p: ta.load(p.saved, torch.nn.Linear(2, 2)), FILE, ("q_proj",)),
    "delta: a path that is none": (lambda p: p.adapter.delta("layers.0.up_proj"), SITE, ("up_proj", "q_proj")),
    "delta: a number": (lambda p: p.adapter.delta(0), SITE, ("0",)),
    "factors: a group that is none": (lambda p: p.adapter.factors("nope"), SPEC, ("nope",)),
    "set_factors: a shape": (
        lambda p: p.adapter.set_factors(GROUP, {"core_in": np.ones((9, 9))}),
        SHAPE,
        ("another shape",),
    ),
    "set_factors: a node": (lambda p: p.adapter.set_factors(GROUP, {"A": np.ones((2, 12))}), SPEC, ("no node 'A'",)),
    "set_factors: a list": (lambda p: p.adapter.set_factors(GROUP, [torch.ones(2, 12)]), SPEC, ("mapping", "list")),
    "set_factors: words": (lambda p: p.adapter.set_factors(GROUP, {"core_in": "ones"}), SHAPE, ("core_in",)),
    "scale: words": (lambda p: setattr(p.adapter, "scale", "2"), ADAPTER, ("finite number",)),
    "scale: None": (lambda p: setattr(p.adapter, "scale", None), ADAPTER, ("finite number",)),
    "merge: twice": (lambda p: (p.adapter.merge(), p.adapter.merge()), ADAPTER, ("merged",)),
    "merge: keep where": (lambda p: p.adapter.merge(keep="gpu"), ADAPTER, ("keep",)),
    "unmerge: not merged": (lambda p: p.adapter.unmerge(), ADAPTER, ("merged",)),
    "save: a number": (lambda p: p.adapter.save(3), FILE, ("no path",)),
    "convert: spec first": (lambda p: ta.convert(p.spec, p.saved), ANY, ("ta.convert(adapter, spec",)),
    "convert: no spec": (lambda p: ta.convert(p.saved, None), SPEC, ("no spec",)),
    "convert: 30k": (lambda p: ta.convert(p.saved, "lora", max_parameters="30k"), RANK, ("30k",)),
    "initialize: a model": (lambda p: ta.initialize(p.model, "pissa"), ADAPTER, ("adapter",)),
    "initialize: a name that is none": (lambda p: ta.initialize(p.adapter, "svd"), SPEC, ("svd", "pissa")),
    "initialize: swapped": (lambda p: ta.initialize("pissa", p.adapter), ANY, ("adapter",)),
    "gradients: no batches": (lambda p: ta.gradients(p.model, p.spec, []), SPEC, ("batches",)),
    "gradients: a number": (lambda p: ta.gradients(p.model, p.spec, 3), ANY, ("batches",)),
    "activations: spec first": (lambda p: ta.activations(p.spec, p.model, []), ADAPTER, ("no model",)),
    "truncate: nothing said": (lambda p: ta.truncate(p.adapter), ANY, ("rank",)),
    "truncate: a rank in words": (lambda p: ta.truncate(p.adapter, rank="4"), ANY, ("rank",)),
    "resize: a fraction": (lambda p: ta.resize(p.adapter, rank=1.5), ANY, ("rank",)),
    "orthogonalize: a model": (lambda p: ta.orthogonalize(p.model), ANY, ("adapter",)),
    "combine: a number": (lambda p: ta.combine(3), ANY, ("adapter",)),
    "export: a model": (lambda p: ta.export_peft(p.model, p.out), ANY, ("adapter",)),
    "import: a number": (lambda p: ta.import_peft(3), ANY, ("path",)),
}
GROUP = "layer0_q_proj"


@pytest.mark.parametrize("name", CASES)
def test_a_misuse_is_one_of_our_errors(name, tmp_path):
    misuse, kind, says = CASES[name]
    with pytest.raises(kind) as caught:
        misuse(Place(tmp_path))
    text = str(caught.value)
    for word in says:
        assert word in text, text
    assert "Traceback" not in text and len(text.splitlines()) <= 6, text
    assert not list(tmp_path.glob("out*")), "a refused call left something behind"


def test_there_are_many():
    assert len(CASES) >= 130
