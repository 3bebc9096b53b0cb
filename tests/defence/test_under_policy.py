"""A policy tried through plans equals the same policy enforced; attacks under it keep to it."""

import pytest
from engines import engine

from vllm_unsafe_routes import LayerPolicy, RouteError, RoutePlan, RoutePolicy, lab
from vllm_unsafe_routes.defence.under_policy import PolicyBackend
from vllm_unsafe_routes.evaluation.judges import Verdict
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.fsour import FsourSettings, fsour_attempt
from vllm_unsafe_routes.search.masks import rng_of
from vllm_unsafe_routes.search.scorer import RouteScorer, make_backend
from vllm_unsafe_routes.search.suffix import SuffixSettings, suffix_search
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts

POLICY = RoutePolicy({0: LayerPolicy(frozenset({1, 2, 3}), frozenset({7})), 2: LayerPolicy(frozenset({9}), bias={4: 2.0, 5: -2.0})})


@pytest.fixture(scope="module")
def model():
    return Model("lab")


@pytest.fixture(scope="module")
def prompt(model):
    return model.item(read_prompts("lab:search", 1)[0]).prompt


def plans():
    yield None
    yield RoutePlan().force(0, [3], [7, 8, 9, 10])
    yield RoutePlan().disable(2, "all", [0, 1])


def enforced(prompt, policy, attempt_settings):
    routes = {"allow_overrides": True} | ({"policy": policy.to_dict()} if policy else {})
    with engine(lab.model_path(), routes, enable_prefix_caching=True) as llm:
        backend = make_backend(llm)
        if policy is None:
            with pytest.raises(RouteError, match="policy layer 9 has no experts"):
                PolicyBackend(backend, RoutePolicy({9: LayerPolicy(frozenset({1}))}))
            backend = PolicyBackend(backend, POLICY)
            with pytest.raises(RouteError, match="cannot be tried under a plan with native"):
                RouteScorer(backend).score(prompt.token_ids, prompt.target, [RoutePlan(weights="native").disable(1, "all", [0])])
        scorer = RouteScorer(backend)
        scores = scorer.score(prompt.token_ids, prompt.target, plans()).tolist()
        found = run_search(backend, fsour_attempt(backend, prompt, attempt_settings, 0, lambda *_: Verdict(0.0, False)))
        return scores, found, backend


@pytest.mark.parametrize("strategy", ["paper", "adaptive"])
def test_tried_equals_enforced(prompt, strategy):
    settings = FsourSettings(strategy=strategy, num_draws=3, max_new_tokens=4)
    tried_scores, tried, _ = enforced(prompt, None, settings)
    scores, found, _ = enforced(prompt, POLICY, settings)
    assert tried_scores == pytest.approx(scores, abs=1e-4)
    assert [route.experts for route in tried.routes] == [route.experts for route in found.routes]
    assert tried.answer == found.answer
    for route in found.routes:
        if route.layer == 0:
            assert 7 in route.experts
            assert not {1, 2, 3} & set(route.experts)
        if route.layer == 2:
            assert 9 not in route.experts


def test_a_suffix_raises_the_target(model, prompt):
    record = read_prompts("lab:search", 1)[0]
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        found = run_search(
            make_backend(llm),
            suffix_search(
                make_backend(llm),
                prompt.id,
                lambda words: model.encode_chat(" ".join([record.goal, *words])),
                prompt.target,
                ["kettle", "well", "maybe", "sure", "here", "again", "drum", "tent"],
                SuffixSettings(num_words=3, num_candidates=8, num_rounds=1),
                rng_of("test"),
            ),
        )
    assert found.words
    assert found.best > found.clean
    assert 1 < found.queries <= 25
