"""Whole studies: settings in, a run folder and its summary out. What the commands of the same names call.

    summary = run_rosais(RosaisStudy(model="lab", data="lab:search", out=Path("runs/rosais"), limit=16))

Every function takes `backend`, an engine that is open already; without it one is started as the settings say and ended. All raise
`RouteError`, and `Interrupted` on Ctrl-C: the same call goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..evaluation.artifacts import ArtifactParameters, write_artifact
from ..evaluation.artifacts import Attempt as ArtifactAttempt
from ..evaluation.datasets import prompts_digest
from ..search.adaptive import Library
from ..search.backend import Backend
from ..search.rosais import RosaisSettings
from .bench import Bench
from .jobs import Job, dataset_mask_record, fsour_record, mask_record, plain_record, rosais_record, run_jobs
from .model import Item
from .prompts import read_prompts
from .records import Fsour, Matrix, Record, read
from .records import Rosais as RosaisRecord
from .settings import FsourStudy, MaskStudy, RosaisStudy
from .summary import fsour_summary, mask_summary, rosais_summary, scored_run
from .workspace import Workspace


def _without(settings: Any, *names: str) -> dict[str, Any]:
    """Search settings for the campaign's file, but for what stands there under another name."""
    return {name: value for name, value in asdict(settings).items() if name not in names}


def run_rosais(study: RosaisStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Score how safety-critical each layer's router is."""
    workspace = Workspace(study, backend)
    draws_for = "dataset" if study.same_masks else None
    searches = [replace(study.search, seed=seed) for seed in study.seeds]
    keys = [(seed, item.prompt.id) for seed in study.seeds for item in workspace.items]

    def job(bench: Bench, search: RosaisSettings, item: Item) -> Job:
        return (search.seed, item.prompt.id), lambda _: rosais_record(bench, item, search, draws_for)

    with workspace.campaign("rosais", _without(study.search, "seed") | {"draws_for": draws_for}) as campaign:
        if not all(campaign.done(key) for key in keys):
            with workspace.bench() as bench:
                jobs = [job(bench, search, item) for search in searches for item in workspace.items]
                run_jobs(campaign, bench.backend, jobs, label="RoSais", concurrency=study.engine.concurrency)
        summary = rosais_summary(read(study.out, RosaisRecord))
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
    own = _without(search, "seed", "num_layers") | {
        "chosen_on": prompts_digest(chosen_on) if chosen_on else None,
        "levels": levels,
        "attacks": list(study.attacks),
        "ranking": ranking,
        "max_new_tokens": study.judging.max_new_tokens,
    }

    def plain(bench: Bench, item: Item) -> Job:
        return ("none", item.prompt.id), lambda _: plain_record(bench, item)

    def of_dataset(bench: Bench, attack: str, seed: int, level: int) -> Job:
        settings = replace(search, seed=seed, num_layers=level)
        key = (f"{attack}-dataset", seed, level)
        return key, lambda _: dataset_mask_record(bench, search_items, workspace.items, attack, ranking, settings)

    def of_prompt(bench: Bench, attack: str, seed: int, item: Item) -> Job:
        settings = replace(search, seed=seed)
        return (attack, seed, item.prompt.id), lambda _: mask_record(bench, item, attack, ranking, settings, levels)

    with workspace.campaign("mask-attack", own) as campaign:
        with workspace.bench() as bench:
            jobs = [plain(bench, item) for item in workspace.items]
            for attack in study.attacks:
                for seed in study.seeds:
                    if search_items:
                        jobs += [of_dataset(bench, attack, seed, level) for level in levels]
                    else:
                        jobs += [of_prompt(bench, attack, seed, item) for item in workspace.items]
            run_jobs(campaign, bench.backend, jobs, label="router masking", concurrency=study.engine.concurrency)
        summary = mask_summary(read(study.out, Record))
        campaign.finish(summary)
    return summary


def run_fsour(study: FsourStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Search a concrete unsafe route for each prompt."""
    workspace = Workspace(study, backend)
    search = replace(study.search, max_new_tokens=study.judging.max_new_tokens)
    num_first = study.library_prompts if search.strategy == "adaptive" else 0
    first, rest = workspace.items[:num_first], workspace.items[num_first:]
    label = f"F-SOUR ({search.strategy})"

    def job(bench: Bench, seed: int, item: Item, library: Library | None) -> Job:
        settings = replace(search, seed=seed)
        return (seed, item.prompt.id), lambda so_far: fsour_record(bench, item, settings, library, so_far)

    def jobs(bench: Bench, items: Sequence[Item], libraries: Mapping[int, Library]) -> list[Job]:
        return [job(bench, seed, item, libraries.get(seed)) for seed in study.seeds for item in items]

    with workspace.campaign("fsour", _without(search, "seed") | {"library_prompts": num_first}) as campaign:
        with workspace.bench() as bench:
            at_once = study.engine.concurrency
            if first:
                run_jobs(campaign, bench.backend, jobs(bench, first, {}), label=f"{label}, library", concurrency=at_once)
            names = {item.prompt.id for item in first}
            libraries = {seed: library_of(read(study.out, Fsour), seed, names) for seed in study.seeds}
            run_jobs(campaign, bench.backend, jobs(bench, rest, libraries), label=label, concurrency=at_once)
        summary = fsour_summary(read(study.out, Fsour))
        campaign.finish(summary)
    if study.artifact is not None:
        _write_artifact(study.artifact, study, workspace)
    return summary


def library_of(records: Iterable[Fsour | Matrix], seed: int, prompts: set[str]) -> Library:
    """Routes of the successful attempts on these prompts."""
    return Library.from_routes(
        [
            (record.prompt_tokens, record.final.routes)
            for record in records
            if record.seed == seed and record.prompt in prompts and record.success and record.final and record.prompt_tokens
        ]
    )


def _write_artifact(path: Path, study: FsourStudy, workspace: Workspace) -> None:
    """The first seed's results as a JailbreakBench attack artifact."""
    place = {item.prompt.id: item.record for item in workspace.items}
    attempts = []
    for found in read(study.out, Fsour):
        if found.seed != study.seeds[0]:
            continue
        prompt = place[found.prompt]
        attempts.append(
            ArtifactAttempt(
                index=prompt.index,
                goal=prompt.goal,
                behavior=str(prompt.extra.get("behavior", prompt.id)),
                category=prompt.category,
                prompt=prompt.request,
                response=found.completion,
                jailbroken=found.success,
                judge_error=found.error,
                number_of_queries=found.candidates,
                queries_to_jailbreak=found.candidates if found.success else None,
                prompt_tokens=found.tokens,
            )
        )
    parameters = ArtifactParameters(
        method=f"F-SOUR ({study.search.strategy})",
        model=study.model,
        attack_type="white_box",
        judge=workspace.judge.name,
        defense="route-policy" if study.engine.policy else None,
    )
    ordered = sorted(attempts, key=lambda attempt: attempt.index)
    write_artifact(path, parameters, ordered, keep_completions=study.judging.keep_completions)
