"""Success rates with intervals: by attack, between attacks, attack against defence, and what a defence costs in utility."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from ..errors import RouteError
from ..evaluation.statistics import Interval, Outcomes, paired_difference
from ..study import summary
from ..study.records import Judged, Matrix, Opinion, Throughput, Utility
from .runs import NO_CATEGORY, Run

# Names in the order in which they are shown.
NAMES = {
    "none": "no attack",
    "random-masks": "random masks",
    "random-layers": "random layers",
    "rosais": "RoSais masking",
    "random-masks-dataset": "random masks, one route for all",
    "random-layers-dataset": "random layers, one route for all",
    "rosais-dataset": "RoSais masking, one route for all",
    "fsour-paper": "F-SOUR, paper",
    "fsour-code": "F-SOUR, published code",
    "fsour": "F-SOUR",
    "fsour-adaptive": "F-SOUR, adaptive",
    "steermoe": "SteerMoE",
    "safex": "SAFEx",
    "l3": "L3, adaptive silencing",
    "mascing": "MASCing, bias",
    "suffix": "adversarial suffix",
    "suffix-transfer": "suffix found on the undefended model",
    "file": "prompts of a file",
}
# Kinds of prompts that utility is measured on.
KINDS = {"benign": "harmless", "category": "harmless, but looks forbidden"}
# Between an attack and a further judge, as summaries write it.
_BY = " by "
CONTROLS = ("random-layers", "random-masks")
FSOUR_BASELINES = ("fsour-paper", "fsour-code")


@dataclass(slots=True)
class Tries:
    """The judged answers of one attack in one run.

    Attributes:
        run: where they are from.
        attack: as records name it.
        level: number of masked layers, None for attacks without.
        judge: whose verdicts; None: the run's first judge's.
        rows: (prompt, seed, harmful; None without a verdict).
        categories: prompt -> category.
        errors: kind of judge error -> count. Only the kind: details may quote what was judged.

    """

    run: Run
    attack: str
    level: int | None
    judge: str | None = None
    rows: list[summary.Row] = field(default_factory=list)
    categories: dict[Hashable, str] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def id(self) -> str:
        """Attack and level as campaigns write them."""
        name = self.attack if self.level is None else f"{self.attack}/{self.level}"
        return name if self.judge is None else f"{name} by {self.judge}"

    @property
    def name(self) -> str:
        """For readers."""
        name = name_of(self.attack, self.level)
        return name if self.judge is None else f"{name}, judged by {self.judge}"

    def add(self, one: summary.Try) -> None:
        """One judged answer."""
        self.rows.append(one.row)
        if one.category is not None:
            self.categories[one.prompt] = one.category or NO_CATEGORY
        if one.judged.success is None:
            self.errors[error_kind(one.judged)] += 1


def error_kind(judged: Judged | Opinion) -> str:
    """The kind of a judge's error, without its details."""
    return (judged.error or "no verdict").partition(":")[0]


def tries(runs: Iterable[Run]) -> list[Tries]:
    """All attacks of all runs, in the order in which they are shown."""
    found: dict[tuple[int, str, int | None, str | None], Tries] = {}
    for at, run in enumerate(runs):
        for one in summary.tries(entry.record for entry in run.entries):
            key = at, one.attack, one.level, one.judge
            found.setdefault(key, Tries(run, one.attack, one.level, one.judge)).add(one)
    order = list(NAMES)

    def place(one: Tries) -> tuple[int, int, str]:
        return order.index(one.attack) if one.attack in NAMES else len(order), one.level or 0, one.judge or ""

    return sorted(found.values(), key=place)


def name_of(attack: str, level: int | None = None) -> str:
    """An attack's name for readers."""
    name = NAMES.get(attack, attack)
    return name if level is None else f"{name}, L = {level}"


def label_runs(pairs: Sequence[tuple[str, Run]]) -> list[str]:
    """Labels for (name, run): with the policy where runs differ in it, with the run where names would coincide."""
    policies = {run.policy for _, run in pairs}
    labels = []
    for name, run in pairs:
        policy = f", policy {run.policy[:8]}" if len(policies) > 1 and run.policy else ""
        labels.append(name + policy)
    times = Counter(labels)
    return [f"{label} ({run.name})" if times[label] > 1 else label for label, (_, run) in zip(labels, pairs, strict=True)]


def rate(rows: Sequence[summary.Row], where: str) -> dict[str, Any]:
    """`summary.rate`; `where` names the rows in an error."""
    try:
        return summary.rate(rows)
    except RouteError as error:
        raise RouteError(f"{where}: {error}") from None


def attack_rates(found: Sequence[Tries]) -> list[dict[str, Any]]:
    """ASR of every attack, over all prompts and by category."""
    labels = label_runs([(one.name, one.run) for one in found])
    entries = []
    for one, label in zip(found, labels, strict=True):
        where = f"run {one.run.name}, {one.id}"
        categories = sorted(set(one.categories.values()))
        by_category = {}
        if len(categories) > 1:
            for category in categories:
                rows = [row for row in one.rows if one.categories.get(row[0]) == category]
                by_category[category] = rate(rows, where)
        entries.append(
            {
                "id": one.id,
                "attack": one.attack,
                "level": one.level,
                "label": label,
                "run": one.run.name,
                "judge": one.judge or one.run.settings.get("judge"),
                **rate(one.rows, where),
                "error_kinds": dict(one.errors.most_common()),
                "by_category": by_category,
            }
        )
    return entries


