"""Layouts: which side of a stored weight is `out`, and whether a saved delta lies the other way round.

Invariant: a delta is only put onto a weight whose layout, together with its own, says how it lies there; where the two
say nothing, the shapes have to, and where these are square it is an error.

- `out in`, `in out`: how the weight is stored is known, and the site's shape is (out, in).
- `as stored`: nobody knows which side is `out`; the shape, and the delta's rows, are those of the stored tensor.
- `either`: the shape is (out, in), and how the weight is stored is not known, as in a PEFT folder.
- `unsure`: read from a file of a version that took `out in` from names; one of the two above.
"""

from __future__ import annotations

from dataclasses import replace

from tensoradapt.errors import FileError
from tensoradapt.sites import Site

OUT_IN, IN_OUT, AS_STORED, EITHER, UNSURE = "out in", "in out", "as stored", "either", "unsure"
KNOWN = (OUT_IN, IN_OUT)
STATED = "stated"  # in a plan's dictionary, under `layouts`: none of them was guessed from a name
READ = {
    OUT_IN: "(out, in), stored so",
    IN_OUT: "(out, in), stored as (in, out)",
    AS_STORED: "as it is stored: which side is out is not known",
    EITHER: "(out, in): how it is stored is not known",
    UNSURE: "from a version that judged layouts by names",
}
STATE = "give what tells the layout: model=, or a base in a folder with the model's config.json"
AGAIN = "make the adapter again with this version, from its checkpoints or its PEFT folder"


def turns(saved: Site, here: Site, where: str = "the adapter") -> bool:
    """Whether a saved site's delta has to be transposed to have the sides of `here`, the same weight elsewhere.

    Both layouts known: no, as both are (out, in); but an embedding's and a linear's delta, for one stored tensor, lie
    as it is stored. One known, one `as stored`: where the known one is `in out`. Else the shapes tell.
    Raises FileError where they are not one weight's, or are square and nothing tells; `where` names the adapter.
    """
    said = _said(saved, here)
    fits = {turned: _fits(saved, here, turned=turned) for turned in (False, True)}
    if said is None and all(fits.values()):
        raise _untold(saved, here, where)
    turned = not fits[False] if said is None else said
    if not fits[turned]:
        raise _misfit(saved, here, where)
    return turned


def crossed(one: Site, two: Site) -> bool:
    """Whether the deltas of two sites lie the other way round in one stored tensor, as their layouts say."""
    return (one.layout == IN_OUT) != (two.layout == IN_OUT)


def fits(saved: Site, here: Site) -> bool:
    """Whether a saved site can be a part of `here`, one way round or the other."""
    return any(_fits(saved, here, turned=turned) for turned in (False, True))


def check_rows(site: Site, here: Site, *, turned: bool) -> None:
    """Raise FileError where a range of rows, of a tensor as it is stored, is none of the outputs of `here`."""
    if turned and site.rows is not None:
        raise FileError(
            f"{site.path} is a range of the inputs of {here.path}, which is stored as (in, out)",
            got=f"rows {site.rows[0]} to {site.rows[1]} of the tensor as it is stored",
            expected="a range of its outputs",
            hint="make the adapter again with what tells the layout: a module, model=, or the rule's layout",
        )


def viewed(saved: Site, here: Site, where: str = "the adapter") -> Site:
    """The saved site with the layout in which the stored tensor of `here` lies as the saved delta does.

    Raises FileError as `turns` does.
    """
    inside = turns(saved, here, where) != (here.layout == IN_OUT)
    return replace(saved, layout=IN_OUT if inside else OUT_IN)


def _said(saved: Site, here: Site) -> bool | None:
    """What the two layouts alone say; None where they say nothing."""
    both = {saved.layout, here.layout}
    if len(here.shape) != 2 or len(saved.shape) != 2 or both in ({AS_STORED}, {EITHER}, {UNSURE}):
        return False
    if _is_table(saved) != _is_table(here) or _are_twins(saved, here):  # what they share is the tensor
        tells = EITHER not in both or saved.shape == saved.shape[::-1]
        return crossed(saved, here) if tells else None
    if both <= set(KNOWN):
        return False
    if EITHER in both:
        return None if both & {AS_STORED, UNSURE} else False
    if UNSURE in both:
        return None if IN_OUT in both or (AS_STORED in both and saved.shape != here.shape) else False
    return IN_OUT in both


def _is_table(site: Site) -> bool:
    """Whether a site is known to be an embedding's; without a layout its kind is but what its name says."""
    return site.kind == "embedding" and site.layout in KNOWN


def _are_twins(saved: Site, here: Site) -> bool:
    """Whether the two are other modules of one tensor: a scaled embedding, which no kind tells, and the head."""
    return saved.owner != here.owner and (here.owner in saved.aliases or saved.owner in here.aliases)


def _fits(saved: Site, here: Site, *, turned: bool) -> bool:
    """Whether the shapes are those of one weight, or of a range of its rows."""
    whole = here.shape[::-1] if turned else here.shape
    if saved.rows is not None and here.rows is None:
        whole = (min(whole[0], saved.rows[1]) - saved.rows[0], *whole[1:])
    return saved.shape == whole


def _misfit(saved: Site, here: Site, where: str) -> FileError:
    turned = _said(saved, here) or saved.shape == here.shape[::-1]
    sides = len(saved.shape) == len(here.shape) == 2 and (turned or saved.layout != here.layout)
    described = [f"{site.shape}, {READ[site.layout]}" if sides else site.shape for site in (here, saved)]
    hint = "load it onto the model it was trained on"
    hint += f"; where its sides alone are exchanged, {AGAIN}" if turned else ""
    return FileError(
        f"{saved.path} has another shape than in {where}", got=described[0], expected=described[1], hint=hint
    )


def _untold(saved: Site, here: Site, where: str) -> FileError:
    return FileError(
        f"{saved.path} is square, and which of its sides is out cannot be told",
        got=f"{here.shape} here, {READ[here.layout]}; in {where} {READ[saved.layout]}",
        expected="a layout that is known on one side" if UNSURE not in (saved.layout, here.layout) else None,
        hint=AGAIN if UNSURE in (saved.layout, here.layout) else STATE,
    )


def parameters_of(module: object) -> str:
    """How a module of no known class stores its parameters.

    torch's own store (out, in), and transformers' experts tell; of others nobody knows which side is which.
    """
    own = type(module).__module__.startswith("torch.nn.")
    told = getattr(module, "is_transposed", False if own else None)
    return AS_STORED if type(told) is not bool else IN_OUT if told else OUT_IN


def formerly(site: Site) -> Site:
    """A site of a file that was written before layouts were told from guesses: `out in` of a linear may be one."""
    guessed = site.kind == "linear" and site.layout == OUT_IN and len(site.shape) == 2
    return replace(site, layout=UNSURE) if guessed else site
