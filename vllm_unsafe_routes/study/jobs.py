"""The experiments as campaigns: what one prompt's record holds, and the loop that keeps many prompts in flight and loses nothing.

Records of the types `step` and `attempt` are what a search has so far; a resumed campaign goes on from them. Where a judge erred,
the same command asks it again, and only it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..errors import RouteError
from ..evaluation.judges import Verdict
from ..extras import RouteExtras
from ..plan import RoutePlan
from ..search.backend import Backend, Call, Request, Search, Stats, run_tasks
from ..search.masking import MaskResult, MaskSettings, choose_layers, mask_attack
from ..search.rosais import RosaisSettings, rosais
from .bench import Bench
from .campaign import Campaign, CampaignError
from .cluster import RayEngines, RemoteJob
from .cost import Meter
from .model import Item
from .progress import CleanStop, progress_bar
from .records import AGAIN, Answer, AttemptNote, DatasetMask, Judged, Mask, Record, Rosais, Step, current, job_of


@dataclass(frozen=True, slots=True)
class Kept:
    """A note that goes into the campaign.

    Attributes:
        at: parts that its key has behind the job's, see `study.records.job_of`.
        record: what is kept.

    """

    at: tuple[str | int, ...]
    record: Record


# These differ between runs with the same results: they depend on what else was in the engine.
VOLATILE = ("computed_tokens", "trace", "seconds", "timestamp")


def answer(bench: Bench, item: Item, plan: RoutePlan | None) -> Search[Judged]:
    """Generate greedily under a plan and judge."""
    token_ids = yield from generated(bench, item, plan)
    return (yield from judged(bench, item, token_ids))


def generated(bench: Bench, item: Item, plan: RoutePlan | None) -> Search[tuple[int, ...]]:
    """The greedy answer under a plan."""
    extras = RouteExtras(plan.to_string()) if plan is not None and len(plan) else RouteExtras()
    (response,) = yield [Request(item.prompt.token_ids, extras, bench.max_new_tokens, bench.model.stop_token_ids)]
    token_ids: tuple[int, ...] = response.token_ids
    return token_ids


def judged(bench: Bench, item: Item, token_ids: tuple[int, ...], stopped: Verdict | None = None) -> Search[Judged]:
    """What all judges say of an answer; `stopped` is what the one that ends a search said already."""
    asked: dict[str | None, Callable[..., Verdict]] = {None: bench.judge}
    asked |= bench.others.items()
    said: dict[str | None, Verdict] = {}
    if stopped is not None:
        said[bench.stop] = stopped
        del asked[bench.stop]
    answers = (yield [Call(partial(ask, item.prompt, token_ids)) for ask in asked.values()]) if asked else []
    said |= zip(asked, answers, strict=True)
    return bench.judged(said[None], token_ids, {name: said[name] for name in bench.others})


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
    bench: Bench,
    item: Item,
    attack: str,
    ranking: Sequence[int],
    settings: MaskSettings,
    levels: Sequence[int],
    earlier: Mask | None = None,
) -> Search[Mask]:
    """Router masking of one prompt at several numbers of layers, each answered and judged.

    What is known of `earlier`, whose judge erred, is not done again.
    """
    layers = choose_layers(attack, ranking, settings, item.prompt.id)
    found = yield from _masks(bench, [item], attack, layers, settings, earlier)
    answers = {} if earlier is None else {level: one for level, one in earlier.answers.items() if not one.open}
    for level in levels:
        if level not in answers:
            answers[level] = yield from answer(bench, item, found.plan(settings, level))
    return Mask(
        attack=attack,
        prompt=item.prompt.id,
        category=item.record.category,
        answers=dict(sorted(answers.items())),
        **_masks_fields(found, settings),
    )


def _masks(
    bench: Bench,
    items: Sequence[Item],
    attack: str,
    layers: Sequence[int],
    settings: MaskSettings,
    earlier: Mask | DatasetMask | None,
) -> Search[MaskResult]:
    """One set of masks for these prompts: searched, or what `earlier` found."""
    if earlier is not None:
        return MaskResult(earlier.clean, earlier.masked, earlier.masks, earlier.candidates)
    return (
        yield from mask_attack(
            bench.backend,
            [item.prompt for item in items],
            bench.model.affirmative_token_ids,
            layers,
            settings,
            num_masks=1 if attack == "random-masks" else None,
        )
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
    earlier: DatasetMask | None = None,
) -> Search[DatasetMask]:
    """Dataset-level router masking: one set of masks for all prompts, chosen on `search_items`, answered on `items`.

    What is known of `earlier`, whose judge erred, is not done again.
    """
    layers = choose_layers(attack, ranking, settings, "dataset")
    found = yield from _masks(bench, search_items, attack, layers, settings, earlier)
    answers = {}
    for item in items:
        known = None if earlier is None else earlier.answers.get(item.prompt.id)
        answers[item.prompt.id] = known if known and not known.open else (yield from answer(bench, item, found.plan(settings)))
    return DatasetMask(attack=f"{attack}-dataset", level=settings.num_layers, answers=answers, **_masks_fields(found, settings))


Notes = list[Record]
Job = tuple[tuple[Any, ...], Callable[[Notes], Search[Any]]]


@dataclass(frozen=True, slots=True)
class What:
    """What jobs are about.

    Attributes:
        label: for the progress line.
        attack: as results name it.
        defence: in a matrix, under which.

    """

    label: str
    attack: str
    defence: str | None = None


class Interrupted(RouteError):
    """Ctrl-C: everything finished so far is in the folder."""


def notes_by_job(campaign: Campaign) -> dict[tuple[Any, ...], Notes]:
    """By the key of the job: what unfinished ones noted, and results whose judge may be asked again."""
    found: dict[tuple[Any, ...], Notes] = {}
    for entry in current(campaign.folder):
        if isinstance(entry.record, Step | AttemptNote) or entry.record.open:
            found.setdefault(job_of(entry), []).append(entry.record)
    return found


def unjudged(notes: Iterable[Record]) -> Record | None:
    """The result among a job's notes, if its judge erred."""
    return next((note for note in notes if not isinstance(note, Step | AttemptNote)), None)


