"""What a report says: every number in its sentences against numpy, and names in the user's words."""

import math
import statistics

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import tensoradapt as ta
from tensoradapt.analysis.naming import stack_names
from tensoradapt.sites import from_mapping


def tensors(seed: int, **shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


MODEL = {
    **{f"encoder.layer.{k}.query.weight": (12, 10) for k in range(3)},
    **{f"encoder.layer.{k}.norm.weight": (10,) for k in range(3)},
    **{"embeddings.word_embeddings.weight": (30, 10), "pooler.weight": (10, 10), "pooler.bias": (10,)},
}


def pair(still: tuple[str, ...] = ()):
    """A model of three layers, and a change of all tensors but those that are still."""
    base, change = tensors(0, **MODEL), tensors(1, **MODEL)
    tuned = {name: base[name] + 0.01 * change[name] * (name not in still) for name in base}
    return tuple({n: torch.from_numpy(t).float() for n, t in side.items()} for side in (base, tuned))


# -- the account ------------------------------------------------------------------------------------------------------

KINDS = {
    "layers": ("query",),
    "embeddings": ("embeddings",),
    "outside": ("pooler.weight",),
    "vectors": ("norm", "pooler.bias"),
}


def square(base, tuned, words) -> float:
    """|tuned - base|^2 of the tensors whose names hold one of some words."""
    names = [name for name in base if any(word in name for word in words)]
    return sum(float(((tuned[n].double() - base[n].double()).numpy() ** 2).sum()) for n in names)


def test_every_tensor_is_of_one_kind():
    base, tuned = pair(still=("encoder.layer.1.norm.weight", "pooler.weight"))
    base, tuned = base | {"only.weight": torch.ones(3, 3)}, tuned | {"new.bias": torch.ones(2)}
    report = ta.analyze(base, tuned, candidates=False)
    found, total = report.change, square(base, tuned, MODEL)
    assert (report.answer.weights, report.answer.layers, report.answer.dense) == (3, True, 3 * 120)
    assert (found["tensors"], found["differing"]) == (len(MODEL), len(MODEL) - 2)
    assert found["norm"] == pytest.approx(total**0.5, rel=1e-6)
    assert {kind: row["tensors"] for kind, row in found["kinds"].items()} == {
        "layers": 3, "embeddings": 1, "outside": 1, "vectors": 4
    }  # fmt: skip
    assert [row["differing"] for row in found["kinds"].values()] == [3, 1, 0, 3]
    for kind, words in KINDS.items():
        assert found["kinds"][kind]["share"] == pytest.approx(square(base, tuned, words) / total, rel=1e-5), kind
    assert (report.match["only_base"], report.match["only_tuned"]) == (["only.weight"], ["new.bias"])


def test_what_the_targets_leave_out_is_measured_too():
    base, tuned = pair()
    kinds = ta.analyze(base, tuned, targets=["query"], candidates=False).change["kinds"]
    left = square(base, tuned, ("embeddings", "pooler.weight")) / square(base, tuned, MODEL)
    assert kinds["untargeted"]["tensors"] == 2 and kinds["untargeted"]["weights"] == 0
    assert kinds["untargeted"]["share"] == pytest.approx(left, rel=1e-5)
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)


def test_tied_tensors_and_integers_count_once_and_not_at_all():
    base, tuned = pair()
    for side in (base, tuned):
        side["lm_head.weight"] = side["embeddings.word_embeddings.weight"]
    base["position_ids"], tuned["position_ids"] = torch.arange(4), torch.arange(4) + 1
    found = ta.analyze(base, tuned, candidates=False).change
    assert found["tensors"] == len(MODEL) + 1 and found["kinds"]["embeddings"]["tensors"] == 1
    assert found["kinds"]["other"] == {"tensors": 1, "differing": 1, "weights": 0, "share": 0.0}


def test_equal_sides_have_no_shares():
    base, _ = pair()
    found = ta.analyze(base, base).change
    assert found["differing"] == 0 and {row["share"] for row in found["kinds"].values()} == {None}


# -- names ------------------------------------------------------------------------------------------------------------


