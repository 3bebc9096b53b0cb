"""Prompts: which runs were on the same ones, and what each attack did to each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any

from ..study.records import Answer, DatasetMask, Fsour, Judged, Mask
from ..study.summary import DIGITS
from .rates import NAMES, name_of
from .runs import Run


def prompt_sets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The different sets of prompts, by the order of the runs. Rates and scores of different ones are not to be compared."""
    by_digest: dict[Any, list[Run]] = {}
    for run in runs:
        by_digest.setdefault(run.settings.get("prompts"), []).append(run)
    names = [letter if not round_ else f"{letter}{round_}" for round_ in range(len(runs)) for letter in ascii_uppercase]
    return [
        {
            "name": name,
            "digest": digest,
            "data": found[0].settings.get("data"),
            "prompts": found[0].settings.get("num_prompts"),
            "runs": [run.name for run in found],
        }
        for name, (digest, found) in zip(names, by_digest.items(), strict=False)
    ]


def by_prompt(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A table for each run that judged answers: prompts by attacks.

    A cell has `successes` of `verdicts` over the seeds, and where the attack has them the `attempts`, and the log-probability in
    nats `before` and `after` it: of the target for F-SOUR, of an affirmative beginning for masking; means over the seeds.
    """
    tables = []
    for run in runs:
        cells: dict[str, dict[str, list[tuple[Judged, dict[str, float]]]]] = {}
        categories: dict[str, str] = {}
        for prompt, attack, judged, more in _tries(run, categories):
            cells.setdefault(prompt, {}).setdefault(attack, []).append((judged, more))
        if not cells:
            continue
        order = list(NAMES)
        names = sorted(
            {attack for row in cells.values() for attack in row},
            key=lambda name: (order.index(name.partition("/")[0]) if name.partition("/")[0] in NAMES else len(order), name),
        )
        tables.append(
            {
                "run": run.name,
                "attacks": names,
                "attack_labels": [_label(name) for name in names],
                "prompts": [
                    {
                        "prompt": prompt,
                        "category": categories.get(prompt, ""),
                        "cells": [_cell(row[name]) if name in row else None for name in names],
                    }
                    for prompt, row in cells.items()
                ],
            }
        )
    return tables


def _label(name: str) -> str:
    attack, slash, level = name.partition("/")
    return name_of(attack, int(level) if slash else None)


def _tries(run: Run, categories: dict[str, str]) -> Iterable[tuple[str, str, Judged, dict[str, float]]]:
    """(prompt, attack, verdict, further figures); `categories` is filled on the way."""
    for plain in run.records(Answer):
        categories[plain.prompt] = plain.category
        yield plain.prompt, plain.attack, plain, {}
    for mask in run.records(Mask):
        categories[mask.prompt] = mask.category
        deepest = max(mask.answers, default=0)
        for level, judged in mask.answers.items():
            # The score is known without masks and under all of them.
            more = {"before": mask.clean, "after": mask.masked} if level == deepest else {}
            yield mask.prompt, f"{mask.attack}/{level}", judged, more
    for shared in run.records(DatasetMask):
        for prompt, judged in shared.answers.items():
            yield prompt, f"{shared.attack}/{shared.level}", judged, {}
    for found in run.records(Fsour):
        categories[found.prompt] = found.category
        more = {"attempts": found.attempts, "before": found.final.clean, "after": found.final.best}
        yield found.prompt, found.attack, found, more


def _cell(found: Sequence[tuple[Judged, dict[str, float]]]) -> dict[str, Any]:
    verdicts = [judged.success for judged, _ in found if judged.success is not None]
    cell: dict[str, Any] = {"successes": sum(verdicts), "verdicts": len(verdicts), "seeds": len(found)}
    for name in ("attempts", "before", "after"):
        values = [more[name] for _, more in found if name in more]
        cell[name] = round(sum(values) / len(values), DIGITS) if values else None
    return cell
