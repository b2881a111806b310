"""The frontier's benchmark: its ledger resumes, rates are chosen off the validation split, budgets hold, plots draw."""

import csv
import dataclasses
import itertools
import math
import statistics
from xml.etree import ElementTree

import frontier
import frontier_methods
import frontier_results
import pytest
import torch
import transformers
from frontier import DOCS
from frontier_methods import METHODS, Entry, Run
from frontier_results import BLUE, Ledger
from test_report_figures import boxes, outside, overlapping, texts

SHAPES = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
COUNTS = {"LoRA r=8 all": 331_776, "LoRA r=1 all": 41_472, "LoRA r=8 qv": 73_728, "LoRA r=1 qv": 9_216}
SHARES = {"1/5": 331_776 / 5, "1/10": 331_776 / 10, "1/30": 331_776 / 30, "1/5 of qv": 73_728 / 5}
PAIR = (
    Entry("LoTR 1/10", "lotr", "lotr", {}, (1.0, 2.0, 3.0), 100),
    Entry("LoTR 1/5", "lotr", "lotr", {}, (1.0, 2.0, 3.0), 200),
)


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr(frontier, "METHODS", PAIR)
    return frontier.parser().parse_args(["run", "--data", "nowhere", "--rows", "40", "--tasks", "mrpc", "cola"])


def found(value):
    return {"parameters": 90, "metric": "f1", "value": value, "seconds": 2.0, "cpu_seconds": 1.0, "versions": "torch 2"}


def make(ledger, args, count=None, score=lambda run: 0.5):
    """Make runs one by one, as the grid does."""
    made = []
    while (count is None or len(made) < count) and (run := next(frontier.pending(PAIR, ledger, args), None)):
        ledger.add(frontier.settings_of(run, args), found(score(run)))
        made.append(run)
    return made


def test_an_interrupted_grid_goes_on_where_it_stopped(args, tmp_path):
    path = tmp_path / "runs.csv"
    first = make(Ledger(path), args, count=9)
    with path.open("a") as file:
        file.write("mrpc,LoTR 1/10,3.0")  # the line that was being written
    second = make(Ledger(path), args)
    assert len({*first, *second}) == len(first) + len(second) == 3 * 2 + 2 * 3 * 2
    assert make(Ledger(path), args) == []
    assert frontier.left(PAIR, Ledger(path), args) == 0 and frontier.cost("mrpc", Ledger(path)) == 2.0
    rows = [row for row in csv.DictReader(path.open()) if row["versions"]]
    assert len(rows) == 18 and {row["value"] for row in rows} == {"0.5"}


def test_other_settings_are_other_runs(args, tmp_path):
    make(Ledger(tmp_path / "runs.csv"), args)
    args.epochs += 1
    assert len(make(Ledger(tmp_path / "runs.csv"), args)) == 18


def test_one_rate_is_no_choice(args, tmp_path, monkeypatch):
    lone = dataclasses.replace(PAIR[0], rates=(1.0,))
    monkeypatch.setattr(frontier, "METHODS", (lone,))
    ready = [*frontier.pending([lone], Ledger(tmp_path / "runs.csv"), args)]
    assert {run.split for run in ready} == {"validation"} and len(ready) == 3 * 2


@pytest.mark.parametrize("how", ["variant", "choose"])
def test_rates_alone_are_chosen(args, tmp_path, how):
    """For a variant that is tried on the held-out tenth only, and for all where --choose is given."""
    entry = dataclasses.replace(PAIR[0], held_out_only=how == "variant")
    args.choose = how == "choose"
    ledger = Ledger(tmp_path / "runs.csv")
    made = []
    while run := next(frontier.pending([entry], ledger, args), None):
        ledger.add(frontier.settings_of(run, args), found(0.5))
        made.append(run.split)
    assert made == ["held-out"] * 6 and frontier.left([entry], ledger, args) == 0


def test_the_precision_is_that_of_the_forward_pass(args, data, tmp_path, monkeypatch):
    config = transformers.BertConfig(vocab_size=600, hidden_size=24, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    args.rows, args.model, args.epochs = 40, str(tmp_path), 1
    seen = []
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a, **k: seen.append(plain(*a, **k)) or seen[-1])
    entry = Entry("full", "full", "full", {}, (1e-4,))
    for precision in ("bfloat16", "float32"):
        args.precision = precision
        frontier_methods.perform(Run(entry, "mrpc", 1e-4, 0, "validation"), args)
        assert {each.dtype for each in seen} == {getattr(torch, precision)}
        seen.clear()


