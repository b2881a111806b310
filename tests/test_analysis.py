"""Rank analysis: every number of a report against numpy, planted structure found again, and bad input refused."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
from scipy import integrate, optimize
from torch import nn

import tensoradapt as ta
from tensoradapt.analysis import candidates as candidates_module
from tensoradapt.analysis import spectra
from tensoradapt.analysis.candidates import FAMILIES
from tensoradapt.analysis.ranks import gavish_donoho
from tensoradapt.plan import make_plan
from tensoradapt.plots import check_report
from tensoradapt.sites import from_mapping
from tensoradapt.spec import Rule, Spec

Deltas = dict[str, np.ndarray]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def checkpoints(deltas: Deltas, dtype=torch.float32, seed: int = 9):
    """A base of zeros and a tuned side, so that the delta is what was meant to the last bit."""
    tuned = {f"{path}.weight": torch.from_numpy(d).to(dtype) for path, d in deltas.items()}
    return {name: torch.zeros_like(t) for name, t in tuned.items()}, tuned


def analysed(deltas: Deltas, **options):
    return ta.analyze(*checkpoints(deltas), **options)


# -- one weight -----------------------------------------------------------------------------------------------------


def entropy_rank(p: np.ndarray) -> float:
    return float(np.exp(-sum(x * math.log(x) for x in p if x > 0)))


@pytest.mark.parametrize("shape", [(12, 12), (30, 8), (5, 40), (1, 7), (7, 1), (200, 130)], ids=str)
def test_a_sites_numbers(shape):
    delta = random(*shape) * np.linspace(1, 3, shape[1])
    s = np.linalg.svd(delta, compute_uv=False)
    row = analysed({"layers.0.q": delta}).sites["layers.0.q"]
    total = (s**2).sum()
    assert row.singular_values == pytest.approx(s.tolist(), rel=1e-5)
    assert row.shape == shape and row.complete and row.residual == 0
    assert row.norm == pytest.approx(math.sqrt(total), rel=1e-6)
    assert row.spectral_norm == pytest.approx(s[0], rel=1e-5)
    assert row.stable_rank == pytest.approx(total / s[0] ** 2, rel=1e-5)
    assert row.effective_rank == pytest.approx(entropy_rank(s**2 / total), rel=1e-5)
    assert row.participation_ratio == pytest.approx(total**2 / (s**4).sum(), rel=1e-5)
    for share in (0.9, 0.95, 0.99):
        wanted = next(r for r in range(len(s) + 1) if (s[:r] ** 2).sum() >= share * total * (1 - 1e-9))
        assert row.ranks[f"energy_{share}"] == wanted
    assert row.relative_change is None  # of nothing
    assert row.ranks["noise"] == min(shape)


def test_the_change_is_relative_to_the_base():
    base, delta = 3 * random(10, 6), random(10, 6, seed=1)
    sides = ({"q.weight": torch.from_numpy(x)} for x in (base, base + delta))
    found = ta.analyze(*sides).sites["q"].relative_change
    assert found == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(base), rel=1e-6)


@pytest.mark.parametrize("values", [1, 5])
def test_some_values_only(values):
    """What lies beyond the values is a norm, spread evenly where a number needs it; ranks beyond them are unknown."""
    delta = random(40, 25)
    s = np.linalg.svd(delta, compute_uv=False)
    row = analysed({"layers.0.q": delta}, values=values).sites["layers.0.q"]
    assert row.singular_values == pytest.approx(s[:values].tolist(), rel=1e-5)
    rest = (s[values:] ** 2).sum()
    assert not row.complete and row.residual == pytest.approx(math.sqrt(rest), rel=1e-5)
    assert row.ranks["energy_0.9"] is None and row.ranks["noise"] is None
    p = np.concatenate([s[:values] ** 2, np.full(25 - values, rest / (25 - values))]) / (s**2).sum()
    assert row.effective_rank == pytest.approx(entropy_rank(p), rel=1e-5)
    assert row.participation_ratio == pytest.approx(1 / (p**2).sum(), rel=1e-5)


def test_large_weights_show_their_leading_values(monkeypatch):
    """Beyond a size the spectrum is cut, and noise beyond it does not count."""
    monkeypatch.setattr(spectra, "WHOLE", 64)
    monkeypatch.setattr(spectra, "VALUES", 12)
    delta = random(300, 5) @ random(5, 200, seed=1) + 0.01 * random(300, 200, seed=2)
    s = np.linalg.svd(delta, compute_uv=False)
    row = analysed({"layers.0.q": delta}, candidates=False).sites["layers.0.q"]
    assert len(row.singular_values) == 12 and row.method == "krylov"
    assert row.singular_values[:5] == pytest.approx(s[:5].tolist(), rel=1e-3)
    assert row.residual == pytest.approx(math.sqrt((s[12:] ** 2).sum()), rel=0.02)
    assert row.ranks["gavish_donoho"] == row.ranks["energy_0.99"] == 5
    assert row.ranks["marchenko_pastur"] in (5, 6)  # its edge is where noise ends on average


def median_of_marchenko_pastur(beta: float) -> float:
    """By scipy's quadrature of the density and a root finder."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def mass(to):
        f = lambda x: math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * beta * x)  # noqa: E731
        return integrate.quad(f, low, to, limit=200)[0]

    return optimize.brentq(lambda x: mass(x) - 0.5, low + 1e-9, high)


