"""The code of the README, the guides and the tutorials runs as it stands.

A page's Python blocks run in order in one namespace. The commands of a page in docs run after them, in the same folder;
the README's stand for the reader's own files.
"""

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
    "installation",
    "targets",
    "tensorly",
)
GUIDES = [ROOT / f"docs/{name}.md" for name in NAMES]
PAGES = [*GUIDES, *sorted((ROOT / "docs/tutorials").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)")

RUN = "import sys; page, code = sys.argv[1:]; exec(compile(code, page, 'exec'), {'__name__': '__main__'})"


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


def commands(page: Path) -> list[str]:
    lines = lines_of(page.read_text("utf-8"), "bash") if page.parent != ROOT else []
    return [line for line in lines if line.startswith("tensoradapt ")]


def run_page(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(page), python_lines(page.read_text("utf-8"))]
    return subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, tmp_path):
    ran = run_page(page, tmp_path)
    assert ran.returncode == 0, ran.stderr
    for command in commands(page):
        arguments = [sys.executable, "-m", *shlex.split(command)]
        ran = subprocess.run(arguments, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"


def test_the_code_of_the_readme_runs_again_in_the_same_folder(tmp_path):
    for _ in range(2):
        ran = run_page(ROOT / "README.md", tmp_path)
        assert ran.returncode == 0, ran.stderr


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
