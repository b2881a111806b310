"""Figures: what is drawn is what the table and the diagram say, no text covers another, and no file is half written."""

import json
import math
import re
import subprocess
import sys
from itertools import combinations, pairwise

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from matplotlib.text import Text

import tensoradapt as ta
from tensoradapt.budget import BudgetRow, BudgetTable
from tensoradapt.diagram import Diagram
from tensoradapt.formats.network import parse
from tensoradapt.plots import draw_diagram, plot_budget

LAYERS = range(2)
ROLES = {
    **dict.fromkeys(("attention.self.query", "attention.self.key", "attention.self.value"), (768, 768)),
    **{"attention.output.dense": (768, 768), "intermediate.dense": (3072, 768), "output.dense": (768, 3072)},
}
MODEL = {f"encoder.layer.{k}.{role}": shape for k in LAYERS for role, shape in ROLES.items()} | {"conv": (64, 32, 3, 3)}
OKABE_ITO = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
SUFFIXES = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF", ".pgf": b"%% A picture for LaTeX"}


def network(text: str, folds=None, size: int = 4) -> Diagram:
    nodes, axes = parse(text)
    return Diagram({i: size for indices in nodes.values() for i in indices}, nodes, axes, folds or {})


def groups(name: str, **parameters):
    """One group of every network that a preset makes."""
    if "heads" in ta.PRESETS[name].parameters:
        parameters["heads"] = 12
    plan = ta.plan(ta.preset(name, **parameters), MODEL)
    return list({tuple(group.diagram.nodes.items()): group for group in plan.groups}.values())


def picture(group) -> Figure:
    zero = [node for node, law in group.laws.items() if law == "zero"]
    return draw_diagram(group.diagram, frozen=group.rule.frozen, zero="".join(zero), title=group.rule.family)


PRESETS = [(name, {}) for name in ta.PRESETS] + [
    *((name, {"form": "cp"}) for name in ta.PRESETS if name.startswith("tenslora")),
    ("lokr", {"decompose": False}),
    ("tt_lora", {"folds": "auto:6"}),
    ("quanta", {"folds": "auto:4"}),
    ("dota", {"folds": "auto:5"}),
    ("mpo_shared", {"folds": "auto:5"}),
]
SIDES = {"out": ("out_0", "out_1"), "in": ("in_0", "in_1")}
TREE = (
    "U1: out_0 a, U2: out_1 b, U3: in_0 c, U4: in_1 d, T12: a b e, T34: c d f, root: e f layer"
    " -> layer out_0 out_1 in_0 in_1"
)
NETWORKS = {
    "tree": network(TREE, SIDES),
    "parallel bonds": network("A: out a b c, B: a b c d, C: d in -> out in"),
    "one node": network("W: layer role out in -> layer role out in"),
    "all axes shared": network("W: layer out in, V: layer out in -> layer out in"),
    "in parts": network("A: out a b, B: a c, C: b c in, s: layer -> layer out in"),
    "a bond of one end": Diagram(
        dict.fromkeys(("out", "in", "a", "q"), 4), {"A": ("out", "a", "q"), "B": ("a", "in")}, ("out", "in"), {}
    ),
    "batch on every core": network(
        "c0: layer out_0 in_0 a, c1: layer a out_1 in_1 b, c2: layer b out_2 in_2"
        " -> layer out_0 out_1 out_2 in_0 in_1 in_2",
        {"out": ("out_0", "out_1", "out_2"), "in": ("in_0", "in_1", "in_2")},
    ),
    "a node named as a bond": network("r: out r, s: r in -> out in"),
    "long names": network("a_rather_long_name: out a, another_rather_long_name: a b, third_of_them: b in -> out in"),
}


def texts(figure: Figure) -> list[Text]:
    """The texts that are drawn: no labels of ticks beyond the ends of an axis, nor of axes that are switched off."""
    figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        hidden = {label for axis in (axes.xaxis, axes.yaxis) for label in beyond(axis)}
        shown = axes.findobj(Text) if axes.axison else [*axes.texts, *axes.get_legend().get_texts()]
        found += [text for text in shown if text not in hidden]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def beyond(axis) -> list[Text]:
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]


def extents(figure: Figure) -> dict[str, object]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return {text: text.get_window_extent(canvas.get_renderer()) for text in texts(figure)}


