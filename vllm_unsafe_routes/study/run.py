"""Whole studies: settings in, a run folder and its summary out. What the commands of the same names call.

    summary = run_rosais(RosaisStudy(model="lab", data="lab:search", out=Path("runs/rosais"), limit=16))

Every function takes `backend`, an engine that is open already; without it one is started as the settings say and ended. All raise
`RouteError`, and `Interrupted` on Ctrl-C: the same call goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..evaluation.datasets import prompts_digest
from ..search.adaptive import Library
from ..search.backend import Backend, Search
from ..search.fsour import FsourSettings
from ..search.rosais import RosaisSettings
from . import artifact
from .bench import Bench
from .campaign import Campaign
from .controls import Found, controls_record
from .fsour import fsour_record
from .jobs import Job, What, dataset_mask_record, mask_record, plain_record, rosais_record, run_jobs, unjudged
from .model import Item
from .prompts import read_prompts
from .records import Answer, DatasetMask, Fsour, Mask, Matrix, Record, read
from .settings import FsourStudy, MaskStudy, RosaisStudy
from .summary import fsour_summary, mask_summary, rosais_summary, scored_run
from .workspace import Workspace


def _without(settings: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Search settings for the campaign's file, but for what stands there under another name."""
    return {name: value for name, value in settings.items() if name not in names}


