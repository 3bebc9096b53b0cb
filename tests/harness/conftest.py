"""Importing `engines` first sets the environment that vLLM reads at import: a small in-process engine on CPU, V1 or V2 runner."""

import engines  # noqa: F401