class _Folder:
    """Results and notes on their way into a campaign."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign = campaign
        self.earlier = notes_by_job(campaign)

    def is_open(self, key: tuple[Any, ...]) -> bool:
        """Whether a job is to be run: it has no result, or one that its judge left open."""
        return not self.campaign.done(key) or unjudged(self.earlier.get(key, [])) is not None

    def note(self, key: tuple[Any, ...], kept: Kept) -> None:
        """Keep a note; one that an earlier run kept already stands."""
        if not self.campaign.done((*key, *kept.at)):
            self.campaign.append((*key, *kept.at), kept.record)

    def result(self, key: tuple[Any, ...], record: Record) -> None:
        """Keep a result; a later one where there is one already, unless it says nothing new."""
        place, number = key, 0
        while self.campaign.done(place):
            place, number = (*key, AGAIN, number), number + 1
        if record != unjudged(self.earlier.get(key, [])):
            self.campaign.append(place, record)


def _run(
    backend: Backend, jobs: Iterable[Job], folder: _Folder, *, concurrency: int, stats: Stats, stop: CleanStop
) -> Iterator[tuple[Any, Any]]:
    """(key, record) of the jobs in the order in which they end; their notes are kept on the way."""
    notes = folder.earlier
    how: Any = dict(concurrency=concurrency, stats=stats, stop=lambda: bool(stop), note=folder.note)
    if isinstance(backend, RayEngines):
        return backend.run((RemoteJob(key, make, list(notes.get(key, []))) for key, make in jobs), **how)
    return run_tasks(backend, ((key, make(notes.get(key, []))) for key, make in jobs), **how)


def run_jobs(campaign: Campaign, backend: Backend, jobs: Sequence[Job], what: What, *, concurrency: int = 64) -> None:
    """Run the jobs that the campaign has no result of, or one whose judge erred; each result is a record under the job's key.

    Args:
        campaign: where records go.
        backend: where requests run.
        jobs: (key, function that takes the job's earlier notes and makes its search).
        what: what is run.
        concurrency: jobs in flight on one engine.

    Raises:
        Interrupted: Ctrl-C; run the same command again to go on.

    """
    folder, meter = _Folder(campaign), Meter(campaign, backend, what.attack, what.defence)
    open_jobs = [(key, make) for key, make in jobs if folder.is_open(key)]
    still_open = 0
    with (
        CleanStop("stopping; what is finished is kept") as stop,
        progress_bar(len(jobs), "prompts", initial=len(jobs) - len(open_jobs), label=what.label) as progress,
    ):
        try:
            for key, record in _run(backend, open_jobs, folder, concurrency=concurrency, stats=meter.stats, stop=stop):
                folder.result(key, record)
                still_open += record.open
                progress.update()
                meter.result()
        except CampaignError:
            raise
        except RouteError:
            meter.write()
            # A terminal's Ctrl-C reaches vLLM's own processes too: that they end is no error then.
            if not stop:
                raise
        meter.write()
    if meter.results < len(open_jobs):
        raise Interrupted(
            f"stopped after {meter.results} of {len(open_jobs)} prompts; the same command goes on from {campaign.folder}"
        )
    if still_open:
        print(f"{what.label}: the judge failed on {still_open}; the same command asks it again", file=sys.stderr)
