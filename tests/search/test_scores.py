"""RouteScorer, RoSais and router masking in the real engine, against transformers."""

import random

import numpy as np
import pytest
from engines import engine
from oracle import Oracle

from vllm_unsafe_routes import RouteError, RoutePlan, lab
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.masking import MaskSettings, choose_layers, mask_attack
from vllm_unsafe_routes.search.masks import mask_plan
from vllm_unsafe_routes.search.rosais import RosaisSettings, dataset_scores, rosais
from vllm_unsafe_routes.search.scorer import RouteScorer
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model():
    return Model("lab")


@pytest.fixture(scope="module")
def oracle():
    return Oracle(lab.model_path())


@pytest.fixture(scope="module")
def scorer():
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield RouteScorer(llm, batch=7)


@pytest.fixture(scope="module")
def prompts(model):
    return [model.item(record).prompt for record in read_prompts("lab:search", 4)]


def target_logprob(oracle, prompt, plan):
    tokens, at = [*prompt.token_ids, *prompt.target[:-1]], len(prompt.token_ids)
    rows = oracle.logprobs(tokens, at, plan)[at - 1 :]
    return rows[range(len(prompt.target)), list(prompt.target)].sum().item()


def next_logprob(oracle, prompt, affirmative, plan):
    return oracle.logprobs(list(prompt.token_ids), len(prompt.token_ids), plan)[-1, list(affirmative)].max().item()


def test_scores_equal_transformers_in_order_and_one_by_one(scorer, oracle, prompts):
    rng = random.Random(1)
    prompt = prompts[0]
    plans = [None] + [
        RoutePlan().force(rng.randrange(4), [rng.randrange(len(prompt.token_ids))], rng.sample(range(16), 4)) for _ in range(30)
    ]
    values = scorer.score(prompt.token_ids, prompt.target, iter(plans))
    assert values.dtype == np.float64 and values.shape == (31,)
    assert values.tolist() == pytest.approx([target_logprob(oracle, prompt, plan) for plan in plans], abs=TOLERANCE)
    many = list(scorer.score_many((one.token_ids, one.target, plans[1]) for one in prompts))
    assert many == pytest.approx([target_logprob(oracle, one, plans[1]) for one in prompts], abs=TOLERANCE)


@pytest.mark.parametrize("score", ["next", "target"])
def test_rosais_equals_its_formula(scorer, oracle, model, prompts, score):
    prompt, words = prompts[0], model.affirmative_token_ids
    found = run_search(scorer.backend, rosais(scorer.backend, prompt, words, RosaisSettings(3, 5, score)))

    def p(plan):
        if score == "next":
            return next_logprob(oracle, prompt, words, plan)
        return target_logprob(oracle, prompt, plan) / len(prompt.target)

    assert found.clean == pytest.approx(p(None), abs=TOLERANCE)
    for layer, gains in found.gains.items():
        expected = [p(mask_plan([(layer, mask)], "all")) - p(None) for mask in found.masks[layer]]
        assert gains == pytest.approx(expected, abs=2 * TOLERANCE)
        assert found.scores[layer] == max(gains)
    assert len({mask for masks in found.masks.values() for mask in masks}) > 3


def test_clean_later_layers_keep_the_routes_of_the_clean_run(scorer, oracle, model, prompts):
    prompt, words = prompts[1], model.affirmative_token_ids
    free, clean = (
        run_search(scorer.backend, rosais(scorer.backend, prompt, words, RosaisSettings(3, 5, "next", later)))
        for later in ("free", "clean")
    )
    assert free.masks == clean.masks
    # Behind the last layer there is nothing to keep; elsewhere it matters.
    assert clean.gains[3] == pytest.approx(free.gains[3], abs=TOLERANCE)
    assert clean.gains[0] != pytest.approx(free.gains[0], abs=10 * TOLERANCE)
    next_logprob(oracle, prompt, words, None)
    clean_routes = {layer: list(routes) for layer, routes in oracle.routes.items()}
    mask = clean.masks[1][0]
    plan = RoutePlan().force(1, "all", mask)
    for layer in (2, 3):
        for position, (ids, weights) in enumerate(clean_routes[layer]):
            plan.force(layer, [position], ids, weights)
    expected = next_logprob(oracle, prompt, words, plan) - next_logprob(oracle, prompt, words, None)
    assert clean.gains[1][0] == pytest.approx(expected, abs=2 * TOLERANCE)


def test_masking_keeps_the_best_mask_of_each_layer(scorer, oracle, model, prompts):
    words = model.affirmative_token_ids
    settings = MaskSettings(num_layers=2, num_masks=5, seed=3)
    found = run_search(scorer.backend, mask_attack(scorer.backend, prompts[:2], words, [2, 0], settings))
    assert [layer for layer, _ in found.masks] == [2, 0]
    means = [
        np.mean([next_logprob(oracle, prompt, words, plan) for prompt in prompts[:2]]) for plan in (None, found.plan(settings))
    ]
    assert [found.clean, found.masked] == pytest.approx(means, abs=TOLERANCE)
    alone = run_search(
        scorer.backend, mask_attack(scorer.backend, prompts[:2], words, [0], MaskSettings(num_masks=5, seed=3, keep_earlier=False))
    )
    assert alone.candidates == 5
    assert choose_layers("rosais", [3, 1, 0, 2], settings, "x") == [3, 1]
    assert len(set(choose_layers("random-layers", [3, 1, 0, 2], settings, "x"))) == 2


def test_dataset_level_needs_shared_masks(scorer, model, prompts):
    words = model.affirmative_token_ids
    own = [run_search(scorer.backend, rosais(scorer.backend, one, words, RosaisSettings(2))) for one in prompts[:2]]
    shared = [run_search(scorer.backend, rosais(scorer.backend, one, words, RosaisSettings(2), "all")) for one in prompts[:2]]
    with pytest.raises(RouteError, match="same masks for every prompt"):
        dataset_scores(own)
    gains = np.array([result.gains[0] for result in shared])
    assert dataset_scores(shared)[0] == pytest.approx(gains.mean(axis=0).max())


def test_bad_input_is_named(scorer, prompts):
    prompt = prompts[0]
    for arguments, message in [
        (([], prompt.target, [None]), "at least one prompt token"),
        ((prompt.token_ids, [], [None]), "at least one prompt token and one target token"),
        ((list(range(3, 60)) * 5, prompt.target, [None]), "do not fit the context of 256"),
        ((prompt.token_ids, prompt.target, [RoutePlan().disable(9, "all", [1])]), "layer 9 has no experts"),
    ]:
        with pytest.raises(ValueError, match=message):
            scorer.score(*arguments)
    assert scorer.score(prompt.token_ids, prompt.target, [None]).shape == (1,)
