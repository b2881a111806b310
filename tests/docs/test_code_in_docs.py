"""The code of the README, the guides and the tutorials runs as it stands.

A page's Python blocks run in order in one namespace, and run again in the folder that they left. The commands of a page
in docs run after them, in the same folder; the README's stand for the reader's own files.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "serving",
    "initialisation",
    "optimisers",
    "trainers",
    "figures-for-papers",
    "hand-over",
    "installation",
    "presets",
    "spec",
    "targets",
    "tensorly",
    "which-preset",
)
WIDTH = 88  # characters of code that a page shows without scrolling, 1280 pixels wide
GUIDES = [ROOT / f"docs/{name}.md" for name in NAMES]
PAGES = [*GUIDES, *sorted((ROOT / "docs/tutorials").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
FENCE = re.compile(r"^```(\w*)")

RUN = """
import sys
page, code, times = sys.argv[1:]
for _ in range(int(times)):
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
"""


def lines_of(text: str, wanted: str) -> list[str]:
    """The page with every line blanked that is not of a language, so that a traceback shows its own line numbers."""
    lines, language = [], None
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence:
            language = fence[1] if language is None else None
        lines.append(line if language == wanted and not fence else "")
    assert language is None, "a code block is not closed"
    return lines


def python_lines(text: str) -> str:
    return "\n".join(lines_of(text, "python"))


def code_of(page: Path) -> str:
    """A page's Python blocks, or a notebook's cells."""
    text = page.read_text("utf-8")
    if page.suffix == ".md":
        return python_lines(text)
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def commands(page: Path) -> list[str]:
    lines = lines_of(page.read_text("utf-8"), "bash") if page.parent != ROOT else []
    whole = "\n".join(lines).replace("\\\n", "")  # a backslash continues a line
    return [line for line in whole.splitlines() if line.startswith("tensoradapt ")]


def run_page(page: Path, folder: Path, times: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(page), code_of(page), str(times)]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_the_code_of_a_page_runs_and_runs_again_in_the_same_folder(page, tmp_path):
    ran = run_page(page, tmp_path, times=2)
    assert ran.returncode == 0, ran.stderr
    for command in commands(page) if page.suffix == ".md" else ():
        arguments = [sys.executable, "-m", *shlex.split(command)]
        ran = subprocess.run(arguments, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"


def test_no_page_with_code_is_left_out():
    with_code = {page for page in ROOT.glob("docs/[!_]*.md") if any(lines_of(page.read_text("utf-8"), "python"))}
    assert with_code - {*PAGES} == set()


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT)))
def test_code_is_read_without_scrolling(page):
    if "_generated" not in page.parts:
        text = page.read_text("utf-8")
        lines = [line for language in ("python", "py", "bash", "text", "json") for line in lines_of(text, language)]
        assert [line for line in lines if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_every_page_has_code(page):
    assert "import tensoradapt as ta" in python_lines(page.read_text("utf-8"))


def test_blocks_share_a_namespace_and_a_failure_shows_its_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n```python\na = 1\n```\n```bash\nexit 3\n```\n```python\nassert a == 2\n```\n")
    ran = run_page(page, tmp_path)
    assert ran.returncode == 1
    assert f'"{page}", line 9' in ran.stderr and "assert a == 2" in ran.stderr


def test_an_open_block_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="not closed"):
        python_lines("```python\na = 1\n")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_that_was_run_by_hand_is_python(page):
    """Blocks marked `py` need packages that the tests have not."""
    compile("\n".join(lines_of(page.read_text("utf-8"), "py")), str(page), "exec")
