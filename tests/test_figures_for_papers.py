"""Figures for papers: the user's axes, sizes, texts, colours and settings; PGF; no line hides another; threads."""

import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import matplotlib
import matplotlib.style
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from reports import EXTREMES
from test_plots import MODEL, OKABE_ITO, luminance, row, table
from test_report_figures import boxes, outside, overlapping, panels
from test_report_figures import texts as words

import tensoradapt as ta
from tensoradapt.budget import BudgetTable
from tensoradapt.plots import FIGURES, Scored, draw_figure, drawable, plot_budget, plot_scores
from tensoradapt.plots.ends import spread
from tensoradapt.plots.page import Letters

SMALL, WIDE = (3.25, 2.5), (7.0, 3.0)
SERIF = {"font.family": ["serif"], "font.size": 9}


@cache
def report(name: str):
    return EXTREMES[name]()


def sound(figure: Figure) -> None:
    """No text covers another, and none leaves the figure."""
    found = boxes(figure)
    assert overlapping(found) == [] and outside(figure, found) == []


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("size", [SMALL, WIDE, (2.4, 4.0)])
@pytest.mark.parametrize("settings", [{}, SERIF], ids=["small letters", "the user's letters"])
def test_a_budget_has_the_size_asked_for_and_its_words_have_room(size, settings):
    with matplotlib.rc_context(settings):
        figure = plot_budget(table(), figsize=size, max_parameters=40_000)
        assert figure.get_size_inches().tolist() == list(size)
        sound(figure)


@pytest.mark.parametrize("size", [SMALL, WIDE])
@pytest.mark.parametrize("name", ["bert", "eighty layers", "one layer", "twelve groups of long names", "float32"])
@pytest.mark.parametrize("figure", FIGURES)
def test_a_reports_figure_has_the_size_asked_for_and_its_words_have_room(name, figure, size):
    if figure in drawable(report(name)):
        drawn = draw_figure(report(name), figure, figsize=size)
        assert drawn.get_size_inches().tolist() == list(size)
        sound(drawn)


def test_panels_fill_their_rows_evenly_and_narrow_pages_have_fewer_abreast():
    for size, columns in ((None, 2), ((3.25, 4.0), 2), ((1.8, 6.0), 1), ((12.0, 3.0), 2)):
        drawn = draw_figure(report("bert"), "spectra", figsize=size)
        assert len({round(axes.get_position().x0, 3) for axes in panels(drawn)}) == columns


@pytest.mark.parametrize("figure", FIGURES)
def test_larger_letters_have_room_too(figure):
    with matplotlib.rc_context({"font.size": 11}):
        drawn = draw_figure(report("bert"), figure)
        sound(drawn)
        assert min(text.get_fontsize() for text in words(drawn)) > 9


def test_a_width_of_the_settings_is_the_figures():
    with matplotlib.rc_context({"figure.figsize": (3.5, 2.0)}):
        figure = plot_budget(table())
    assert figure.get_figwidth() == 3.5 and figure.get_figheight() > 3


def test_a_small_figure_shows_the_counts_alone_and_a_wide_one_both_panels_abreast():
    assert len(plot_budget(table(), figsize=SMALL).axes) == 1
    left, right = plot_budget(table(), figsize=WIDE).axes
    assert left.get_position().x1 < right.get_position().x0


@pytest.mark.parametrize("figsize", [3, (3,), (3, "a"), (3, 0), (3, float("nan")), (400, 300), "3x2"])
def test_no_size_is_refused(figsize):
    with pytest.raises(ta.SpecError, match="figsize is no size in inches"):
        plot_budget(table(), figsize=figsize)


# ------------------------------------------------------------------------------------------------ axes


def test_a_budget_is_drawn_into_the_axes_given():
    own = Figure(figsize=(6, 3), layout="constrained")
    first, second = own.subplots(1, 2)
    before = list(second.get_children())
    assert plot_budget(table(), ax=first) is own
    assert own.axes == [first, second] and second.get_children() == before
    assert {line.get_label() for line in first.lines} == {"lora", "lotr", "krona"}
    sound(own)
    assert plot_budget(table(), ax=[first, second]) is own and len(second.containers) > 1


