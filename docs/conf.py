"""Sphinx configuration: MyST pages, the API from docstrings, and tables generated from the code they describe."""

import json
import os
import re
import sys
import tomllib
from pathlib import Path

import typer
from pydantic import BaseModel

from tensoradapt import plan, preset
from tensoradapt.cli.app import application
from tensoradapt.plots import draw_diagram
from tensoradapt.presets import PRESETS
from tensoradapt.spec import Rule, Spec

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of the notebooks: threads beside other work wait for each other
HERE = Path(__file__).parent
ROOT = HERE.parent

project = "tensoradapt"
author = "The tensoradapt authors"
copyright = "2026, the tensoradapt authors"
release = version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))[
    "project"
]["version"]

sys.path.insert(0, str(HERE))  # `mathml` and `targets_table`, beside this file
extensions = ["sphinx.ext.autodoc", "mathml", "myst_nb"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"tensoradapt {release}"
exclude_patterns = ["_build", "_generated"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = (
    88  # longer signatures have a line for each parameter
)
html_static_path = ["_static"]
html_css_files = ["tables.css"]
nb_execution_mode = "force"  # notebooks run whenever the pages are built
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # progress, and notices of other libraries
default_role = "code"

# What the networks of the theory page are drawn for: the shapes of two layers of BERT-base, and one convolution.
HEADS = 12
ROLES = {
    **{
        f"attention.{role}": (768, 768)
        for role in ("self.query", "self.key", "self.value", "output.dense")
    },
    **{"intermediate.dense": (3072, 768), "output.dense": (768, 3072)},
}
SHAPES = {
    f"encoder.layer.{k}.{role}": shape
    for k in range(2)
    for role, shape in ROLES.items()
} | {"conv": (64, 32, 3, 3)}

CITED = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def preset_table() -> str:
    """One row per preset: name with its own parameters, start, formula; below it the source, and what to know of it."""
    rows = ["| preset | start | delta, source and notes |", "| --- | --- | --- |"]
    for name, row in PRESETS.items():
        source = CITED.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", row.cite)
        source = re.sub(r"^(github\.com/\S+)", r"[\1](https://\1)", source)
        start = ", ".join(dict.fromkeys(rule.start for rule in row.rules))
        cells = (
            f"**`{name}`**<br>" + ", ".join(map("`{}`".format, row.parameters)),
            start,
            f"`{row.formula}`<br>" + "; ".join(filter(None, (source, row.note))),
        )
        rows.append(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        )
    return "\n".join(rows) + "\n"


def advice_table() -> str:
    """One row per preset: when to take it, and the learning rate to begin with."""
    rows = ["| preset | when to take it | learning rate |", "| --- | --- | --: |"]
    for name, row in PRESETS.items():
        rows.append(f"| `{name}` | {row.use} | {row.rate or 'not measured'} |")
    return "\n".join(rows) + "\n"


def command_pages() -> str:
    """Every command's own help, under a heading of its name."""
    app = typer.main.get_command(application())
    whole = type(app).context_class
    parts = []
    for name, command in app.commands.items():
        context = whole(
            command,
            info_name=f"tensoradapt {name}",
            max_content_width=80,
            terminal_width=80,
        )
        parts.append(
            f"## {name}\n\n```text\n{command.get_help(context).strip()}\n```\n"
        )
    return "\n".join(parts)


def rule_table() -> str:
    """One row per field of a rule: name, default, meaning."""
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, field in Rule.model_fields.items():
        default = field.get_default(call_default_factory=True)
        meaning = (field.description or "").replace("|", r"\|")
        rows.append(f"| `{name}` | `{json.dumps(default)}` | {meaning} |")
    return "\n".join(rows) + "\n"


def groups_of(name: str) -> list:
    """One group of every network that a preset makes."""
    own = {"heads": HEADS} if "heads" in PRESETS[name].parameters else {}
    groups = plan(preset(name, **own), SHAPES).groups
    return list(
        {tuple(group.diagram.nodes.items()): group for group in groups}.values()
    )


def draw_networks(folder: Path) -> str:
    """Draw every preset's networks; boxes that show them, as many in a row as there is room for."""
    boxes = []
    for name, row in PRESETS.items():
        for number, group in enumerate(groups_of(name)):
            file = f"networks/{name}{f'-{number + 1}' if number else ''}.svg"
            zero = next((node for node, law in group.laws.items() if law == "zero"), "")
            draw_diagram(
                group.diagram, folder / file, frozen=group.rule.frozen, zero=zero
            )
            alt = str(group.diagram).replace("[", "(").replace("]", ")")
            boxes.append(
                f":::{{container}}\n![{alt}](/_generated/{file})\n\n**`{name}`** `{row.formula}`\n:::\n"
            )
    return "\n".join(["::::{container} networks", *boxes, "::::", ""])


def draw_sweep(folder: Path) -> None:
    """Draw the steps of a QR sweep to the third core of a train: isometries are hatched."""
    (group,) = groups_of("metatt_4d")
    cores = list(group.diagram.nodes)
    for step, done in enumerate(
        (cores[:1], cores[:2], [*cores[:2], cores[3]]), start=1
    ):
        figure = draw_diagram(group.diagram, frozen=done)
        for text in figure.findobj(
            lambda artist: getattr(artist, "get_text", str)() == "frozen"
        ):
            text.set_text("isometry")
        figure.savefig(folder / f"networks/sweep-{step}.svg")


def write_generated(app) -> None:
    from targets_table import targets_table

    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text(command_pages(), "utf-8")
    (folder / "targets.md").write_text(targets_table(), "utf-8")
    (folder / "advice.md").write_text(advice_table(), "utf-8")
    (folder / "presets.md").write_text(preset_table(), "utf-8")
    (folder / "networks.md").write_text(draw_networks(folder), "utf-8")
    draw_sweep(folder)
    (folder / "rule.md").write_text(rule_table(), "utf-8")
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Spec.model_json_schema(),
    }
    (folder / "spec.schema.json").write_text(
        json.dumps(schema, indent=2) + "\n", "utf-8"
    )


def readable(app, what, name, obj, options, signature, returns):
    """Signatures that tell a reader nothing are left out, and empty mappings are written as such.

    A rule's thirty fields stand in the table of the spec page, and all errors are raised with the same words.
    """
    if what == "class" and issubclass(obj, BaseModel):
        return "(**fields)", None
    if what == "exception":
        return ("" if obj.__init__ is obj.__base__.__init__ else signature), None
    return (signature.replace("<factory>", "{}"), returns) if signature else None


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
    return "".join(
        part if k % 2 else re.sub(r"([*_|\\])", r"\\\1", part)
        for k, part in enumerate(parts)
    )


def setup(app) -> None:
    app.connect("builder-inited", write_generated)
    app.connect("autodoc-process-signature", readable)
    app.connect("autodoc-process-docstring", prose_to_rst)
