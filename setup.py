"""Packaging. The metadata lives in pyproject.toml; only what TOML cannot say well is here.

The Triton kernels live in the top-level folder ``kernels/`` and are installed as ``vllm_unsafe_routes.kernels``: the top-level
module name ``kernels`` belongs to Hugging Face's package, which transformers imports.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["vllm_unsafe_routes", "vllm_unsafe_routes.*"]), "vllm_unsafe_routes.kernels"],
    package_dir={"vllm_unsafe_routes.kernels": "kernels"},
    package_data={
        "vllm_unsafe_routes": ["py.typed", "architectures.json", "lab/model/*", "report/page.css", "report/page.html.jinja"]
    },
)
