"""Which of vLLM's expert kernels ask the router and which route inside themselves, read from vLLM's own selection code.

A quantisation method keeps which backend was chosen for it as a value of an enum, and the enum's module (vLLM calls it an oracle)
has the names that --moe-backend takes and the kernel classes of each.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from enum import Enum
from types import ModuleType
from typing import Any, NamedTuple, get_args

from vllm.config.kernel import MoEBackend

ORACLES = "vllm.model_executor.layers.fused_moe.oracle"
# What to advise first where several would do, by what the name of a quantisation method holds: those that were read with care.
_FIRST = (
    ("nvfp4", ("flashinfer_cutlass", "cutlass", "marlin")),
    ("mxfp4", ("marlin", "triton_unfused", "flashinfer_cutlass")),
)
# Of bf16, FP8, MXFP8, INT8 and INT4 weights.
_OTHERS = ("triton",)


class Kernel(NamedTuple):
    """An expert kernel that a value of --moe-backend may get.

    Attributes:
        backend: the value.
        name: of the kernel's class; of several with one backend, vLLM takes the first that fits the model and the device.
        at_logits: it routes inside itself, so that it is controlled at its logits; else at its router.
        runs_here: on this device, whatever the model.

    """

    backend: str
    name: str
    at_logits: bool
    runs_here: bool


def oracle_of(method: Any) -> ModuleType | None:
    """The module that chose a quantisation method's kernels; None: the method has none."""
    for name, value in vars(method).items():
        if isinstance(value, Enum) and type(value).__module__.startswith(ORACLES):
            # MXFP8 shares the enum of FP8, and has names of its own.
            return importlib.import_module(f"{ORACLES}.mxfp8" if name.startswith("mxfp8") else type(value).__module__)
    return None


def kernels(oracle: ModuleType) -> Iterator[Kernel]:
    """The kernels behind each value of --moe-backend; "auto" is left out."""
    names: Mapping[str, Any] = getattr(oracle, "_BACKEND_NAME_MAP", {})
    map_backend = next((value for name, value in vars(oracle).items() if name.startswith("map_")), names.__getitem__)
    classes_of = getattr(oracle, "_mxfp8_backend_to_kernel_cls", None) or oracle.backend_to_kernel_cls
    for backend in get_args(MoEBackend):
        try:
            found = map_backend(backend)
        except (KeyError, ValueError):
            continue
        for member in found if isinstance(found, list) else [found]:
            for kernel in classes_of(member):
                yield Kernel(backend, kernel.__name__, kernel.is_monolithic(), kernel._supports_current_device())


def seams(oracle: ModuleType) -> dict[str, bool]:
    """Value of --moe-backend -> whether the kernel that vLLM prefers with it, in some variant, is controlled at its logits."""
    found: dict[str, bool] = {}
    for kernel in kernels(oracle):
        found[kernel.backend] = found.get(kernel.backend, False) or kernel.at_logits
    return found


def modular_backends(method: Any) -> tuple[str, ...]:
    """Values of --moe-backend under which a method's kernels ask the router; those that run here if there are."""
    name = type(method).__name__.lower()
    first = next((backends for part, backends in _FIRST if part in name), _OTHERS)
    oracle = oracle_of(method)
    if oracle is None:
        return first
    at_logits = seams(oracle)
    here = {kernel.backend for kernel in kernels(oracle) if kernel.runs_here and not at_logits[kernel.backend]}
    return tuple(backend for backend in first if backend in here) or tuple(sorted(here)) or first
