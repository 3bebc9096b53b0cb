"""Candidates share the tokens in which they do not differ: fewer go through the experts, with the same scores."""

import random

import pytest
from engines import engine, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan
from vllm_unsafe_routes.engine.router import controllers
from vllm_unsafe_routes.search.scorer import RouteScorer

FAMILIES = {"olmoe": (16, 4), "qwen2_moe": (12, 3)}


@pytest.fixture(scope="module", params=FAMILIES)
def scorer(request, tiny_model):
    with engine(tiny_model(request.param), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield RouteScorer(llm)


@pytest.fixture
def shared(scorer):
    found = controllers[max(controllers)].shared
    assert found is not None
    found.num_tokens = found.num_computed = 0
    return found


def candidates(scorer, layer, position, count=12):
    """Forces of one (layer, position) on top of a common mask, and a few plans that share nothing with them."""
    rng, shape = random.Random(4), scorer.backend.shape
    plans = [
        RoutePlan().disable(0, "all", [1]).force(layer, [position], rng.sample(range(2, shape.num_experts), shape.top_k))
        for _ in range(count)
    ]
    return [*plans, None, RoutePlan().disable(0, "all", [2])]


@pytest.mark.parametrize(("layer", "position"), [(0, 0), (1, 11), (2, 20), (2, 3)])
def test_fewer_tokens_are_computed_with_equal_scores(scorer, shared, monkeypatch, layer, position):
    prompt, target = (random_prompt(random.Random(at + position), length, VOCAB_SIZE) for at, length in ((1, 21), (2, 6)))
    plans = candidates(scorer, layer, position)
    values = scorer.score(prompt, target, plans)
    # At and below the layer one candidate's tokens stand for all; above it those before the position do.
    num_layers, num_tokens = scorer.backend.shape.num_hidden_layers, len(prompt) + len(target) - 1
    differing = 12 * (1 + (num_tokens - position) * (num_layers - 1 - layer))
    assert shared.num_computed <= differing + 4 * num_layers * num_tokens
    assert shared.num_tokens == 14 * num_layers * num_tokens
    assert len(set(values.round(4))) > 6 or layer == num_layers - 1
    monkeypatch.setattr(shared, "stage", lambda step: None)
    assert scorer.score(prompt, target, plans[::-1]).tolist() == pytest.approx(values[::-1].tolist(), abs=1e-5)


def test_other_prompts_and_unscored_requests_share_nothing(scorer, shared):
    prompts = [random_prompt(random.Random(at), 15, VOCAB_SIZE) for at in range(6)]
    list(scorer.score_many((prompt, [5, 6], None) for prompt in prompts))
    assert shared.num_tokens == 0