def run_rosais(study: RosaisStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Score how safety-critical each layer's router is."""
    workspace = Workspace(study, backend)
    draws_for = "dataset" if study.same_masks else None
    searches = [replace(study.search, seed=seed) for seed in study.seeds]
    keys = [(seed, item.prompt.id) for seed in study.seeds for item in workspace.items]

    def job(bench: Bench, search: RosaisSettings, item: Item) -> Job:
        return (search.seed, item.prompt.id), lambda _: rosais_record(bench, item, search, draws_for)

    with workspace.campaign("rosais", _without(asdict(study.search), "seed") | {"draws_for": draws_for}) as campaign:
        if not all(campaign.done(key) for key in keys):
            with workspace.bench() as bench:
                jobs = [job(bench, search, item) for search in searches for item in workspace.items]
                run_jobs(campaign, bench.backend, jobs, What("RoSais", "rosais"), concurrency=study.engine.concurrency)
        summary = rosais_summary(read(study.out, Record))
        campaign.finish(summary)
    return summary


def run_masks(study: MaskStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Mask the most safety-critical routers, beside the controls."""
    workspace = Workspace(study, backend)
    scored, ranking = scored_run(study.rosais, workspace.model.shape.fingerprint)
    levels = sorted({min(level, len(ranking)) for level in study.levels})
    search = replace(study.search, num_layers=max(levels), score=scored["score"])
    chosen_on = read_prompts(study.chosen_on, study.chosen_limit, columns=study.columns) if study.chosen_on else []
    # Other prompts may have the same ids.
    search_items = workspace.render([replace(record, id=f"chosen-on:{record.id}") for record in chosen_on])
    own = _without(asdict(search), "seed", "num_layers") | {
        "chosen_on": prompts_digest(chosen_on) if chosen_on else None,
        "levels": levels,
        "attacks": list(study.attacks),
        "ranking": ranking,
        "max_new_tokens": study.judging.max_new_tokens,
        "controls": study.controls,
    }

    def of_dataset(bench: Bench, attack: str, seed: int, level: int) -> Job:
        settings = replace(search, seed=seed, num_layers=level)
        key = (f"{attack}-dataset", seed, level)

        def search_of(so_far: Sequence[Record]) -> Search[DatasetMask]:
            earlier = unjudged(so_far)
            assert earlier is None or isinstance(earlier, DatasetMask)
            return dataset_mask_record(bench, search_items, workspace.items, attack, ranking, settings, earlier)

        return key, search_of

    def of_prompt(bench: Bench, attack: str, seed: int, item: Item) -> Job:
        settings = replace(search, seed=seed)

        def search_of(so_far: Sequence[Record]) -> Search[Mask]:
            earlier = unjudged(so_far)
            assert earlier is None or isinstance(earlier, Mask)
            return mask_record(bench, item, attack, ranking, settings, levels, earlier)

        return (attack, seed, item.prompt.id), search_of

    with workspace.campaign("mask-attack", own) as campaign:
        with workspace.bench() as bench:
            at_once = study.engine.concurrency
            run_plain(campaign, bench, workspace.items, at_once)
            for attack in study.attacks:
                if search_items:
                    jobs = [of_dataset(bench, attack, seed, level) for seed in study.seeds for level in levels]
                else:
                    jobs = [of_prompt(bench, attack, seed, item) for seed in study.seeds for item in workspace.items]
                what = What(f"router masking, {attack}", f"{attack}-dataset" if search_items else attack)
                run_jobs(campaign, bench.backend, jobs, what, concurrency=at_once)
            if study.controls:
                found = _found_masks(study, workspace.items)
                _run_controls(campaign, bench, found, study.controls, "router masking", at_once)
        summary = mask_summary(read(study.out, Record))
        campaign.finish(summary)
    return summary


def run_plain(campaign: Campaign, bench: Bench, items: Sequence[Item], concurrency: int) -> dict[str, Answer]:
    """The model's own answers, judged; by prompt."""

    def job(item: Item) -> Job:
        return ("none", item.prompt.id), lambda _: plain_record(bench, item)

    run_jobs(campaign, bench.backend, [job(item) for item in items], What("no attack", "none"), concurrency=concurrency)
    return {record.prompt: record for record in read(campaign.folder, Answer)}


def run_fsour(study: FsourStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Search a concrete unsafe route for each prompt."""
    workspace = Workspace(study, backend)
    search = replace(study.search, max_new_tokens=study.judging.max_new_tokens)
    num_first = study.library_prompts if search.strategy == "adaptive" else 0
    first, rest = workspace.items[:num_first], workspace.items[num_first:]
    label, attack = f"F-SOUR ({search.strategy})", f"fsour-{search.strategy}"
    own = _without(asdict(search), "seed") | {
        "library_prompts": num_first,
        "plain_answer_first": not study.search_answered,
        "controls": study.controls,
    }

    with workspace.campaign("fsour", own) as campaign:
        with workspace.bench() as bench:
            at_once = study.engine.concurrency
            plain = {} if study.search_answered else run_plain(campaign, bench, workspace.items, at_once)

            def jobs(items: Sequence[Item], libraries: Mapping[int, Library]) -> list[Job]:
                return [
                    _fsour_job(bench, replace(search, seed=seed), item, libraries.get(seed), plain)
                    for seed in study.seeds
                    for item in items
                ]

            if first:
                run_jobs(campaign, bench.backend, jobs(first, {}), What(f"{label}, library", attack), concurrency=at_once)
            names = {item.prompt.id for item in first}
            libraries = {seed: library_of(read(study.out, Fsour), seed, names) for seed in study.seeds}
            run_jobs(campaign, bench.backend, jobs(rest, libraries), What(label, attack), concurrency=at_once)
            if study.controls:
                _run_controls(campaign, bench, _found_routes(study, workspace.items), study.controls, label, at_once)
        summary = fsour_summary(read(study.out, Record))
        campaign.finish(summary)
    if study.artifact is not None:
        artifact.write(study.artifact, study, read(study.out, Record), workspace.records, workspace.judges.settings())
    return summary


def _fsour_job(bench: Bench, settings: FsourSettings, item: Item, library: Library | None, plain: Mapping[str, Answer]) -> Job:
    own = plain.get(item.prompt.id)
    return (settings.seed, item.prompt.id), lambda so_far: fsour_record(bench, item, settings, library, so_far, own)


def _found_routes(study: FsourStudy, items: Sequence[Item]) -> Iterator[tuple[Item, Found]]:
    """Every route that was found."""
    by_id = {item.prompt.id: item for item in items}
    for record in read(study.out, Fsour):
        if record.final.routes:
            item = by_id[record.prompt]
            yield item, Found.by_fsour(record, item, study.search.weights)


def _found_masks(study: MaskStudy, items: Sequence[Item]) -> Iterator[tuple[Item, Found]]:
    """The masks of most layers that each attack chose, for every prompt that they are put on."""
    shared = list(read(study.out, DatasetMask))
    most = max((record.level for record in shared), default=0)
    records: list[Mask | DatasetMask] = [*read(study.out, Mask), *(one for one in shared if one.level == most)]
    for record in records:
        for item in items:
            if record.masks and (isinstance(record, DatasetMask) or record.prompt == item.prompt.id):
                yield item, Found.by_masks(record.attack, record.seed, record.masks, item, study.search.weights)


def _run_controls(
    campaign: Campaign, bench: Bench, found: Iterable[tuple[Item, Found]], num_random: int, label: str, concurrency: int
) -> None:
    """The controls of what was found."""

    def job(item: Item, one: Found) -> Job:
        # F-SOUR's runs have one attack, whose name their keys never had.
        attack = () if one.attack.startswith("fsour") else (one.attack,)
        return ("controls", *attack, one.seed, item.prompt.id), lambda _: controls_record(bench.backend, item, one, num_random)

    jobs = [job(item, one) for item, one in found]
    run_jobs(campaign, bench.backend, jobs, What(f"{label}, controls", "controls"), concurrency=concurrency)


def library_of(records: Iterable[Fsour | Matrix], seed: int, prompts: set[str]) -> Library:
    """Routes of the successful attempts on these prompts."""
    return Library.from_routes(
        [
            (record.prompt_tokens, record.final.routes)
            for record in records
            if record.seed == seed and record.prompt in prompts and record.success
            # A plain answer that complies has no route.
            if record.final and record.final.routes and record.prompt_tokens
        ]
    )
