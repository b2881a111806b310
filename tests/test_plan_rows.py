"""What a plan in a file says twice is said alike, and what it says is of its kind: else it is refused, as damaged."""

import copy
import json
import struct
import time
import zlib

import pytest
import tiny
from cases import CASES
from torch import nn

import tensoradapt as ta
from tensoradapt.plan import Plan

QV = ["query", "value"]
MODELS = {
    "lotr": (tiny.bert, lambda: ta.preset("lotr", rank=2, targets=QV)),
    "vera": (tiny.bert, lambda: ta.preset("vera", rank=2, targets=[*QV, "intermediate.dense"])),
    "slots": (tiny.bert, lambda: ta.preset("fact_tt", rank=2, targets=[*QV, "intermediate.dense"])),
    "folds": (tiny.bert, lambda: ta.preset("tt_lora", rank=2, targets=QV, folds={"in": [4, 4], "out": [4, 4]})),
    "rows": (
        tiny.gpt2,
        lambda: ta.preset("lora", rank=2, targets=["c_attn[q]", "c_attn[v]"], parts={"c_attn": ["q", "k", "v"]}),
    ),
    "experts": (tiny.mixtral, lambda: ta.preset("lotr", rank=2, targets=["gate_up_proj"])),
    "tie": (tiny.gpt2, lambda: ta.preset("lora", rank=2, targets=["wte", "lm_head"])),
    "train": (tiny.bert_classifier, lambda: ta.preset("lora", rank=2, targets=QV, train=["classifier"])),
}


def saved(kind, folder):
    make, spec = MODELS[kind]
    adapter = ta.attach(make(), spec())
    tiny.shake(adapter)
    return adapter.save(folder / "adapter")


def header(file):
    raw = file.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write(file, head, tail):
    text = json.dumps(head).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + tail)


def with_text(file, text):
    """The file with another text for its plan, whose checksum is right."""
    head, tail = header(file)
    metadata = head["__metadata__"]
    sums = json.loads(metadata["crc32"]) | {"tensoradapt": zlib.crc32(text.encode())}
    metadata |= {"tensoradapt": text, "crc32": json.dumps(sums)}
    write(file, head, tail)
    return file


def changed(file, change):
    plan = json.loads(header(file)[0]["__metadata__"]["tensoradapt"])
    before = copy.deepcopy(plan)
    change(plan)
    assert repr(plan) != repr(before)
    return with_text(file, json.dumps(plan))


def put(*path, to):
    """Put a value, or what a function makes of the old one, at a path."""

    def change(plan):
        *above, last = path
        for key in above:
            plan = plan[key]
        plan[last] = to(plan[last]) if callable(to) else to

    return change


