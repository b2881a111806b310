"""What works on which model: the page made of the tables of tests/zoo. `python docs/what_works.py` writes it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE / "what-works.md"
sys.path.insert(0, str(HERE.parent / "tests"))  # `zoo`, the matrix of models and jobs

from zoo.building import LINES  # noqa: E402
from zoo.table import Expected, expected, known_wrong  # noqa: E402

# Columns: what a reader looks for, and the jobs of the matrix behind it.
COLUMNS = {
    "attach, train": ("plan", "attach", "train", "restore"),
    "merge": ("merge",),
    "save, load": ("save",),
    "analyze": ("analyze",),
    "extract": ("from folders", "from modules", "from states", "from wrapped"),
    "embedding, head": ("ends",),
    "whole change": ("whole", "verify"),
    "merge into a folder": ("merge extracted", "merge attached"),
    "PEFT out": ("export",),
    "PEFT in": ("import", "merge imported"),
}
INTRODUCTION = """# What works on which model

Every row is a tiny model with random weights, every column something that is done with it, on all of its matrices at once: linear
weights, convolutions, embeddings, heads, tables and experts. {cells:,} cells of {models} architectures are judged by the model's own
outputs, by transformers' own `save_pretrained` and `from_pretrained`, and by PEFT itself; the library judges none of its work.
`pytest` runs a third of them, `pytest tests/zoo --zoo all` every one.

| column | a tick means |
| --- | --- |
| attach, train | A fresh adapter leaves every output as it was, bit for bit. A backward pass reaches every factor whose weight has an effect, and a step lowers the loss. Detached, the model is what it was. The plan of the folder is that of the model. |
| merge | Merged into the weights, the model gives what it gave with the adapter attached. |
| save, load | Loaded onto another copy of the model, a saved adapter does the same. |
| analyze | Every weight that differs between two folders is listed by its name in the model, with its norm. |
| extract | An adapter extracted from two folders, two live models, two state dicts, or state dicts with the names of wrappers (`module.`, `_orig_mod.`) makes the tuned model of the base. |
| embedding, head | The same for the embedding and the head by their names, each alone and together, tied or not. |
| whole change | With no targets, and norms and biases changed too: what the adapter leaves out is named, and the error over the whole change is that of the numbers. `verify` finds nothing missing. |
| merge into a folder | What was extracted, or attached and saved, merged into the model's folder, is the tuned model for `from_pretrained`. |
| PEFT out | PEFT opens the exported folder on the real model, and the outputs are those of the attached adapter. |
| PEFT in | A LoRA that PEFT made does here what it does in PEFT: loaded onto the model, and merged into its folder. |

A number in a cell is a note below the tables: what is refused by name, or left out and told. A dash means that there is nothing to
do. Nothing in these tables is wrong in silence.
"""


def page() -> str:
    """The page: one table for every section of the models, and the notes."""
    notes: dict[str, int] = {}
    tables = [
        _table(section, notes)
        for section in dict.fromkeys(line.section for line in LINES.values())
    ]
    jobs = sum(map(len, COLUMNS.values()))
    listed = "\n".join(f"{number}. {text}" for text, number in notes.items())
    first = INTRODUCTION.format(cells=len(LINES) * jobs, models=len(LINES))
    return "\n\n".join([first.rstrip(), *tables, f"## Notes\n\n{listed}"]) + "\n"


def _table(section: str, notes: dict[str, int]) -> str:
    """The models of a section: those with a tick in every column as a list, the others in rows of equal cells."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name in (name for name, line in LINES.items() if line.section == section):
        cells = [
            _cell([(name, job) for job in jobs], notes) for jobs in COLUMNS.values()
        ]
        rows.setdefault(tuple(cells), []).append(f"`{name}`")
    whole = rows.pop(("✓",) * len(COLUMNS), [])
    shown = [k for k in range(len(COLUMNS)) if any(cells[k] != "✓" for cells in rows)]
    names = [list(COLUMNS)[k] for k in shown]
    head = f"| model | {' | '.join(names)} |\n| --- |{' :---: |' * len(shown)}"
    body = [
        f"| {', '.join(models)} | {' | '.join(cells[k] for k in shown)} |"
        for cells, models in rows.items()
    ]
    parts = [f"## {section[0].upper()}{section[1:]}"]
    parts += [f"A tick in every column: {', '.join(whole)}."] if whole else []
    others = (
        "The others have one" if whole else "A tick"
    ) + " in every column that is not shown:"
    parts += ["\n".join([others, "", head, *body])] if body else []
    return "\n\n".join(parts)


def _cell(cells: list[tuple[str, str]], notes: dict[str, int]) -> str:
    if any(cell in known_wrong() for cell in cells):
        return "wrong"
    found: list[Expected] = [expected()[cell] for cell in cells if cell in expected()]
    if len(found) == len(cells) and all(each.word == "none" for each in found):
        return "–"
    texts = dict.fromkeys(each.why for each in found)
    return (
        ", ".join(str(notes.setdefault(text, len(notes) + 1)) for text in texts) or "✓"
    )


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