@pytest.mark.parametrize("beta", [0.05, 0.25, 0.5, 1.0])
def test_gavish_and_donohos_threshold(beta):
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    found = gavish_donoho((round(1000 * beta), 1000))
    assert found == pytest.approx(known / math.sqrt(median_of_marchenko_pastur(beta)), rel=2e-3)
    assert found == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.03)  # the paper's fit


@pytest.mark.parametrize("shape", [(120, 120), (60, 240)])
@pytest.mark.parametrize("rank", [0, 3])
def test_ranks_above_noise_of_unknown_size(shape, rank):
    delta = 0.1 * random(*shape) + random(shape[0], rank, seed=1) @ random(rank, shape[1], seed=2)
    ranks = analysed({"layers.0.q": delta}, candidates=False).sites["layers.0.q"].ranks
    assert ranks["gavish_donoho"] == rank
    assert rank <= ranks["marchenko_pastur"] <= rank + 1  # its edge is where noise ends on average


def test_convolutions_embeddings_and_layouts():
    """A kernel belongs to `in`; an embedding is (width, rows)."""
    base = {"conv1.weight": torch.zeros(6, 4, 3, 2), "embeddings.word_embeddings.weight": torch.zeros(9, 5)}
    tuned = {name: tiny.noise(*t.shape) for name, t in base.items()}
    report = ta.analyze(base, tuned)
    conv, words = report.sites["conv1"], report.sites["embeddings.word_embeddings"]
    wanted = np.linalg.svd(tuned["conv1.weight"].reshape(6, -1).numpy(), compute_uv=False)
    assert conv.shape == (6, 24) and conv.singular_values == pytest.approx(wanted.tolist(), rel=1e-5)
    assert words.shape == (9, 5)


# -- stacks ---------------------------------------------------------------------------------------------------------