def differences(found: Sequence[Tries]) -> list[dict[str, Any]]:
    """Paired differences of rates: masking minus its controls, F-SOUR strategies minus the published ones, on the same prompts."""
    found = [one for one in found if one.judge is None]
    labels = dict(zip(map(id, found), label_runs([(one.name, one.run) for one in found]), strict=True))
    entries = []
    for first, second in _comparable(found):
        interval = _paired(first, second)
        if interval is not None:
            entry = {"attack": labels[id(second)], "minus": labels[id(first)]}
            entry |= summary.interval_json(interval, interval.n_errors)
            entry["left_out"] = entry.pop("errors")
            entries.append(entry)
    return entries


def _comparable(found: Sequence[Tries]) -> Iterator[tuple[Tries, Tries]]:
    """(baseline, attack)."""
    for second in found:
        for first in found:
            if second.attack == "rosais" and first.attack in CONTROLS:
                if first.run is second.run and first.level == second.level:
                    yield first, second
            elif first.attack in FSOUR_BASELINES and second.attack.startswith("fsour-") and first.attack != second.attack:
                if second.attack in FSOUR_BASELINES[: FSOUR_BASELINES.index(first.attack)]:
                    continue
                keys = ("prompts", "policy", "system", "judge", "judges")
                if all(first.run.settings.get(key) == second.run.settings.get(key) for key in keys):
                    yield first, second


def _paired(first: Tries, second: Tries) -> Interval | None:
    """None where no prompt has a verdict in both."""
    tables = [Outcomes.from_rows(one.rows) for one in (first, second)]
    common = set(tables[0].prompts) & set(tables[1].prompts)
    try:
        return paired_difference(*(table.select(common) for table in tables)) if common else None
    except RouteError:
        return None


def matrices(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """Attack against defence, one table for each run that has `matrix` records."""
    tables = []
    for run in runs:
        cells: dict[tuple[str, str], list[tuple[summary.Row, Judged | Opinion]]] = {}
        for record in run.records(Matrix):
            said: dict[str, Judged | Opinion] = {record.attack: record}
            said |= {f"{record.attack}{_BY}{judge}": opinion for judge, opinion in (record.others or {}).items()}
            for name, judged in said.items():
                row_of = record.prompt, record.seed, judged.success
                cells.setdefault((name, record.defence), []).append((row_of, judged))
        if not cells:
            continue
        attacks = _in_order((attack for attack, _ in cells), list(NAMES))
        defences = _in_order((defence for _, defence in cells), ["none"])
        rows = []
        for attack in attacks:
            row: list[dict[str, Any] | None] = []
            for defence in defences:
                found = cells.get((attack, defence))
                if found is None:
                    row.append(None)
                    continue
                kinds = Counter(error_kind(judged) for _, judged in found if judged.success is None)
                figures = rate([triple for triple, _ in found], f"run {run.name}, {attack} against {defence}")
                row.append(figures | {"error_kinds": dict(kinds.most_common())})
            rows.append(row)
        tables.append(
            {
                "run": run.name,
                "attacks": attacks,
                "attack_labels": [matrix_name(run, attack) for attack in attacks],
                "defences": defences,
                "defence_labels": [defence_name(defence) for defence in defences],
                "cells": rows,
            }
        )
    return tables


def matrix_name(run: Run, attack: str) -> str:
    """A matrix row's name: its number of layers stands behind a slash or in the run's settings, a further judge behind `_BY`."""
    attack, by, judge = attack.partition(_BY)
    if by:
        return f"{matrix_name(run, attack)}, judged by {judge}"
    name, slash, level = attack.partition("/")
    if slash and level.isdigit():
        return name_of(name, int(level))
    masks = run.settings.get("masks")
    if attack in ("rosais", *CONTROLS) and isinstance(masks, Mapping) and "num_layers" in masks:
        return name_of(attack, int(masks["num_layers"]))
    return name_of(attack)


def defence_name(defence: str) -> str:
    """A defence's name for readers: of a policy's path its last part."""
    if defence == "none":
        return "no defence"
    parts = []
    for part in defence.split("+"):
        head, colon, path = part.partition(":")
        parts.append(f"{head} {PurePath(path).name}" if colon else part.strip())
    return " + ".join(parts)


def _in_order(names: Iterable[str], first: Sequence[str]) -> list[str]:
    """Each name once: those in `first` in its order, then the others as they come."""
    unique = list(dict.fromkeys(names))
    rank = {name: at for at, name in enumerate(first)}
    return sorted(unique, key=lambda name: rank.get(name.partition("/")[0], len(first)))


def utility(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """What each defence leaves of the model: right answers and refusals, by kind of prompt, and its speed."""
    entries = []
    for run in runs:
        speed = {record.defence: record.seconds.tokens_per_s for record in run.records(Throughput)}
        groups: dict[tuple[str, str], list[Utility]] = {}
        for record in run.records(Utility):
            groups.setdefault((record.defence, record.kind), []).append(record)
        for defence in _in_order((defence for defence, _ in groups), ["none"]):
            for kind in sorted({kind for other, kind in groups if other == defence}):
                found = groups[defence, kind]
                where = f"run {run.name}, utility of {kind} prompts under {defence}"
                entries.append(
                    {
                        "run": run.name,
                        "defence": defence,
                        "label": defence_name(defence),
                        "kind": kind,
                        "kind_label": KINDS.get(kind, kind),
                        "right": rate([summary.utility_row(one, "right") for one in found], where),
                        "refused": rate([summary.utility_row(one, "refused") for one in found], where),
                        "tokens_per_s": speed.get(defence),
                    }
                )
    return entries
