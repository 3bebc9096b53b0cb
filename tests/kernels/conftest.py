"""Kernel tests run Triton's interpreter on CPU: the variable must be set before a kernel module is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ["VLLM_UNSAFE_ROUTES_KERNEL"] = "triton"
