"""F-SOUR searches: the target's log-probability against tokens computed, the accepted routes, their experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from math import log
from typing import Any

import numpy as np

from ..search.attempt import AttemptState
from ..study.records import AttemptNote, DatasetMask, Fsour, Mask
from ..study.summary import DIGITS
from .rates import NAMES, label_runs, name_of
from .runs import Run

GRID_POINTS = 120
TOP_EXPERTS = 6

Line = list[tuple[int, float]]


def curves(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Best log-probability so far against computed tokens: a line for each prompt and seed, and their median."""
    entries = []
    for run, label in _searching(runs):
        lines = _lines(run)
        if not lines:
            continue
        tau = log(run.settings["tau"]) if run.settings.get("tau") else None
        entries.append(
            {
                "run": run.name,
                "attack": _attack(run),
                "label": label,
                "log_tau": None if tau is None else round(tau, DIGITS),
                "reached_tau": None if tau is None else sum(line[-1][1] >= tau - 1e-3 for _, line in lines),
                "median_end": float(np.median([line[-1][0] for _, line in lines])),
                "median": [[tokens, round(value, DIGITS)] for tokens, value in _median([line for _, line in lines])],
                "lines": [
                    {"prompt": prompt, "seed": seed, "points": [list(point) for point in line]} for (seed, prompt), line in lines
                ],
            }
        )
    return entries


def _searching(runs: Iterable[Run]) -> list[tuple[Run, str]]:
    """In the order in which attacks are shown."""
    found = [run for run in runs if any(isinstance(entry.record, Fsour | AttemptNote) for entry in run.entries)]
    order = list(NAMES)
    found.sort(key=lambda run: order.index(_attack(run)) if _attack(run) in NAMES else len(order))
    return list(zip(found, label_runs([(name_of(_attack(run)), run) for run in found]), strict=True))


def _attack(run: Run) -> str:
    for record in run.records(Fsour):
        return record.attack
    return f"fsour-{run.settings.get('strategy', 'paper')}"


def _lines(run: Run) -> list[tuple[tuple[Any, Any], Line]]:
    """((seed, prompt), line). Attempts of one search follow one another; the line is the best of all of them so far."""
    attempts: dict[tuple[Any, ...], dict[int, AttemptState]] = {}
    for job, note in run.by_job(AttemptNote):
        attempts.setdefault(job, {})[note.number] = note.attempt
    before: dict[tuple[Any, ...], int] = {}
    for job, record in run.by_job(Fsour):
        # Where the plain answer was enough there is no search to draw.
        if job not in attempts and record.attempts:
            # Only the last attempt is known; it starts after what the others took.
            attempts[job] = {record.attempts - 1: record.final}
            before[job] = record.computed_tokens - record.final.computed_tokens
    lines = []
    for job, numbered in attempts.items():
        line: Line = []
        offset = before.get(job, 0)
        for number in sorted(numbered):
            attempt = numbered[number]
            # The first request scores the prompt as it is, and all requests of a search are equally long.
            first = attempt.tokens // max(attempt.candidates, 1)
            points = [(first, attempt.clean), *attempt.trace, (attempt.computed_tokens, attempt.best)]
            for tokens, value in points:
                best = max(value, line[-1][1]) if line else value
                line.append((max(offset + tokens, line[-1][0] if line else 0), best))
            offset += attempt.computed_tokens
        lines.append(((job[-2] if len(job) > 1 else 0, job[-1]), _corners(line)))
    return lines


def _corners(line: Line) -> Line:
    """Without the points at which nothing changes, but with both ends."""
    kept = line[:1]
    for point in line[1:]:
        if point[1] > kept[-1][1]:
            if point[0] == kept[-1][0] and len(kept) > 1:
                kept.pop()
            kept.append(point)
    if line[-1][0] > kept[-1][0]:
        kept.append(line[-1])
    return kept


def _median(lines: Sequence[Line]) -> Line:
    """Median over the searches; one that is over keeps its last value, one that has not begun has its first."""
    start, end = min(line[0][0] for line in lines), max(line[-1][0] for line in lines)
    grid = np.unique(np.round(np.geomspace(max(start, 1), max(end, 1), GRID_POINTS)).astype(int))
    values = np.empty((len(lines), len(grid)))
    for row, line in zip(values, lines, strict=True):
        tokens = np.array([point[0] for point in line])
        at = np.clip(np.searchsorted(tokens, grid, side="right") - 1, 0, None)
        row[:] = np.array([point[1] for point in line])[at]
    return [(int(tokens), float(value)) for tokens, value in zip(grid, np.median(values, axis=0), strict=True)]


def routes(runs: Iterable[Run], layers: Sequence[int]) -> list[dict[str, Any]]:
    """Accepted routes of each search's attempt that counts, by layer and by position from the prompt's end (-1 is the last).

    `counts` says how many, `gains` how many nats they gained together when they were accepted.
    """
    entries = []
    for run, label in _searching(runs):
        found = [record for record in run.records(Fsour) if record.attempts]
        if not found:
            continue
        counts: Counter[tuple[int, int]] = Counter()
        gains: Counter[tuple[int, int]] = Counter()
        for record in found:
            for route in record.final.routes:
                place = route.layer, route.position - record.prompt_tokens
                counts[place] += 1
                gains[place] += route.gain  # type: ignore[assignment]
        positions = list(range(-max(record.prompt_tokens for record in found), 0))
        longest = Counter(record.prompt_tokens for record in found)
        entries.append(
            {
                "run": run.name,
                "label": label,
                "searches": len(found),
                "successes": sum(record.success is True for record in found),
                "accepted": sum(counts.values()),
                "layers": list(layers),
                "positions": positions,
                "reaching": [sum(times for length, times in longest.items() if length >= -at) for at in positions],
                "counts": [[counts[layer, position] for position in positions] for layer in layers],
                "gains": [[round(gains[layer, position], DIGITS) for position in positions] for layer in layers],
            }
        )
    return entries


def experts(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The experts that accepted routes and chosen masks use most, by layer."""
    sources: list[tuple[str, Run, str, list[tuple[int, Sequence[int]]]]] = []
    for run, label in _searching(runs):
        chosen: list[tuple[int, Sequence[int]]] = [
            (route.layer, route.experts) for record in run.records(Fsour) for route in record.final.routes
        ]
        sources.append((label, run, "accepted routes", chosen))
    for run in runs:
        masked: list[Mask | DatasetMask] = [*run.records(Mask), *run.records(DatasetMask)]
        for attack in ("rosais", "rosais-dataset"):
            masks = [mask for record in masked if record.attack == attack for mask in record.masks]
            if masks:
                sources.append((name_of(attack), run, "chosen masks", list(masks)))
    entries = []
    for label, run, what, chosen in sources:
        by_layer: dict[int, list[Sequence[int]]] = {}
        for layer, ids in chosen:
            by_layer.setdefault(layer, []).append(ids)
        for layer in sorted(by_layer):
            sets = by_layer[layer]
            counts = Counter(expert for ids in sets for expert in ids)
            top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP_EXPERTS]
            entries.append(
                {
                    "run": run.name,
                    "label": label,
                    "what": what,
                    "layer": layer,
                    "sets": len(sets),
                    "top_k": len(sets[0]),
                    "experts": [{"expert": expert, "count": count, "share": round(count / len(sets), 4)} for expert, count in top],
                }
            )
    return entries
