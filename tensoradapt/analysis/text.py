"""A report as text: the answer, what was compared, the tables, the proposal; within 80 columns unless it is `wide`.

Invariant: one row of a table is one line, names are whole, and a column without numbers is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from tensoradapt.plots.answer import (
    QUESTION,
    answer_lines,
    answer_words,
    dense_part,
    kind_rows,
    one_sided,
    proposal_words,
    sides_words,
)
from tensoradapt.plots.words import figures, has_noise, percent, some
from tensoradapt.tables import WIDTH, wrapped

MANY = 48  # weights from which on a role has a row, not a weight
ALWAYS = ("lora", "lotr", "tt")  # formats that are listed though they are not on the front
Cells = Sequence[str]
Site = Mapping[str, Any]


class Column(NamedTuple):
    """A column of numbers by weight; the first of the optional ones go where a table is too wide."""

    head: str
    cell: Callable[[Site], str]
    optional: bool = False


def render_text(report: Mapping[str, Any], *, wide: bool = False) -> str:
    """The report in words and tables; `wide` gives every weight with all of its numbers, whatever the width."""
    parts = [
        [*wrapped(f"{QUESTION} {answer_words(report)}"), *_indented(answer_lines(report))],
        _compared(report),
        _weights(report, wide=wide),
        _stacks(report["groups"], wide=wide),
        *_candidates(report),
        _proposal(report["choice"]),
        [line for note in report["match"]["notes"] for line in wrapped(f"note: {note}")],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _indented(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in wrapped(f"  {line}", "    ")]


def _table(head: Cells, rows: Sequence[Cells], left: int = 1) -> list[str]:
    """Columns side by side, the first `left` of them flush left; those without a cell are left out."""
    kept = [k for k in range(len(head)) if k == 0 or any(row[k : k + 1] and row[k] for row in rows)]
    every = [[row[k] if k < len(row) else "" for k in kept] for row in [head, *rows]]
    widths = [max(len(row[k]) for row in every if len(rows) == 0 or k or row[k][-1:] != ":") for k in range(len(kept))]
    side = ["<" if k < left else ">" for k in kept]
    return ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, side, widths, strict=True)).rstrip() for row in every]


# ------------------------------------------------------------------------------------------------ what was compared


def _compared(report: Mapping[str, Any]) -> list[str]:
    """The two sides, how much the weights changed, and every tensor by kind."""
    lines = wrapped(f"{sides_words(report)}{_changed(report['sites'])}")
    change = report.get("change")
    if change:
        rows = list(kind_rows(change))
        every = ("in both", f"{change['tensors']:,}", f"{change['differing']:,}", "")
        lines += ["", *_table(("tensors", "number", "differ", "of the squared change"), [*rows, every])]
    return lines + [line for said in one_sided(report["match"]) for line in wrapped(said)]


def _changed(sites: Mapping[str, Site]) -> str:
    pairs = [(row["norm"], row["norm"] / row["relative_change"]) for row in sites.values() if row["relative_change"]]
    if not pairs:
        return f"; {some(len(sites), 'weight')}"
    share = (sum(a * a for a, _ in pairs) / sum(b * b for _, b in pairs)) ** 0.5
    return f": {some(len(sites), 'weight')} compared, changed by {percent(share)} of their norm"


# ------------------------------------------------------------------------------------------------ weights


def _rank(rule: str) -> Callable[[Site], str]:
    def cell(row: Site) -> str:
        if rule == "noise" and not row["noise"]["edge"]:
            return ""
        rank = row["ranks"][rule]
        return f">{len(row['singular_values'])}" if rank is None else str(rank)

    return cell


def _share(row: Site) -> str:
    return "" if row["relative_change"] is None else percent(row["relative_change"])


NARROW = (
    Column("norm", lambda row: figures(row["norm"]), optional=True),
    Column("change", _share),
    Column("above noise", _rank("noise")),
    Column("95%", _rank("energy_0.95")),
    Column("99%", _rank("energy_0.99"), optional=True),
)
WIDE = (
    Column("shape", lambda row: "x".join(map(str, row["shape"]))),
    *NARROW[:3],
    Column("90%", _rank("energy_0.9")),
    *NARROW[3:],
    Column("Gavish-Donoho", _rank("gavish_donoho")),
    Column("Marchenko-Pastur", _rank("marchenko_pastur")),
    Column("effective", lambda row: figures(row["effective_rank"])),
    Column("stable", lambda row: figures(row["stable_rank"])),
)


def _weights(report: Mapping[str, Any], *, wide: bool) -> list[str]:
    every = report["sites"]
    sites = {path: row for path, row in every.items() if row["norm"] or wide}
    if not sites:
        return []
    if wide:
        return _numbers(list(sites.items()), WIDE)
    return _roles(sites) if len(sites) > MANY else _narrow(sites)


def _numbers(rows: Sequence[tuple[str, Site]], columns: Sequence[Column]) -> list[str]:
    """Names with their numbers; a name without any is a heading."""
    cells = [(name, *(column.cell(row) for column in columns if row)) for name, row in rows]
    return _table(("weight", *(column.head for column in columns)), cells)


def _narrow(sites: Mapping[str, Site]) -> list[str]:
    """A row for every weight, in as many columns as fit."""
    rows = [row for block in _blocks(sites) for row in _block(*block)]
    columns = list(NARROW)
    while max(map(len, lines := _numbers(rows, columns))) > WIDTH and any(c.optional for c in columns):
        columns.remove(next(c for c in columns if c.optional))
    noise = "above the rounding noise, and " if has_noise({"sites": sites}) else ""
    shares = " and ".join(c.head for c in columns if c.head.endswith("%"))
    return [
        *lines,
        *wrapped(f"ranks: {noise}for {shares} of the energy (the squared norm); more in wide form (--wide)"),
    ]


def _blocks(sites: Mapping[str, Site]) -> Iterator[tuple[str, Mapping[str, Site]]]:
    """The weights under what their paths begin with: a stack of layers, or nothing."""
    found: dict[str, dict[str, Site]] = {}
    for path, row in sites.items():
        stack = str(row["coordinates"].get("stack", ""))
        stack = stack if stack and path.startswith(f"{stack}.") else ""
        found.setdefault(stack, {})[path.removeprefix(f"{stack}.") if stack else path] = row
    yield from found.items()


def _block(stack: str, rows: Mapping[str, Site]) -> Iterator[tuple[str, Site]]:
    if stack:
        yield f"{stack}:", {}
    yield from ((("  " if stack else "") + name, row) for name, row in rows.items())


def _roles(sites: Mapping[str, Site]) -> list[str]:
    """A row for every role of a stack of layers, with the median of its weights and their range."""
    rules = [("above noise", "noise")] * has_noise({"sites": sites}) + [("95%", "energy_0.95"), ("99%", "energy_0.99")]
    head = ("weight", "number", "change", *(name for name, _ in rules))
    rows: list[Cells] = []
    for stack, members in _blocks(sites):
        rows += [(f"{stack}:",)] if stack else []
        roles: dict[str, list[Site]] = {}
        for name, row in members.items():
            roles.setdefault(str(row["coordinates"].get("role") or name) if stack else name, []).append(row)
        for role, of in roles.items():
            changes = [row["relative_change"] for row in of if row["relative_change"] is not None]
            change = percent(median(changes)) if changes else ""
            rows += [(f"  {role}" if stack else role, str(len(of)), change, *(_spread(of, rule) for _, rule in rules))]
    said = (
        "a row for every role: the median of its weights' ranks (lowest-highest), for shares of the energy (the "
        "squared norm); every weight in wide form (--wide)"
    )
    return [*_table(head, rows), *wrapped(said)]


def _spread(rows: Sequence[Site], rule: str) -> str:
    """`27 (9-99)`; ranks above those computed as `>128`."""
    rows = [row for row in rows if rule != "noise" or row["noise"]["edge"]]
    known = sorted((row["ranks"][rule] is None, row["ranks"][rule] or 0, _rank(rule)(row)) for row in rows)
    if not known:
        return ""
    low, middle, high = (known[k][2] for k in (0, len(known) // 2, -1))
    return middle if low == high else f"{middle} ({low}-{high})"


# ------------------------------------------------------------------------------------------------ stacks


def _stacks(groups: Mapping[str, Any], *, wide: bool) -> list[str]:
    """The stacks of several weights: the ranks of their modes, and what one pair of bases for all of them holds."""
    shown = {name: row for name, row in groups.items() if len(row["sites"]) > 1}
    if not shown:
        return []
    rows = []
    for name, row in shown.items():
        axes, energy = row["axes"], row["shared_energy"]
        sizes = "x".join(str(row["sizes"][a]) for a in axes)
        tensor = " ".join(f"{a}={row['sizes'][a]}" for a in axes) if wide else sizes
        rules = ("noise", "energy_0.95") if wide and any(row["noise_edges"].values()) else ("energy_0.95",)
        ranks = [" ".join(_mode(row, rule, a) for a in axes) for rule in rules]
        at = energy["rank"].index(8) if energy and 8 in energy["rank"] else None
        shares = ["" if at is None else percent(energy[key][at]) for key in ("shared", "private")]
        rows += [(name, tensor, *["" for _ in range(2 - len(ranks))], *ranks, *shares)]
    axes = max((" x ".join(row["axes"]) for row in shown.values()), key=len)
    head = ("stack", "tensor", "ranks above noise", "ranks, 95%", "r=8: one", "each")
    said = (
        "one: at least so much of the energy is held by one pair of bases of rank 8 for the stack (that of a "
        "higher-order SVD; the best may hold a little more); each: by a pair for each weight"
    )
    return [*_table(head, rows, left=2), *wrapped(f"tensor: {axes}; {said}")]


def _mode(row: Mapping[str, Any], rule: str, axis: str) -> str:
    rank = row["multilinear_rank"][rule][axis]
    return f">{len(row['mode_spectra'][axis])}" if rank is None else str(rank)


# ------------------------------------------------------------------------------------------------ candidates


def _candidates(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """The front, and the usual formats at the reference's rank; then formats as close as it, and within its size."""
    found, choice = report["candidates"], report["choice"]
    if not found or not choice:
        return
    marked = "proposed" if choice.get("holds", True) else "by the rule"
    reference = next(c for c in found if c["label"] == choice.get("reference", choice["label"]))
    shown = [c for c in found if c["front"] or (c["preset"] in ALWAYS and c["rank"] == reference["rank"])]
    head = ("format", "parameters", "of dense", "error", "worst weight", "")
    rows = [
        (
            *(c["label"], f"{c['num_parameters']:,}", dense_part(c["share"]), percent(c["relative_error"])),
            percent(c["worst_site"]["relative_error"]),
            marked if c["label"] == choice["label"] else "front" if c["front"] else "",
        )
        for c in sorted(shown, key=lambda c: (c["num_parameters"], -c["relative_error"]))
    ]
    said = "front: no format tried has both fewer parameters and a smaller error"
    yield [*_table(head, rows), *wrapped(said)]
    at_error, at_budget = (
        next((row for row in report["comparisons"][part] if matches(row)), None)
        for part, matches in (
            ("at_error", lambda row: row["label"] == reference["label"]),
            ("at_budget", lambda row: row["max_parameters"] == reference["num_parameters"]),
        )
    )
    if at_error and at_budget:
        yield _beside(reference, at_error, at_budget)


def _beside(reference: Mapping[str, Any], at_error: Mapping[str, Any], at_budget: Mapping[str, Any]) -> list[str]:
    close = {_format(row["label"]): row for row in at_error["rows"]}
    small = {_format(row["label"]): row for row in at_budget["rows"]}
    names = dict.fromkeys([*close, *small, *at_error["unreached"], *at_budget["unreached"]])
    head = (f"as close as {reference['label']}", "parameters", "of dense", "within as many", "error")
    rows = []
    for name in names:
        one, other = close.get(name), small.get(name)
        left = (
            (one["label"], f"{one['num_parameters']:,}", dense_part(one["share"])) if one else (f"{name}: none", "", "")
        )
        rows += [(*left, *((other["label"], percent(other["relative_error"])) if other else ("none", "")))]
    return _table(head, rows)


def _format(label: str) -> str:
    return label.rpartition(" r=")[0]


def _proposal(choice: Mapping[str, Any] | None) -> list[str]:
    if not choice:
        return []
    first, *rest = proposal_words(choice)
    return [line for said in (f"Proposal: {first}", *rest) for line in wrapped(said)]
