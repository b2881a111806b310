"""A report as one page: what was compared, the answer in words, the figures with their captions, the tables.

Invariant: the page needs no other file and no network, and every word that comes from the report is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from io import StringIO
from typing import TYPE_CHECKING, Any

from tensoradapt.errors import SpecError
from tensoradapt.plots.answer import (
    NONE,
    QUESTION,
    answer_lines,
    answer_words,
    dense_part,
    kind_rows,
    one_sided,
    proposal_words,
    sides_words,
)
from tensoradapt.plots.figures import FIGURES, caption
from tensoradapt.plots.page import INCH, WRITTEN, writing
from tensoradapt.plots.panels import PAGE
from tensoradapt.plots.reading import check_report, consistent
from tensoradapt.plots.sheet import sheet
from tensoradapt.plots.words import figures, has_noise, listed, percent, plain, proposed, rule_words, some

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "front": "Error against parameters",
    "budget": "The parameter budget by group",
    "ranks": "Ranks of the weights' changes",
    "spectra": "Singular spectra and the noise floor",
    "modes": "Mode spectra of the groups",
    "similarity": "Similarity of subspaces across weights",
}
VECTOR = "1-D"  # how the reason begins for which biases and norms are no weights: they are counted, not listed
LONG = 30  # rows from which a table is folded
Report = Mapping[str, Any]
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # none: they are written with addresses of schemas
ADDRESSED = re.compile(r'(\bid="|url\(#|href="#)')


def render_html(report: Report) -> str:
    """The report as one self-contained page of HTML. Raises FileError on what is no report (`check_report`)."""
    check_report(report)
    with consistent():
        return _page(report)


def _page(report: Report) -> str:
    here = files("tensoradapt.plots")
    title = _path(sides_words(report).replace("->", "→"))
    body = [
        f"<header><p class='kind'>tensoradapt report: {title}</p><h1>{QUESTION}</h1></header>",
        *_answer(report),
        *_compared_sides(report),
        *(part for name in FIGURES for part in _figure(report, name)),
        *_comparisons(report["comparisons"]),
        *_candidates(report),
        *_sites(report),
        *_settings(report["settings"]),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            "<html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>{title.replace('<wbr>', '')}</title>",
            f"<style>{here.joinpath('page.css').read_text('utf-8')}</style></head><body><main>",
            *body,
            f"</main><script>{here.joinpath('page.js').read_text('utf-8')}</script></body></html>",
            "",
        ]
    )


def _text(value: object) -> str:
    """Words of the report, made harmless."""
    return escape(plain(value), quote=True)


def _path(path: str) -> str:
    """A path that may break into lines after its dots and slashes."""
    return _text(path).replace(".", ".<wbr>").replace("/", "/<wbr>")


# ------------------------------------------------------------------------------------------------ words


def _answer(report: Report) -> list[str]:
    """What rank it is, what an adapter takes for an error, and the proposal with its rule."""
    lines = ["<section class='summary'>", f"<p class='answer'><strong>{_sentence(answer_words(report))}</strong></p>"]
    lines += ["<ul>", *(f"<li>{_text(line)}</li>" for line in said), "</ul>"] if (said := answer_lines(report)) else []
    choice = report["choice"]
    if choice:
        title = _text(choice["label"]) if choice.get("holds", True) else "no adapter"
        lines += [f"<h2>Proposal: {title}</h2>"]
        lines += [f"<p>{_text(sentence)}</p>" for sentence in proposal_words(choice) if sentence != NONE]
    elif report["candidates"]:
        lines += ["<p>No candidate was chosen.</p>"]
    return [*lines, "</section>"]


def _sentence(words: str) -> str:
    return _text(words[:1].upper() + words[1:])


def _compared_sides(report: Report) -> list[str]:
    """What was compared: the tensors by kind, what one side holds alone, and what was left out."""
    sites = report["sites"]
    changed = sum(site["norm"] > 0 for site in sites.values())
    said = f"{some(len(sites), 'weight')} compared, {changed:,} of them differ."
    change = report.get("change")
    heads = ("tensors", "number", "differ", "of the squared change")
    lines = ["<section><h2>What was compared</h2>", f"<p>{said}</p>"]
    if change:
        every = ("in both", f"{change['tensors']:,}", f"{change['differing']:,}", "")
        lines += _rows(heads, [*(tuple(map(_text, row)) for row in kind_rows(change)), every], 1)
    return [*lines, *_match(report["match"]), "</section>"]


def _match(match: Mapping[str, Any]) -> list[str]:
    """What was not compared, and the notes."""
    lines = [_text(said) for said in one_sided(match)]
    lines += (
        [f"{some(len(match['reshaped']), 'tensor')} of another shape: {_text(listed(match['reshaped'], 8))}"]
        if (match["reshaped"])
        else []
    )
    refused = {name: reason for name, reason in match["refused"].items() if not reason.startswith(VECTOR)}
    lines += [f"{some(len(refused), 'tensor')} not compared: {_refused(refused)}"] if refused else []
    lines += [_text(note) for note in match["notes"]]
    return ["<ul>", *(f"<li>{line}</li>" for line in lines), "</ul>"] if lines else []


def _refused(refused: Mapping[str, str], limit: int = 8) -> str:
    shown = [f"{_text(name)} ({_text(reason)})" for name, reason in list(refused.items())[:limit]]
    return "; ".join([*shown, *([f"and {len(refused) - limit:,} more"] if len(refused) > limit else [])])


# ------------------------------------------------------------------------------------------------ figures


def _figure(report: Report, name: str) -> list[str]:
    """One figure with its caption; a sentence where the report has nothing for it."""
    title = TITLES[name] if name != "spectra" or has_noise(report) else "Singular spectra"
    heading = f"<h2 id='{name}'>{title}</h2>"
    try:
        said = _text(caption(report, name))
        drawn = inline(FIGURES[name][0](report, sheet()), name)
    except SpecError as error:
        return [f"<section>{heading}<p class='none'>{_text(str(error).splitlines()[0])}.</p></section>"]
    return [f"<section>{heading}<figure>{drawn}<figcaption>{said}</figcaption></figure></section>"]


def inline(figure: Figure, name: str) -> str:
    """A figure as an SVG element: its letters are outlines, so that no font is needed; its ids begin with `name`."""
    stream = StringIO()
    with writing({**WRITTEN, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", metadata=METADATA)
    text = stream.getvalue()
    text = re.sub(r"<!--.*?-->|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    width = 60 * figure.get_figwidth() * INCH / PAGE
    label = f'role="img" aria-label="{TITLES[name]}" style="max-width: {width:.4g}rem"'
    rest = ADDRESSED.sub(rf"\g<1>{name}-", rest.replace("xlink:href", "href"))
    return f"<svg {box.group() if box else ''} {label}>{rest.strip()}"


# ------------------------------------------------------------------------------------------------ tables


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: int, marked: int | None = None
) -> list[str]:
    """A section with a table, folded where it is long; the columns from the `numeric`-th on hold numbers."""
    lines = _rows(heads, rows, numeric, marked)
    if len(rows) >= LONG:
        lines = [f"<details><summary>{len(rows):,} rows</summary>", *lines, "</details>"]
    return [f"<section><h2>{title}</h2>", *lines, "</section>"]


def _rows(heads: Sequence[str], rows: Sequence[Sequence[str]], numeric: int, marked: int | None = None) -> list[str]:
    cells = [
        f"<tr{' class=chosen' if k == marked else ''}>"
        + "".join(f"<td{' class=n' if c >= numeric else ''}>{cell}</td>" for c, cell in enumerate(row))
        + "</tr>"
        for k, row in enumerate(rows)
    ]
    head = "".join(f"<th scope='col'{' class=n' if c >= numeric else ''}>{name}</th>" for c, name in enumerate(heads))
    table = f"<div class='wide'><table class='sortable'><thead><tr>{head}</tr></thead><tbody>"
    return [table, *cells, "</tbody></table></div>"]


def _candidates(report: Report) -> list[str]:
    candidates, choice = report["candidates"], proposed(report)
    labels = [candidate["label"] for candidate in candidates]
    rows = [
        (
            _text(c["label"])
            + (" <span class='tag'>chosen</span>" if choice and c["label"] == choice["label"] else ""),
            "front" if c["front"] else "",
            _path(c["worst_site"]["path"]) if c["worst_site"] else "",
            percent(c["worst_site"]["relative_error"]) if c["worst_site"] else "",
            f"{c['num_parameters']:,}",
            "–" if c.get("share") is None else dense_part(c["share"]),
            percent(c["relative_error"]),
        )
        for c in candidates
    ]
    heads = ("candidate", "Pareto", "worst weight", "its error", "parameters", "of dense", "relative error")
    return _table("Candidates", heads, rows, 3, labels.index(choice["label"]) if choice else None) if rows else []


def _sites(report: Report) -> list[str]:
    noisy = has_noise(report)
    rows = [
        (
            _path(path),
            " × ".join(map(str, site["shape"])),
            percent(site["relative_change"]) if site["relative_change"] is not None else "–",
            figures(site["spectral_norm"]),
            *((figures(site["noise"]["edge"]), _rank(site, "noise")) if noisy else ()),
            *(_rank(site, "energy_0.95"), _rank(site, "energy_0.99")),
            figures(site["stable_rank"]),
            figures(site["effective_rank"]),
        )
        for path, site in report["sites"].items()
    ]
    heads = [
        *("weight", "out × in", "relative change", "largest singular value"),
        *(("noise edge", "rank above noise") if noisy else ()),
        *("rank, 95 % of energy", "rank, 99 % of energy", "stable rank", "effective rank"),
    ]
    note = f"<p class='note'>Figures use the {_text(rule_words('noise' if noisy else 'energy_0.95'))}."
    return [*_table("Weights", heads, rows, 1), f"{note} Norms are in the units of the weights.</p>"] if rows else []


def _rank(site: Mapping[str, Any], rule: str) -> str:
    if rule not in site["ranks"]:
        return "–"
    rank = site["ranks"][rule]
    return f"&gt; {len(site['singular_values']):,}" if rank is None else f"{rank:,}"


def _comparisons(comparisons: Mapping[str, Any]) -> list[str]:
    """Formats at one error, and at one budget."""
    at_error = [
        (
            f"error at most {percent(found['relative_error'])}"
            + (f" ({_text(of)})" if (of := found.get("label")) else ""),
            [(r["label"], *_size(r)) for r in found["rows"]] + [(name, "none") for name in found.get("unreached", ())],
        )
        for found in comparisons.get("at_error", ())
    ]
    at_budget = [
        (
            f"at most {some(found['max_parameters'], 'parameter')}",
            [(r["label"], percent(r["relative_error"])) for r in found["rows"]]
            + [(name, "none") for name in found.get("unreached", ())],
        )
        for found in comparisons.get("at_budget", ())
    ]
    lines = _compared("Formats at the same error", "parameters", at_error)
    return lines + _compared("Formats within the same budget", "relative error", at_budget)


def _size(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Parameters, and of the dense change where that is known."""
    share = row.get("share")
    return (f"{row['num_parameters']:,}" + ("" if share is None else f" ({dense_part(share)} of dense)"),)