@pytest.mark.parametrize("name", ["bert", "one layer", "eighty layers"])
@pytest.mark.parametrize("figure", FIGURES)
def test_a_reports_figure_is_drawn_into_the_axes_given(name, figure):
    if figure not in drawable(report(name)):
        return
    natural = draw_figure(report(name), figure)
    count = len([axes for axes in panels(natural) if not hasattr(axes, "_colorbar")])
    own = Figure(figsize=(4 * count, 4), layout="constrained")
    given = own.subplots(1, count)
    assert draw_figure(report(name), figure, ax=given) is own
    sound(own)


def test_axes_within_subfigures_will_do():
    own = Figure(figsize=(6, 3), layout="constrained")
    axes = own.subfigures(1, 2)[0].subplots()
    assert plot_budget(table(), ax=axes) is own


def test_axes_of_which_there_are_too_many_are_refused():
    with pytest.raises(ta.SpecError, match="the figure has 4 panels"):
        draw_figure(report("bert"), "spectra", ax=Figure().subplots(2, 4))
    with pytest.raises(ta.SpecError, match="two panels"):
        plot_budget(table(), ax=Figure().subplots(3))


def test_fewer_axes_show_the_largest_changes():
    own = Figure()
    draw_figure(report("bert"), "spectra", ax=own.subplots())
    norms: dict[str, float] = {}
    for site in report("bert")["sites"].values():
        role = site["coordinates"]["role"]
        norms[role] = norms.get(role, 0.0) + site["norm"] ** 2
    assert own.axes[0].get_title(loc="left") == max(norms, key=norms.__getitem__)


@pytest.mark.parametrize("ax", [3, "axes", [], [1, 2]])
def test_what_is_no_axes_is_refused(ax):
    with pytest.raises(ta.SpecError, match="ax is no axes"):
        plot_budget(table(), ax=ax)


def test_axes_and_a_size_are_one_too_many():
    with pytest.raises(ta.SpecError, match="ax and figsize"):
        plot_budget(table(), ax=Figure().subplots(), figsize=SMALL)


# ------------------------------------------------------------------------------------------------ labels and colours


def test_labels_replace_names_and_may_be_mathematics():
    figure = plot_budget(table(), labels={"lora": "LoRA", "lotr": r"LoTR, $r^2$", "query": "Q"})
    found = [text.get_text() for text in words(figure)]
    assert {"LoRA", r"LoTR, $r^2$", "Q", "krona"} <= set(found) and "lora" not in found
    sound(figure)


@pytest.mark.parametrize(
    ("figure", "name"),
    [("front", "lora"), ("front", "LoRA r=4"), ("budget", "48x48"), ("ranks", "attention.self.key"),
     ("spectra", "attention.self.key"), ("modes", "48x48"), ("modes", "role"), ("similarity", "96x48")],
)  # fmt: skip
def test_every_name_of_a_reports_figure_has_its_label(figure, name):
    drawn = draw_figure(report("bert"), figure, labels={name: "Another"})
    drawn.draw_without_rendering()
    assert any("Another" in text.get_text() for text in words(drawn))


def test_colours_by_name_and_in_order():
    named = plot_budget(table(), colors={"lotr": "black"}).axes[0].lines
    assert named[1].get_color() == "black" and named[0].get_color() in OKABE_ITO
    listed = plot_budget(table(), colors=["red", "tab:green"]).axes[0].lines
    assert [line.get_color() for line in listed] == ["red", "tab:green", "red"]


