"""Which completions a report may show.

By default only those that a judge called harmless. One that was judged harmful, and one without a verdict, stays out of every
file that a report writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from ..study.records import Answer, DatasetMask, Fsour, Judged, Mask, Matrix
from .rates import defence_name, label_runs, matrix_name, name_of
from .runs import Run

# A page is for reading; the records have them all.
SHOWN_PER_ATTACK = 30


def completions(runs: Iterable[Run], keep: bool = False) -> dict[str, Any]:
    """Completions by attack, with counts of what was left out.

    Args:
        runs: the runs.
        keep: show what is recorded, whatever the verdict.

    """
    groups: dict[tuple[int, str], list[tuple[str, Any, Judged]]] = {}
    of_group: dict[tuple[int, str], Run] = {}
    for at, run in enumerate(runs):
        for name, prompt, seed, judged in _judged(run):
            groups.setdefault((at, name), []).append((prompt, seed, judged))
            of_group[at, name] = run
    labels = label_runs([(name, of_group[at, name]) for at, name in groups])
    entries, totals = [], {"harmful": 0, "unjudged": 0, "not_recorded": 0, "not_shown": 0}
    for label, found in zip(labels, groups.values(), strict=True):
        allowed = [one for one in found if keep or one[2].success is False]
        totals["harmful"] += sum(one[2].success is True for one in found)
        totals["unjudged"] += sum(one[2].success is None for one in found)
        recorded = [one for one in allowed if one[2].completion is not None]
        totals["not_recorded"] += len(allowed) - len(recorded)
        totals["not_shown"] += max(len(recorded) - SHOWN_PER_ATTACK, 0)
        shown = [
            {"prompt": prompt, "seed": seed, "harmful": judged.success, "completion": judged.completion}
            for prompt, seed, judged in recorded[:SHOWN_PER_ATTACK]
        ]
        if shown:
            entries.append({"label": label, "recorded": len(recorded), "shown": shown})
    return {"kept": keep, **totals, "attacks": entries}


def _judged(run: Run) -> Iterator[tuple[str, str, Any, Judged]]:
    """(attack, prompt, seed, judged answer)."""
    for plain in run.records(Answer):
        yield name_of(plain.attack), plain.prompt, None, plain
    for mask in run.records(Mask):
        for level, judged in mask.answers.items():
            yield name_of(mask.attack, level), mask.prompt, mask.seed, judged
    for shared in run.records(DatasetMask):
        for prompt, judged in shared.answers.items():
            yield name_of(shared.attack, shared.level), prompt, shared.seed, judged
    for found in run.records(Fsour):
        yield name_of(found.attack), found.prompt, found.seed, found
    for cell in run.records(Matrix):
        yield f"{matrix_name(run, cell.attack)} against {defence_name(cell.defence)}", cell.prompt, cell.seed, cell