def test_sides_are_called_as_the_user_knows_them(tmp_path):
    from safetensors.torch import save_file

    base, tuned = pair()
    save_file(base, tmp_path / "base.safetensors")
    named = lambda *sides, **options: (  # noqa: E731
        (found := ta.analyze(*sides, candidates=False, **options)).base,
        found.tuned,
    )
    assert named(base, tuned) == named(list(base.items()), iter(tuned.items())) == ("base", "tuned")
    assert named(base, tuned, names=("v1", "v2")) == ("v1", "v2")
    assert named(tmp_path / "base.safetensors", tuned) == ("base.safetensors", "tuned")
    assert named(nn.Linear(3, 4), nn.Linear(3, 4)) == ("Linear (base)", "Linear (tuned)")
    for wrong in ("ab", ("one",), ("a", 3), ("", "b")):
        with pytest.raises(ta.SpecError, match="names are what the report calls"):
            ta.analyze(base, tuned, names=wrong)


BERT = ("attention.output.dense", "attention.self.key", "attention.self.query", "attention.self.value")
NAMES = {
    "one role": ([["layer.0.query", "layer.1.query"]], ["query"]),
    "several roles": ([[f"h.{k}.{r}" for k in (0, 1) for r in ("q_proj", "o_proj")]], ["q_proj+o_proj"]),
    "more roles than a name holds": (
        [[f"layer.0.{r}" for r in BERT], ["layer.0.output.dense"]],
        ["key+query+value+1 more", "output.dense"],
    ),
    "roles in the model's order": ([["h.0.up_proj", "h.0.q"]], ["up_proj+q"]),
    "two towers": ([["encoder.block.0.wi"], ["decoder.block.0.wi"]], ["encoder wi", "decoder wi"]),
    "shapes tell them apart": ([["layer.0.up"], ["layer.1.up"]], ["up 4x4", "up 4x8"]),
    "numbers alone": ([["0", "2"], ["3"]], ["layers", "layer 3"]),
    "a sequence": ([["net.0", "net.2"], ["net.4"]], ["net", "net.4"]),
    "outside the layers": ([["layer.0.dense"], ["pooler.dense"], ["lm_head"]], ["dense", "pooler.dense", "lm_head"]),
}


@pytest.mark.parametrize("case", NAMES)
def test_stacks_are_called_by_their_roles(case):
    stacks, wanted = NAMES[case]
    sizes = {p: (4, 4 + 4 * (case.startswith("shapes") and k)) for k, paths in enumerate(stacks) for p in paths}
    sites = {site.path: site for site in from_mapping(sizes).sites}
    assert stack_names([[sites[path] for path in paths] for paths in stacks]) == wanted


# -- the answer -------------------------------------------------------------------------------------------------------


def layers(matrices, dtype=torch.float32, base: float = 0.0):
    """Checkpoints of layers whose deltas are the matrices: on zeros, or on weights of some size."""
    rng = np.random.default_rng(7)
    names = [f"layers.{k}.q.weight" for k in range(len(matrices))]
    bases = [torch.from_numpy(base * rng.standard_normal(m.shape)).to(dtype) for m in matrices]
    tuned = [(b.double() + torch.from_numpy(m)).to(dtype) for b, m in zip(bases, matrices, strict=True)]
    return dict(zip(names, bases, strict=True)), dict(zip(names, tuned, strict=True))


def decaying(count: int = 5, shape=(24, 18), rate: float = 0.6, seed: int = 0) -> list[np.ndarray]:
    """Full matrices whose singular values fall at rates of their own."""
    rng = np.random.default_rng(seed)
    found = []
    for k in range(count):
        u, _, vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
        found.append((u * rate ** (np.arange(min(shape)) / (1 + 0.737 * k))) @ vh)
    return found


def values(matrices) -> list[np.ndarray]:
    return [np.linalg.svd(m, compute_uv=False) for m in matrices]


def lora_ranks(matrices, error: float) -> list[int]:
    """A rank for each weight: by the highest threshold on what a rank holds per parameter that is within the error."""
    gains = [s**2 / sum(m.shape) for s, m in zip(values(matrices), matrices, strict=True)]
    total = sum((m**2).sum() for m in matrices)
    for threshold in sorted((float(g) for gain in gains for g in gain), reverse=True):
        ranks = [int((gain >= threshold).sum()) for gain in gains]
        if sum((s[r:] ** 2).sum() for s, r in zip(values(matrices), ranks, strict=True)) <= error**2 * total:
            return ranks
    raise AssertionError("no threshold")