def test_shaded_figures_take_a_map_of_colours():
    drawn = draw_figure(report("bert"), "ranks", colors="viridis")
    assert drawn.axes[0].collections[0].cmap.name == "viridis"
    lines = draw_figure(report("bert"), "spectra", colors=["white", "red"]).axes[0].lines
    assert to_rgb(lines[1].get_color()) == pytest.approx((1, 1, 1), abs=0.01)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"labels": {"lorra": "LoRA"}}, "labels names 'lorra'"),
        ({"labels": ["LoRA"]}, "labels are no texts"),
        ({"labels": {"lora": 3}}, "labels are no texts"),
        ({"labels": {"lora": r"$\frac{1}$"}}, "no mathematics"),
        ({"colors": {"lorra": "red"}}, "colors names 'lorra'"),
        ({"colors": {"lora": "rosé"}}, "no colours that matplotlib knows"),
        ({"colors": "blue"}, "no colours that matplotlib knows"),
        ({"colors": []}, "no colours that matplotlib knows"),
    ],
)
def test_labels_and_colours_that_cannot_be_are_refused(tmp_path, choices, says):
    with pytest.raises(ta.SpecError, match=says):
        plot_budget(table(), tmp_path / "a.png", **choices)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ no line hides another


def twins(count: int) -> BudgetTable:
    """Specs whose counts are the same, or nearly."""
    return BudgetTable(tuple(row(f"spec_{k}", 2**n, {"q": 100 * 4**n + k}) for k in range(count) for n in range(6)))


