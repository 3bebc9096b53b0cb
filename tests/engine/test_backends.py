"""Which expert kernels route where, by vLLM's own selection code; docs/integration.md has it as a table."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integration.md"
ORACLES = {
    "bf16": "unquantized",
    "FP8": "fp8",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
    "MXFP4": "mxfp4",
    "INT8": "int8",
    "INT4 and INT8 weights alone": "int_wna16",
}
# The enum of each, by its name in the module.
ENUMS = {
    "bf16": "UnquantizedMoeBackend",
    "FP8": "Fp8MoeBackend",
    "MXFP8": "Fp8MoeBackend",
    "NVFP4": "NvFp4MoeBackend",
    "MXFP4": "Mxfp4MoeBackend",
    "INT8": "Int8MoeBackend",
    "INT4 and INT8 weights alone": "WNA16MoEBackend",
}


def cells(page_row):
    return [set(re.findall(r"`([a-z0-9_]+)`", cell)) for cell in page_row.split("|")[2:4]]


def oracle(name):
    from vllm_unsafe_routes.engine.backends import ORACLES as PACKAGE

    return importlib.import_module(f"{PACKAGE}.{ORACLES[name]}")


@pytest.mark.v1_only
@pytest.mark.parametrize("name", ORACLES)
def test_the_table_is_vllm_s_own_selection(name):
    from vllm_unsafe_routes.engine.backends import seams

    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1
    at_router, at_logits = cells(rows[0])
    found = seams(oracle(name))
    assert at_router == {backend for backend, is_at_logits in found.items() if not is_at_logits}
    assert at_logits == {backend for backend, is_at_logits in found.items() if is_at_logits}


@pytest.mark.v1_only
@pytest.mark.parametrize("name", ORACLES)
def test_a_refusal_advises_what_asks_the_router(name):
    """The method is a stand-in: none but bf16's can be made without its device."""
    from vllm_unsafe_routes.engine.backends import kernels, modular_backends, oracle_of, seams

    module = oracle(name)
    member = next(iter(getattr(module, ENUMS[name])))
    method = type(f"{ORACLES[name]}Method", (), {})()
    setattr(method, f"{ORACLES[name]}_backend", member)
    assert oracle_of(method) is module
    advised = modular_backends(method)
    assert advised and not any(seams(module)[backend] for backend in advised)
    runs_here = {kernel.backend for kernel in kernels(module) if kernel.runs_here}
    assert set(advised) <= runs_here or not any(backend in runs_here and not at for backend, at in seams(module).items())