def lora_label(ranks) -> str:
    return f"LoRA r={min(ranks)}" + (f"-{max(ranks)}" if max(ranks) > min(ranks) else "")


def lora_size(matrices, ranks) -> int:
    return sum(r * sum(m.shape) for m, r in zip(matrices, ranks, strict=True))


def energy_ranks(matrices, share: float) -> list[int]:
    return [int((np.cumsum(s**2) < share * (s**2).sum()).sum()) + 1 for s in values(matrices)]


def test_median_ranks_and_loras_parameters():
    matrices = decaying()
    report = ta.analyze(*layers(matrices), candidates=False)
    wanted = sorted(energy_ranks(matrices, 0.95))
    found = report.answer.ranks["energy_0.95"]
    assert set(report.answer.ranks) == {"energy_0.95"}  # no noise, and no low rank
    assert (found.lowest, found.median, found.highest) == (wanted[0], statistics.median_high(wanted), wanted[-1])
    for needed, error in zip(report.answer.needed, (0.1, 0.01), strict=True):
        ranks = lora_ranks(matrices, error)
        count = lora_size(matrices, ranks)
        assert (needed.relative_error, needed.label, needed.num_parameters) == (error, lora_label(ranks), count)
        assert needed.share == pytest.approx(count / sum(m.size for m in matrices))
        left = sum((s[r:] ** 2).sum() for s, r in zip(values(matrices), ranks, strict=True))
        assert needed.reached == pytest.approx((left / sum((m**2).sum() for m in matrices)) ** 0.5, rel=1e-3)
        assert not needed.at_least and (needed.rank is None) == (min(ranks) < max(ranks))


@pytest.mark.parametrize("error", [0, 1], ids=["10 %", "1 %"])
def test_an_extraction_within_these_parameters_is_within_the_error(error, tmp_path):
    sides = layers(decaying())
    needed = ta.analyze(*sides, candidates=False).answer.needed[error]
    made = ta.extract(*sides, ta.preset("lora", targets=["q"]), tmp_path / "a", max_parameters=needed.num_parameters)
    assert made.num_parameters <= needed.num_parameters and made.relative_error <= needed.relative_error * (1 + 1e-5)
    less = needed.num_parameters - 24 - 18
    made = ta.extract(*sides, ta.preset("lora", targets=["q"]), tmp_path / "b", max_parameters=less)
    assert made.relative_error > needed.relative_error


def test_a_rank_of_a_large_weight_costs_more():
    """Weights of three shapes: a rank is taken where it holds most per parameter, not where it holds most."""
    matrices = [scale * decaying(1, shape, seed=k)[0] for k, (scale, shape) in enumerate(SHAPES)]
    ranks = lora_ranks(matrices, 0.1)
    by_value = sorted((s for m in values(matrices) for s in m), reverse=True)[: sum(ranks)]
    assert ranks != [int((s >= by_value[-1]).sum()) for s in values(matrices)]
    found = ta.analyze(*layers(matrices), candidates=False).answer.needed[0]
    assert (found.label, found.num_parameters) == (lora_label(ranks), lora_size(matrices, ranks))


SHAPES = ((1.0, (12, 10)), (1.6, (90, 70)), (1.3, (30, 80)))


def test_the_first_lines_say_these_numbers():
    matrices = decaying(3, (40, 36), rate=0.7)
    first = " ".join(str(ta.analyze(*layers(matrices), candidates=False)).split("\n\n")[0].split())
    ranks, lora = sorted(energy_ranks(matrices, 0.95)), [lora_ranks(matrices, e) for e in (0.1, 0.01)]
    size, counts = sum(m.size for m in matrices), [lora_size(matrices, r) for r in lora]
    assert counts[0] < size < counts[1]
    shares = f"{100 * counts[0] / size:.3g}%", f"{counts[1] / size:.1f} times"
    assert first == (
        f"What rank is it? {statistics.median_high(ranks)} for 95% of the energy ({ranks[0]} to {ranks[-1]}):"
        " medians of 3 weights in the layers."
        f" 10% error: {lora_label(lora[0])}, {counts[0]:,} parameters, {shares[0]} of the dense change"
        f" 1% error: this change has no low rank: {lora_label(lora[1])} takes {shares[1]} its dense size"
    )