SITE = ("groups", 0, "sites", 0)
REFUSED = {
    "a scale that is not finite": ("lotr", put("groups", 0, "scale", to=float("inf")), "Infinity"),
    "a scale that is no number": ("lotr", put("groups", 0, "scale", to=float("nan")), "NaN"),
    "an enormous scale": ("lotr", put("groups", 0, "scale", to=1e300), "scale"),
    "a scale in words": ("lotr", put("groups", 0, "scale", to="2"), "scale"),
    "a scale of yes": ("lotr", put("groups", 0, "scale", to=True), "scale"),
    "an integer without end": ("lotr", put("groups", 0, "num_trainable", to=10**400), "num_trainable"),
    "a size without end": ("lotr", put("groups", 0, "diagram", "sizes", "out", to=10**30), "sizes"),
    "a negative rank": ("lotr", put("groups", 0, "diagram", "sizes", "r_out", to=-2), "sizes"),
    "a rank that is not that of the diagram": ("lotr", put("groups", 0, "rank", "r_out", to=1), "rank"),
    "a node less": ("lotr", lambda p: p["groups"][0]["diagram"]["nodes"].popitem(), "group"),
    "nodes in another order": (
        "lotr",
        put("groups", 0, "diagram", "nodes", to=lambda nodes: dict(reversed(nodes.items()))),
        "diagram",
    ),
    "a node with an index twice": (
        "lotr",
        put("groups", 0, "diagram", "nodes", "core_out", to=["out", "out"]),
        "group",
    ),
    "an axis less": ("lotr", put("groups", 0, "diagram", "open", to=lambda axes: axes[:-1]), "group"),
    "folds of a rule that has none": (
        "lotr",
        put("groups", 0, "diagram", "folds", to={"out": ["out"]}),
        "cut",
    ),
    "other folds than the rule's": (
        "folds",
        put("spec", "rules", 0, "folds", "in", to=[2, 2, 4]),
        "folds of in",
    ),
    "a law less": ("lotr", lambda p: p["groups"][0]["laws"].popitem(), "laws"),
    "a law that is none": ("lotr", put("groups", 0, "laws", "core_out", to="chaos"), "laws"),
    "a node that is stored in another group": (
        "lotr",
        put("groups", 0, "store", "core_out", to="x.core_out"),
        "stored",
    ),
    "a node of a bank without a bank": ("lotr", put("groups", 0, "store", "core_out", to="x_bank.core_out"), "stored"),
    "a place off the axis": ("lotr", put(*SITE, "place", to=lambda at: dict.fromkeys(at, 99)), "place"),
    "a place before the axis": ("lotr", put(*SITE, "place", to=lambda at: dict.fromkeys(at, -1)), "place"),
    "another site's place": ("experts", put(*SITE, "place", to=lambda at: dict.fromkeys(at, 1)), "place"),
    "no place": ("lotr", put(*SITE, "place", to={}), "place"),
    "labels that are too few": (
        "experts",
        put("groups", 0, "labels", to=lambda of: {a: v[1:] for a, v in of.items()}),
        "labels",
    ),
    "labels that are one": (
        "experts",
        put("groups", 0, "labels", to=lambda of: {a: v[:1] * len(v) for a, v in of.items()}),
        "labels",
    ),
    "slots beyond the axis": ("slots", put(*SITE, "slots", to=[5, 5]), "shape|slots"),
    "slots of no slots": ("lotr", put(*SITE, "slots", to=[2, 1]), "slots"),
    "a site of another shape": ("lotr", put(*SITE, "shape", to=[16, 8]), "shape"),
    "a site with one side": ("lotr", put(*SITE, "shape", to=[16]), "shape"),
    "rows outside the weight": ("rows", put(*SITE, "rows", to=[-16, 0]), "rows"),
    "more rows than the site has": ("rows", put(*SITE, "rows", to=[0, 48]), "rows"),
    "rows that end before they begin": ("rows", put(*SITE, "rows", to=[32, 16]), "rows"),
    "rows that are adapted twice": (
        "rows",
        lambda p: p["groups"][1]["sites"][0].update(rows=p["groups"][0]["sites"][0]["rows"]),
        "adapted twice",
    ),
    "two sites of one path": (
        "rows",
        lambda p: p["groups"][1]["sites"][0].update(path=p["groups"][0]["sites"][0]["path"]),
        "adapted twice",
    ),
    "a site that is joined to itself": (
        "tie",
        lambda p: p["groups"][0]["sites"][0].update(joined=[p["groups"][0]["sites"][0]["path"]]),
        "adapted twice",
    ),
    "a kind less": ("tie", put(*SITE, "joined_kinds", to=["linear", "linear"]), "kinds"),
    "a kind that is none": ("lotr", put(*SITE, "kind", to="cloud"), "kind"),
    "a delivery that is none": ("lotr", put(*SITE, "delivery", to="post"), "delivery"),
    "an index that is negative": ("experts", put(*SITE, "index", to=-1), "index"),
    "another module's name": ("lotr", put(*SITE, "owner", to="pooler.dense"), "another module"),
    "two groups of one name": (
        "rows",
        lambda p: p["groups"][1].update(
            name=p["groups"][0]["name"], store={n: f"{p['groups'][0]['name']}.{n}" for n in p["groups"][1]["store"]}
        ),
        "one name",
    ),
    "a name with a command for the terminal": ("lotr", put("model", to="\x1b[2J"), "model"),
    "half a character": ("lotr", put(*SITE, "path", to="\ud800"), "path"),
    "half a character in the spec": ("lotr", put("spec", "rules", 0, "family", to="\ud800"), "spec"),
    "a count that is not so": ("lotr", put("num_trainable", to=lambda n: n + 1), "num_trainable"),
    "a number of sites that is not so": ("lotr", put("num_sites", to=1), "num_sites"),
    "the share of a model in words": ("lotr", put("num_model", to="all"), "num_model"),
    "notes that are no list": ("lotr", put("notes", to="rank"), "notes"),
    "a shape in words": ("train", put("extras", "classifier.weight", to=["3", 16]), "extras"),
    "a key that nobody knows": ("lotr", lambda p: p.update(colour="red"), "colour"),
    "a rule that is a preset": ("lotr", lambda p: p["spec"]["rules"][0].update(preset="lora"), "spec|written out"),
    "a start that the rule has not": ("lotr", put("groups", 0, "start", to="nonzero"), "start"),
    "a rule that the spec has not": ("lotr", put("groups", 0, "rule", to=9), "the rule of group"),
    "axes in another order": ("lotr", put("groups", 0, "diagram", "open", to=lambda axes: axes[::-1]), "group"),
    "convolutions of one dimension that are linear": ("lotr", put(*SITE, "dims", to=1), "the shape of"),
    "a place beyond the axis": (
        "lotr",
        put(*SITE, "place", to=lambda at: {k: n + 9999 for k, n in at.items()}),
        "place",
    ),
    "a layout by another word": ("lotr", put("layouts", to="guessed"), "layouts"),
}


@pytest.mark.parametrize(("kind", "change", "says"), REFUSED.values(), ids=REFUSED)
def test_what_contradicts_itself_is_refused_by_name(kind, change, says, tmp_path):
    file = changed(saved(kind, tmp_path), change)
    with pytest.raises(ta.FileError, match=rf"(?s)the plan in .*adapter\.safetensors is damaged.*({says})"):
        ta.open_adapter(file)
    with pytest.raises(ta.FileError):
        ta.load(file, MODELS[kind][0]())


