"""Other people's recipes as a study: two kinds of prompts are compared once, then each prompt gets its plan and is judged under it.

SteerMoE, SAFEx and MASCing start from the comparison of what both kinds use, L3 from nothing. How many experts, or how strongly, is
chosen for every prompt by its target's log-probability, with at most the same number of candidates for each recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..evaluation.datasets import prompts_digest
from ..plan import RoutePlan
from ..search.backend import Backend, Search, run_search
from ..search.candidates import Chosen
from ..search.mascing import log_ratio, mascing
from ..search.rosais import Prompt
from ..search.safex import safex, stable_experts
from ..search.silencing import silence
from ..search.steering import steermoe
from ..search.usage import Usage, usage
from ..shape import ModelShape
from .bench import Bench
from .jobs import Job, What, answer, run_jobs, unjudged
from .model import Item
from .prompts import read_prompts
from .records import Recipe, Record, read
from .run import run_plain
from .settings import RecipeStudy
from .summary import mask_summary
from .workspace import Workspace

Choose = Callable[[Backend, Sequence[Prompt]], Search[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Contrast:
    """What the recipes start from.

    Attributes:
        refused: expert usage of the prompts that are refused.
        answered: of those that are answered.

    """

    refused: Usage
    answered: Usage


def chooser(recipe: str, study: RecipeStudy, shape: ModelShape, contrast: Contrast, seed: int) -> Choose:
    """A recipe as a search over prompts: away from what refused prompts use."""
    num, first, second = study.num_candidates, contrast.refused, contrast.answered
    if recipe == "steermoe":
        return partial(steermoe, difference=second.shares() - first.shares(), num_candidates=num)
    if recipe == "safex":
        stable = stable_experts(shape, first, second, replace(study.safex, seed=seed))
        return partial(safex, ranking=stable.ranking, num_candidates=num)
    if recipe == "l3":
        return partial(silence, settings=replace(study.l3, num_candidates=num))
    return partial(mascing, direction=log_ratio(first, second), settings=replace(study.mascing, num_candidates=num))


def recipe_record(bench: Bench, item: Item, recipe: str, choose: Choose, seed: int, earlier: Recipe | None) -> Search[Recipe]:
    """One recipe on one prompt; what is known of `earlier`, whose judge erred, is not done again."""
    if earlier is None:
        chosen = yield from choose(bench.backend, [item.prompt])
    else:
        chosen = Chosen(earlier.clean, earlier.found, RoutePlan.from_string(earlier.plan), earlier.candidates)
    judged = yield from answer(bench, item, chosen.plan)
    return Recipe(
        attack=recipe,
        prompt=item.prompt.id,
        category=item.record.category,
        seed=seed,
        clean=round(chosen.clean, 4),
        found=round(chosen.value, 4),
        plan=chosen.plan.to_string(),
        candidates=chosen.candidates,
        **judged.fields(),
    )


def run_recipes(study: RecipeStudy, backend: Backend | None = None) -> dict[str, Any]:
    """Run recipes on every prompt, beside the model's own answers."""
    workspace = Workspace(study, backend)
    kinds = [read_prompts(source, study.contrast_limit, columns=study.columns) for source in (study.refused, study.answered)]
    rendered = [[item.prompt.token_ids for item in workspace.render(records)] for records in kinds]
    own = {name: asdict(getattr(study, name)) for name in ("safex", "l3", "mascing")} | {
        "contrast": [prompts_digest(records) for records in kinds],
        "recipes": list(study.recipes),
        "num_candidates": study.num_candidates,
        "max_new_tokens": study.judging.max_new_tokens,
    }

    def job(bench: Bench, recipe: str, choose: Choose, seed: int, item: Item) -> Job:
        def search_of(so_far: Sequence[Record]) -> Search[Recipe]:
            earlier = unjudged(so_far)
            assert earlier is None or isinstance(earlier, Recipe)
            return recipe_record(bench, item, recipe, choose, seed, earlier)

        return (recipe, seed, item.prompt.id), search_of

    with workspace.campaign("recipe", own) as campaign:
        with workspace.bench() as bench:
            run_plain(campaign, bench, workspace.items, study.engine.concurrency)
            contrast = Contrast(*(run_search(bench.backend, usage(bench.backend, prompts)) for prompts in rendered))
            for recipe in study.recipes:
                jobs = []
                for seed in study.seeds:
                    choose = chooser(recipe, study, bench.backend.shape, contrast, seed)
                    jobs += [job(bench, recipe, choose, seed, item) for item in workspace.items]
                run_jobs(campaign, bench.backend, jobs, What(f"recipe {recipe}", recipe), concurrency=study.engine.concurrency)
        summary = mask_summary(read(study.out, Record))
        campaign.finish(summary)
    return summary
