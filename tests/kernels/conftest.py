"""Kernel tests run Triton's interpreter on CPU: the variable must be set before a kernel module is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_UNSAFE_ROUTES_KERNEL"] = "triton"

import pytest


@pytest.fixture(autouse=True)
def tokens_per_program(request, monkeypatch):
    """Tokens that a program gates; one, as it is where tokens are few, unless a test asks for more."""
    from vllm_unsafe_routes.kernels import route_topk_triton

    number = getattr(request, "param", 1)
    monkeypatch.setattr(route_topk_triton, "tokens_per_program", lambda spec, *_: 1 if spec.grouped else number)
