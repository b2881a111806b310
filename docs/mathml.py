"""Formulas as MathML, made when the pages are built: they need no script and no network to be read."""

import re

from docutils import nodes
from latex2mathml.converter import convert

PRIMED = re.compile(r"<msup>(<m[ino]>[^<]*</m[ino]>)<mi>&#x02032;</mi></msup>")
NORM = "<mo>&#x02016;</mo>"


def formula(text: str, display: str) -> str:
    """A formula as browsers set it: primes as large as in print, and the bars of a norm alike on both sides."""
    made = PRIMED.sub(
        r"<mrow>\1<mo>&#x02032;</mo></mrow>", convert(text, display=display)
    )
    return made.replace(NORM, NORM.replace("<mo>", '<mo stretchy="false">'))


def inline(self, node: nodes.math) -> None:
    self.body.append(formula(node.astext(), "inline"))
    raise nodes.SkipNode


def block(self, node: nodes.math_block) -> None:
    self.body.append(self.starttag(node, "div", CLASS="math"))
    self.body.append(formula(node.astext(), "block"))
    self.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app) -> dict:
    app.add_html_math_renderer(
        "mathml", inline_renderers=(inline, None), block_renderers=(block, None)
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}