def tucker(sizes: tuple[int, ...], ranks: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A tensor of given multilinear ranks."""
    found = random(*ranks, seed=seed)
    for k, size in enumerate(sizes):
        found = np.moveaxis(np.tensordot(random(size, ranks[k], seed=seed + k + 1), found, (1, k)), 0, k)
    return found


def named(tensor: np.ndarray, roles=("q", "k", "v")) -> Deltas:
    return {f"blocks.{i}.attn.{r}": tensor[i, j] for i in range(tensor.shape[0]) for j, r in enumerate(roles)}


def unfolding(tensor: np.ndarray, *dims: int) -> np.ndarray:
    rest = [k for k in range(tensor.ndim) if k not in dims]
    return tensor.transpose(*dims, *rest).reshape(math.prod(tensor.shape[k] for k in dims), -1)


def values_of(matrix: np.ndarray) -> list[float]:
    return np.linalg.svd(matrix, compute_uv=False).tolist()


@pytest.mark.parametrize("memory", [1 << 28, 0], ids=["whole", "in shared bases"])
def test_a_stacks_spectra(memory):
    tensor = tucker((4, 3, 60, 48), (2, 3, 5, 6))
    report = analysed(named(tensor), memory=memory, candidates=False)
    (group,) = report.groups.values()
    assert group.axes == ("layer", "role", "out", "in") and dict(group.sizes) == dict(
        layer=4, role=3, out=60, **{"in": 48}
    )
    assert group.captured == pytest.approx(1, abs=1e-5)
    assert group.norm == pytest.approx(np.linalg.norm(tensor), rel=1e-5)
    first = values_of(unfolding(tensor, 0))[0]
    for k, axis in enumerate(group.axes):
        wanted = values_of(unfolding(tensor, k))
        assert group.mode_spectra[axis][: len(wanted)] == pytest.approx(
            wanted[: len(group.mode_spectra[axis])], abs=3e-5 * first
        )
    assert group.multilinear_rank["noise"] == {"layer": 2, "role": 3, "out": 5, "in": 6}
    assert list(group.tt_spectra) == ["layer", "layer role", "layer role out"]
    for k, found in enumerate(group.tt_spectra.values(), start=1):
        wanted = values_of(unfolding(tensor, *range(k)))
        assert found[:6] == pytest.approx(wanted[: len(found)][:6], abs=3e-5 * first)
    for site, row in report.sites.items():
        assert row.group == "q+k+v" and site in group.sites


def leading(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    u, _, vh = np.linalg.svd(matrix)
    return u[:, :rank], vh[:rank].T


def test_angles_and_shared_energy():
    """Two layers with one column space, a third one orthogonal to it."""
    q, _ = np.linalg.qr(random(40, 40))
    deltas = [q[:, :8] @ random(8, 32, seed=1), q[:, :8] @ random(8, 32, seed=2), q[:, 8:16] @ random(8, 32, seed=3)]
    (group,) = analysed({f"layers.{i}.q": d for i, d in enumerate(deltas)}, candidates=False).groups.values()
    found = np.array(group.similarity["out"]["matrix"])
    assert found == pytest.approx(np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1]]), abs=1e-4)
    assert group.similarity["out"]["rank"] == 8
    right = [leading(d, 8)[1] for d in deltas]
    wanted = [[np.linalg.norm(a.T @ b) ** 2 / 8 for b in right] for a in right]
    assert np.array(group.similarity["in"]["matrix"]) == pytest.approx(np.array(wanted), abs=1e-4)
    total = sum((d**2).sum() for d in deltas)
    stacked = np.stack(deltas)
    u, v = (np.linalg.svd(unfolding(stacked, k))[0] for k in (1, 2))
    for k, r in enumerate(group.shared_energy["rank"]):
        private = sum((np.linalg.svd(d, compute_uv=False)[:r] ** 2).sum() for d in deltas) / total
        assert group.shared_energy["private"][k] == pytest.approx(private, rel=1e-4)
        shared = sum((u[:, :r].T @ d @ v[:, :r]) ** 2 for d in deltas).sum() / total
        assert group.shared_energy["shared"][k] == pytest.approx(shared, rel=1e-4)


GRIDS = {
    "a role that some layers lack": (["layers.0.q", "layers.0.v", "layers.1.q"], [("site", "out", "in")]),
    "one layer": (["layers.0.q", "layers.0.v"], [("role", "out", "in")]),
    "experts": ([f"layers.{i}.experts.{e}.up" for i in (0, 1) for e in (0, 1, 2)], [("layer", "expert", "out", "in")]),
    "two stacks": (["encoder.0.q", "encoder.1.q", "decoder.0.q", "decoder.1.q"], [("layer", "out", "in")] * 2),
    "outside the layers": (["layers.0.q", "pooler", "head"], [("out", "in")] * 3),
}


@pytest.mark.parametrize("case", GRIDS)
def test_sites_are_stacked_by_their_places(case):
    paths, wanted = GRIDS[case]
    report = analysed({path: random(8, 6, seed=k) for k, path in enumerate(paths)})
    assert [group.axes for group in report.groups.values()] == wanted
    assert sorted(path for group in report.groups.values() for path in group.sites) == sorted(paths)
    assert len(report.groups) == len(wanted)
    check_report(report.to_dict())


def test_convolutions_of_one_shape_that_are_served_unlike_have_stacks_of_their_own():
    def made():
        one, two = nn.Conv2d(4, 4, 3), nn.Conv2d(8, 4, 3, groups=2)
        return nn.ModuleDict({"one": one, "two": two})

    layers = [nn.ModuleDict({"layers": nn.ModuleList([made(), made()])}) for _ in range(2)]
    report = ta.analyze(*layers, candidates=False)
    sites = {frozenset(group.sites) for group in report.groups.values()}
    assert sites == {frozenset(f"layers.{k}.{name}" for k in range(2)) for name in ("one", "two")}


def test_shapes_have_stacks_of_their_own():
    deltas = {f"layers.{i}.{r}": random(*s) for i in (0, 1) for r, s in {"q": (8, 8), "up": (16, 8)}.items()}
    report = analysed(deltas)
    assert {name: group.sites for name, group in report.groups.items()} == {
        "q": ("layers.0.q", "layers.1.q"),
        "up": ("layers.0.up", "layers.1.up"),
    }


def test_a_site_that_did_not_change():
    """Its ranks are zero, it is in no stack, and the others are as they were."""
    deltas = {f"layers.{i}.q": random(12, 12, seed=i) * (i != 1) for i in range(3)}
    report = analysed(deltas)
    row = report.sites["layers.1.q"]
    assert row.norm == 0 and set(row.ranks.values()) == {0}
    assert row.group is None and report.groups["q"].sites == ("layers.0.q", "layers.2.q")
    assert report.groups["q"].similarity["out"]["labels"] == ["layers.0.q", "layers.2.q"]
    check_report(report.to_dict())
    assert "layers.1.q" in report.to_html()


# -- candidates -----------------------------------------------------------------------------------------------------


def rule_of(candidate, group) -> Rule:
    return Rule(**{"targets": group.sites, "rank": candidate.rank, **FAMILIES[candidate.preset].rule(group.axes)})


@pytest.mark.parametrize("roles", [("q", "k", "v"), ("q",)])
def test_candidates_count_the_parameters_of_their_specs(roles):
    tensor = tucker((3, len(roles), 24, 18), (3, len(roles), 24, 18))
    deltas = named(tensor, roles)
    report = analysed(deltas)
    (group,) = report.groups.values()
    sites = from_mapping({path: d.shape for path, d in deltas.items()})
    assert {c.preset for c in report.candidates} == set(FAMILIES)
    for candidate in report.candidates:
        plan = make_plan(Spec(rules=(rule_of(candidate, group),)), sites)
        assert candidate.num_parameters == plan.num_trainable, candidate.label
        assert sum(candidate.by_group.values()) == candidate.num_parameters


def lora_lost(deltas, r):
    return sum((np.linalg.svd(d, compute_uv=False)[r:] ** 2).sum() for d in deltas)


def tucker_2_lost(deltas, r):
    stacked = np.stack(deltas)
    u, v = (np.linalg.svd(unfolding(stacked, k))[0][:, :r] for k in (1, 2))
    return sum(((d - u @ (u.T @ d @ v) @ v.T) ** 2).sum() for d in deltas)


def train_lost(deltas, r):
    """TT over (in, layer, out), by plain sequential SVDs."""
    tensor = np.stack(deltas).transpose(2, 0, 1)
    u, s, vh = np.linalg.svd(unfolding(tensor, 0), full_matrices=False)
    rest = (s[:r, None] * vh[:r]).reshape(-1, tensor.shape[2])
    u2, s2, vh2 = np.linalg.svd(rest, full_matrices=False)
    made = u[:, :r] @ ((u2[:, :r] * s2[:r]) @ vh2[:r]).reshape(min(r, len(s)), -1)
    return ((unfolding(tensor, 0) - made) ** 2).sum()


@pytest.mark.parametrize(("preset", "oracle"), [("lora", lora_lost), ("lotr", tucker_2_lost), ("tt", train_lost)])
@pytest.mark.parametrize("memory", [1 << 28, 0], ids=["whole", "in shared bases"])
def test_candidates_errors(preset, oracle, memory):
    deltas = list(tucker((4, 48, 36), (4, 10, 9)) + 0.05 * random(4, 48, 36, seed=7))
    report = analysed({f"layers.{i}.q": d for i, d in enumerate(deltas)}, memory=memory)
    total = sum((d**2).sum() for d in deltas)
    for candidate in (c for c in report.candidates if c.preset == preset):
        wanted = math.sqrt(oracle(deltas, candidate.rank) / total)
        assert candidate.relative_error == pytest.approx(wanted, rel=0.02, abs=2e-3), candidate.label
        assert candidate.worst_site["relative_error"] >= candidate.relative_error - 1e-6


def test_few_values_make_no_candidate_worse():
    """What is listed of the spectra is one thing, what candidates are judged by another."""
    deltas = {f"layers.{i}.q": random(20, 16, seed=i) for i in range(3)}
    few, all_of_them = analysed(deltas, values=2), analysed(deltas)
    for one, other in zip(few.candidates, all_of_them.candidates, strict=True):
        assert one.label == other.label
        assert one.relative_error == pytest.approx(other.relative_error, abs=2e-3)
    shared = few.groups["q"].shared_energy["private"]
    assert shared == pytest.approx(all_of_them.groups["q"].shared_energy["private"], rel=1e-4)


def planted(kind: str) -> Deltas:
    """Six sites whose deltas are cheapest in one format."""
    match kind:
        case "LoRA":  # every site has spaces of its own
            return {f"layers.{i}.q": random(48, 3, seed=i) @ random(3, 48, seed=50 + i) for i in range(6)}
        case "LoTR":
            left, right = random(48, 4, seed=1), random(4, 48, seed=2)
            return {f"layers.{i}.q": left @ random(4, 4, seed=10 + i) @ right for i in range(6)}
        case "CP":
            factors = [random(n, 4, seed=k) for k, n in enumerate((6, 48, 48))]
            tensor = np.einsum("lr,or,ir->loi", *factors)
            return {f"layers.{i}.q": d for i, d in enumerate(tensor)}
    raise AssertionError(kind)


@pytest.mark.parametrize("kind", ["LoRA", "LoTR", "CP"])
def test_the_winner_is_the_format_that_was_planted(kind, tmp_path):
    deltas = planted(kind)
    report = analysed(deltas)
    assert report.choice["label"].startswith(kind), report
    assert report.choice["label"] in report.choice["reason"]
    best = next(c for c in report.candidates if c.label == report.choice["label"])
    assert best.front and best.relative_error < 1e-2
    made = ta.extract(*checkpoints(deltas), Spec.from_dict(report.choice["spec"]), tmp_path / "adapter")
    assert made.num_parameters == best.num_parameters
    assert made.relative_error < 1e-2


def test_the_front_and_the_comparisons():
    report = analysed(named(tucker((4, 3, 40, 32), (2, 2, 6, 6)) + 0.1 * random(4, 3, 40, 32, seed=5)))
    rows = {c.label: c for c in report.candidates}
    for one in rows.values():
        better = [
            o for o in rows.values() if o.num_parameters <= one.num_parameters and o.relative_error < one.relative_error
        ]
        assert one.front == (not better) or one.relative_error < 1e-3, one.label
    for row in report.comparisons["at_error"]:
        for found in row["rows"]:
            assert rows[found["label"]].relative_error <= max(1e-3, row["relative_error"] * 1.0001)
            assert rows[found["label"]].num_parameters == found["num_parameters"]
    for row in report.comparisons["at_budget"]:
        for found in row["rows"]:
            assert rows[found["label"]].num_parameters <= row["max_parameters"]
            assert rows[found["label"]].relative_error == found["relative_error"]
    assert report.comparisons["at_error"] and report.comparisons["at_budget"]


def test_candidates_are_left_out_when_asked(monkeypatch):
    def refuse(*_):
        raise AssertionError("a candidate was tried")

    monkeypatch.setattr(candidates_module, "_lora", refuse)
    monkeypatch.setitem(FAMILIES, "lora", candidates_module.Family("LoRA", refuse, lambda axes: {}))
    report = analysed({"layers.0.q": random(6, 6)}, candidates=False)
    assert report.candidates == () and report.choice is None


@pytest.mark.parametrize("shape", [(7, 13), (1, 5), (16, 2)], ids=str)
def test_candidates_of_odd_shapes(shape):
    report = analysed({f"layers.{i}.q": random(*shape, seed=i) for i in range(2)})
    assert {c.preset for c in report.candidates} == set(FAMILIES)
    check_report(report.to_dict())


# -- the report -----------------------------------------------------------------------------------------------------


def bert_pair(dtype=torch.float32):
    base = {name: tensor.to(dtype) for name, tensor in tiny.bert().state_dict().items()}
    tuned = dict(base)
    for k, name in enumerate(n for n in base if n.endswith(("query.weight", "value.weight"))):
        shape = base[name].shape
        low = tiny.noise(shape[0], 2, seed=k) @ tiny.noise(2, shape[1], seed=70 + k)
        tuned[name] = (base[name].float() + 0.02 * low).to(dtype)
    return base, tuned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_report_of_a_model(dtype, tmp_path):
    report = ta.analyze(*bert_pair(dtype), candidates=dtype == torch.float32)
    changed = {path: row for path, row in report.sites.items() if row.norm}
    assert len(changed) == 4 and {row.ranks["noise"] for row in changed.values()} == {2}
    assert set(changed["encoder.layer.0.attention.self.query"].dtypes) == {str(dtype)[6:]}
    check_report(report.to_dict())
    text = report.to_json(tmp_path / "report.json")
    assert json.loads(text) == json.loads((tmp_path / "report.json").read_text()) == report.to_dict() | json.loads(text)
    assert "<svg" in report.to_html(tmp_path / "report.html")
    assert "encoder.layer:\n  0.attention.self.query " in str(report)
    assert "\nencoder.layer.0.attention.self.query " in report.text(wide=True)


def test_equal_checkpoints():
    """Nothing changed: a report that says so, and no choice."""
    base, _ = bert_pair()
    report = ta.analyze(base, base)
    assert all(row.norm == 0 and set(row.ranks.values()) == {0} for row in report.sites.values())
    assert (report.candidates, report.choice) == ((), None)
    assert "no weight differs" in str(report)
    check_report(report.to_dict())
    assert "<html" in report.to_html()
    json.loads(report.to_json())


def test_swapped_sides_give_the_same_spectra():
    base, tuned = bert_pair()
    there, back = ta.analyze(base, tuned, candidates=False), ta.analyze(tuned, base, candidates=False)
    for path, row in there.sites.items():
        assert back.sites[path].singular_values == pytest.approx(row.singular_values, rel=1e-5)


def test_every_source_gives_the_same_report(tmp_path):
    base, tuned = bert_pair()
    model = tiny.bert()
    model.load_state_dict(tuned)
    model.save_pretrained(tmp_path / "tuned")
    wanted = ta.analyze(base, tuned, candidates=False).sites
    for sides in ((base, tmp_path / "tuned"), (iter(base.items()), iter(tuned.items())), (list(base.items()), model)):
        found = ta.analyze(*sides, candidates=False).sites
        assert {p: row.singular_values for p, row in found.items()} == {p: r.singular_values for p, r in wanted.items()}


def test_a_prefix_on_one_side():
    base, tuned = bert_pair()
    report = ta.analyze(base, {f"bert.{name}": tensor for name, tensor in tuned.items()}, candidates=False)
    assert "bert." in " ".join(report.match["notes"])
    assert sum(row.norm > 0 for row in report.sites.values()) == 4


def test_targets():
    report = ta.analyze(*bert_pair(), targets=["query", "*.value"], candidates=False)
    assert {path.rpartition(".")[2] for path in report.sites} == {"query", "value"}
    assert ta.analyze(*bert_pair(), targets="query", candidates=False).sites.keys() < report.sites.keys()


def test_two_dtypes():
    base, tuned = bert_pair()
    report = ta.analyze({n: t.to(torch.bfloat16) for n, t in base.items()}, tuned, candidates=False)
    assert report.sites["pooler.dense"].dtypes == ("bfloat16", "float32")
    assert report.sites["pooler.dense"].ranks["noise"] == 0  # what differs is the rounding of the base
    assert report.sites["encoder.layer.0.attention.self.query"].ranks["noise"] == 2


def test_progress_names_every_item_as_it_begins_and_as_it_ends():
    told = []
    report = ta.analyze(*bert_pair(), progress=lambda *step: told.append(step))
    (total,) = {step[2] for step in told}
    counts = [step[1] for step in told]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == total
    named = [step[0] for step in told]
    for item in (*report.sites, *report.groups):
        assert named.count(item) >= 2


class Narrow(nn.Module):
    """A model of another kind."""

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(3, 3)


def spoiled(value: float):
    base, tuned = bert_pair()
    name = "encoder.layer.0.attention.self.query.weight"
    tuned[name] = tuned[name].clone()
    tuned[name][0, 0] = value
    return base, tuned


def packed(dtype):
    base, tuned = bert_pair()
    return base, tuned | {"encoder.layer.0.attention.self.query.weight": torch.zeros(16, 16).to(dtype)}


BAD = {
    "NaN in one tensor": (lambda: (spoiled(math.nan), {}), r"query is not finite"),
    "infinity in one tensor": (lambda: (spoiled(math.inf), {}), r"query is not finite"),
    "fp8": (lambda: (packed(torch.float8_e4m3fn), {}), "float8"),
    "packed integers": (lambda: (packed(torch.uint8), {}), "uint8"),
    "another model": (lambda: ((bert_pair()[0], Narrow()), {}), "different models"),
    "another size": (lambda: ((bert_pair()[0], tiny.bert(hidden_size=32)), {}), "shape"),
    "a misspelt target": (lambda: (bert_pair(), {"targets": ["qeury"]}), "did you mean 'query'"),
    "one misspelt target of two": (lambda: (bert_pair(), {"targets": ["query", "valeu"]}), "valeu"),
    "no values": (lambda: (bert_pair(), {"values": 0}), "values"),
    "a misspelt option": (lambda: (bert_pair(), {"vlaues": 3}), "did you mean values"),
    "a device that is not there": (lambda: (bert_pair(), {"device": "gpu7"}), "device 'gpu7'"),
    "no such rows": (lambda: (bert_pair(), {"rows": "some"}), "rows='some'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_a_sentence(case):
    make, message = BAD[case]
    sides, options = make()
    with pytest.raises(ta.TensorAdaptError, match=message):
        ta.analyze(*sides, **options)


def test_bad_tensors_may_be_left_out():
    report = ta.analyze(*spoiled(math.nan), nonfinite="skip", candidates=False)
    path = "encoder.layer.0.attention.self.query"
    assert path not in report.sites and "not finite" in report.match["refused"][path]
    assert any("left out" in note for note in report.match["notes"])
    check_report(report.to_dict())


def test_added_rows_are_padded_or_cut():
    base, tuned = bert_pair(torch.bfloat16)
    name = "embeddings.word_embeddings"
    grown = torch.cat([tuned[f"{name}.weight"], torch.ones(3, 16, dtype=torch.bfloat16)])
    sides = base, tuned | {f"{name}.weight": grown}
    for rows, count in (("pad", tiny.WORDS + 3), ("truncate", tiny.WORDS)):
        report = ta.analyze(*sides, rows=rows, candidates=False)
        assert report.sites[name].shape == (count, 16)
        assert report.sites[name].norm == pytest.approx(math.sqrt(48) if rows == "pad" else 0)
        check_report(report.to_dict())
