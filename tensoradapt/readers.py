"""Readers: which modules use a weight of another one without calling it, `F.linear(x, self.child.weight)`.

Told from the source of what a forward pass runs: every forward, and the methods and functions that it names. Nothing is
called. Invariant: a use that asks only for a weight's dtype, device or shape is no reading.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from tensoradapt.calls import forward_of
from tensoradapt.io.wrapped import inside

Chain = tuple[str, ...]  # names from a parameter of a function on: self.blocks[0].weight is (self, blocks, [], weight)
ITEM = "[]"
GIVES = "()"
ASKS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "element_size", "is_cuda", "is_meta", "layout"}
ASKS |= {"requires_grad", "grad", "is_floating_point", "data_ptr", "stride", "is_contiguous", "nbytes", "itemsize"}
LIKE = {"to", "type_as", "zeros_like", "ones_like", "empty_like", "full_like", "isinstance", "hasattr", "id", "type"}
GIVERS = ("get_input_embeddings", "get_output_embeddings")  # of transformers: they return a module
EACH = {"enumerate", "zip", "reversed", "list", "tuple", "iter"}
DEPTH = 8  # functions that call one another


@dataclass(frozen=True)
class Uses:
    """What a function names: chains from its parameters, with the chains that it hands on where it calls them."""

    parameters: Sequence[str] = ()
    chains: Sequence[tuple[Chain, Mapping[int | str, Chain]]] = ()
    functions: Sequence[tuple[str, Mapping[int | str, Chain]]] = ()
    above: Sequence[str] = ()  # methods of the class above that it calls, super().forward(x)


class _Reading(ast.NodeVisitor):
    """Collects the uses in one function's tree; names that stand for chains are followed in the order of the text."""

    def __init__(self, parameters: Sequence[str]) -> None:
        self.known: dict[str, Chain] = {name: (name,) for name in parameters}
        self.chains: list[tuple[Chain, Mapping[int | str, Chain]]] = []
        self.functions: list[tuple[str, Mapping[int | str, Chain]]] = []
        self.above: list[str] = []

    def chain(self, node: ast.AST | None) -> Chain | None:
        """The chain that an expression is; None for any other."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute | ast.Subscript):
            base = self.chain(node.value)
            return base and (*base, node.attr if hasattr(node, "attr") else ITEM)
        if isinstance(node, ast.Call):
            return self._given(node)
        return None

    def _given(self, node: ast.Call) -> Chain | None:
        """The chain that a call gives: getattr(x, "name"), x.values(), x.get_input_embeddings()."""
        name, args = getattr(node.func, "id", ""), node.args
        if name == "getattr" and len(args) > 1 and type(getattr(args[1], "value", None)) is str:
            base = self.chain(args[0])
            return base and (*base, args[1].value)  # type: ignore[attr-defined]
        found = self.chain(node.func)
        if found and found[-1] in ("values", "children"):
            return found[:-1]
        return (*found, GIVES) if found and found[-1] in GIVERS else None

    def visit_Call(self, node: ast.Call) -> None:
        """A call: of a chain, of a function by its name, or of a method of the class above."""
        handed: list[tuple[int | str, ast.AST]] = [
            *enumerate(node.args),
            *((k.arg or "", k.value) for k in node.keywords),
        ]
        args = {key: chain for key, value in handed if (chain := self.chain(value))}
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        called, whole = self.chain(node.func), self.chain(node)
        if whole:
            self.chains.append((whole, {}))
        elif called:
            self.chains.append((called, args))
        elif isinstance(node.func, ast.Name) and args and name not in LIKE:
            self.functions.append((name, args))
        elif isinstance(node.func, ast.Attribute) and "super()" in ast.unparse(node.func.value):
            self.above.append(name)
        else:
            self.visit(node.func)
        for _, value in handed if name not in LIKE and not whole else ():
            self.visit(value)

    def _use(self, node: ast.Attribute | ast.Subscript | ast.Name) -> None:
        found = self.chain(node)
        if found is None:
            self.generic_visit(node)
        elif isinstance(node.ctx, ast.Load):
            self.chains.append((found, {}))

    visit_Attribute = visit_Subscript = visit_Name = _use

    def visit_Compare(self, node: ast.Compare) -> None:
        """What is only compared with None is not read."""
        if not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """A name for a chain; what is assigned to a name that stood for one is another thing."""
        found = self.chain(node.value)
        if found is None:
            self.visit(node.value)
        for target in node.targets:
            self._name(target, found)

    def visit_For(self, node: ast.For) -> None:
        """A loop over children."""
        self._each(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """The same, in a comprehension."""
        self._each(node.target, node.iter)
        self.generic_visit(node)

    def _comprehension(self, node: Any) -> None:
        for each in (*node.generators, getattr(node, "elt", None) or node.key, getattr(node, "value", None)):
            if each is not None:
                self.visit(each)

    visit_ListComp = visit_SetComp = visit_GeneratorExp = visit_DictComp = _comprehension

    def _each(self, target: ast.AST, source: ast.AST) -> None:
        """Name what a loop runs over: a list of modules, enumerated, or several at once."""
        name = getattr(getattr(source, "func", None), "id", "")
        args = getattr(source, "args", [])
        parts = getattr(target, "elts", [])
        if name == "enumerate" and len(parts) == 2 and args:
            self._each(parts[1], args[0])
        elif name == "zip" and len(parts) == len(args):
            for part, arg in zip(parts, args, strict=True):
                self._each(part, arg)
        elif name in EACH and args:
            self._each(target, args[0])
        else:
            found = self.chain(source)
            self._name(target, (*found, ITEM) if found else None)

    def _name(self, target: ast.AST, chain: Chain | None) -> None:
        if isinstance(target, ast.Name):
            self.known.pop(target.id, None)
            if chain:
                self.known[target.id] = chain


@lru_cache(maxsize=4096)
def uses(function: Any) -> Uses:
    """What a function names, from its source; nothing where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return Uses()
    if not isinstance(tree, ast.FunctionDef):
        return Uses()
    parameters = [each.arg for each in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)]
    reading = _Reading(parameters)
    for statement in tree.body:
        reading.visit(statement)
    alike = {(chain, *sorted(args.items(), key=str)): (chain, args) for chain, args in reading.chains if len(chain) > 1}
    return Uses(parameters, list(alike.values()), reading.functions, reading.above)