def test_ranks_above_the_rounding_noise():
    """A change of rank 3 on bfloat16 weights, and how much of it may be noise, by a loop over all entries."""
    rng = np.random.default_rng(3)
    matrices = [0.01 * rng.standard_normal((40, 3)) @ rng.standard_normal((3, 30)) for _ in range(3)]
    sides = layers(matrices, torch.bfloat16, base=1.0)
    report = ta.analyze(*sides, candidates=False)
    assert report.answer.ranks["noise"].median == 3 and "exact" not in report.answer.ranks
    noise = change = 0.0
    for before, after in zip(*(side.values() for side in sides), strict=True):
        for value in (*before.flatten().tolist(), *after.flatten().tolist()):
            noise += 2.0 ** (2 * (math.floor(math.log2(abs(value))) - 7)) / 12
        change += float((after.double() - before.double()).square().sum())
    assert report.answer.noise_share == pytest.approx(min(1.0, (noise / change) ** 0.5), rel=1e-3)
    text = " ".join(str(report).split())
    assert text.startswith("What rank is it? 3 above the rounding noise, ")
    assert f"up to {100 * report.answer.noise_share:.3g}% of the change's norm is rounding noise" in text
    assert "above noise" in text


def test_exact_ranks_of_float32_are_told_and_have_no_column():
    rng = np.random.default_rng(3)
    matrices = [rng.standard_normal((20, 2)) @ rng.standard_normal((2, 16)) for _ in range(3)]
    report = ta.analyze(*layers(matrices))
    assert report.answer.ranks["exact"].median == 2 and report.answer.noise_share is None
    assert "2 above float32's own rounding" in str(report)
    assert "above noise" not in report.text() + report.text(wide=True)
    assert "rank above noise" not in report.to_html() and "noise edge" not in report.to_html()


def test_what_the_values_do_not_show_is_a_bound():
    """Four values of each weight: LoRA takes at least what is said, and the text says that it is a bound."""
    matrices = decaying(rate=0.9)
    report = ta.analyze(*layers(matrices), candidates=False, values=4)
    found, error = report.answer.needed[0], 0.1
    assert found.at_least and found.reached is None
    true = lora_size(matrices, lora_ranks(matrices, error))
    assert 5 * 4 * 42 < found.num_parameters <= true
    # one rank after the other, where what is beyond the fourth value is as large as it may be
    steps = []
    for s in values(matrices):
        left, guessed = float((s[4:] ** 2).sum()), [float(x) for x in s[:4] ** 2]
        while left > 0 and len(guessed) < 18:
            guessed.append(min(left, float(s[3] ** 2)))
            left -= guessed[-1]
        steps += guessed
    held, total = np.cumsum(sorted(steps, reverse=True)), sum((m**2).sum() for m in matrices)
    assert found.num_parameters == int((held < (1 - error**2) * total).sum()) * 42
    text = " ".join(str(report).split())
    size = found.num_parameters / sum(m.size for m in matrices)
    if size >= 1:
        assert f"10% error: this change has no low rank: LoRA takes at least {size:.1f} times" in text
    else:
        assert (
            f"no format tried reaches it; LoRA takes at least {found.num_parameters:,} parameters, {size:.1%}" in text
        )
    assert report.answer.ranks["energy_0.95"].median is None and "more than 4 for 95% of the energy" in text


def test_the_best_format_is_named():
    """Weights that share their spaces: LoTR is within 1 % with fewer parameters than LoRA."""
    rng = np.random.default_rng(5)
    left, right = rng.standard_normal((40, 4)), rng.standard_normal((4, 40))
    matrices = [left @ rng.standard_normal((4, 4)) @ right for _ in range(6)]
    report = ta.analyze(*layers(matrices))
    within = [c for c in report.candidates if c.relative_error <= 0.01]
    best = min(within, key=lambda c: c.num_parameters)
    assert best.preset == "lotr" and best.num_parameters == 2 * 4 * 40 + 6 * 16
    found = report.answer.needed[1]
    assert (found.label, found.num_parameters) == (best.label, best.num_parameters)
    assert found.share == best.share == best.num_parameters / (6 * 1600)


