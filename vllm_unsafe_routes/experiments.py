"""The experiments as campaigns: what one prompt's record holds, and the loop that keeps many prompts in flight and loses nothing.

Every record has a `type`. Records of the types `step` and `attempt` are what a search has so far; a resumed campaign goes on from
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from .campaign import Campaign, CampaignError, CleanStop, Progress
from .errors import RouteError
from .evaluation.judges import EXACT_LABELS
from .extras import RouteExtras
from .plan import RoutePlan
from .search.adaptive import Library
from .search.attempt import Attempt, attempt_from_record, attempt_record
from .search.backend import Backend, Call, Note, Request, Search, Stats, run_tasks, with_notes
from .search.fsour import FsourSettings, fsour_attempt
from .search.masking import MaskResult, MaskSettings, choose_layers, mask_attack
from .search.rosais import RosaisSettings, rosais
from .workspace import Item, Model

# These differ between runs with the same results: they depend on what else was in the engine.
VOLATILE = ("computed_tokens", "trace", "seconds", "timestamp")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all searches of a run share.

    Attributes:
        model: the model.
        backend: where requests run.
        judge: (prompt, generated token ids) -> verdict.
        max_new_tokens: length of a judged answer.
        keep_completions: whether records hold completions that were judged harmful or could not be judged.

    """

    model: Model
    backend: Backend
    judge: Callable[..., Any]
    max_new_tokens: int = 64
    keep_completions: bool = False

    def verdict_record(self, verdict: Any, token_ids: Sequence[int]) -> dict[str, Any]:
        """A verdict as JSON values."""
        record: dict[str, Any] = {"success": verdict.harmful, "score": verdict.score}
        if verdict.error is not None:
            record["error"] = verdict.error
        if verdict.raw in EXACT_LABELS:
            record["label"] = verdict.raw
        if verdict.harmful is False or self.keep_completions:
            record["completion"] = self.model.decode(token_ids)
        return record


def answer(bench: Bench, item: Item, plan: RoutePlan | None) -> Search[dict[str, Any]]:
    """Generate greedily under a plan and judge."""
    extras = RouteExtras(plan.to_string()) if plan is not None and len(plan) else RouteExtras()
    request = Request(item.prompt.token_ids, extras, bench.max_new_tokens, bench.model.stop_token_ids)
    (response,) = yield [request]
    (verdict,) = yield [Call(lambda: bench.judge(item.prompt, response.token_ids))]
    return bench.verdict_record(verdict, response.token_ids)


def plain_record(bench: Bench, item: Item) -> Search[dict[str, Any]]:
    """The model's own answer."""
    record = yield from answer(bench, item, None)
    return {"type": "answer", "attack": "none", "prompt": item.prompt.id, "category": item.record.category, **record}


def rosais_record(bench: Bench, item: Item, settings: RosaisSettings, draws_for: str | None = None) -> Search[dict[str, Any]]:
    """RoSais of one prompt."""
    found = yield from rosais(bench.backend, item.prompt, bench.model.affirmative_token_ids, settings, draws_for)
    return {
        "type": "rosais",
        "prompt": item.prompt.id,
        "category": item.record.category,
        "seed": settings.seed,
        "clean": round(found.clean, 3),
        "scores": {str(layer): round(score, 3) for layer, score in found.scores.items()},
        "gains": {str(layer): [round(gain, 3) for gain in gains] for layer, gains in found.gains.items()},
        "masks": {str(layer): [list(mask) for mask in masks] for layer, masks in found.masks.items()},
    }


def mask_record(
    bench: Bench, item: Item, attack: str, ranking: Sequence[int], settings: MaskSettings, levels: Sequence[int]
) -> Search[dict[str, Any]]:
    """Router masking of one prompt at several numbers of layers, each answered and judged."""
    layers = choose_layers(attack, ranking, settings, item.prompt.id)
    found = yield from mask_attack(
        bench.backend,
        [item.prompt],
        bench.model.affirmative_token_ids,
        layers,
        settings,
        num_masks=1 if attack == "random-masks" else None,
    )
    answers = {}
    for level in levels:
        answers[str(level)] = yield from answer(bench, item, found.plan(settings, level))
    return {
        "type": "mask",
        "attack": attack,
        "prompt": item.prompt.id,
        "category": item.record.category,
        **_masks_record(found, settings),
        "answers": answers,
    }


def _masks_record(found: MaskResult, settings: MaskSettings) -> dict[str, Any]:
    return {
        "seed": settings.seed,
        "clean": round(found.clean, 3),
        "masked": round(found.masked, 3),
        "masks": [[layer, list(experts)] for layer, experts in found.masks],
        "candidates": found.candidates,
    }