def overlapping(figure: Figure) -> list[tuple[str, str]]:
    boxes = {text: box for text, box in extents(figure).items()}
    return [
        (a.get_text(), b.get_text())
        for a, b in combinations(boxes, 2)
        if min(boxes[a].x1, boxes[b].x1) - max(boxes[a].x0, boxes[b].x0) > 0.1
        and min(boxes[a].y1, boxes[b].y1) - max(boxes[a].y0, boxes[b].y0) > 0.1
    ]


def outside(figure: Figure) -> list[str]:
    width, height = figure.bbox.size
    return [
        text.get_text()
        for text, box in extents(figure).items()
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
    ]


def said(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def expected(diagram: Diagram) -> list[str]:
    """Every node once, every bond and axis once with its size."""
    indices = {index for indices in diagram.nodes.values() for index in indices}
    return [*diagram.nodes, *(f"{index}={diagram.sizes[index]}" for index in indices)]


def circles(figure: Figure) -> dict[str, Circle]:
    """The circle of every node, by the name that stands nearest to it."""
    labels = {t.get_text(): t.get_position() for t in figure.axes[0].texts if "=" not in t.get_text()}
    found = [patch for patch in figure.axes[0].patches if patch.radius > 1]
    return {name: min(found, key=lambda c, p=place: math.dist(c.center, p)) for name, place in labels.items() if name}


def lines(figure: Figure):
    return [line.get_xydata() for line in figure.axes[0].lines]


# ------------------------------------------------------------------------------------------------ diagrams


@pytest.mark.parametrize(("name", "parameters"), PRESETS, ids=lambda value: str(value) if value else "")
def test_every_preset_is_drawn_without_overlap_in_one_column(name, parameters):
    for group in groups(name, **parameters):
        figure = picture(group)
        assert set(expected(group.diagram)) <= set(said(figure))
        assert overlapping(figure) == [] and outside(figure) == []
        if not parameters:
            assert figure.get_size_inches()[0] * 25.4 == pytest.approx(80)


@pytest.mark.parametrize("name", NETWORKS)
def test_users_networks_are_drawn_without_overlap(name):
    figure = draw_diagram(NETWORKS[name], title=name)
    drawn = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(drawn) == sorted([*expected(NETWORKS[name]), name])
    assert overlapping(figure) == [] and outside(figure) == []


@pytest.mark.parametrize(("name", "parameters"), PRESETS, ids=lambda value: str(value) if value else "")
def test_no_text_lies_on_a_circle_but_a_name_within_its_own(name, parameters):
    for group in groups(name, **parameters):
        figure = picture(group)
        to_data = figure.axes[0].transData.inverted()
        boxes = {t: box.transformed(to_data) for t, box in extents(figure).items() if t in figure.axes[0].texts}
        for text, box in boxes.items():
            for patch in figure.axes[0].patches:
                x, y = patch.center
                gap = math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))
                within = math.dist(patch.center, text.get_position()) < 1e-9 and box.width < 2 * patch.radius
                assert gap > patch.radius - 0.05 or within, (name, text.get_text())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_diagram_is_saved_by_suffix(tmp_path, suffix):
    path = tmp_path / "new" / f"lotr{suffix.upper()}"
    draw_diagram(groups("lotr")[0].diagram, path, "LoTR")
    assert path.read_bytes().startswith(SUFFIXES[suffix])
    assert list(path.parent.iterdir()) == [path]


def test_an_svg_has_its_words_as_text(tmp_path):
    group = groups("lotr")[0]
    draw_diagram(group.diagram, tmp_path / "a.svg", "LoTR of $r$", zero="core")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text("utf-8"))
    assert set(words) >= {*expected(group.diagram), "LoTR of $r$", "coordinate", "out", "in", "zero at the start"}


