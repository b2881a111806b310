"""The code's own budgets: short functions, short files, no drawer for odds and ends, no globals, few type tests."""

import ast
from pathlib import Path

import pytest
from source_tree import PACKAGE, File, files

MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 320
MAX_ISINSTANCE_PER_KLOC = 9.0
DRAWERS = {"utils", "util", "helpers", "common", "misc"}


def long_functions(tree: list[File]) -> list[str]:
    return [
        f"{_at(file, node)} {node.name}: {length} lines"
        for file, node in _walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (length := _length(node)) > MAX_FUNCTION_LINES
    ]


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code from `def` on, without the docstring."""
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    return _span(node) - (_span(doc) if doc else 0)


def _span(node: ast.stmt) -> int:
    return node.end_lineno - node.lineno + 1


def long_files(tree: list[File]) -> list[str]:
    return [f"{file.module}: {lines} lines" for file in tree if (lines := _lines(file)) > MAX_FILE_LINES]


def _lines(file: File) -> int:
    return len(file.path.read_text("utf-8").splitlines())


def drawers(tree: list[File]) -> list[str]:
    return [file.module for file in tree if DRAWERS & {part.strip("_") for part in file.parts}]


def global_statements(tree: list[File]) -> list[str]:
    return [f"{_at(file, node)} {ast.unparse(node)}" for file, node in _walk(tree) if isinstance(node, ast.Global)]


def dense_type_tests(tree: list[File]) -> list[str]:
    calls = sum(isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" for _, node in _walk(tree))
    density = 1000 * calls / sum(map(_lines, tree))
    return [f"{density:.1f} isinstance per thousand lines"] if density >= MAX_ISINSTANCE_PER_KLOC else []


def _walk(tree: list[File]):
    return ((file, node) for file in tree for node in ast.walk(file.tree))


def _at(file: File, node: ast.stmt) -> str:
    return f"{file.path.relative_to(file.root.parent)}:{node.lineno}"


RULES = (long_functions, long_files, drawers, global_statements, dense_type_tests)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule):
    assert rule(files()) == []


def _function(lines: int, doc: int = 0) -> str:
    docstring = '    """' + "Say.\n" * doc + '    """\n' if doc else ""
    return "def f():\n" + docstring + "    a = 1\n" * (lines - 1)


ALLOWED = [
    (long_functions, _function(MAX_FUNCTION_LINES)),
    (long_functions, _function(MAX_FUNCTION_LINES, doc=30)),
    (long_files, "a = 1\n" * MAX_FILE_LINES),
    (global_statements, "TABLE = {}"),
    (dense_type_tests, "isinstance(1, int)\n" + "a = 1\n" * 111),
]
BREACHES = [
    (long_functions, "spec.py", _function(MAX_FUNCTION_LINES + 1), "spec.py:1 f: 51 lines"),
    (long_functions, "spec.py", _function(MAX_FUNCTION_LINES + 1, doc=3), "f: 51 lines"),
    (long_functions, "spec.py", "class A:\n    async " + _function(51).replace("    ", "        "), "spec.py:2 f"),
    (long_files, "spec.py", "a = 1\n" * (MAX_FILE_LINES + 1), "321 lines"),
    (drawers, "utils.py", "", "tensoradapt.utils"),
    (drawers, "fit/_helpers.py", "", "tensoradapt.fit._helpers"),
    (global_statements, "spec.py", "STATE = 0\ndef f():\n    global STATE\n    STATE = 1", "spec.py:3 global STATE"),
    (dense_type_tests, "spec.py", "isinstance(1, int)\n" + "a = 1\n" * 110, "9.0 isinstance"),
]


def _tree(folder: Path, name: str, source: str) -> list[File]:
    path = folder / PACKAGE / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    return files(folder / PACKAGE)


@pytest.mark.parametrize(("rule", "source"), ALLOWED, ids=[rule.__name__ for rule, _ in ALLOWED])
def test_the_limit_itself_is_accepted(rule, source, tmp_path):
    assert rule(_tree(tmp_path, "spec.py", source)) == []


@pytest.mark.parametrize(
    ("rule", "name", "source", "says"), BREACHES, ids=[f"{b[0].__name__}-{b[1]}" for b in BREACHES]
)
def test_a_breach_is_named(rule, name, source, says, tmp_path):
    found = rule(_tree(tmp_path, name, source))
    assert len(found) == 1 and says in found[0], found
