"""Read the package's source as syntax trees: files, imports and their layers, without importing anything."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1] / "tensoradapt"
PACKAGE = "tensoradapt"

TORCH_FREE = (
    *("version", "errors", "expressions", "paths", "writing", "textfiles", "records", "tables", "foreign", "axes"),
    *("diagram", "spec", "folds", "formats", "presets"),
    *("coordinates", "sites", "layouts", "targets", "roles", "sets", "contraction", "recipe"),
    *("placing", "schema", "laws", "grouping", "rows", "derived", "plan", "knapsack", "budget"),
)
WITH_TORCH = (
    *(
        "linalg",
        "chain",
        "lower",
        "interchange",
        "gauge",
        "io",
        "running",
        "host",
        "sharded",
        "quantised",
        "calls",
        "readers",
        "heads",
        "scan",
        "offload",
        "parts",
        "fit",
        "init",
    ),
    *(
        "replicas",
        "switch",
        "standins",
        "passes",
        "dry_run",
        "hooks",
        "merging",
        "merged",
        "factors",
        "adapter",
        "handover",
        "callers",
        "attach",
    ),
    *(
        "change",
        "optim",
        "plots",
        "analysis",
        "extract",
        "start",
        "folders",
        "verify",
        "peft",
        "convert",
        "collection",
        "distributed",
        "trainer",
    ),
    *("demo", "cli", "__main__", "__init__"),
)
LAYERS = TORCH_FREE + WITH_TORCH


@dataclass(frozen=True)
class Import:
    """One imported module, absolute: `tensoradapt.spec`, `torch.nn`."""

    module: str
    line: int
    in_function: bool
    type_checking: bool

    @property
    def late(self) -> bool:
        """Whether importing the file does not import the module."""
        return self.in_function or self.type_checking


@dataclass(frozen=True)
class File:
    """One source file of the package under `root`."""

    path: Path
    root: Path
    tree: ast.Module = field(compare=False)

    @property
    def parts(self) -> tuple[str, ...]:
        return self.path.relative_to(self.root).with_suffix("").parts

    @property
    def layer(self) -> str:
        return self.parts[0]

    @property
    def module(self) -> str:
        """Dotted name; a package's `__init__` keeps its own, so that it is a node of its own among the imports."""
        return ".".join((PACKAGE, *self.parts))

    @property
    def imports(self) -> list[Import]:
        return sorted(_imports(self.tree, self), key=lambda found: found.line)


def files(root: Path = ROOT) -> list[File]:
    found = [File(path, root, ast.parse(path.read_text("utf-8"))) for path in sorted(root.rglob("*.py"))]
    assert found, f"no source files under {root}"
    return found


def layer_of(module: str) -> str | None:
    """The layer of a module of the package, None for any other: `tensoradapt.formats.tt` -> `formats`."""
    head, _, rest = module.partition(".")
    return (rest.split(".")[0] or "__init__") if head == PACKAGE else None


def _imports(node: ast.AST, file: File, in_function: bool = False, type_checking: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = type_checking or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        for module in _targets(child, file):
            yield Import(module, child.lineno, inside, checking)
        yield from _imports(child, file, inside, checking)


def _targets(node: ast.AST, file: File) -> list[str]:
    if isinstance(node, ast.Import):
        return [_as_file(alias.name, file.root) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(node, file)
        return [_as_file(_member(base, alias.name, file.root), file.root) for alias in node.names]
    return []


def _absolute(node: ast.ImportFrom, file: File) -> str:
    if not node.level:
        return node.module or ""
    package = (PACKAGE, *file.parts)[: -node.level]
    return ".".join((*package, node.module) if node.module else package)


def _member(base: str, name: str, root: Path) -> str:
    """`from tensoradapt import spec` imports the file spec.py; any other name is an attribute of the module `base`."""
    path = _path(base, root)
    is_module = path is not None and ((path / f"{name}.py").exists() or (path / name).is_dir())
    return f"{base}.{name}" if is_module else base


def _as_file(module: str, root: Path) -> str:
    path = _path(module, root)
    return f"{module}.__init__" if path is not None and path.is_dir() else module


def _path(module: str, root: Path) -> Path | None:
    head, *rest = module.split(".")
    return root.joinpath(*rest) if head == PACKAGE else None