def _compared(title: str, what: str, parts: Sequence[tuple[str, Sequence[tuple[str, ...]]]]) -> list[str]:
    """A table in parts, each with a line of its own above it."""
    if not any(rows for _, rows in parts):
        return []
    lines = [f"<section><h2>{title}</h2><table class='parts'><thead><tr><th scope='col'>format</th>"]
    lines += [f"<th scope='col' class='n'>{what}</th></tr></thead>"]
    for head, rows in parts:
        lines += [f"<tbody><tr><th colspan='2' scope='rowgroup'>{head}</th></tr>"]
        lines += [f"<tr><td>{_text(label)}</td><td class=n>{number}</td></tr>" for label, number in rows]
        lines += [*([] if rows else ["<tr><td colspan='2' class='none'>none</td></tr>"]), "</tbody>"]
    return [*lines, "</table></section>"]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The settings that were given or chosen; those left open are not there."""
    given = {name: value for name, value in settings.items() if value is not None}
    rows = "".join(
        f"<dt>{_text(name.replace('_', ' '))}</dt><dd>{_text(_listing(v))}</dd>" for name, v in given.items()
    )
    return [f"<section><h2>Settings</h2><dl>{rows}</dl></section>"] if rows else []


def _listing(value: Any) -> str:
    return ", ".join(map(str, value)) if type(value) in (list, tuple) else str(value)