@pytest.mark.parametrize("suffix", [".svg", ".pdf", ".png"])
def test_one_diagram_gives_one_file(tmp_path, suffix):
    paths = [tmp_path / f"{k}{suffix}" for k in (1, 2)]
    for path in paths:
        draw_diagram(groups("vera")[0].diagram, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def places(figure: Figure) -> dict[str, tuple[float, float]]:
    return {name: circle.center for name, circle in circles(figure).items()}


def test_a_train_is_a_line():
    at = places(draw_diagram(groups("metatt_4d")[0].diagram))
    assert len({round(y, 6) for _, y in at.values()}) == 1
    assert sorted(at, key=lambda name: at[name]) == ["core_in", "core_layer", "core_role", "core_out"]


def test_a_long_train_turns_round():
    at = places(draw_diagram(groups("tt_lora")[0].diagram))
    assert at["core_in_0"][1] == at["core_in_3"][1] > at["core_out_0"][1] == at["core_out_3"][1]
    assert at["core_in_3"][0] == at["core_out_0"][0] and at["core_in_0"][0] == at["core_out_3"][0]


def test_a_matrix_train_has_out_above_and_in_below():
    figure = draw_diagram(groups("dota")[0].diagram)
    height = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    middle = places(figure)["core_0"][1]
    assert min(height["out_0=12"], height["out_1=8"], height["out_2=8"]) > middle
    assert max(height["in_0=12"], height["in_1=8"], height["in_2=8"]) < middle


def test_tuckers_core_is_in_the_centre():
    at = places(draw_diagram(groups("tenslora_qkv_depth")[0].diagram))
    x, y = at.pop("core")
    assert len(at) == 4 and sum(px for px, _ in at.values()) == pytest.approx(4 * x)
    assert sum(py for _, py in at.values()) == pytest.approx(4 * y)


def test_a_hyperedge_is_a_dot_that_lines_to_all_its_nodes_meet_in():
    figure = draw_diagram(groups("lorta")[0].diagram)
    dots = [patch for patch in figure.axes[0].patches if patch.radius < 1]
    assert len(dots) == 1
    meeting = [tuple(end) for line in lines(figure) for end in (line[0], line[-1]) if tuple(end) == dots[0].center]
    assert len(meeting) == len(groups("lorta")[0].diagram.nodes)


def test_parallel_bonds_are_apart():
    figure = draw_diagram(NETWORKS["parallel bonds"])
    at = places(figure)
    between = [line for line in lines(figure) if {tuple(line[0]), tuple(line[-1])} == {at["A"], at["B"]}]
    heights = sorted(line[len(line) // 2][1] for line in between)
    assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) > 2


def test_an_axis_on_several_nodes_is_a_dot_with_one_leg():
    figure = draw_diagram(groups("mpo_shared")[0].diagram)
    dot = next(patch for patch in figure.axes[0].patches if patch.radius < 1)
    assert sum(dot.center in (tuple(line[0]), tuple(line[-1])) for line in lines(figure)) == 3
    assert said(figure).count("layer=2") == 1


def test_the_kinds_of_axes_differ_in_colour_and_stand_in_the_key():
    figure = draw_diagram(groups("lotr")[0].diagram)
    drawn = {line.get_color() for line in figure.axes[0].lines}
    assert len(drawn) == 4 and len(drawn & OKABE_ITO) == 3  # bonds, and three kinds of legs
    assert {"coordinate", "out", "in"} <= set(said(figure)) and "kernel" not in said(figure)
    assert "kernel" in said(draw_diagram(groups("locon")[0].diagram))


def luminance(colour) -> float:
    """Relative luminance as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("name", ["lotr", "locon"])
def test_letters_have_contrast_and_size(name):
    for text in texts(draw_diagram(groups(name)[0].diagram)):
        assert 1.05 / (luminance(text.get_color()) + 0.05) > 4.5, text.get_text()
        assert text.get_fontsize() >= 6


def test_frozen_nodes_are_hatched_and_the_zero_node_is_empty():
    group = groups("vera")[0]
    drawn = circles(picture(group))
    assert {name for name, circle in drawn.items() if circle.get_hatch()} == {"A", "B"} == set(group.rule.frozen)
    assert {name for name, circle in drawn.items() if circle.get_facecolor() == (1, 1, 1, 1)} == {"b"}
    plain = draw_diagram(group.diagram)
    assert not any(patch.get_hatch() for patch in plain.axes[0].patches)
    assert not {"frozen", "zero at the start"} & set(said(plain))


@pytest.mark.parametrize("marked", [{"frozen": ("core", "cor")}, {"zero": "cor"}])
def test_a_node_that_the_diagram_lacks_is_refused(tmp_path, marked):
    with pytest.raises(ta.SpecError, match="no node 'cor'"):
        draw_diagram(groups("lotr")[0].diagram, tmp_path / "a.png", **marked)
    assert list(tmp_path.iterdir()) == []


def test_a_diagram_without_nodes_is_refused():
    with pytest.raises(ta.SpecError, match="no nodes"):
        draw_diagram(Diagram({}, {}, ()))


# ------------------------------------------------------------------------------------------------ budgets


def specs():
    return {"lora": ta.preset("lora"), "lotr": ta.preset("lotr"), "krona": ta.preset("krona")}


def table() -> BudgetTable:
    return ta.budget(specs(), MODEL, [1, 2, 4, 8, 16])


def row(spec: str, rank: int | None, shares: dict[str, int], bank: int = 0) -> BudgetRow:
    count = sum(shares.values()) + bank
    return BudgetRow(spec, rank, count, count, 4 * count, 2 * count, shares)


def bars(figure: Figure) -> dict[str, list[float]]:
    """The widths of every part, from the first bar to the last."""
    return {c.get_label(): [patch.get_width() for patch in c.patches] for c in figure.axes[1].containers}


def test_the_lines_are_the_tables_counts():
    rows = table().rows
    drawn = {line.get_label(): line for line in plot_budget(table()).axes[0].lines}
    for spec in ("lora", "lotr"):
        points = [(r.rank, r.num_trainable) for r in rows if r.spec == spec]
        assert [tuple(map(int, point)) for point in drawn[spec].get_xydata()] == points


def test_a_spec_without_a_rank_and_the_budget_are_horizontal():
    krona = next(r for r in table().rows if r.spec == "krona")
    figure = plot_budget(table(), max_parameters=50_000)
    drawn = {line.get_label(): set(line.get_ydata()) for line in figure.axes[0].lines}
    assert krona.rank is None and drawn["krona"] == {krona.num_trainable}
    assert drawn["budget 50,000"] == {50_000}
    assert not any(label.startswith("budget") for label in said(plot_budget(table())))


@pytest.mark.parametrize(("largest", "scale"), [(200, "linear"), (100_000, "log")])
def test_the_scale_is_logarithmic_where_counts_are_far_apart(largest, scale):
    rows = (row("a", 4, {"q": 100}), row("a", 5, {"q": largest}))
    axes = plot_budget(BudgetTable(rows)).axes[0]
    assert axes.get_yscale() == scale and axes.get_xscale() == "linear"
    assert plot_budget(table()).axes[0].get_xscale() == "log"


def test_ticks_stand_at_ranks():
    assert [t.get_text() for t in plot_budget(table()).axes[0].get_xticklabels()] == ["1", "2", "4", "8", "16"]
    rows = tuple(row("a", rank, {"q": 10 * rank}) for rank in range(1, 65))
    ticks = [t.get_text() for t in plot_budget(BudgetTable(rows)).axes[0].get_xticklabels()]
    assert ticks == ["1", "2", "4", "8", "16", "32", "64"]


def test_shares_are_those_of_the_roles_at_the_rank():
    rows = (row("a", 1, {"q": 3, "v": 1}), row("a", 2, {"q": 8, "v": 2}), row("b", None, {"v": 5}))
    figure = plot_budget(BudgetTable(rows))
    assert bars(figure) == {"q": [80, 0], "v": [20, 100]}
    assert "at rank 2" in figure.axes[1].get_xlabel()
    assert {"a\n10", "b\n5"} <= set(said(figure))
    assert bars(plot_budget(BudgetTable(rows), rank=1)) == {"q": [75, 0], "v": [25, 100]}


def test_a_bar_at_another_rank_says_so():
    figure = plot_budget(BudgetTable((row("a", 1, {"q": 3}), row("b", 2, {"q": 4}))))
    assert {"a\n3", "b, rank 2\n4"} <= set(said(figure))


def test_what_groups_share_is_a_part_of_its_own():
    drawn = bars(plot_budget(BudgetTable((row("a", 1, {"q": 3, "v": 1}, bank=4),))))
    assert drawn == {"q": [37.5], "v": [12.5], "shared by groups": [50.0]}


def test_many_roles_are_gathered_to_a_legible_number():
    shares = {f"role_{k}": 10 + k for k in range(40)}
    figure = plot_budget(BudgetTable((row("a", 1, shares),)))
    drawn = bars(figure)
    assert len(drawn) <= 8 and list(drawn)[-1] == "others"
    assert "role_39" in drawn and "role_0" not in drawn
    assert sum(width for widths in drawn.values() for width in widths) == pytest.approx(100)
    assert overlapping(figure) == []


def test_no_text_of_a_budget_covers_another():
    names = [name for name in ta.PRESETS if name != "locon" and not name.startswith("tenslora")]
    made = {n: ta.preset(n, **({"heads": 12} if "heads" in ta.PRESETS[n].parameters else {})) for n in names}
    figure = plot_budget(ta.budget(made, MODEL, [4, 8, 16]), max_parameters=123_456)
    assert overlapping(figure) == [] and outside(figure) == []
    assert set(names) <= set(said(figure))


@pytest.mark.parametrize("rank", [None, 4])
def test_the_lines_of_twenty_specs_differ(tmp_path, rank):
    rows = tuple(row(f"spec_{k}", rank, {"q": 10 + k}) for k in range(20))
    plot_budget(BudgetTable(rows), tmp_path / "a.svg")
    styles = re.findall(r'style="([^"]*stroke-width: 1.2[^"]*)"', (tmp_path / "a.svg").read_text("utf-8"))
    assert len(styles) >= 20 and len(set(styles)) == 20


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_budget_is_saved_by_suffix(tmp_path, suffix):
    plot_budget(table(), str(tmp_path / f"budget{suffix}"), max_parameters=40_000)
    assert (tmp_path / f"budget{suffix}").read_bytes().startswith(SUFFIXES[suffix])
    assert [path.name for path in tmp_path.iterdir()] == [f"budget{suffix}"]


def test_a_budgets_svg_has_its_words_as_text(tmp_path):
    plot_budget(table(), tmp_path / "a.svg", max_parameters=40_000)
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text("utf-8"))
    assert set(words) >= {"lora", "lotr", "krona", "budget 40,000", "rank", "trainable parameters", "query", "value"}


def test_names_are_no_markup(tmp_path):
    figure = plot_budget(BudgetTable((row("$a_1^$", 1, {"$q": 3}),)), tmp_path / "a.svg")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "a.svg").read_text("utf-8"))
    assert {"$a_1^$", "$q"} <= set(words) and overlapping(figure) == []


def test_an_empty_table_and_a_rank_that_it_lacks_are_refused():
    with pytest.raises(ta.SpecError, match="no rows"):
        plot_budget(BudgetTable(()))
    with pytest.raises(ta.RankError, match="no rank 3"):
        plot_budget(table(), rank=3)


# ------------------------------------------------------------------------------------------------ files and state


def draw_either(kind: str, path) -> None:
    if kind == "budget":
        plot_budget(table(), path)
    else:
        draw_diagram(groups("lora")[0].diagram, path)


@pytest.mark.parametrize("kind", ["budget", "diagram"])
@pytest.mark.parametrize("name", ["a.bmp", "a", ".png", "a.png.txt"])
def test_an_unknown_suffix_is_refused_and_leaves_no_file(tmp_path, kind, name):
    with pytest.raises(ta.FileError, match=r"\.png, \.svg, \.pdf, \.pgf"):
        draw_either(kind, tmp_path / "new" / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["budget", "diagram"])
def test_a_failure_while_saving_leaves_the_old_file(tmp_path, monkeypatch, kind):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def torn(self, target, **options):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", torn)
    with pytest.raises(ta.FileError, match="No space left"):
        draw_either(kind, path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_matplotlibs_settings_stay(tmp_path):
    before = dict(matplotlib.rcParams)
    draw_either("budget", tmp_path / "a.svg")
    draw_either("diagram", tmp_path / "b.pdf")
    assert dict(matplotlib.rcParams) == before


DRAW = """
import json, sys
import tensoradapt as ta
from tensoradapt.plots import draw_diagram, plot_budget
early = sorted(m for m in sys.modules if m.partition(".")[0] == "matplotlib")
model = {"layer.0.query": (8, 8)}
spec = ta.preset("lora", rank=2)
plot_budget(ta.budget(spec, model, [1, 2]), sys.argv[1] + "/a.png")
draw_diagram(ta.plan(spec, model).groups[0].diagram, sys.argv[1] + "/a.svg")
print(json.dumps([early, "matplotlib.figure" in sys.modules, "matplotlib.pyplot" in sys.modules]))
"""


def test_drawing_takes_no_pyplot_and_importing_no_matplotlib(tmp_path):
    ran = subprocess.run([sys.executable, "-c", DRAW, str(tmp_path)], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == [[], True, False]
