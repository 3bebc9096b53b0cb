"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model(family, **config)`: the folder of a tiny random model, made once per session."""
    import tiny_models

    made: dict[tuple[object, ...], Path] = {}

    def make(family: str, **overrides: object) -> Path:
        key = (family, *sorted((name, repr(value)) for name, value in overrides.items()))
        if key not in made:
            made[key] = tiny_models.make_model(family, tmp_path_factory.mktemp(family), **overrides)
        return made[key]

    return make