def test_only_what_changed_is_counted():
    """Weights that did not change are in no stack, no candidate and no share: adapters of them would be of no use."""
    matrices = decaying(4)
    base, tuned = layers(matrices)
    still = {f"layers.{k}.v.weight": torch.ones(24, 18) for k in range(4)}
    report, alone = ta.analyze(base | still, tuned | still), ta.analyze(base, tuned)
    assert [c.num_parameters for c in report.candidates] == [c.num_parameters for c in alone.candidates]
    assert report.answer == alone.answer and report.choice["spec"] == alone.choice["spec"]
    assert [report.groups["q"].axes] == [("layer", "out", "in")] and report.sites["layers.0.v"].group is None


def test_nothing_changed_and_nothing_compared():
    base, _ = pair()
    report = ta.analyze(base, base)
    assert report.answer is None
    assert str(report).startswith("What rank is it? 0: no weight differs.") and "no weight differs" in report.to_html()


# -- the proposal -----------------------------------------------------------------------------------------------------


def proposed(matrices, dtype=torch.float32, base: float = 0.0):
    report = ta.analyze(*layers(matrices, dtype, base))
    return report, {c.label: c for c in report.candidates}


def test_no_low_rank_is_said_and_nothing_is_praised():
    """Noise of full rank: 10 % of it takes an adapter that is larger than the weights."""
    matrices = list(np.random.default_rng(1).standard_normal((3, 90, 80)))
    report, rows = proposed(matrices)
    choice, ranks = report.choice, lora_ranks(matrices, 0.1)
    text = " ".join(str(report).split())
    assert "Proposal: no adapter." in text and "Proposal: no adapter" in report.to_html()
    sizes = {c.label: c.num_parameters for c in rows.values() if c.relative_error <= 0.1}
    sizes[lora_label(ranks)] = lora_size(matrices, ranks)
    label = min(sizes, key=lambda name: sizes[name])
    times = sizes[label] / (3 * 90 * 80)
    assert f"10% error: this change has no low rank: {label} takes {times:.1f} times its dense size" in text
    said = f"to be within 10% of it takes {sizes[label]:,} parameters, {times:.1f} times the dense change"
    assert not choice["holds"] and choice["warning"].startswith(f"This change has no low rank: {said}")
    assert "by the rule" in str(report) and "proposed" not in str(report)
    best = rows[choice["label"]]
    assert best.share < 1 and best.relative_error > 0.3 and "close" not in choice["warning"]
    # the largest LoRA that is smaller than the weights: r (90 + 80) < 90 * 80
    assert choice["reference"] == "LoRA r=32" and "the largest tried that is smaller than the weights" in choice["rule"]
    large = next(c for c in rows.values() if c.label == "LoRA r=64")
    assert large.share == pytest.approx(64 * 170 / 7200) and f"{64 * 170 / 7200:.1f} times" in report.to_html()


RULES = {  # singular values -> LoRA that the others are compared with, and why
    "the median rank": ([1.0] * 4, "LoRA r=4", ": the median rank above float32's own rounding is 4."),
    "the first above it": ([1.0] * 5, "LoRA r=8", "no less than the median rank above float32's own rounding, 5."),
    "one that is close at a lower rank": ([1.0] * 2 + [1e-3] * 9, "LoRA r=2", ", the first tried that is within 1%."),
}


@pytest.mark.parametrize("case", RULES)
def test_the_rule_says_what_lora_is_compared_at(case):
    spectrum, reference, why = RULES[case]
    rng, count = np.random.default_rng(2), len(RULES[case][0])
    bases = [[np.linalg.qr(rng.standard_normal((n, count)))[0] for n in (60, 50)] for _ in range(3)]
    report, rows = proposed([(left * spectrum) @ right.T for left, right in bases])
    assert report.choice["reference"] == reference and report.choice["rule"].endswith(why)
    wanted = [np.array(spectrum[int(reference[7:]) :]), np.array(spectrum)]
    left = math.sqrt((wanted[0] ** 2).sum() / (wanted[1] ** 2).sum())
    assert rows[reference].relative_error == pytest.approx(left, abs=1e-3)
    assert rows[reference].num_parameters == 3 * int(reference[7:]) * 110