def test_the_rate_is_the_best_on_the_held_out_tenth_alone(args, tmp_path):
    """Rate 2 is best there, though the validation scores grow with the rate, and one rate diverges."""
    ledger = Ledger(tmp_path / "runs.csv")
    for rate, seed in itertools.product(PAIR[0].rates, (0, 1, 2)):
        ledger.add(frontier.settings_of(Run(PAIR[0], "mrpc", rate, seed, "validation"), args), found(rate))
    scores = {1.0: math.nan, 2.0: 0.4, 3.0: 0.3}
    made = make(ledger, args, score=lambda run: scores[run.rate] if run.split == "held-out" else 0.1)
    assert {run.rate for run in made if run.split == "validation"} == {2.0}
    chosen_by = [run for run in made if run.split == "held-out"]
    assert {run.entry.label for run in chosen_by} == {"LoTR 1/10"} and {run.seed for run in chosen_by} == {0}


def rows_named(start, count):
    """Rows of three tokens that say who they are."""
    inputs = lambda k: {"input_ids": torch.tensor([1, k, 2]), "attention_mask": torch.ones(3, dtype=torch.long)}  # noqa: E731
    return [frontier_methods.Row(inputs(k), k % 2) for k in range(start, start + count)]


@pytest.fixture
def data(monkeypatch):
    """200 training rows of the tokens from 10 on, 50 validation rows of those from 500 on."""
    reader = lambda data, task, split, *rest: rows_named(*((10, 200) if split == "train" else (500, 50)))  # noqa: E731
    monkeypatch.setattr(frontier_methods, "read_rows", reader)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: None)
    frontier_methods.splits.cache_clear()
    yield
    frontier_methods.splits.cache_clear()


def names(rows):
    return {int(row.inputs["input_ids"][1]) for row in rows}


def test_a_rates_choice_sees_no_validation_row(args, data):
    args.rows, args.model = 180, "none"
    for run in itertools.chain.from_iterable(frontier.choices(PAIR[1], PAIR, args).values()):
        trained, judged = map(names, frontier_methods.rows_of(run, args))
        assert len(trained) == 180 and len(judged) == 20
        assert trained | judged == {*range(10, 210)}
    trained, judged = map(names, frontier_methods.rows_of(Run(PAIR[0], "mrpc", 1.0, 0, "validation"), args))
    assert trained < {*range(10, 210)} and judged == {*range(500, 550)}


def test_a_run_trains_and_is_scored(args, data, tmp_path):
    config = transformers.BertConfig(vocab_size=600, hidden_size=24, num_hidden_layers=2, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    args.rows, args.model, args.epochs = 40, str(tmp_path), 1
    entry = Entry("LoTR", "lotr", "lotr", {"targets": frontier_methods.ALL}, (1e-2,), 20_000, "lora_ga")
    record = frontier_methods.perform(Run(entry, "mrpc", 1e-2, 0, "validation"), args)
    assert record["metric"] == "f1" and 0 <= record["value"] <= 1 and 15_000 < record["parameters"] <= 20_000


@pytest.fixture(scope="module")
def minilm():
    """A random BERT of the shapes of all-MiniLM-L6-v2, with few words."""
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, num_labels=2, **SHAPES)
    state = transformers.BertForSequenceClassification(config).state_dict()

    def fresh():
        model = transformers.BertForSequenceClassification(config)
        model.load_state_dict(state)
        return model

    return fresh


@pytest.mark.parametrize("entry", frontier_methods.available(), ids=lambda entry: entry.label)
def test_parameters_and_rates_of_every_row(entry, minilm):
    """Counted over the tensors themselves: adapters within their budget and close to it, one head for all."""
    model, adapter = frontier_methods.attach(entry, minilm(), 0)
    optimiser = frontier_methods.optimiser_of(entry, model, adapter, 0.5)
    trained = [value for value in model.parameters() if value.requires_grad]
    *groups, head = optimiser.param_groups  # Stiefel has one of its own for orthonormal factors
    rest = [value for group in groups for value in group["params"]]
    assert sorted(map(id, rest + head["params"])) == sorted(map(id, trained))
    assert sum(value.numel() for value in head["params"]) == 384 * 384 + 384 + 2 * 384 + 2
    assert {group["lr"] for group in groups} == {0.5} and head["lr"] == frontier_methods.HEAD_RATE
    count = sum(value.numel() for value in rest)
    if entry.label in COUNTS:
        assert count == COUNTS[entry.label]
    elif entry.label != "full":
        share = next(name for name in ("1/5 of qv", "1/5", "1/10", "1/30") if name in entry.label)
        assert 0.9 * SHARES[share] < count <= SHARES[share]


def test_labels_are_unique_and_families_share_their_rates():
    assert len({entry.label for entry in METHODS}) == len(METHODS)
    for _, family in itertools.groupby(sorted(METHODS, key=lambda e: e.family), key=lambda e: e.family):
        assert len({(entry.rates, entry.preset, entry.start, entry.optimiser) for entry in family}) == 1


def settings(task, method, seed, split="validation", rate="0.001", rows="1000"):
    names = dict.fromkeys(frontier_results.KEY, "1")
    return {**names, "task": task, "method": method, "seed": seed, "split": split, "rate": rate, "train_rows": rows}


