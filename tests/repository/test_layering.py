"""Dependencies point one way; read off the imports of every file, not off what happens to be loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from house import KERNELS, PACKAGE, ROOT, SOURCES, Import, imports

# What the front end needs to check a plan, and what a user without an engine needs to write one.
PURE = (
    "errors",
    "files",
    "shape",
    "directive",
    "binding",
    "wire",
    "jitter",
    "plan",
    "extras",
    "policy",
    "compiled",
    "compiler",
    "layer_rules",
    "table",
    "receipt",
    "cells",
    "routed_experts",
    "divergence",
    "positions",
    "riy",
)
# Files outside `engine/` that may import vLLM inside a function, and why.
LAZY_VLLM: dict[str, str] = {}
NEVER_VLLM = ("lab", "evaluation", "search", "study")


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def is_stdlib(item: Import) -> bool:
    return item.top in sys.stdlib_module_names


@pytest.mark.parametrize("path", KERNELS, ids=names(KERNELS))
def test_kernels_import_arrays_and_triton_only(path):
    own = f"{PACKAGE}.kernels."
    wrong = [
        item
        for item in imports(path)
        if not (is_stdlib(item) or item.top in ("torch", "triton", "numpy") or item.module.startswith(own))
    ]
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_plans_and_their_checks_need_neither_torch_nor_vllm(name):
    pure = tuple(f"{PACKAGE}.{other}." for other in PURE)
    path = ROOT / PACKAGE / f"{name}.py"
    wrong = [item for item in imports(path) if not (is_stdlib(item) or item.top == "numpy" or f"{item.module}.".startswith(pure))]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_only_the_engine_imports_vllm(path):
    where = path.relative_to(ROOT / PACKAGE)
    found = [item for item in imports(path) if item.top == "vllm"]
    if where.parts[0] == "engine":
        return
    if str(where) in LAZY_VLLM:
        found = [item for item in found if not item.lazy]
    assert not found, f"{where} imports vLLM; only engine/ may"


def test_the_exceptions_are_still_needed():
    for name in LAZY_VLLM:
        assert name.split("/")[0] not in NEVER_VLLM
        assert any(item.top == "vllm" for item in imports(ROOT / PACKAGE / name)), f"{name} needs no exception any more"


def test_the_entry_point_imports_only_the_standard_library():
    """vLLM logs and then ignores a plugin that fails to import: this module must not be able to."""
    at_top = [item for item in imports(ROOT / PACKAGE / "engine" / "plugin.py") if not item.lazy]
    assert at_top
    assert [item for item in at_top if not is_stdlib(item)] == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = ("torch", "vllm", "transformers")
    code = f"import sys, {PACKAGE}, {PACKAGE}.engine.plugin; print(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_the_scan_sees_what_it_should(tmp_path):
    """The checks above pass for a reader that sees nothing; this one does not."""
    path = tmp_path / PACKAGE / "engine" / "sample.py"
    path.parent.mkdir(parents=True)
    path.write_text("import torch.nn\nfrom ..plan import A\nfrom . import b\ndef f():\n    from vllm import LLM\n")
    assert [(item.module, item.lazy) for item in imports(path, tmp_path)] == [
        ("torch.nn", False),
        (f"{PACKAGE}.plan.A", False),
        (f"{PACKAGE}.engine.b", False),
        ("vllm.LLM", True),
    ]


# Files of `commands/` that are no command.
SHARED = ("options", "show", "usage")
# Command lines: ours, that of training, and what is added to that of vLLM's server.
PROGRAMS = ("cli.py", "commands", "lab/train.py", "engine/flags.py", "engine/admin.py")


@pytest.mark.parametrize("path", sorted((ROOT / PACKAGE / "commands").glob("*.py")), ids=lambda path: path.stem)
def test_no_command_imports_another(path):
    commands = {other.stem for other in path.parent.glob("*.py")} - {"__init__", *SHARED}
    prefix = f"{PACKAGE}.commands."
    used = {item.module.removeprefix(prefix).split(".")[0] for item in imports(path) if item.module.startswith(prefix)}
    assert not used & (commands - {path.stem})


@pytest.mark.parametrize("path", SOURCES, ids=names(SOURCES))
def test_only_command_lines_see_argparse(path):
    where = path.relative_to(ROOT / PACKAGE)
    if where.parts[0] in PROGRAMS or where.as_posix() in PROGRAMS:
        return
    assert not [item for item in imports(path) if item.top == "argparse"]
