"""Prompts of any source, the lab language among them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import RouteError
from ..evaluation.datasets import Columns, PromptRecord, load_prompts

_LAB_SOURCE = re.compile(r"lab:(?P<split>\w+)(:(?P<kind>\w+))?")


def read_prompts(
    source: str,
    limit: int | None = None,
    seed: int = 0,
    categories: Sequence[str] | None = None,
    columns: Columns | None = None,
) -> list[PromptRecord]:
    """Prompts of a source: what `evaluation.load_prompts` takes, or `lab:SPLIT[:KIND]` for the lab language.

    Raises:
        RouteError: an unknown source, split or kind, or bad data.

    """
    found = _LAB_SOURCE.fullmatch(source)
    if found is None:
        return load_prompts(source, limit=limit, seed=seed, categories=categories, columns=columns)
    from .. import lab

    kind = found["kind"] or "forbidden"
    try:
        prompts = lab.load_prompts(found["split"], kind, seed=seed, count=limit or 32)
    except ValueError as error:
        raise RouteError(f"{source}: {error}") from None
    return [
        PromptRecord(f"{kind}-{at}", prompt.text, prompt.target, prompt.category, row=at)
        for at, prompt in enumerate(prompts)
        if categories is None or prompt.category in categories
    ]
