"""The shape of the code as figures, read off the sources: `make house` prints them, tests/repository/test_house.py has the limits.

Lines are counted from `class` or `def` to the last line, docstring and comments included. A class's fields are the names that it
annotates and the attributes that its methods set on `self`. Parameters leave `self` and `cls` out.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_unsafe_routes"
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))

# What may import what: a module imports from its own row and from rows above, never from rows below. Of several prefixes that fit a
# module, the longest counts.
LAYERS = (
    ("errors", "files"),
    ("architectures",),
    (
        "shape",
        "directive",
        "binding",
        "wire",
        "jitter",
        "plan",
        "policy",
        "extras",
        "receipt",
        "route_probe",
        "compiled",
        "compiler",
        "layer_rules",
        "table",
        "cells",
        "routed_experts",
        "divergence",
        "positions",
        "riy",
        "kernels",
    ),
    ("search.backend", "evaluation", "lab"),
    ("search", "engine"),
    ("study",),
    ("defence",),
    ("report", "harness"),
    ("commands",),
    ("cli", "commands.main"),
)


@dataclass(frozen=True)
class Import:
    """One imported module, by its absolute name."""

    module: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def dotted(path: Path, root: Path = ROOT) -> list[str]:
    """Package of a file, as parts of its installed name; `kernels/` is installed inside the package."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, PACKAGE)
    return parts[:-1]


