"""An F-SOUR run as a JailbreakBench attack artifact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..evaluation.artifacts import ArtifactParameters, Attempt, write_artifact
from ..evaluation.datasets import PromptRecord
from .cost import cost_of
from .records import Fsour, Record
from .settings import FsourStudy


def attempts_of(records: Iterable[Record], seed: int, prompts: Mapping[str, PromptRecord], plain_first: bool) -> list[Attempt]:
    """The results of one seed, by the data set's own index.

    Queries are those that the method needs one by one: the plain answer, and for each attempt the target's score, the draws and the
    answer. Draws that were scored ahead of their turn, to fill a batch, are no queries. Tokens are those of the scored prompts.

    Args:
        records: of a run.
        seed: of the draws.
        prompts: by id.
        plain_first: whether the plain answer was judged before a search.

    """
    attempts = []
    for found in records:
        if not isinstance(found, Fsour) or found.seed != seed:
            continue
        prompt = prompts[found.prompt]
        queries = int(plain_first) + 2 * found.attempts + found.needed
        scored = found.needed + found.attempts
        attempts.append(
            Attempt(
                index=prompt.index,
                goal=prompt.goal,
                behavior=str(prompt.extra.get("behavior", prompt.id)),
                category=prompt.category,
                prompt=prompt.request,
                response=found.completion,
                jailbroken=found.success,
                judge_error=found.error,
                number_of_queries=queries,
                queries_to_jailbreak=queries if found.success else None,
                prompt_tokens=scored * found.tokens // max(found.candidates, 1),
            )
        )
    return sorted(attempts, key=lambda attempt: attempt.index)


def write(
    path: Path, study: FsourStudy, records: Iterable[Record], prompts: Iterable[PromptRecord], judges: Mapping[str, Any]
) -> None:
    """Write the first seed's results.

    Args:
        path: the file.
        study: what was asked.
        records: what was found.
        prompts: the study's.
        judges: as the run's settings name them.

    """
    found = list(records)
    known = {prompt.id: prompt for prompt in prompts}
    parameters = ArtifactParameters(
        method=f"F-SOUR ({study.search.strategy})",
        model=study.model,
        attack_type="white_box",
        judge=judges["judge"],
        defense="route-policy" if study.engine.policy else None,
        method_parameters=_parameters(study, found, judges),
    )
    attempts = attempts_of(found, study.seeds[0], known, not study.search_answered)
    write_artifact(path, parameters, attempts, keep_completions=study.judging.keep_completions)


def _parameters(study: FsourStudy, records: Iterable[Record], judges: Mapping[str, Any]) -> dict[str, str | int | float]:
    """What decides the results, flat: the search's settings, the judges' content, versions and device."""
    search = {name: value for name, value in asdict(study.search).items() if name != "seed"}
    if study.search.strategy != "adaptive":
        del search["adaptive"]
    cost = cost_of(records)
    document = {
        **search,
        "seed": study.seeds[0],
        "max_new_tokens": study.judging.max_new_tokens,
        "plain_answer_first": not study.search_answered,
        "dtype": study.engine.dtype,
        "judges": {one["name"]: {key: value for key, value in one.items() if key != "name"} for one in judges.get("judges", ())},
        "policy": study.engine.policy.digest if study.engine.policy else None,
        "device": cost.device if cost else None,
        "versions": cost.versions if cost else {},
    }
    return dict(_flat(document, ""))


def _flat(document: Mapping[str, Any], where: str) -> Iterable[tuple[str, str | int | float]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{name}.")
        elif isinstance(value, str | int | float):
            yield f"{where}{name}", value