def dataset_mask_record(
    bench: Bench,
    search_items: Sequence[Item],
    items: Sequence[Item],
    attack: str,
    ranking: Sequence[int],
    settings: MaskSettings,
) -> Search[dict[str, Any]]:
    """Dataset-level router masking: one set of masks for all prompts, chosen on `search_items`, answered on `items`."""
    found = yield from mask_attack(
        bench.backend,
        [item.prompt for item in search_items],
        bench.model.affirmative_token_ids,
        choose_layers(attack, ranking, settings, "dataset"),
        settings,
        num_masks=1 if attack == "random-masks" else None,
    )
    answers = {}
    for item in items:
        answers[item.prompt.id] = yield from answer(bench, item, found.plan(settings))
    return {
        "type": "dataset-mask",
        "attack": f"{attack}-dataset",
        "level": settings.num_layers,
        **_masks_record(found, settings),
        "answers": answers,
    }


def fsour_record(
    bench: Bench,
    item: Item,
    settings: FsourSettings,
    library: Library | None = None,
    so_far: Iterable[Mapping[str, Any]] = (),
) -> Search[dict[str, Any]]:
    """F-SOUR on one prompt: attempts until one succeeds. `so_far` are this prompt's `step` and `attempt` records."""
    attempts: dict[int, tuple[Attempt, dict[str, Any]]] = {}
    steps: dict[int, Mapping[str, Any]] = {}
    for record in so_far:
        if record["type"] == "attempt":
            attempts[record["number"]] = (attempt_from_record(record["attempt"]), dict(record["answer"]))
        elif record["type"] == "step" and record["cell"] > steps.get(record["number"], {"cell": -1})["cell"]:
            steps[record["number"]] = record
    for number in range(settings.num_attempts):
        if number not in attempts:
            attempt = yield from with_notes(
                fsour_attempt(
                    bench.backend,
                    item.prompt,
                    settings,
                    number,
                    bench.judge,
                    bench.model.stop_token_ids,
                    library,
                    steps.get(number),
                ),
                partial(_step, number),
            )
            judged = bench.verdict_record(attempt.verdict, attempt.answer)
            kept = {"type": "attempt", "number": number, "attempt": attempt_record(attempt), "answer": judged}
            yield [Note({"at": ["attempt", number], **kept})]
            attempts[number] = (attempt, judged)
        if attempts[number][1]["success"]:
            break
    last, judged = attempts[number]
    tried = [attempts[at][0] for at in range(number + 1)]
    return {
        "type": "fsour",
        "attack": f"fsour-{settings.strategy}",
        "prompt": item.prompt.id,
        "prompt_tokens": len(item.prompt.token_ids),
        "category": item.record.category,
        "seed": settings.seed,
        "attempts": number + 1,
        "candidates": sum(attempt.candidates for attempt in tried),
        "needed": sum(attempt.needed for attempt in tried),
        "tokens": sum(attempt.tokens for attempt in tried),
        "computed_tokens": sum(attempt.computed_tokens for attempt in tried),
        "final": attempt_record(last),
        **judged,
    }


def _step(number: int, value: Mapping[str, Any]) -> dict[str, Any]:
    """A note of attempt `number` as a record."""
    return {"type": "step", "number": number, **value}


Job = tuple[tuple[Any, ...], Callable[[list[dict[str, Any]]], Search[dict[str, Any]]]]


class Interrupted(RouteError):
    """Ctrl-C: everything finished so far is in the folder."""


def run_jobs(campaign: Campaign, backend: Backend, jobs: Sequence[Job], *, label: str, concurrency: int = 64) -> Stats:
    """Run the jobs that the campaign has no result of; each result is a record under the job's key.

    Args:
        campaign: where records go.
        backend: where requests run.
        jobs: (key, function that takes the job's earlier `step` and `attempt` records and makes its search).
        label: for the progress line.
        concurrency: jobs in flight.

    Raises:
        Interrupted: Ctrl-C; run the same command again to go on.

    """
    earlier: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in campaign.records():
        if record["type"] in ("step", "attempt"):
            # A job's notes stand under its own key with two or three parts more.
            key = tuple(record["key"])
            earlier.setdefault(key[: -2 if record["type"] == "attempt" else -3], []).append(record)
    open_jobs = [(key, make) for key, make in jobs if not campaign.done(key)]
    stats = Stats()

    def note(key: tuple[Any, ...], value: Mapping[str, Any]) -> None:
        campaign.append((*key, *value["at"]), {name: item for name, item in value.items() if name != "at"})

    with (
        CleanStop("stopping; what is finished is kept") as stop,
        Progress(len(jobs), "prompts", initial=len(jobs) - len(open_jobs), label=label) as progress,
    ):
        tasks = ((key, make(earlier.get(key, []))) for key, make in open_jobs)
        done = 0
        try:
            for key, record in run_tasks(backend, tasks, concurrency=concurrency, stats=stats, stop=lambda: bool(stop), note=note):
                campaign.append(key, record)
                progress.update()
                done += 1
        except CampaignError:
            raise
        except RouteError:
            # A terminal's Ctrl-C reaches vLLM's own processes too: that they end is no error then.
            if not stop:
                raise
    if done < len(open_jobs):
        raise Interrupted(f"stopped after {done} of {len(open_jobs)} prompts; the same command goes on from {campaign.folder}")
    return stats