def imports(path: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import of a file; those inside a function are lazy."""
    package = dotted(path, root)

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, lazy)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) + 1 - child.level] if child.level else []
                module = ".".join([*base, *(child.module or "").split(".")]).strip(".")
                # `from . import x` names a module, `from .x import y` a thing in it: the longer name says more.
                yield from (Import(f"{module}.{alias.name}", child.lineno, lazy) for alias in child.names)
            else:
                yield from walk(child, lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    return walk(ast.parse(path.read_text(encoding="utf-8")), False)


def module_graph() -> dict[str, set[str]]:
    """Module -> modules of this package that it imports, lazy imports included; names without the package's."""
    modules = {".".join([*dotted(path), *([] if path.stem == "__init__" else [path.stem])]): path for path in [*SOURCES, *KERNELS]}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        used = set()
        for item in imports(path):
            target = item.module if item.module in modules else item.module.rpartition(".")[0]
            if target in modules and target not in (name, PACKAGE):
                used.add(target.removeprefix(f"{PACKAGE}."))
        graph[name.removeprefix(f"{PACKAGE}.")] = used
    del graph[PACKAGE]
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or over others."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for used in graph.get(todo.pop(), ()):
                if used not in seen:
                    seen.add(used)
                    todo.append(used)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {frozenset({name, *(other for other in reached[name] if name in reached[other])}) for name in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def level(module: str) -> int:
    """The row of `LAYERS` that a module stands in."""
    fits = [(len(name), row) for row, names in enumerate(LAYERS) for name in names if f"{module}.".startswith(f"{name}.")]
    if not fits:
        raise ValueError(f"{module} has no place in LAYERS (tests/support/house.py)")
    return max(fits)[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports against the order of `LAYERS`."""
    return sorted(f"{name} -> {used}" for name, targets in graph.items() for used in targets if level(used) > level(name))


@dataclass(frozen=True)
class Definition:
    """A class or a function with what is counted of it.

    Attributes:
        where: file and name.
        lines: from its first line to its last.
        width: fields of a class, parameters of a function.

    """

    where: str
    lines: int
    width: int


def _fields(node: ast.ClassDef) -> int:
    found = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)}
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
            if isinstance(child.value, ast.Name) and child.value.id == "self":
                found.add(child.attr)
    return len(found)


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    args = node.args
    named = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(args.vararg) + bool(args.kwarg)


def definitions(path: Path) -> tuple[list[Definition], list[Definition]]:
    """Classes and functions of a file."""
    classes, functions = [], []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                where, lines = f"{path.relative_to(ROOT)}:{name}", (child.end_lineno or 0) - child.lineno + 1
                if isinstance(child, ast.ClassDef):
                    classes.append(Definition(where, lines, _fields(child)))
                else:
                    functions.append(Definition(where, lines, _parameters(child)))
                walk(child, f"{name}.")
            else:
                walk(child, prefix)

    walk(ast.parse(path.read_text(encoding="utf-8")), "")
    return classes, functions


def all_definitions() -> tuple[list[Definition], list[Definition]]:
    """Classes and functions of the package; kernels are left out, their length and width are their own."""
    found = [definitions(path) for path in SOURCES]
    return [one for classes, _ in found for one in classes], [one for _, functions in found for one in functions]


def lines_by_folder() -> dict[str, int]:
    """Lines of Python in each folder, with all below it; the package's root and its folders apart."""
    count: Counter[str] = Counter()
    for top in (PACKAGE, "kernels", "benchmarks", "tests"):
        for path in sorted((ROOT / top).rglob("*.py")):
            lines = len(path.read_text(encoding="utf-8").splitlines())
            parts = path.relative_to(ROOT).parts
            count[top] += lines
            if top == PACKAGE:
                count[f"{PACKAGE}/{parts[1]}" if len(parts) > 2 else f"{PACKAGE}/*.py"] += lines
    return dict(count)


def strict_errors() -> list[str]:
    """Errors of `mypy --strict` with the settings of pyproject.toml; no module is excepted but Triton's."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", PACKAGE, "kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if " error: " in line]


def _named(code: CodeType) -> tuple[str, str] | None:
    """File and name of a function of the package; None for others, and for comprehensions, which belong to the function around."""
    inside = f"{ROOT / PACKAGE}/"
    if not code.co_filename.startswith(inside) or code.co_name.endswith(("comp>", "genexpr>")):
        return None
    return code.co_filename.removeprefix(inside), code.co_qualname


def _stack(frame: FrameType | None) -> list[tuple[str, str]]:
    """Functions of the package on the call stack, outermost first."""
    found = []
    while frame is not None:
        if (one := _named(frame.f_code)) is not None:
            found.append(one)
        frame = frame.f_back
    return found[::-1]


@contextmanager
def recorded_calls() -> Iterator[dict[tuple[str, str], None]]:
    """Every function of the package that this thread calls meanwhile, in the order of first calls."""
    called: dict[tuple[str, str], None] = {}

    def note_call(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (one := _named(frame.f_code)) is not None:
            called.setdefault(one)

    sys.setprofile(note_call)
    try:
        yield called
    finally:
        sys.setprofile(None)


class _Arrived(BaseException):
    """Ends a traced run as soon as the way is known; no `except Exception` on the way may hold it up."""


def candidate_path() -> list[tuple[str, str]]:
    """Functions (file, name) that an F-SOUR candidate goes through from the command to the backend.

    Traced, not guessed: `unsafe-routes fsour` runs on the lab model with a backend that computes nothing. The
    way of the first candidate is every function of the package that is on the call stack when its cells are made (the search that
    draws it, and all that drive that search), and again when the backend gets them. Each function counts once.
    """
    import numpy as np

    from vllm_unsafe_routes import cli
    from vllm_unsafe_routes.cells import Cells, CellScores
    from vllm_unsafe_routes.search.backend import About, Request, Response
    from vllm_unsafe_routes.search.http import HttpBackend

    makers: dict[int, list[tuple[str, str]]] = {}
    way: list[tuple[str, str]] = []
    plain_init = Cells.__init__

    def init(self: Cells, *args: Any, **kwargs: Any) -> None:
        plain_init(self, *args, **kwargs)
        makers[id(self)] = _stack(sys._getframe(1))

    def score_cells(self: HttpBackend, items: list[Cells]) -> list[CellScores]:
        if len(items[0].moves):
            way.extend(dict.fromkeys([*makers[id(items[0])], *_stack(sys._getframe(1))]))
            raise _Arrived
        return [CellScores(np.full((item.num_candidates, *item.target.shape), -9.0, np.float32), 1, 1) for item in items]

    def submit(self: HttpBackend, number: int, request: Request) -> None:
        self._in_flight.add(number)
        self._results.put((number, Response((1,), 1)))

    command = "fsour --model lab --data lab:test --limit 1 --server http://none --strategy paper --out"
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(Cells, "__init__", init),
        mock.patch.object(HttpBackend, "_describe", new_callable=mock.Mock),
        mock.patch.object(HttpBackend, "_run", return_value=("lab", 256)),
        mock.patch.object(HttpBackend, "about", return_value=About("nothing")),
        mock.patch.object(HttpBackend, "score_cells", score_cells),
        mock.patch.object(HttpBackend, "submit", submit),
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
        suppress(_Arrived),
    ):
        cli.main([*command.split(), folder])
    first = next(at for at, (file, name) in enumerate(way) if file.endswith("fsour.py") and name == "run")
    return way[first:]


def _print_largest(title: str, found: list[Definition], key: Callable[[Definition], int], count: int = 5) -> None:
    print(f"\n{title}")
    for one in sorted(found, key=lambda one: (-key(one), one.where))[:count]:
        print(f"  {key(one):>5}  {one.where}")


def main() -> None:
    """Print the figures."""
    classes, functions = all_definitions()
    _print_largest("Longest classes (limit 200 lines)", classes, lambda one: one.lines)
    _print_largest("Most fields (limit 15)", classes, lambda one: one.width)
    _print_largest("Longest functions (limit 60 lines)", functions, lambda one: one.lines)
    _print_largest("Most parameters (limit 8)", functions, lambda one: one.width)
    graph = module_graph()
    print("\nImport cycles")
    print(*(f"  {' <-> '.join(group)}" for group in cycles(graph) or [["none"]]), sep="\n")
    print("\nUpward imports")
    print(*(f"  {edge}" for edge in upward(graph) or ["none"]), sep="\n")
    print("\nLines of Python")
    for folder, lines in lines_by_folder().items():
        print(f"  {lines:>6}  {'  ' * folder.count('/')}{folder}")
    with recorded_calls() as called:
        way = candidate_path()
    until_then = list(called)[list(called).index(way[0]) :]
    print(f"\nFunctions that a candidate goes through from commands/fsour.py:run to the backend: {len(way)} (limit 19)")
    print(*(f"  {file}: {name}" for file, name in way), sep="\n")
    print(f"All functions called until then: {len(until_then)} in {len({file for file, _ in until_then})} files")
    errors = strict_errors()
    print(f"\nErrors of mypy --strict, without any exception but Triton's files: {len(errors)}")
    print(*(f"  {line}" for line in errors), sep="\n")


if __name__ == "__main__":
    main()