def painted(figure: Figure, line) -> int:
    """How many pixels have a line's own colour."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    return int((abs(pixels - np.array(to_rgb(line.get_color())) * 255).sum(-1) < 30).sum())


@pytest.mark.parametrize("count", [2, 3, 4])
def test_lines_that_coincide_are_all_seen(count):
    figure = plot_budget(twins(count), figsize=SMALL)
    figure.set_dpi(200)
    lines = figure.axes[0].lines[:count]
    for line in lines:
        line.set_marker("none")
    assert min(painted(figure, line) for line in lines) > 150


def test_markers_of_lines_that_coincide_nest():
    first, second, third = plot_budget(twins(3)).axes[0].lines
    assert first.get_markersize() > second.get_markersize() > third.get_markersize()
    assert first.get_markerfacecolor() == second.get_markerfacecolor() == "none" != third.get_markerfacecolor()
    assert len({line.get_marker() for line in (first, second, third)}) == 3


def test_lines_that_stand_apart_are_left_as_they_are():
    rows = tuple(row(name, 2**n, {"q": size * 2**n}) for name, size in (("a", 10), ("b", 90)) for n in range(5))
    lines = plot_budget(BudgetTable(rows)).axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-", "-"]


def test_lotr_and_metatt_on_query_and_value_are_both_seen():
    specs = {n: ta.preset(n, targets=["query", "value"], rank=1) for n in ("lora", "lotr", "metatt_4d")}
    figure = plot_budget(ta.budget(specs, MODEL, [1, 2, 4, 8]), figsize=SMALL)
    figure.set_dpi(200)
    assert min(painted(figure, line) for line in figure.axes[0].lines) > 150


def test_names_stand_at_the_ends_of_their_lines_in_their_order():
    (axes,) = plot_budget(table(), figsize=SMALL).axes
    names = sorted(axes.texts, key=lambda text: text.get_position()[1])
    ends = {line.get_label(): line.get_ydata()[-1] for line in axes.lines}
    assert [text.get_text() for text in names] == sorted(ends, key=ends.__getitem__)
    assert axes.get_legend() is None
    right = max(axes.transData.transform(line.get_xydata())[-1, 0] for line in axes.lines)
    assert min(text.get_window_extent().x0 for text in names) > right


def test_lines_without_room_for_names_have_a_key():
    rows = tuple(row(f"spec_{k}", rank, {"q": (10 + k) * rank}) for k in range(30) for rank in (1, 2))
    (axes,) = plot_budget(BudgetTable(rows), figsize=(6, 2)).axes
    assert len(axes.get_legend().get_texts()) == 30


@pytest.mark.parametrize("ranks", [range(1, 17), range(1, 65), [1, 2, 4, 8, 16, 32, 64], [3, 4, 5, 6]])
def test_markers_stand_at_the_ranks_that_the_axis_names(ranks):
    specs = {name: ta.preset(name, targets=["query", "value"]) for name in ("lora", "lotr")}
    axes = plot_budget(ta.budget(specs, MODEL, ranks=list(ranks)), figsize=SMALL).axes[0]
    for line in axes.lines:
        assert [line.get_xdata()[k] for k in line.get_markevery()] == axes.get_xticks().tolist()


def test_the_key_of_a_front_names_formats_as_their_points_are_named():
    figure = draw_figure(report("bert"), "front")
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "LoRA" in said and "lora" not in said
    assert {name.partition(" r=")[0] for name in (c["label"] for c in report("bert")["candidates"])} < {*said}


@pytest.mark.parametrize("name", ["bert", "one layer", "float32"])
def test_a_key_in_the_axes_given_hides_no_spectrum(name):
    own = Figure(figsize=(3.25, 2.5), layout="constrained")
    axes = own.subplots()
    draw_figure(report(name), "spectra", ax=axes)
    own.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    for line in axes.lines:
        assert not line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False)


def test_places_are_apart_in_order_and_within():
    wanted = [5.0, 1.0, 1.1, 1.2, 9.9, 9.9, -3.0]
    places = spread(wanted, 1.0, 0.0, 10.0)
    ordered = [places[k] for k in sorted(range(7), key=lambda k: wanted[k])]
    assert ordered == sorted(places) and min(np.diff(ordered)) > 1 - 1e-9
    assert ordered[0] >= 0.5 and ordered[-1] <= 9.5 and places[0] == 5.0


@pytest.mark.parametrize("scale", [0, -1])
def test_counts_of_zero_and_one_point_are_drawn(scale):
    assert plot_budget(BudgetTable((row("a", 8, {"q": 0}), row("a", 9, {"q": 0}))), figsize=SMALL).axes
    assert plot_budget(BudgetTable((row("a", 8, {"q": 3}),)), figsize=SMALL).axes


def test_candidates_in_one_place_have_markers_around_each_other():
    made = dict(report("plain"))
    twin = {**made["candidates"][0], "label": "Twin r=1", "preset": "twin"}
    made["candidates"] = [*made["candidates"], twin]
    (axes,) = draw_figure(made, "front").axes
    (own,) = [line for line in axes.lines if line.get_label() == "twin"]
    assert own.get_markerfacecolor() == "none"
    assert own.get_markersize() > 1.5 * min(line.get_markersize() for line in axes.lines)


def test_colours_differ_in_grey_by_marker_or_hatching():
    (axes, shares) = plot_budget(table()).axes
    assert len({line.get_marker() for line in axes.lines if line.get_label() != "krona"}) == 2
    hatches = [container.patches[0].get_hatch() for container in shares.containers]
    assert len(set(hatches)) == len(hatches)


# ------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("figure", ["budget of specs", *FIGURES])
def test_a_figure_obeys_the_users_settings(figure):
    settings = {"font.family": ["DejaVu Serif"], "font.size": 9, "axes.labelsize": 8, "xtick.labelsize": 8.5}
    with matplotlib.rc_context(settings | {"ytick.labelsize": 8.5, "legend.fontsize": 7.5, "text.color": "#101080"}):
        drawn = plot_budget(table()) if figure == "budget of specs" else draw_figure(report("bert"), figure)
    drawn.draw_without_rendering()
    assert {text.get_fontname() for text in words(drawn)} == {"DejaVu Serif"}
    assert {round(text.get_fontsize(), 3) for text in words(drawn)} <= {6.9, 7.5, 8, 8.5, 10.8}
    named = [label for axes in drawn.axes for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()]
    assert {label.get_fontsize() for label in named} <= {8}


def test_the_librarys_letters_are_small_where_nothing_is_set():
    sizes = {text.get_fontsize() for text in words(plot_budget(table()))}
    assert sizes == {Letters().tick, Letters().label}


def test_lines_are_as_wide_as_the_user_has_them():
    with matplotlib.rc_context({"lines.linewidth": 2.5, "axes.linewidth": 2.0, "axes.spines.top": False}):
        (axes,) = plot_budget(table(), figsize=SMALL).axes
    assert {line.get_linewidth() for line in axes.lines} == {2.5}
    assert axes.spines["left"].get_linewidth() == 2.0


def test_the_users_cycle_of_colours_and_dark_ground_are_kept():
    with matplotlib.rc_context({"axes.prop_cycle": matplotlib.cycler(color=["m", "c", "y"])}):
        assert [line.get_color() for line in plot_budget(table()).axes[0].lines] == ["m", "c", "y"]
    with matplotlib.style.context("dark_background"):
        figure = plot_budget(table(), figsize=SMALL)
        assert all(luminance(text.get_color()) > 0.5 for text in words(figure))


def test_with_usetex_every_word_is_latex(monkeypatch):
    monkeypatch.setattr(
        "matplotlib.texmanager.TexManager.get_text_width_height_descent", lambda *_, **__: (20.0, 8.0, 2.0)
    )
    with matplotlib.rc_context({"text.usetex": True}):
        budget = plot_budget(BudgetTable((row("tt_lora", 1, {"100 %": 3}),)), labels={"tt_lora": r"\textsc{tt}"})
        front = draw_figure(report("bert"), "front")
    found = [text.get_text() for figure in (budget, front) for text in figure.findobj(Text)]
    assert {r"\textsc{tt}", r"100 \%", r"relative error of the change, \% of its norm"} <= set(found)
    assert all(re.search(r"(?<!\\)[%&#_]", text) is None for text in found)
    drawn = [text for figure in (budget, front) for text in words(figure)]
    assert all(text.get_usetex() for text in drawn)


def test_usetex_without_a_latex_is_refused_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with matplotlib.rc_context({"text.usetex": True, "text.latex.preamble": r"\newcommand{\unseen}{}"}):
        with pytest.raises(ta.SpecError, match="usetex is set, and LaTeX fails"):
            plot_budget(table(), tmp_path / "a.pdf")


def test_settings_are_never_changed_while_figures_are_drawn(tmp_path):
    seen = []
    original = matplotlib.RcParams.__setitem__

    def watched(self, key, value):
        seen.append(key)
        original(self, key, value)

    matplotlib.RcParams.__setitem__ = watched
    try:
        figure = plot_budget(table())
        draw_figure(report("bert"), "front")
        drawing = list(seen)
        figure.savefig(tmp_path / "own.png")
        plot_budget(table(), tmp_path / "a.svg")
    finally:
        matplotlib.RcParams.__setitem__ = original
    assert drawing == [] and set(seen) <= {"svg.fonttype", "svg.hashsalt", "pdf.fonttype"}


def test_threads_draw_what_one_thread_draws_and_leave_the_settings(tmp_path):
    before = dict(matplotlib.rcParams)
    plot_budget(table(), tmp_path / "one.svg")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda k: plot_budget(table(), tmp_path / f"{k}.svg"), range(12)))
    assert dict(matplotlib.rcParams) == before
    assert len({(tmp_path / f"{name}.svg").read_bytes() for name in ("one", *range(12))}) == 1


NOTEBOOK = """
from IPython.core.interactiveshell import InteractiveShell
import sys
from tensoradapt.plots import plot_budget
import tensoradapt as ta
shell = InteractiveShell.instance()
figure = plot_budget(ta.budget(ta.preset("lora", rank=1), {"layer.0.query": (8, 8)}, [1, 2]))
data, _ = shell.display_formatter.format(figure)
assert data["image/png"], data
assert "matplotlib.pyplot" not in sys.modules
"""


def test_a_notebook_shows_the_figure_without_pyplot():
    pytest.importorskip("IPython")
    ran = subprocess.run([sys.executable, "-c", NOTEBOOK], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_figure_can_be_pickled_and_shown_again():
    again = pickle.loads(pickle.dumps(plot_budget(table())))
    assert again._repr_png_().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------ PGF


def pgf(tmp_path, **choices) -> str:
    plot_budget(table(), tmp_path / "a.pgf", **choices)
    return (tmp_path / "a.pgf").read_text("utf-8")


def texts_of(pgf: str) -> list[str]:
    return re.findall(r"\\pgftext\[.*?\]\{.*?\\def%\{\\%\}(.*)\}\}%$", pgf, re.M)


def test_pgf_needs_no_latex_and_is_well_formed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    text = pgf(tmp_path, figsize=SMALL, max_parameters=40_000)
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended) and begun.count("pgfpicture") == 1
    bare = re.sub(r"\\[{}%\\]", "", text)
    assert bare.count("{") == bare.count("}")
    assert r"{\pgfqpoint{3.250000in}{2.500000in}}" in text
    assert {"lora", "lotr", "rank", "trainable parameters", "budget 40,000"} <= set(texts_of(text))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pgf"]


def test_every_figure_is_one_pgf_file_without_images(tmp_path):
    for name in FIGURES:
        draw_figure(report("eighty layers"), name, tmp_path / f"{name}.pgf")
    assert sorted(path.stem for path in tmp_path.iterdir()) == sorted(FIGURES)
    assert not any("includegraphics" in path.read_text("utf-8") for path in tmp_path.iterdir())


def test_names_in_pgf_are_no_commands_and_labels_are(tmp_path):
    rows = (row(r"a_b 5% #1 \end{x}", 1, {"q&": 3}), row("lora", 1, {"q&": 70}))
    plot_budget(BudgetTable(rows), tmp_path / "a.pgf", labels={"lora": r"$r^2$"})
    found = texts_of((tmp_path / "a.pgf").read_text("utf-8"))
    assert r"a\_b 5\% \#1 \textbackslash{}end\{x\}" in found and r"q\&" in found
    assert r"$r^2$" in found


def test_one_figure_gives_one_pgf(tmp_path):
    assert pgf(tmp_path) == pgf(tmp_path)


# ------------------------------------------------------------------------------------------------ scores


SCORES = [Scored("LoRA", 1000 * 4**k, (80.0 + k, 82.0 + k)) for k in range(3)] + [
    Scored("LoTR", 700 * 4**k, (81.5 + k, 82.5 + k)) for k in range(3)
]


def test_scores_are_means_with_their_range_and_names_at_the_ends():
    figure = plot_scores(SCORES[::-1], levels={"full fine-tuning": [90.0, 92.0]}, figsize=SMALL)
    (axes,) = figure.axes
    drawn = {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axes.lines}
    assert drawn["LoRA"] == [(1000, 81), (4000, 82), (16000, 83)]
    assert drawn["LoTR"] == [(700, 82), (2800, 83), (11200, 84)]
    assert {y for _, y in drawn["full fine-tuning"]} == {91}
    bars = [segment[:, 1].tolist() for bar in axes.collections for segment in bar.get_segments()]
    assert sorted(bars)[0] == [80.0, 82.0] and len(bars) == 6
    assert {text.get_text() for text in axes.texts} == {"LoRA", "LoTR", "full fine-tuning"}
    assert axes.get_ylim()[0] < 80 and axes.get_ylim()[1] > 91
    assert axes.get_xscale() == "log"
    sound(figure)


@pytest.mark.parametrize(
    "points", [[Scored("a", 10, (1.0,))], [Scored("a", 0, (0.0,)), Scored("b", 0, (-3.0,))], [*SCORES, *SCORES]]
)
def test_one_score_none_above_zero_and_the_same_twice_are_drawn(points):
    sound(plot_scores(points, figsize=SMALL))


def test_scores_of_methods_without_any_are_left_out_and_none_at_all_refused():
    assert len(plot_scores([*SCORES, Scored("LoRTA", 10, ())]).axes[0].texts) == 2
    with pytest.raises(ta.SpecError, match="no scores to draw"):
        plot_scores([Scored("LoRTA", 10, ())])
    with pytest.raises(ta.SpecError, match="labels names 'x'"):
        plot_scores(SCORES, labels={"x": "y"})