@pytest.fixture
def filled(tmp_path):
    """Four methods, two seeds: scores 100 x (.8, .3, .5) plus the method's points and a point for the second seed."""
    ledger = Ledger(tmp_path / "runs.csv")
    methods = {"LoRA r=8 qv": (73_728, 0), "full": (22_000_000, 4), "LoRA r=8 all": (331_776, 2)}
    methods |= {"LoTR 1/10": (32_328, 1.6), "LoTR 1/5 of qv": (14_148, -1)}
    ledger.add(settings("mrpc", "full", 7, rows="64"), {**found(0.01), "parameters": 22_000_000})  # a quick try
    ledger.add(settings("mrpc", "LoTR 1/10", 7, rate="9"), {**found(0.01), "parameters": 32_328})  # a rate left since
    for (method, (count, points)), seed in itertools.product(methods.items(), (0, 1)):
        for task, base in (("mrpc", 80), ("cola", 30), ("rte", 50)):
            ledger.add(settings(task, method, seed), {**found((base + points + seed) / 100), "parameters": count})
    ledger.add(settings("mrpc", "LoTR 1/10", 0, split="held-out"), {**found(0.01), "parameters": 32_328})
    return ledger


def test_table_and_goals_from_the_csv(filled):
    lines = frontier_results.table(Ledger(filled.path).rows.values()).splitlines()
    cells = {cell[0]: cell for cell in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    assert [*cells] == ["full", "LoRA r=8 all", "LoRA r=8 qv", "LoTR 1/10", "LoTR 1/5 of qv"]  # most parameters first
    assert cells["LoTR 1/10"][1:4] == ["32,328", "1/10.3", "0.001"]
    assert cells["LoRA r=8 all"][2] == "1/1.0" and cells["full"][2] == "66 times"
    assert cells["full"][4] == "84.5 ± 0.7"
    deviation = f"{statistics.stdev([0, 1]):.1f}"
    assert cells["LoTR 1/10"][4:9] == [f"{82.1} ± {deviation}", "32.1 ± 0.7", "52.1 ± 0.7", "55.4 ± 0.7", "2"]
    first, second = frontier_results.goals(filled.rows.values())
    assert "LoTR 1/10, -0.4 points" in first and "reached" in first
    assert "LoTR 1/5 of qv, -1.0 points" in second and "missed" in second


def test_figure_from_the_csv(filled, tmp_path):
    path = tmp_path / "figures" / "frontier.svg"
    assert frontier.main(["--csv", str(filled.path), "plot", "--figure", str(path)]) == 0
    text = " ".join(ElementTree.parse(path).getroot().itertext())
    for words in ("trainable adapter parameters", "points (%)", "LoTR", "LoRA r=8 all", "full, 22.0 M"):
        assert words in text
    before = path.read_bytes()
    frontier.main(["--csv", str(filled.path), "plot", "--figure", str(path)])
    assert path.read_bytes() == before


def test_every_method_of_the_figure_has_a_panel_of_its_numbers_and_words_with_room(filled):
    drawn = frontier_results.figure(filled.rows.values())
    own = {axes.get_title(loc="left"): axes.lines for axes in drawn.axes if axes.axison}
    found = {each.method: each for each in frontier_results.summaries(filled.rows.values())}
    assert set(own) == {frontier_results.series_of(method) for method in found if method != "full"}
    (point,) = [line for line in own["LoTR"] if line.get_color() == BLUE and len(line.get_xdata()) == 2][:1]
    budgets = [found[name] for name in ("LoTR 1/5 of qv", "LoTR 1/10")]
    assert [tuple(xy) for xy in point.get_xydata()] == [(b.parameters, statistics.fmean(b.means)) for b in budgets]
    words = boxes(drawn)
    assert overlapping(words) == [] and outside(drawn, words) == []
    assert drawn.get_figwidth() <= 4.6 and min(text.get_fontsize() for text in texts(drawn)) >= 8


def test_the_figure_of_the_pages_is_that_of_their_data(tmp_path):
    frontier.main(["--csv", str(DOCS / "data/frontier.csv"), "plot", "--figure", str(tmp_path / "a.svg")])
    made, kept = (
        " ".join(ElementTree.parse(path).getroot().itertext()).split()
        for path in (tmp_path / "a.svg", DOCS / "figures/frontier.svg")
    )
    assert made == kept


def test_series_join_budgets_of_one_method():
    series = {frontier_results.series_of(name) for name in ("LoTR 1/5 of qv x", "LoTR 1/10 x", "LoRA r=8 all")}
    assert series == {"LoTR x", "LoRA all"}


def test_rows_without_their_optimiser_are_left_out():
    entry = Entry("x", "x", "lotr", optimiser="NoSuchOptimiser")
    assert frontier_methods.available((entry, PAIR[0])) == [PAIR[0]]
