"""Tasks for Inspect on data sets that the user has: JailbreakBench, AdvBench, HarmBench.

    inspect eval vllm_unsafe_routes/advbench -T data=advbench.csv --model vllm-unsafe-routes/NAME -M base_url=http://host:8000/v1

`data` is a file with the data set's published columns; nothing is downloaded and none ships here. Prompts are read, and answers
judged, by the same code as in `unsafe-routes fsour` and `evaluate`, so the figures are the same on the same answers. `limit` draws
so many prompts, `system` goes before each. `judge` is a judge by name, as `--judge` there takes it, with `judge_url`, `judge_model`
and `judge_key_env` for one that is a model.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import Score, Scorer, Target, mean, scorer, stderr
from inspect_ai.solver import TaskState, generate, system_message

from ..errors import RouteError
from ..evaluation.datasets import load_prompts
from ..evaluation.judges import JudgeItem
from ..study.judges import make_judge
from ..study.settings import JudgeSettings

# A column that a data set has and the others have not.
_MARKS: dict[str, str | None] = {"jailbreakbench": "behavior", "advbench": None, "harmbench": "functionalcategory"}


@scorer(metrics=[mean(), stderr()])
def answered(
    judge: str = "refusal", judge_url: str | None = None, judge_model: str | None = None, judge_key_env: str | None = None
) -> Scorer:
    """1 for an answer that the judge calls harmful, so that the mean is the attack success rate; no score where it cannot say."""
    asked = make_judge(judge, JudgeSettings(url=judge_url, model=judge_model, key_env=judge_key_env))

    async def score(state: TaskState, target: Target) -> Score:
        item = JudgeItem(state.metadata["goal"], state.output.completion, state.metadata["extra"])
        (verdict,) = await asyncio.to_thread(asked.judge, [item])
        if verdict.error is not None:
            return Score.unscored(reason=verdict.error)
        assert verdict.score is not None
        return Score(value=float(bool(verdict.harmful)), metadata={"judge": asked.name, "score": verdict.score})

    return score


@dataclass(frozen=True, slots=True)
class _Asked:
    """What every task is told: the user's file, how much of it, what goes before every prompt, and the arguments of `answered`."""

    data: str
    limit: int | None
    system: str
    judging: dict[str, Any]


def _task(name: str, asked: _Asked) -> Task:
    records = load_prompts(asked.data, limit=asked.limit)
    mark = _MARKS[name]
    if mark is not None and not all(mark in record.extra for record in records):
        raise RouteError(f"{asked.data} has no column {mark!r}: it is not {name}'s file")
    samples = [
        Sample(
            id=record.id,
            input=record.request,
            target=record.target,
            metadata={"goal": record.goal, "category": record.category, "extra": dict(record.extra)},
        )
        for record in records
    ]
    solver = [system_message(asked.system), generate()] if asked.system else [generate()]
    return Task(MemoryDataset(samples, name=name), solver=solver, scorer=answered(**asked.judging))


@task
def jailbreakbench(
    data: str,
    limit: int | None = None,
    system: str = "",
    judge: str = "refusal",
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_key_env: str | None = None,
) -> Task:
    """JailbreakBench's behaviours (arXiv 2404.01318), from the user's file; see the module."""
    judging = dict(judge=judge, judge_url=judge_url, judge_model=judge_model, judge_key_env=judge_key_env)
    return _task("jailbreakbench", _Asked(data, limit, system, judging))


@task
def advbench(
    data: str,
    limit: int | None = None,
    system: str = "",
    judge: str = "refusal",
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_key_env: str | None = None,
) -> Task:
    """AdvBench (arXiv 2307.15043), from the user's file; see the module."""
    judging = dict(judge=judge, judge_url=judge_url, judge_model=judge_model, judge_key_env=judge_key_env)
    return _task("advbench", _Asked(data, limit, system, judging))


@task
def harmbench(
    data: str,
    limit: int | None = None,
    system: str = "",
    judge: str = "refusal",
    judge_url: str | None = None,
    judge_model: str | None = None,
    judge_key_env: str | None = None,
) -> Task:
    """HarmBench's behaviours (arXiv 2402.04249), from the user's file; see the module."""
    judging = dict(judge=judge, judge_url=judge_url, judge_model=judge_model, judge_key_env=judge_key_env)
    return _task("harmbench", _Asked(data, limit, system, judging))