@pytest.mark.parametrize("name", ["scale", "rule", "path", "model"])
def test_a_key_that_is_twice_in_the_plan_is_refused(name, tmp_path):
    file = saved("lotr", tmp_path)
    text = header(file)[0]["__metadata__"]["tensoradapt"]
    with pytest.raises(ta.FileError, match=f"{name!r} is there 2 times"):
        ta.open_adapter(with_text(file, text.replace(f'"{name}": ', f'"{name}": 1, "{name}": ', 1)))


def test_a_tensor_that_is_twice_in_the_header_is_refused(tmp_path):
    file = saved("lotr", tmp_path)
    head, tail = header(file)
    key = next(key for key in head if key != "__metadata__")
    text = json.dumps(head)[:-1] + f", {json.dumps(key)}: {json.dumps(head[key])}}}"
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + tail)
    with pytest.raises(ta.FileError, match=f"'{key}' is there 2 times"):
        ta.open_adapter(file)


@pytest.mark.parametrize(
    "base", [{"shapes": "0" * 64}, {"shapes": "none"}, {"shapes": 7}, {"name": ["bert"]}, {"revision": None}]
)
def test_what_a_file_says_of_its_base_is_that_of_its_plan(base, tmp_path):
    file = saved("lotr", tmp_path)
    head, tail = header(file)
    head["__metadata__"]["base"] = json.dumps(json.loads(head["__metadata__"]["base"]) | base)
    write(file, head, tail)
    with pytest.raises(ta.FileError, match="base|other shapes"):
        ta.open_adapter(file)


def test_numbers_of_no_common_kind_are_refused(tmp_path):
    """float8 has no isfinite; whoever stores factors so has to say how they are scaled."""
    file = saved("lotr", tmp_path)
    head, _ = header(file)
    end = 0
    for entry in (entry for key, entry in head.items() if key != "__metadata__"):
        size = (entry["data_offsets"][1] - entry["data_offsets"][0]) // 4
        entry |= {"dtype": "F8_E4M3", "data_offsets": [end, end := end + size]}
    write(file, head, bytes(end))
    with pytest.raises(ta.FileError, match="float8_e4m3fn(?s:.*)expected: one of"):
        ta.open_adapter(file)


def wide(make):
    """A model whose weights have other sizes than the adapter's."""
    return {tiny.bert: lambda: tiny.bert(hidden_size=32), tiny.gpt2: lambda: tiny.gpt2(n_embd=32)}.get(make)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if wide(MODELS[kind][0])])
def test_the_shapes_that_were_recorded_are_those_of_the_model(kind, tmp_path):
    file, model = saved(kind, tmp_path), wide(MODELS[kind][0])()
    with pytest.raises(ta.FileError, match="another shape"):
        ta.load(file, model)
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(ta.FileError, match="another shape"):
        ta.merge_folder(tmp_path / "base", file, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_every_plan_of_ours_is_read_as_it_was():
    for case in CASES[::4]:
        plan = case.plan()
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan, case.name
        assert Plan.from_dict(plan.to_dict()) == plan, case.name


def test_a_scale_that_no_file_would_be_read_with_is_refused_at_once(tmp_path):
    with pytest.raises(ta.SpecError, match="scale"):
        ta.preset("lora", rank=2, targets=QV, scale=1e13)
    adapter = ta.attach(tiny.bert(), ta.preset("lora", rank=2, targets=QV, scale=1e10))
    adapter.scale = 1e10
    with pytest.raises(ta.FileError, match="scale(?s:.*)1e\\+20"):
        adapter.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    adapter.scale = 1e-10
    ta.load(adapter.save(tmp_path / "a"), tiny.bert())


def test_seven_nodes_are_lowered_as_fast_as_six():
    """There are five thousand orders of seven nodes; most of them come to the same."""
    began = time.process_time()
    folds = dict.fromkeys(("out", "in"), "auto:7")
    rule = ta.Rule(targets=["0"], format="ttm", rank=2, start="nonzero", folds=folds)
    assert ta.plan(rule, {"0": (4096, 4096)}).groups[0].lowering
    assert time.process_time() - began < 2


def test_more_indices_than_einsum_has_letters_are_refused_when_planned():
    rule = ta.Rule(targets=["0"], format="ttm", rank=1, start="nonzero", folds=dict.fromkeys(("out", "in"), "auto:25"))
    with pytest.raises(ta.SpecError, match="too many indices"):
        ta.attach(nn.Sequential(nn.Linear(8, 8)), rule)


def test_a_network_that_one_bond_does_not_join_is_no_cp():
    adapter = ta.attach(tiny.bert(), MODELS["vera"][1]())
    with pytest.raises(ta.SpecError, match="TensorLy has no class"):
        adapter.to_tensorly()
