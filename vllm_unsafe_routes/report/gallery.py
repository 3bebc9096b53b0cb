"""What one F-SOUR search did, to look at: a map of accepted routes by token and layer, and both answers beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..study.records import Answer, Fsour, Judged
from ..study.summary import DIGITS
from .rates import label_runs, name_of
from .runs import Run

# A page is for looking; report.json has no more of them either, the records have all.
SHOWN_PER_RUN = 12


def gallery(runs: Iterable[Run], keep: bool = False) -> list[dict[str, Any]]:
    """The searches of each run, those that succeeded first.

    Args:
        runs: the runs.
        keep: show answers whatever the verdict on them.

    Returns:
        For each run with searches `label`, `num_searches` and `searches`: each with its `prompt`, `layers` (those with an
        accepted route), `tokens` (of the prompt), `cells` (layer -> position -> experts, gain in nats, and `strength`, the gain
        as a share of the search's largest), and `plain` and `answer`: text, or None where it is left out or not recorded.

    """
    found = [run for run in runs if any(record.attempts for record in run.records(Fsour))]
    labels = label_runs([(name_of(next(iter(run.records(Fsour))).attack), run) for run in found])
    entries = []
    for run, label in zip(found, labels, strict=True):
        plain = {one.prompt: one for one in run.records(Answer)}
        searched = [record for record in run.records(Fsour) if record.attempts]
        searched.sort(key=lambda record: record.success is not True)
        shown = [_search(record, plain.get(record.prompt), keep) for record in searched[:SHOWN_PER_RUN]]
        entries.append({"run": run.name, "label": label, "num_searches": len(searched), "searches": shown})
    return entries


def _search(record: Fsour, plain: Answer | None, keep: bool) -> dict[str, Any]:
    routes = record.final.routes
    largest = max((route.gain for route in routes), default=0.0) or 1.0
    cells: dict[str, dict[str, Any]] = {}
    for route in routes:
        cells.setdefault(str(route.layer), {})[str(route.position)] = {
            "experts": list(route.experts),
            "gain": round(route.gain, DIGITS),
            "strength": round(max(route.gain, 0.0) / largest, 2),
        }
    return {
        "prompt": record.prompt,
        "category": record.category,
        "seed": record.seed,
        "success": record.success,
        "before": round(record.final.clean, DIGITS),
        "after": round(record.final.best, DIGITS),
        "accepted": len(routes),
        "tokens": record.prompt_tokens,
        "layers": sorted({route.layer for route in routes}),
        "cells": cells,
        "plain": _text(plain, keep),
        "answer": _text(record, keep),
    }


def _text(judged: Judged | None, keep: bool) -> str | None:
    return judged.completion if judged is not None and (keep or judged.success is False) else None
