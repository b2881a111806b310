"""Sphinx configuration: MyST pages, the API from docstrings, and tables generated from the code they describe."""

import json
import re
import tomllib
from pathlib import Path

from pydantic import BaseModel

from tensoradapt.presets import PRESETS
from tensoradapt.spec import Rule, Spec

HERE = Path(__file__).parent
ROOT = HERE.parent

project = "tensoradapt"
author = "The tensoradapt authors"
copyright = "2026, the tensoradapt authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "myst_parser"]
html_theme = "furo"
html_title = f"tensoradapt {release}"
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
default_role = "code"

CITED = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def preset_table() -> str:
    """One row per preset: name, own parameters, formula, source, and what to know before using it."""
    rows = ["| preset | parameters | delta | start | source | note |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in PRESETS.items():
        source = CITED.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", row.cite)
        start = ", ".join(dict.fromkeys(rule.start for rule in row.rules))
        cells = (
            f"`{name}`",
            ", ".join(map("`{}`".format, row.parameters)),
            f"`{row.formula}`",
            start,
            source,
            row.note,
        )
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def rule_table() -> str:
    """One row per field of a rule: name, default, meaning."""
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, field in Rule.model_fields.items():
        default = field.get_default(call_default_factory=True)
        meaning = (field.description or "").replace("|", r"\|")
        rows.append(f"| `{name}` | `{json.dumps(default)}` | {meaning} |")
    return "\n".join(rows) + "\n"


def write_generated(app) -> None:
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "presets.md").write_text(preset_table(), "utf-8")
    (folder / "rule.md").write_text(rule_table(), "utf-8")
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Spec.model_json_schema()}
    (folder / "spec.schema.json").write_text(json.dumps(schema, indent=2) + "\n", "utf-8")


def fields_as_such(app, what, name, obj, options, signature, returns):
    """A rule's thirty fields stand in the table of the spec page, not in a signature."""
    return ("(**fields)", None) if what == "class" and issubclass(obj, BaseModel) else None


def prose_to_rst(app, what, name, obj, options, lines: list[str]) -> None:
    """Docstrings are prose, not markup: backticks are code, blocks indented by four are shown as they stand."""
    result: list[str] = []
    literal = False
    for line in lines:
        indented = line.startswith("    ")
        if indented and not literal:
            result += ["", "::", ""]
        if literal and line and not indented:
            result.append("")
        literal = indented or (literal and not line)
        result.append(line if literal else escape(line))
    lines[:] = result


def escape(line: str) -> str:
    """RST's special characters, outside code, as themselves: `a * b` and b_ are mathematics."""
    parts = re.split(r"(`[^`]*`)", line)
    return "".join(part if k % 2 else re.sub(r"([*_|\\])", r"\\\1", part) for k, part in enumerate(parts))


def setup(app) -> None:
    app.connect("builder-inited", write_generated)
    app.connect("autodoc-process-signature", fields_as_such)
    app.connect("autodoc-process-docstring", prose_to_rst)