def test_the_usual_formats_are_listed_beside_the_front():
    report, _ = proposed([random @ random.T for random in np.random.default_rng(4).standard_normal((4, 40, 3))])
    at_error = next(row for row in report.comparisons["at_error"] if row["label"] == report.choice["reference"])
    named = [row["label"].partition(" r=")[0] for row in at_error["rows"]] + at_error["unreached"]
    assert sorted(named) == sorted(["LoRA", "LoTR", "Tucker", "TT", "CP", "TT-matrix"])
    lines = str(report).splitlines()
    table = lines[next(k for k, line in enumerate(lines) if line.startswith("format ")) :]
    for name in ("LoRA r=4 ", "LoTR r=4 ", "TT r=4 "):
        assert any(line.startswith(name) for line in table[: table.index("")]), name


def test_what_rounding_leaves_is_called_noise():
    """A small change on bfloat16 weights: the reference's error is that of the rounding, not a loss."""
    rng = np.random.default_rng(6)
    matrices = [4e-3 * rng.standard_normal((64, 2)) @ rng.standard_normal((2, 48)) for _ in range(3)]
    report, rows = proposed(matrices, torch.bfloat16, base=1.0)
    best = rows[report.choice["label"]]
    assert 0.1 < best.relative_error <= 1.1 * report.answer.noise_share
    assert report.choice["holds"] and "no more than the rounding noise" in report.choice["warning"]


# -- the text ---------------------------------------------------------------------------------------------------------


BLOCK = "cross_attention_of_the_decoder"


def wide_model(layers: int, roles: int = 7):
    rng = np.random.default_rng(0)
    names = [f"model.layers.{k}.{BLOCK}.projection_{r}.weight" for k in range(layers) for r in range(roles)]
    base = {name: torch.from_numpy(rng.standard_normal((10, 12))).float() for name in names}
    return base, {name: b + 0.01 * torch.from_numpy(rng.standard_normal((10, 12))).float() for name, b in base.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 4, 12])
def test_the_text_fits_80_columns(count, dtype):
    base, tuned = ({n: t.to(dtype) for n, t in side.items()} for side in wide_model(count))
    report = ta.analyze(base, tuned)
    text = report.text()
    assert max(map(len, text.splitlines())) <= 80 and "None" not in text + report.text(wide=True)
    rows = [line for line in text.splitlines() if "projection_3" in line and "+" not in line]
    assert len(rows) == (count if count * 7 <= 48 else 1)
    wide = report.text(wide=True)
    assert all(f"\n{path} " in wide for path in report.sites)


def test_a_row_for_a_role_has_the_median_and_the_range():
    base, tuned = wide_model(12)
    report = ta.analyze(base, tuned, candidates=False)
    paths = [f"model.layers.{k}.{BLOCK}.projection_2" for k in range(12)]
    deltas = [(tuned[f"{p}.weight"].double() - base[f"{p}.weight"].double()).numpy() for p in paths]
    ranks = sorted(energy_ranks(deltas, 0.95))
    (row,) = (line for line in report.text().splitlines() if "projection_2" in line and "+" not in line)
    low, middle, high = ranks[0], statistics.median_high(ranks), ranks[-1]
    assert row.split()[1] == "12" and (f" {middle} ({low}-{high})" in row if low < high else f" {middle} " in row)


def test_a_set_of_adapters_is_called_by_its_names():
    adapters = {}
    for seed, name in enumerate(("one", "two", "three")):
        adapters[name] = adapter = ta.attach(tiny.bert(), ta.preset("lora", rank=3, targets=["query"]), seed=seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.from_numpy(np.random.default_rng(seed).standard_normal(parameter.shape)))
    report = ta.analyze_adapters(adapters)
    matrices = [
        adapter.delta(path).detach().double().numpy()
        for adapter in adapters.values()
        for g in adapter.plan.groups
        for path in g.paths
    ]
    count = lora_size(matrices, lora_ranks(matrices, 0.01))
    text = " ".join(report.text().split())
    assert text.startswith("What rank is it? 3 above float32's own rounding") and report.change is None
    assert "3 adapters: one, two, three; 6 weights" in text and f"1% error: LoRA r=3, {count:,} parameters" in text
    assert "3 adapters: one, two, three" in report.to_html()
    assert max(map(len, report.text().splitlines())) <= 80 and "None" not in report.text(wide=True)
