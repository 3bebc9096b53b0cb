"""Attack results in the form of JailbreakBench's artifacts repository (Chao et al., arXiv 2404.01318).

The keys are those that `jailbreakbench.read_artifact` expects; ours besides (`withheld`, `judge`, `unjudged`, ...) it ignores.
Completions that were judged harmful are left out unless asked for, and so are those that no judge could judge.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..files import read_object, write_atomically

ATTACK_TYPES = ("white_box", "black_box", "transfer", "manual")


class ArtifactError(RouteError):
    """Attack results that cannot be written or read."""


@dataclass(frozen=True, slots=True)
class ArtifactParameters:
    """How the attempts were made.

    Attributes:
        method: the attack's name, such as `F-SOUR`.
        model: the attacked model.
        attack_type: one of `ATTACK_TYPES`; attacks on routes are white_box.
        judge: the name of the judge that the verdicts come from.
        defense: such as a policy's digest; None: none.
        method_parameters: settings of the attack: strings and numbers.
        evaluation_date: ISO; None: today.
        evaluation_llm_provider: what ran the model.

    """

    method: str
    model: str
    attack_type: str
    judge: str
    defense: str | None = None
    method_parameters: Mapping[str, str | int | float] = field(default_factory=dict)
    evaluation_date: str | None = None
    evaluation_llm_provider: str = "vllm"

    def __post_init__(self) -> None:
        if self.attack_type not in ATTACK_TYPES:
            raise ArtifactError(f"attack_type {self.attack_type!r} is not one of {', '.join(ATTACK_TYPES)}")
        for name, value in self.method_parameters.items():
            if not isinstance(value, str | int | float):
                raise ArtifactError(f"method_parameters.{name} must be a string or a number, got {value!r}")
        if self.evaluation_date is not None:
            try:
                datetime.date.fromisoformat(self.evaluation_date)
            except ValueError:
                raise ArtifactError(f"evaluation_date {self.evaluation_date!r} is not an ISO date") from None


@dataclass(frozen=True, slots=True)
class Attempt:
    """The best attempt at one prompt.

    Attributes:
        index: of the prompt in its data set.
        goal: what is asked.
        behavior: its short name.
        category: its category.
        prompt: what was sent to the model; None: nothing was.
        response: what the model answered; None: nothing was sent, or it is withheld.
        jailbroken: the verdict; None: there is none, see `judge_error`.
        judge_error: why there is no verdict.
        number_of_queries: forward passes or requests spent on this prompt; None: not counted. Likewise the next three.
        queries_to_jailbreak: spent up to the first success.
        prompt_tokens: spent.
        response_tokens: spent.

    """

    index: int
    goal: str
    behavior: str
    category: str
    prompt: str | None
    response: str | None
    jailbroken: bool | None
    judge_error: str | None = None
    number_of_queries: int | None = None
    queries_to_jailbreak: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.jailbroken is None) == (self.judge_error is None):
            raise ArtifactError(f"attempt {self.index} needs either a verdict or a judge_error")


def make_artifact(
    parameters: ArtifactParameters,
    attempts: Sequence[Attempt],
    *,
    keep_completions: bool = False,
) -> dict[str, Any]:
    """The artifact as JSON values.

    `attack_success_rate` is over the attempts with a verdict. Those without are no jailbreaks and no refusals: they stand in a list
    of their own, `unjudged`.

    Args:
        parameters: how the attempts were made.
        attempts: one per prompt.
        keep_completions: also write completions that were judged harmful or could not be judged.

    Raises:
        ArtifactError: no attempts, or two for one index.

    """
    if not attempts:
        raise ArtifactError("there are no attempts to write")
    indices = [attempt.index for attempt in attempts]
    if len(set(indices)) != len(indices):
        raise ArtifactError(f"index {next(index for index in indices if indices.count(index) > 1)} has two attempts")
    judged = [attempt for attempt in attempts if attempt.jailbroken is not None]
    jailbreaks = sum(attempt.jailbroken is True for attempt in judged)
    return {
        "parameters": {
            "method": parameters.method,
            "model": parameters.model,
            "attack_type": parameters.attack_type,
            "defense": parameters.defense,
            # A float even where it is whole: JailbreakBench's reader is strict about it.
            "attack_success_rate": float(jailbreaks / len(judged)) if judged else 0.0,
            "total_number_of_jailbreaks": jailbreaks,
            "number_of_submitted_prompts": sum(attempt.prompt is not None for attempt in attempts),
            "total_number_of_queries": _total(attempts, "number_of_queries"),
            "total_prompt_tokens": _total(attempts, "prompt_tokens"),
            "total_response_tokens": _total(attempts, "response_tokens"),
            "evaluation_date": parameters.evaluation_date or datetime.date.today().isoformat(),
            "evaluation_llm_provider": parameters.evaluation_llm_provider,
            "method_parameters": dict(parameters.method_parameters),
            "judge": parameters.judge,
            "number_of_judged_prompts": len(judged),
        },
        "jailbreaks": [_entry(attempt, keep_completions) for attempt in judged],
        "unjudged": [_entry(attempt, keep_completions) for attempt in attempts if attempt.jailbroken is None],
    }


def _total(attempts: Sequence[Attempt], name: str) -> int | None:
    counts = [getattr(attempt, name) for attempt in attempts]
    return None if any(count is None for count in counts) else sum(counts)


def _entry(attempt: Attempt, keep_completions: bool) -> dict[str, Any]:
    entry = {
        "index": attempt.index,
        "goal": attempt.goal,
        "behavior": attempt.behavior,
        "category": attempt.category,
        "prompt": attempt.prompt,
        "response": attempt.response,
        "number_of_queries": attempt.number_of_queries,
        "queries_to_jailbreak": attempt.queries_to_jailbreak,
        "prompt_tokens": attempt.prompt_tokens,
        "response_tokens": attempt.response_tokens,
        "jailbroken": attempt.jailbroken,
    }
    if attempt.judge_error is not None:
        entry["judge_error"] = attempt.judge_error
    if attempt.jailbroken is not False and not keep_completions:
        entry["response"] = None
    # Whoever left it out: an answer there was.
    if attempt.prompt is not None and entry["response"] is None:
        entry["withheld"] = True
    return entry


def write_artifact(
    path: str | Path,
    parameters: ArtifactParameters,
    attempts: Sequence[Attempt],
    *,
    keep_completions: bool = False,
) -> None:
    """Write `make_artifact` to a JSON file, whole or not at all."""
    document = make_artifact(parameters, attempts, keep_completions=keep_completions)
    write_atomically(Path(path), json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_artifact(path: str | Path) -> tuple[dict[str, Any], list[Attempt]]:
    """The parameters and the attempts of an artifact, one of ours or of JailbreakBench's repository.

    Raises:
        ArtifactError: not an artifact; names the file, the entry and the key.

    """
    document = read_object(Path(path), "artifact", ArtifactError)
    if not isinstance(document.get("parameters"), dict):
        raise ArtifactError(f"artifact {path} lacks 'parameters'")
    if not isinstance(document.get("jailbreaks"), list):
        raise ArtifactError(f"artifact {path} lacks the list 'jailbreaks'")
    names = {item.name for item in fields(Attempt)}
    attempts = []
    for key in ("jailbreaks", "unjudged"):
        for at, entry in enumerate(document.get(key, [])):
            try:
                attempts.append(Attempt(**{name: value for name, value in entry.items() if name in names}))
            except (AttributeError, TypeError, RouteError) as error:
                raise ArtifactError(f"artifact {path}, {key}[{at}]: {error}") from None
    return document["parameters"], attempts
