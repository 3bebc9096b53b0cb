"""The experiments as campaigns: what one prompt's record holds, and the loop that keeps many prompts in flight and loses nothing.

Records of the types `step` and `attempt` are what a search has so far; a resumed campaign goes on from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import RouteError
from ..extras import RouteExtras
from ..plan import RoutePlan
from ..search.adaptive import Library
from ..search.attempt import Attempt
from ..search.backend import Backend, Call, Note, Request, Search, Stats, run_tasks, with_notes
from ..search.fsour import FsourSettings, fsour_attempt
from ..search.fsour import Progress as AttemptProgress
from ..search.masking import MaskResult, MaskSettings, choose_layers, mask_attack
from ..search.rosais import RosaisSettings, rosais
from .bench import Bench
from .campaign import Campaign, CampaignError
from .model import Item
from .progress import CleanStop, progress_bar
from .records import Answer, AttemptNote, DatasetMask, Fsour, Judged, Mask, Record, Rosais, Step, entries, job_of

# These differ between runs with the same results: they depend on what else was in the engine.
VOLATILE = ("computed_tokens", "trace", "seconds", "timestamp")


def answer(bench: Bench, item: Item, plan: RoutePlan | None) -> Search[Judged]:
    """Generate greedily under a plan and judge."""
    extras = RouteExtras(plan.to_string()) if plan is not None and len(plan) else RouteExtras()
    request = Request(item.prompt.token_ids, extras, bench.max_new_tokens, bench.model.stop_token_ids)
    (response,) = yield [request]
    (verdict,) = yield [Call(lambda: bench.judge(item.prompt, response.token_ids))]
    return bench.judged(verdict, response.token_ids)


def plain_record(bench: Bench, item: Item) -> Search[Answer]:
    """The model's own answer."""
    judged = yield from answer(bench, item, None)
    return Answer(attack="none", prompt=item.prompt.id, category=item.record.category, **judged.fields())


def rosais_record(bench: Bench, item: Item, settings: RosaisSettings, draws_for: str | None = None) -> Search[Rosais]:
    """RoSais of one prompt."""
    found = yield from rosais(bench.backend, item.prompt, bench.model.affirmative_token_ids, settings, draws_for)
    return Rosais(
        prompt=item.prompt.id,
        category=item.record.category,
        seed=settings.seed,
        clean=round(found.clean, 3),
        scores={layer: round(score, 3) for layer, score in found.scores.items()},
        gains={layer: tuple(round(gain, 3) for gain in gains) for layer, gains in found.gains.items()},
        masks={layer: tuple(masks) for layer, masks in found.masks.items()},
    )


def mask_record(
    bench: Bench, item: Item, attack: str, ranking: Sequence[int], settings: MaskSettings, levels: Sequence[int]
) -> Search[Mask]:
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
        answers[level] = yield from answer(bench, item, found.plan(settings, level))
    return Mask(
        attack=attack, prompt=item.prompt.id, category=item.record.category, answers=answers, **_masks_fields(found, settings)
    )


def _masks_fields(found: MaskResult, settings: MaskSettings) -> dict[str, Any]:
    return {
        "seed": settings.seed,
        "clean": round(found.clean, 3),
        "masked": round(found.masked, 3),
        "masks": found.masks,
        "candidates": found.candidates,
    }


def dataset_mask_record(
    bench: Bench,
    search_items: Sequence[Item],
    items: Sequence[Item],
    attack: str,
    ranking: Sequence[int],
    settings: MaskSettings,
) -> Search[DatasetMask]:
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
    return DatasetMask(attack=f"{attack}-dataset", level=settings.num_layers, answers=answers, **_masks_fields(found, settings))


@dataclass(frozen=True, slots=True)
class Kept:
    """A note that goes into the campaign.

    Attributes:
        at: parts that its key has behind the job's, see `study.records.job_of`.
        record: what is kept.

    """

    at: tuple[str | int, ...]
    record: Record


def fsour_record(
    bench: Bench,
    item: Item,
    settings: FsourSettings,
    library: Library | None = None,
    so_far: Iterable[Step | AttemptNote] = (),
) -> Search[Fsour]:
    """F-SOUR on one prompt: attempts until one succeeds. `so_far` is what an earlier run noted of this prompt."""
    attempts: dict[int, tuple[Attempt, Judged]] = {}
    steps: dict[int, AttemptProgress] = {}
    for note in so_far:
        if isinstance(note, AttemptNote):
            attempts[note.number] = (Attempt.from_state(note.attempt), note.answer)
        elif note.number not in steps or note.cell > steps[note.number].cell:
            steps[note.number] = AttemptProgress(note.cell, note.attempt)
    for number in range(settings.num_attempts):
        if number not in attempts:
            search = fsour_attempt(
                bench.backend, item.prompt, settings, number, bench.judge, bench.model.stop_token_ids, library, steps.get(number)
            )
            attempt = yield from with_notes(search, partial(_step, number))
            assert attempt.verdict is not None
            judged = bench.judged(attempt.verdict, attempt.answer)
            yield [Note(Kept(("attempt", number), AttemptNote(number=number, attempt=attempt.state(), answer=judged)))]
            attempts[number] = (attempt, judged)
        if attempts[number][1].success:
            break
    last, judged = attempts[number]
    tried = [attempts[at][0] for at in range(number + 1)]
    return Fsour(
        attack=f"fsour-{settings.strategy}",
        prompt=item.prompt.id,
        prompt_tokens=len(item.prompt.token_ids),
        category=item.record.category,
        seed=settings.seed,
        attempts=number + 1,
        candidates=sum(attempt.candidates for attempt in tried),
        needed=sum(attempt.needed for attempt in tried),
        tokens=sum(attempt.tokens for attempt in tried),
        computed_tokens=sum(attempt.computed_tokens for attempt in tried),
        final=last.state(),
        **judged.fields(),
    )


def _step(number: int, progress: AttemptProgress) -> Kept:
    """A note of attempt `number` as a record."""
    return Kept(("step", number, progress.cell), Step(number=number, cell=progress.cell, attempt=progress.state))


Notes = list[Step | AttemptNote]
Job = tuple[tuple[Any, ...], Callable[[Notes], Search[Any]]]


class Interrupted(RouteError):
    """Ctrl-C: everything finished so far is in the folder."""


def notes_by_job(campaign: Campaign) -> dict[tuple[Any, ...], Notes]:
    """What unfinished jobs noted, by the key of the job."""
    found: dict[tuple[Any, ...], Notes] = {}
    for entry in entries(campaign.folder):
        if isinstance(entry.record, Step | AttemptNote):
            found.setdefault(job_of(entry), []).append(entry.record)
    return found


def run_jobs(campaign: Campaign, backend: Backend, jobs: Sequence[Job], *, label: str, concurrency: int = 64) -> Stats:
    """Run the jobs that the campaign has no result of; each result is a record under the job's key.

    Args:
        campaign: where records go.
        backend: where requests run.
        jobs: (key, function that takes the job's earlier notes and makes its search).
        label: for the progress line.
        concurrency: jobs in flight.

    Raises:
        Interrupted: Ctrl-C; run the same command again to go on.

    """
    earlier = notes_by_job(campaign)
    open_jobs = [(key, make) for key, make in jobs if not campaign.done(key)]
    stats = Stats()

    def note(key: tuple[Any, ...], kept: Kept) -> None:
        campaign.append((*key, *kept.at), kept.record)

    with (
        CleanStop("stopping; what is finished is kept") as stop,
        progress_bar(len(jobs), "prompts", initial=len(jobs) - len(open_jobs), label=label) as progress,
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
