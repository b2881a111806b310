"""Reports as pictures and as a page: what is drawn is what the JSON says, for one layer and for eighty."""

import json
import re
from functools import cache
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from reports import EXTREMES, LONG, bare, deltas, report
from test_plots import OKABE_ITO, SUFFIXES, luminance

import tensoradapt as ta
from tensoradapt.cli.app import run
from tensoradapt.plots import FIGURES, caption, check_report, draw_figure, drawable, read_report, render_html
from tensoradapt.plots.answer import answer_lines, answer_words, kind_rows

PLAIN = report()


@pytest.fixture(scope="module")
def found():
    """Every extreme report, made once."""
    return cache(lambda name: EXTREMES[name]())


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(map(float, xy)) for xy in line.get_xydata()] for line in axes.lines}


def panels(figure: Figure):
    return [axes for axes in figure.axes if axes.axison]


def texts(figure: Figure) -> list[Text]:
    """The texts that are drawn: no labels of ticks beyond the ends of an axis."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, *(axes.get_legend().get_texts() if axes.get_legend() else ())]
        for axis in (axes.xaxis, axes.yaxis) if axes.axison else ():
            low, high = sorted(axis.get_view_interval())
            found += [axis.label, *(t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high)]
        found += axes.findobj(lambda artist, own=axes: artist in (own.title, own._left_title))
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def boxes(figure: Figure) -> list[tuple[str, Bbox]]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in texts(figure)]


def overlapping(found: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    return [
        (one, other)
        for (one, a), (other, b) in combinations(found, 2)
        if min(a.x1, b.x1) - max(a.x0, b.x0) > 0.1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 0.1
    ]


def outside(figure: Figure, found: list[tuple[str, Bbox]]) -> list[str]:
    width, height = figure.bbox.size
    return [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


def said(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in texts(figure)]


# ------------------------------------------------------------------------------------------------ every figure


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("figure", FIGURES)
def test_no_text_covers_another_or_leaves_the_figure(found, name, figure):
    if figure not in drawable(found(name)):
        pytest.fail("nothing to draw") if name == "plain" else None
        return
    drawn = draw_figure(found(name), figure)
    words = boxes(drawn)
    assert overlapping(words) == [] and outside(drawn, words) == []


@pytest.mark.parametrize("name", ["plain", "experts", "thirty presets"])
@pytest.mark.parametrize("figure", FIGURES)
def test_letters_are_large_and_dark_enough_for_print(found, name, figure):
    drawn = draw_figure(found(name), figure)
    drawn.draw_without_rendering()
    assert drawn.get_figwidth() * 25.4 <= 170.001 and drawn.get_figheight() * 25.4 <= 240
    for text in texts(drawn):
        assert text.get_fontsize() >= 6
        light, dark = sorted([luminance(text.get_color()), 1.0 if luminance(text.get_color()) < 0.5 else 0.0])[::-1]
        assert (light + 0.05) / (dark + 0.05) > 4.5, text.get_text()


UNITS = {
    "front": {"parameters of the adapter", "relative error of the change, % of its norm"},
    "budget": {"share of the adapter's parameters, %"},
    "ranks": {"layer", "rank above noise"},
    "spectra": {"index of the singular value", "singular value\n(units of the weights)"},
    "modes": {"index of the singular value", "singular value\n(units of the weights)"},
    "similarity": {
        *("rank of the subspaces", "share of the energy, %", "layer"),
        "mean squared cosine of the principal angles\n(1: the same subspace)",
    },
}


@pytest.mark.parametrize("figure", FIGURES)
def test_axes_are_named_with_units(figure):
    drawn = draw_figure(PLAIN, figure)
    named = {a.get_xlabel() for a in drawn.axes} | {a.get_ylabel() for a in drawn.axes}
    assert (named | {drawn.get_supxlabel(), drawn.get_supylabel()}) - {""} == UNITS[figure]


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("figure", FIGURES)
def test_captions_are_sentences(found, name, figure):
    if figure in drawable(found(name)):
        words = caption(found(name), figure)
        assert words.endswith(".") and "None" not in words and "nan" not in words and len(words) < 1200


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("figure", ["front", "ranks"])
def test_figures_are_saved_by_suffix(tmp_path, figure, suffix):
    draw_figure(PLAIN, figure, tmp_path / f"a{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes().startswith(SUFFIXES[suffix])


@pytest.mark.parametrize("figure", FIGURES)
def test_one_report_gives_one_file(tmp_path, figure):
    for path in ("a.svg", "b.svg"):
        draw_figure(PLAIN, figure, tmp_path / path)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("figure", "choices", "says"),
    [
        ("spectrum", {}, "no figure 'spectrum'"),
        ("ranks", {"rule": "guess"}, "no ranks by the rule 'guess'"),
        ("ranks", {"rank": 3}, "no choice 'rank'"),
        ("spectra", {"roles": ["query"]}, "no role 'query'"),
        ("modes", {"groups": ["a"]}, "no group 'a'"),
        ("front", {"groups": ["a"]}, "no choice 'groups'"),
    ],
)
def test_what_the_report_lacks_is_refused(tmp_path, figure, choices, says):
    with pytest.raises(ta.SpecError, match=says):
        draw_figure(PLAIN, figure, tmp_path / "a.png", **choices)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("figure", FIGURES)
def test_a_report_of_nothing_has_nothing_to_draw(figure):
    assert drawable(bare()) == ()
    with pytest.raises(ta.SpecError, match="the report has no"):
        draw_figure(bare(), figure)


# ------------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("name", ["plain", "one layer", "eighty layers", "adapters", "float32", "ranks unknown"])
def test_lines_of_spectra_are_singular_values(found, name):
    sites = found(name)["sites"]
    drawn = {
        label: points for axes in panels(draw_figure(found(name), "spectra")) for label, points in lines(axes).items()
    }
    assert set(drawn) - {"noise"} == set(sites)
    for path, site in sites.items():
        assert drawn[path] == [(k + 1, value) for k, value in enumerate(site["singular_values"])]


def test_a_long_spectrum_keeps_its_ends_and_thins_between():
    many = report({"query": (300, 400)}, 1, values=300)
    (site,) = many["sites"].values()
    (axes,) = panels(draw_figure(many, "spectra"))
    points = next(points for label, points in lines(axes).items() if label != "noise")
    assert points[:16] == [(k + 1, site["singular_values"][k]) for k in range(16)] and points[-1][0] == 300
    assert len(points) < 100 and all(value == site["singular_values"][int(k) - 1] for k, value in points)


def test_the_noise_floor_is_drawn_at_its_edges():
    changed = json.loads(json.dumps(PLAIN))
    path = next(iter(changed["sites"]))
    changed["sites"][path]["noise"]["edge"] *= 1.5
    first, second, *_ = panels(draw_figure(changed, "spectra"))
    edges = {site["noise"]["edge"] for site in changed["sites"].values()}
    drawn = [{y for _, y in line.get_xydata()} for line in first.lines if line.get_label() == "noise"]
    assert sorted(drawn, key=min) == [{edge} for edge in sorted(edges)]
    assert [line.get_label() for line in second.lines].count("noise") == 1


def test_without_noise_there_is_no_floor(found):
    drawn = draw_figure(found("float32"), "spectra")
    assert not any("noise" in word for word in said(drawn))
    assert not any("noise" in lines(axes) for axes in panels(drawn))
    assert "no rounding noise" in caption(found("float32"), "spectra")


def test_lines_in_order_are_a_ramp_that_stays_one_in_grey(found):
    (axes, *_) = panels(draw_figure(found("eighty layers"), "spectra"))
    shades = [luminance(line.get_color()) for line in axes.lines if line.get_label() != "noise"]
    assert shades == sorted(shades) and len(set(shades)) == 80 and shades[-1] < 0.5


def test_the_largest_changes_are_drawn_of_many_roles(found):
    many = found("fifty roles")
    norms = {site["coordinates"]["role"]: site["norm"] for site in many["sites"].values()}
    drawn = {label for axes in panels(draw_figure(many, "spectra")) for label in lines(axes)} - {"noise"}
    roles = {many["sites"][path]["coordinates"]["role"] for path in drawn}
    assert roles == set(sorted(norms, key=lambda role: -norms[role])[:12])
    assert "12 roles that changed most of 50" in caption(many, "spectra")
    assert len(panels(draw_figure(many, "spectra", roles=[f"{LONG}.number_3"]))) == 1


def test_the_spectras_caption_counts(found):
    ranks = sorted(site["ranks"]["noise"] for site in PLAIN["sites"].values())
    words = re.search(r"(\d+) of 12 weights have at most (\d+) singular values? above", caption(PLAIN, "spectra"))
    assert int(words[1]) == sum(rank <= int(words[2]) for rank in ranks) >= 10
    assert "nothing stands out" in caption(found("nothing changed"), "spectra")


# ------------------------------------------------------------------------------------------------ ranks


def cells(figure: Figure) -> np.ndarray:
    return figure.axes[0].collections[0].get_array().reshape(-1, len(figure.axes[0].collections[0]._coordinates[0]) - 1)


@pytest.mark.parametrize("rule", ["noise", "energy_0.9", "gavish_donoho"])
def test_cells_are_ranks(rule):
    drawn = draw_figure(PLAIN, "ranks", rule=rule)
    rows = [t.get_text() for t in drawn.axes[0].get_yticklabels()]
    columns = [t.get_text() for t in drawn.axes[0].get_xticklabels()]
    for site in PLAIN["sites"].values():
        at = rows.index(site["coordinates"]["role"]), columns.index(str(site["coordinates"]["layer"]))
        assert cells(drawn)[at] == site["ranks"][rule]
    written = [t.get_text() for t in drawn.axes[0].texts]
    assert sorted(written) == sorted(str(site["ranks"][rule]) for site in PLAIN["sites"].values())


def test_an_unknown_rank_is_hatched_and_has_no_number(found):
    drawn = draw_figure(found("ranks unknown"), "ranks")
    ranks = [site["ranks"]["noise"] for site in found("ranks unknown")["sites"].values()]
    hatched = next(c for c in drawn.axes[0].collections if c.get_hatch() == "//////")
    assert len(hatched.get_paths()) == ranks.count(None) > 0
    assert len(drawn.axes[0].texts) == len(ranks) - ranks.count(None)
    assert f"({ranks.count(None)} of {len(ranks)})" in caption(found("ranks unknown"), "ranks")


def test_a_weight_that_is_not_there_is_crossed_out():
    holes = report(roles={"query": (24, 16), "value": (24, 16)}, layers=3, by_role=True)
    lost = "encoder.layer.1.query"
    holes["sites"].pop(lost)
    holes["groups"]["query"]["sites"].remove(lost)
    drawn = draw_figure(holes, "ranks")
    crossed = next(c for c in drawn.axes[0].collections if c.get_hatch() == "xxxx")
    (box,) = [path.get_extents() for path in crossed.get_paths()]
    assert (round(box.x0 + 0.5), round(box.y0 + 0.5)) == (1, 0)
    assert "Crosses: no such weight" in caption(holes, "ranks")


def test_ranks_are_light_to_dark_in_one_hue():
    drawn = draw_figure(PLAIN, "ranks")
    ramp = [luminance(drawn.axes[0].collections[0].cmap(x)[:3]) for x in np.linspace(0, 1, 20)]
    assert ramp == sorted(ramp, reverse=True)


def test_stacks_and_tasks_stand_beside_each_other(found):
    assert {"stack encoder.layers", "stack decoder.layers"} <= set(said(draw_figure(found("two stacks"), "ranks")))
    assert {"task mrpc", "task sst2", "task cola"} <= set(said(draw_figure(found("adapters"), "ranks")))
    assert {"layer 0", "layer 7"} <= set(said(draw_figure(found("experts"), "ranks")))


def test_weights_outside_the_layers_have_a_column_of_their_own():
    made = json.loads(json.dumps(PLAIN))
    path = next(iter(made["sites"]))
    made["sites"]["classifier"] = made["sites"][path] | {"coordinates": {"role": "classifier"}, "group": None}
    drawn = draw_figure(made, "ranks")
    assert [t.get_text() for t in drawn.axes[0].get_xticklabels()] == ["–", "0", "1", "2", "3"]
    assert not any("stack" in words for words in said(drawn))


# ------------------------------------------------------------------------------------------------ modes, similarity


@pytest.mark.parametrize("name", ["plain", "bert", "adapters", "experts", "float32"])
def test_lines_of_modes_are_singular_values_of_unfoldings(found, name):
    groups = found(name)["groups"]
    drawn = draw_figure(found(name), "modes")
    by_title = {axes.get_title(loc="left").split("\n")[0]: lines(axes) for axes in panels(drawn)}
    assert set(by_title) == set(groups)
    for group, drawn_lines in by_title.items():
        for axis, values in groups[group]["mode_spectra"].items():
            assert all(value == values[int(k) - 1] for k, value in drawn_lines[axis])
            assert len(drawn_lines[axis]) >= min(16, len(values))
            edge = groups[group]["noise_edges"][axis]
            assert {y for _, y in drawn_lines.get(f"noise {axis}", ())} == ({edge} if edge else set())


def test_axes_of_a_group_differ_in_more_than_colour(found):
    (axes, *_) = panels(draw_figure(found("bert"), "modes"))
    looks = {
        (line.get_marker(), line.get_markerfacecolor() == "none") for line in axes.lines if " " not in line.get_label()
    }
    assert len(looks) == 4
    colours = {line.get_color() for line in axes.lines}
    assert colours <= OKABE_ITO


def test_similarity_is_the_reports_matrix_and_its_shares():
    figure = draw_figure(PLAIN, "similarity", groups=["output.dense"])
    out, into, curves, _ = figure.axes
    group = PLAIN["groups"]["output.dense"]
    for axes, side in ((out, "out"), (into, "in")):
        assert axes.collections[0].get_array().tolist() == group["similarity"][side]["matrix"]
        assert axes.collections[0].get_clim() == (0, 1)
    energy = group["shared_energy"]
    for label, key in (("one for all", "shared"), ("each weight its own", "private")):
        assert lines(curves)[label] == [(r, 100 * share) for r, share in zip(energy["rank"], energy[key], strict=True)]


def test_labels_of_similar_sites_are_their_coordinates(found):
    figure = draw_figure(found("bert"), "similarity", groups=["48x48"])
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels[0] == "0, query" and figure.axes[0].get_ylabel() == "layer, role"


def test_an_unknown_similarity_is_left_blank(found):
    figure = draw_figure(found("nothing changed"), "similarity")
    values = np.ma.filled(figure.axes[0].collections[0].get_array().astype(float), np.nan)
    assert np.isnan(values).all()


def test_one_weight_is_not_compared_with_itself(found):
    with pytest.raises(ta.SpecError, match="no group of several weights"):
        draw_figure(found("one layer"), "similarity")


# ------------------------------------------------------------------------------------------------ front and budget


@pytest.mark.parametrize("name", ["plain", "thirty presets", "one candidate", "nothing changed"])
def test_points_are_candidates(found, name):
    (axes,) = draw_figure(found(name), "front").axes
    drawn = [
        tuple(xy)
        for line in axes.lines
        if line.get_label() not in ("front", "chosen", "below")
        for xy in line.get_xydata()
    ]
    candidates = found(name)["candidates"]
    assert sorted(drawn) == sorted((c["num_parameters"], 100 * c["relative_error"]) for c in candidates)


def test_the_front_goes_through_its_candidates_and_the_chosen_one_is_marked():
    (axes,) = draw_figure(PLAIN, "front").axes
    front = [c for c in PLAIN["candidates"] if c["front"]]
    assert {(c["num_parameters"], 100 * c["relative_error"]) for c in front} <= set(lines(axes)["front"])
    chosen = next(c for c in PLAIN["candidates"] if c["label"] == PLAIN["choice"]["label"])
    assert lines(axes)["chosen"] == [(chosen["num_parameters"], 100 * chosen["relative_error"])]
    assert f"chosen: {chosen['label']}" in said(axes.figure)
    assert f"{chosen['num_parameters']:,} parameters" in caption(PLAIN, "front")


def test_presets_differ_in_marker_or_colour(found):
    (axes,) = draw_figure(found("thirty presets"), "front").axes
    looks = {
        line.get_label(): (line.get_marker(), line.get_markeredgecolor())
        for line in axes.lines
        if line.get_label() not in ("front", "chosen", "below")
    }
    assert len(looks) == 32 == len(set(looks.values()))
    first = list(looks.values())[:7]
    assert len({marker for marker, _ in first}) == 7


def test_errors_below_the_axis_are_marked_at_its_edge():
    made = json.loads(json.dumps(PLAIN))
    least = min(made["candidates"], key=lambda c: c["relative_error"])
    assert least["label"] != made["choice"]["label"]
    least["relative_error"] = 1e-9
    (axes,) = draw_figure(made, "front").axes
    assert [x for x, _ in lines(axes)["below"]] == [least["num_parameters"]]
    assert axes.get_ylim()[0] > 1e-3 and "1 candidate with smaller errors" in caption(made, "front")


def test_bars_are_parameters_by_group():
    (axes,) = draw_figure(PLAIN, "budget").axes
    front = sorted((c for c in PLAIN["candidates"] if c["front"]), key=lambda c: c["num_parameters"])
    drawn = {c.get_label(): [patch.get_width() for patch in c.patches] for c in axes.containers}
    for group, widths in drawn.items():
        assert widths == pytest.approx([100 * c["by_group"][group] / c["num_parameters"] for c in front])
    chosen = next(c for c in front if c["label"] == PLAIN["choice"]["label"])
    assert f"chosen: {chosen['label']}\n{chosen['num_parameters']:,}" in said(axes.figure)


def test_parts_of_a_bar_differ_in_hatching():
    (axes,) = draw_figure(PLAIN, "budget").axes
    hatches = [container.patches[0].get_hatch() for container in axes.containers]
    assert len(set(hatches)) == len(hatches) == 3
    assert len({to_rgb(container.patches[0].get_facecolor()[:3]) for container in axes.containers}) == 3


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """What is in a page: words, tags in order; an error where tags do not close."""

    VOID = {"meta", "wbr", "br", "hr", "img", "input", "link"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.mark.parametrize(
    "name", ["plain", "one layer", "nothing changed", "ranks unknown", "adapters", "hostile names"]
)
def test_the_page_is_well_formed_and_needs_no_other_file(found, name):
    text = render_html(found(name))
    page = Page(text)
    assert "http" not in text and "@import" not in text and not re.findall(r"url\((?!#)", text)
    sources = [attrs.get(key) for _, attrs in page.tags for key in ("src", "href", "srcset", "data") if key in attrs]
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "img"} == set()
    assert sum(tag == "svg" for tag, _ in page.tags) == len(drawable(found(name)))


def test_ids_are_unique_and_references_point_to_them(found):
    page = Page(text := render_html(found("bert")))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {*re.findall(r"url\(#([^)]+)\)", text), *re.findall(r'href="#([^"]+)"', text)} <= set(ids)


def test_names_from_files_are_only_words(found):
    hostile = found("hostile names") | {
        "base": "<img src=x onerror=alert(1)>",
        "tuned": "'\"><script>alert(2)</script>",
    }
    hostile["match"] = hostile["match"] | {"only_base": ["</style><b>"], "refused": {"<i>": "&lt;"}, "notes": ["<u>"]}
    page = Page(render_html(hostile))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and not {"img", "b", "i", "u"} & set(tags)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    assert "<script>alert(1)</script>" in page.text and "<img src=x onerror=alert(1)>" in page.text


def test_nothing_is_marked_as_chosen_where_no_adapter_is_proposed():
    refused = PLAIN | {"choice": PLAIN["choice"] | {"holds": False, "warning": "This change has no low rank."}}
    text = render_html(refused)
    assert "Proposal: no adapter" in Page(text).text
    assert "chosen" not in re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)


def test_the_page_says_what_was_compared_and_the_answer():
    page = Page(render_html(PLAIN))
    chosen = next(c for c in PLAIN["candidates"] if c["label"] == PLAIN["choice"]["label"])
    for words in (
        "tiny-bert → tiny-bert-mrpc",
        answer_words(PLAIN),
        *answer_lines(PLAIN),
        f"Proposal: {chosen['label']}",
        PLAIN["choice"]["reason"],
        f"The rule: {PLAIN['choice']['rule']}",
        "chosen",
        "1 only in the tuned side: classifier.weight",
        "embeddings.position_ids (not a weight: int64)",
        *(cell for row in kind_rows(PLAIN["change"]) for cell in row),
        *(caption(PLAIN, name) for name in FIGURES),
        *PLAIN["sites"],
        *(candidate["label"] for candidate in PLAIN["candidates"]),
    ):
        assert " ".join(words.split()) in page.text, words


def test_a_figure_without_data_is_a_sentence():
    page = Page(render_html(bare()))
    assert "the report has no candidates to draw." in page.text and not any(tag == "svg" for tag, _ in page.tags)


def test_long_tables_are_folded(found):
    folded = lambda made: sum(tag == "details" for tag, _ in Page(render_html(made)).tags)  # noqa: E731
    assert folded(PLAIN) == 0 and folded(found("bert")) == 1


# ------------------------------------------------------------------------------------------------ the check

WRONG = {
    "format": ("this is no report", lambda r: r.update(format="other")),
    "version": ("version 2", lambda r: r.update(version=2)),
    "sites": ("no key sites", lambda r: r.pop("sites")),
    "groups['output.dense'].norm": ("wrong", lambda r: r["groups"]["output.dense"].update(norm="1")),
    "match.matched": ("no key match.matched", lambda r: r["match"].pop("matched")),
    "singular_values[0]": ("wrong", lambda r: next(iter(r["sites"].values())).update(singular_values=[None])),
    "ranks.noise": ("wrong", lambda r: next(iter(r["sites"].values()))["ranks"].update(noise=1.5)),
    "norm": ("finite", lambda r: next(iter(r["sites"].values())).update(norm=float("inf"))),
    "candidates[0].front": ("no key", lambda r: r["candidates"][0].pop("front")),
    "choice.label": ("wrong", lambda r: r["choice"].update(label="nobody")),
    "groups['output.dense'].sites": ("wrong", lambda r: r["groups"]["output.dense"]["sites"].append("nobody")),
    "similarity.out.matrix": ("wrong", lambda r: r["groups"]["output.dense"]["similarity"]["out"]["matrix"].pop()),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_report_is_refused_by_the_key(key):
    words, spoil = WRONG[key]
    spoilt = json.loads(json.dumps(PLAIN))
    spoil(spoilt)
    with pytest.raises(ta.FileError) as caught:
        check_report(spoilt)
    assert words in str(caught.value) and (key in str(caught.value) or key == "norm")


@pytest.mark.parametrize("name", EXTREMES)
def test_every_report_passes(found, name):
    check_report(json.loads(json.dumps(found(name))))
    check_report(found(name) | {"a later key": 1})


@pytest.mark.parametrize("data", [None, [], "report", 3, {}])
def test_other_json_is_no_report(data):
    for reader in (check_report, render_html, lambda d: draw_figure(d, "front"), lambda d: caption(d, "front")):
        with pytest.raises(ta.FileError, match="no report"):
            reader(data)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def path(tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(PLAIN))
    return tmp_path / "report.json"


def test_one_figure_is_written(path, capsys):
    out = path.parent / "front.pdf"
    assert run(["plot", str(path), "--figure", "front", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"%PDF")
    assert "wrote" in capsys.readouterr().err


def test_all_figures_go_into_a_folder(path, capsys):
    out = path.parent / "figures"
    assert run(["plot", str(path), "--out", str(out), "--format", "svg"]) == 0
    assert {file.name for file in out.iterdir()} == {f"{name}.svg" for name in FIGURES}


def test_figures_without_data_are_named(tmp_path, capsys):
    (tmp_path / "r.json").write_text(json.dumps(PLAIN | {"candidates": [], "choice": None}))
    assert run(["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "all")]) == 0
    assert "nothing to draw for front, budget" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "all" / "front.png").exists()


BAD = {
    "a single file for all": (["--out", "all.png"], None, "--figure with one of front"),
    "an unknown figure": (["--figure", "pie", "--out", "a.png"], None, "one of front, budget"),
    "another suffix": (["--figure", "front", "--out", "a.bmp"], None, ".png, .svg, .pdf"),
    "damaged JSON": (["--out", "all"], b'{"format": "tensoradapt.rep', "damaged"),
    "bytes": (["--out", "all"], b"\xff\xfe\x00", "damaged"),
    "other JSON": (["--out", "all"], b"[1, 2]", "no report"),
    "a later version": (["--out", "all"], b'{"format": "tensoradapt.report", "version": 9}', "version 9"),
    "a key that is missing": (["--out", "all"], b'{"format": "tensoradapt.report", "version": 1}', "no key kind"),
    "an unwritable place": (["--figure", "front", "--out", "report.json/a.png"], None, "cannot be written"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_with_a_few_lines(case, path, capsys, monkeypatch):
    monkeypatch.chdir(path.parent)
    arguments, content, message = BAD[case]
    if content is not None:
        path.write_bytes(content)
    assert run(["plot", "report.json", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and len(printed.err.splitlines()) < 8
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_a_missing_report_is_named(tmp_path, capsys):
    assert run(["plot", str(tmp_path / "nowhere.json"), "--out", str(tmp_path / "all")]) == 2
    assert "nowhere.json" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the documented schema


def documented() -> str:
    from pathlib import Path

    return (Path(__file__).parents[1] / "docs" / "report-schema.md").read_text("utf-8")


def test_the_documented_example_is_a_report(tmp_path):
    (example,) = re.findall(r"```json\n(.*?)```", documented(), re.DOTALL)
    (tmp_path / "report.json").write_text(example)
    data = read_report(tmp_path / "report.json")
    assert set(drawable(data)) == {*FIGURES} - {"similarity"}
    render_html(data)


def test_every_key_is_documented():
    from tensoradapt.plots import reading

    parts = [kind for kind in vars(reading).values() if isinstance(kind, type) and issubclass(kind, reading.Part)]
    fields = {name for part in parts for name in part.model_fields}
    words = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", documented()))))
    assert len(parts) == 19 and fields - words == set()


def test_deltas_of_the_reports_are_reproducible():
    first, second = deltas({"q": (4, 4)}, 2), deltas({"q": (4, 4)}, 2)
    assert all(np.array_equal(first[path][1], second[path][1]) for path in first)
