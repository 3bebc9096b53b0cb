"""Recipes as a study on the lab model: a budget that holds, a run that goes on, and what summary and report say."""

import pytest
from engines import engine

from vllm_unsafe_routes import RouteError, RoutePlan, lab
from vllm_unsafe_routes.commands import show
from vllm_unsafe_routes.report import collect, load_runs
from vllm_unsafe_routes.search.scorer import RouteScorer
from vllm_unsafe_routes.search.silencing import SilencingSettings
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts
from vllm_unsafe_routes.study.recipes import run_recipes
from vllm_unsafe_routes.study.records import Recipe, read
from vllm_unsafe_routes.study.settings import RECIPES, JudgeSettings, RecipeStudy

BUDGET = 12


def study(out, **changed):
    settings = dict(
        model="lab",
        data="lab:tune",
        out=out,
        limit=2,
        refused="lab:search",
        answered="lab:search:benign",
        contrast_limit=6,
        num_candidates=BUDGET,
        l3=SilencingSettings(max_share=0.5),
        judging=JudgeSettings(max_new_tokens=4),
    )
    return RecipeStudy(**settings | changed)


def test_every_recipe_on_every_prompt(tmp_path):
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        scorer = RouteScorer(llm)
        run_recipes(study(tmp_path, recipes=("safex",)), scorer.backend)
        with pytest.raises(RouteError, match="recipes"):  # another run of the same folder
            run_recipes(study(tmp_path), scorer.backend)
        out = tmp_path / "all"
        summary = run_recipes(study(out), scorer.backend)
        assert run_recipes(study(out), scorer.backend) == summary
        records = list(read(out, Recipe))
        model = Model("lab")
        items = {f"forbidden-{at}": model.item(record).prompt for at, record in enumerate(read_prompts("lab:tune", 2))}
        for record in records:
            prompt = items[record.prompt]
            scores = scorer.score(prompt.token_ids, prompt.target, [None, RoutePlan.from_string(record.plan)])
            assert [record.clean, record.found] == pytest.approx(scores.tolist(), abs=2e-3)
    assert [(one.attack, one.prompt) for one in records] == [(name, prompt) for name in RECIPES for prompt in items]
    assert all(1 < one.candidates <= BUDGET and one.found >= one.clean for one in records)
    kinds = [{item.kind for item in RoutePlan.from_string(one.plan).directives} for one in records]
    assert kinds[2] <= {"disable"} and kinds[4] <= {"disable"} and kinds[6] <= {"bias"}
    assert set(summary["asr"]) == {"none", *RECIPES}
    assert "mascing" in show.masks(summary)
    report = collect(load_runs([out]))
    assert {"SteerMoE", "SAFEx", "L3, adaptive silencing", "MASCing, bias"} <= {entry["label"] for entry in report["asr"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipes": ("l4",)}, "recipe 'l4' is not one of steermoe, safex, l3, mascing"),
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
    ],
)
def test_bad_settings(changed, message, tmp_path):
    with pytest.raises(RouteError, match=message):
        study(tmp_path, **changed)
