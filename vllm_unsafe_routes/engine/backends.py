"""Which of vLLM's expert kernels ask the router, by the quantisation of the weights: what a refusal can advise."""

from __future__ import annotations

# By what the name of vLLM's quantisation method holds; each is a value of --moe-backend whose first choice of kernel is modular.
_BY_METHOD = (
    ("nvfp4", ("flashinfer_cutlass", "cutlass", "marlin")),
    ("mxfp4", ("marlin", "triton_unfused", "flashinfer_cutlass")),
)
# Of bf16, FP8, MXFP8, INT8 and INT4 weights.
_OTHERS = ("triton",)


def modular_backends(method: type) -> tuple[str, ...]:
    """Values of --moe-backend under which a quantisation method has kernels that ask the router."""
    name = method.__name__.lower()
    return next((backends for part, backends in _BY_METHOD if part in name), _OTHERS)
