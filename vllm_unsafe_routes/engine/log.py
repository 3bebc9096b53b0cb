"""Loggers whose lines stand among vLLM's own: it configures the logger `vllm` and its children only."""

from __future__ import annotations

import logging


def logger_of(module: str) -> logging.Logger:
    """The logger of one of our modules, by its name."""
    return logging.getLogger(f"vllm.{module}")