@dataclass
class _Walk:
    """One module's forward, followed through what it calls: the parameters of others that it reads."""

    modules: Mapping[str, nn.Module]
    paths: Mapping[int, str]  # by the module's identity: one that stands in two places has one path
    reader: str
    found: set[str] = field(default_factory=set)
    seen: set[Any] = field(default_factory=set)

    def run(self, function: Any, bound: Mapping[str, str], depth: int = 0) -> None:
        """Follow a function whose parameters stand for modules, by path."""
        function = inspect.unwrap(function)
        key = (function, *sorted(bound.items()))
        if key in self.seen or depth > DEPTH or not hasattr(function, "__globals__"):
            return
        self.seen.add(key)
        told = uses(function)
        for chain, args in told.chains:
            if chain[0] in bound:
                handed = {k: p for k, c in args.items() for p in self._modules_at(c, bound)}
                self._follow(bound[chain[0]], chain[1:], handed, depth)
        for name, args in told.functions:
            handed = {k: p for k, c in args.items() for p in self._modules_at(c, bound)}
            other = function.__globals__.get(name)
            if handed and inspect.isfunction(other) and not other.__module__.startswith("torch."):
                self.run(other, _bound(uses(inspect.unwrap(other)).parameters, handed), depth + 1)
        for name in told.above:
            own = told.parameters[0] if told.parameters else ""
            if own in bound:
                self._above(bound[own], name, function, depth)

    def _above(self, path: str, name: str, function: Any, depth: int) -> None:
        """The method of the next class above that has one of the name."""
        kinds = type(self.modules[path]).__mro__
        mine = [
            k for k, kind in enumerate(kinds) if inspect.unwrap(vars(kind).get(function.__name__, _nothing)) is function
        ]
        for kind in kinds[mine[0] + 1 :] if mine else ():
            if name in vars(kind):
                self._method(path, vars(kind)[name], {}, depth)
                return

    def _follow(self, path: str, names: Chain, handed: Mapping[int | str, str], depth: int) -> None:
        """Go along a chain from a module: to a parameter, a method, or another module."""
        module = self.modules[path]
        if not names:
            if handed:
                self._called(path, handed, depth)
            return
        first, *rest = names
        if isinstance(module, torch.jit.ScriptModule):
            return  # compiled, and refused
        children = module._modules if first == ITEM else {first: module._modules.get(first)}
        inner = [path for path in map(self._path, children.values()) if path is not None]
        for other in inner:
            self._follow(other, tuple(rest), handed, depth)
        if inner or first == ITEM:
            return
        if module._parameters.get(first) is not None:
            if path != self.reader and not (rest and rest[0] in ASKS):
                self.found.add(_join(path, first))
        elif rest[:1] == [GIVES]:
            given = self._path(getattr(module, first, _nothing)())
            if given is not None:
                self._follow(given, tuple(rest[1:]), handed, depth)
        else:
            self._method(path, inspect.getattr_static(type(module), first, None), handed, depth)

    def _called(self, path: str, handed: Mapping[int | str, str], depth: int) -> None:
        """A module that is called with others: what its own forward reads of these."""
        inner = _Walk(self.modules, self.paths, path, seen=self.seen)
        function = inspect.unwrap(forward_of(self.modules[path]))
        names = uses(function).parameters
        inner.run(function, {names[0]: path, **_bound(names[1:], handed)} if names else {}, depth + 1)
        self.found |= {name for name in inner.found if not name.startswith(f"{path}.")}

    def _method(self, path: str, function: Any, handed: Mapping[int | str, str], depth: int) -> None:
        function = getattr(function, "fget", function)  # a property
        if not inspect.isfunction(function) or function.__module__ == nn.Module.__module__:
            return
        names = uses(inspect.unwrap(function)).parameters
        if names:
            self.run(function, {names[0]: path, **_bound(names[1:], handed)}, depth + 1)

    def _path(self, module: nn.Module | None) -> str | None:
        """The path of a module, or of the one inside a wrapper."""
        return self.paths.get(id(module)) or (self.paths.get(id(inside(module))) if module is not None else None)

    def _modules_at(self, chain: Chain, bound: Mapping[str, str]) -> Iterator[str]:
        """The module that a chain from a bound name is, if it is one."""
        if chain[0] in bound:
            path: str | None = bound[chain[0]]
            for name in chain[1:]:
                path = self._path(self.modules[path]._modules.get(name)) if path is not None else None
            if path is not None:
                yield path


def _nothing() -> None:
    """No module."""


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _bound(names: Sequence[str], handed: Mapping[int | str, str]) -> dict[str, str]:
    """The paths of handed modules by the names of the parameters that take them."""
    found = {names[key] if type(key) is int and key < len(names) else key: path for key, path in handed.items()}
    return {str(name): path for name, path in found.items() if name in names}


def readers_of(modules: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
    """The modules that read a parameter of another one, by the parameter's path; those that call its owner apart."""
    found: dict[str, list[str]] = {}
    paths = {id(module): path for path, module in modules.items()}
    for path, module in modules.items():
        function: Callable[..., Any] = inspect.unwrap(forward_of(module))
        if not inspect.isfunction(function) or function.__module__.startswith("torch."):
            continue  # PyTorch's own layers take weights of theirs only where nothing is hooked
        names = uses(function).parameters
        walk = _Walk(modules, paths, path)
        walk.run(function, {names[0]: path} if names else {})
        for name in sorted(walk.found):
            found.setdefault(name, []).append(path)
    return {name: tuple(paths) for name, paths in found.items()}
