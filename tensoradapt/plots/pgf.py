"""Figures as PGF pictures, which LaTeX reads with its command input and sets in the document's own fonts.

Matplotlib's writer asks a LaTeX for the size of every text. This one measures them in the figure's font, so that no
LaTeX is needed; texts are anchored where they touch, so that the document's font may be wider or narrower.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SPECIAL = {
    **{letter: f"\\{letter}" for letter in "{}$&#%_"},
    **{"\\": r"\textbackslash{}", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}"},
    "\N{REPLACEMENT CHARACTER}": "?",
    **{"…": r"\ldots{}", "×": r"$\times$", "–": "--", "−": r"$-$", "·": r"$\cdot$", "±": r"$\pm$", "≤": r"$\leq$"},
}
RAISED = "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"
LOWERED = str.maketrans(RAISED, "-0123456789")
PATTERN = re.compile(f"[{RAISED}]+|[{re.escape(''.join(SPECIAL))}]")
HEAD = """%% A picture for LaTeX. In the document's preamble: \\usepackage{pgf}. In a figure: \\input{NAME.pgf}
\\begingroup
\\makeatletter
\\begin{pgfpicture}
"""
TAIL = """\\end{pgfpicture}
\\makeatother
\\endgroup
"""


def tex(text: str) -> str:
    """A text such that LaTeX shows it as it stands."""
    return PATTERN.sub(lambda found: SPECIAL.get(found[0]) or f"$^{{{found[0].translate(LOWERED)}}}$", text)


def write_pgf(figure: Figure, path: Path) -> None:
    """Write a figure as PGF, all of it vectors and texts."""
    figure.draw_without_rendering()  # the layout, by the sizes of the figure's own font
    engine, width, height = figure.get_layout_engine(), figure.get_figwidth(), figure.get_figheight()
    figure.set_layout_engine("none")
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(HEAD)
            file.write(f"\\pgfpathrectangle{{\\pgfpointorigin}}{{\\pgfqpoint{{{width:f}in}}{{{height:f}in}}}}%\n")
            file.write("\\pgfusepath{use as bounding box, clip}%\n")
            figure.draw(_renderer(figure, file))
            file.write(TAIL)
    finally:
        figure.set_layout_engine(engine)


def _renderer(figure: Figure, file: Any) -> Any:
    """Matplotlib's renderer of PGF, with texts measured here and shown as they stand."""
    from matplotlib.backends.backend_pgf import RendererPgf
    from matplotlib.textpath import text_to_path

    class Measured(RendererPgf):
        def get_text_width_height_descent(self, s: str, prop: Any, ismath: Any) -> tuple[float, float, float]:
            size = text_to_path.get_text_width_height_descent(s, prop, ismath is True)
            return tuple(self.points_to_pixels(length) for length in size)

        def draw_text(self, gc: Any, x: float, y: float, s: str, *rest: Any, **options: Any) -> None:
            words = s if options.get("ismath", False) else tex(s)
            mtext = options.get("mtext")
            if mtext is not None and mtext.get_verticalalignment() == "center_baseline" and not mtext.get_rotation():
                options["mtext"] = _Anchored(mtext, y)
            super().draw_text(gc, x, y, words, *rest, **options)

    return Measured(figure, file)


class _Anchored:
    """A text on its measured baseline, anchored sideways: what matplotlib's renderer asks of a text."""

    def __init__(self, text: Any, baseline: float) -> None:
        self.text, self.baseline = text, baseline

    def get_rotation_mode(self) -> str:
        return "anchor"

    def get_verticalalignment(self) -> str:
        return "baseline"

    def get_horizontalalignment(self) -> str:
        return str(self.text.get_horizontalalignment())

    def get_unitless_position(self) -> tuple[float, float]:
        x, _ = self.text.get_transform().transform(self.text.get_unitless_position())
        return float(x), self.baseline

    def get_transform(self) -> Any:
        from matplotlib.transforms import IdentityTransform

        return IdentityTransform()
