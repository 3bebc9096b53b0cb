"""What attacks and runs took."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..study.cost import Cost, cost_of
from ..study.records import DatasetMask, Fsour, Mask, Matrix, Rosais, Work
from ..study.summary import TOTALS, total
from .rates import NAMES, defence_name, label_runs, matrix_name, name_of
from .runs import Run

FIELDS = (
    *("searches", "attempts", "candidates", "needed", "tokens", "computed_tokens", "reuse", "computed_per_search"),
    *("seconds", "candidates_per_s", "seconds_per_prompt"),
)


def costs(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What each attack took. Fields that the records do not have are None."""
    named: list[tuple[str, Run, dict[str, Any]]] = []
    for run in runs:
        scored = run.records(Rosais)
        if scored:
            candidates = sum(len(gains) for record in scored for gains in record.gains.values())
            entry = {"searches": len(scored), "candidates": candidates}
            named.append(("RoSais scoring", run, entry | _time(run, "rosais", None, len(scored))))
        by_attack: dict[str, list[Mask | DatasetMask | Fsour]] = {}
        searches: list[Mask | DatasetMask | Fsour] = [*run.records(Mask), *run.records(DatasetMask), *run.records(Fsour)]
        for record in searches:
            by_attack.setdefault(record.attack, []).append(record)
        for attack, found in by_attack.items():
            named.append((name_of(attack), run, _cost(found) | _time(run, attack, None, len(found))))
        cells: dict[tuple[str, str], list[Matrix]] = {}
        for cell in run.records(Matrix):
            if cell.candidates is not None:
                cells.setdefault((cell.attack, cell.defence), []).append(cell)
        for (attack, defence), tried in cells.items():
            label = f"{matrix_name(run, attack)} against {defence_name(defence)}"
            named.append((label, run, _cost(tried) | _time(run, attack, defence, len(tried))))
    # Layers are scored first; then attacks as everywhere.
    order = ["RoSais scoring", *NAMES.values()]
    named.sort(key=lambda one: order.index(one[0]) if one[0] in order else len(order))
    labels = label_runs([(name, run) for name, run, _ in named])
    return [
        {"label": label, "run": run.name, **{name: entry.get(name) for name in FIELDS}}
        for label, (_, run, entry) in zip(labels, named, strict=True)
    ]


def _cost(found: Sequence[Mask | DatasetMask | Fsour | Matrix]) -> dict[str, Any]:
    """Sums over the searches that counted; a cell of a matrix does not know what one by one would have needed."""
    entry: dict[str, Any] = {"searches": len(found)} | {name: total(found, name) for name in TOTALS}
    tokens, computed = entry["tokens"], entry["computed_tokens"]
    if tokens is None or computed is None:
        return entry
    reuse = round(1 - computed / tokens, 4) if tokens else None
    return entry | {"reuse": reuse, "computed_per_search": round(computed / len(found), 1)}


def _time(run: Run, attack: str, defence: str | None, searches: int) -> dict[str, Any]:
    """Seconds of the wall clock for so many searches that were in flight together, where the run kept them."""
    cost = cost_of(work for work in run.records(Work) if (work.attack, work.defence) == (attack, defence))
    if cost is None:
        return {}
    known = cost.to_dict(searches)
    return {name: known[name] for name in ("seconds", "candidates_per_s", "seconds_per_prompt")}


def machine(run: Run) -> dict[str, Any]:
    """What a run was computed on, and the sum of its cost."""
    cost: Cost | None = cost_of(run.records(Work))
    return {
        "device": cost.device if cost else None,
        "versions": dict(cost.versions) if cost else {},
        "seconds": round(cost.seconds, 1) if cost else None,
        "candidates": cost.candidates if cost else None,
        "candidates_per_s": round(cost.candidates_per_s, 2) if cost else None,
    }
