"""Cells share an engine with requests: scores under a policy, beside requests that are served, in few KV blocks, after a swap."""

import random

import numpy as np
import pytest
from cell_checks import Case, check_cases, check_cells
from engines import chosen_logprobs, engine, generate, random_prompt
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RouteError, RoutePlan, RoutePolicy
from vllm_unsafe_routes.cells import Cells
from vllm_unsafe_routes.engine.cell_blocks import CellsUnavailable, ask
from vllm_unsafe_routes.engine.swap import swap_policy

BANNED = (2, 3)


@pytest.fixture(scope="module")
def shape(tiny_model):
    return ModelShape.from_hf_config(Oracle(tiny_model("olmoe")).config)


def policy(shape, banned):
    layers = {str(layer): {"disabled": list(banned), "protected": []} for layer in shape.moe_layers}
    return RoutePolicy.from_json({"version": "route-policy/1", "model": shape.fingerprint, "layers": layers})


@pytest.fixture(scope="module")
def llm(tiny_model, shape):
    routes = {"allow_overrides": True, "policy": policy(shape, BANNED).to_dict()}
    # So few sequences and tokens that one call takes several sweeps.
    settings = {"enable_prefix_caching": True, "max_num_seqs": 16, "max_num_batched_tokens": 192}
    with engine(tiny_model("olmoe"), routes, **settings) as llm:
        yield llm


def core_of(llm):
    return llm.llm_engine.engine_core


def test_scores_under_a_policy(llm, shape):
    rng = random.Random(3)
    cases = [Case(rng, shape, RoutePlan(weights="native"), 12, BANNED) for _ in range(4)]
    check_cases(llm, cases)
    cases[1].accept(rng)
    check_cases(llm, cases)


def test_served_requests_stay_as_they_are(llm, shape):
    rng = random.Random(4)
    prompts = [random_prompt(rng, rng.randrange(20, 80), VOCAB_SIZE) for _ in range(6)]
    plans = [RoutePlan().force(0, [3], [4, 5, 6, 7]).extra_args() if at % 2 else None for at in range(6)]

    def said(outputs):
        return [(list(output.outputs[0].token_ids), chosen_logprobs(output)) for output in outputs]

    alone = said(generate(llm, prompts, plans, max_tokens=12))
    cases = [Case(rng, shape, RoutePlan(), 4, BANNED) for _ in range(2)]
    core, own, calls = llm.llm_engine, llm.llm_engine.step, []

    def step():
        calls.append(ask(core_of(llm), [case.cells for case in cases]))
        return own()

    try:
        core.step = step
        assert said(generate(llm, prompts, plans, max_tokens=12)) == alone
    finally:
        core.step = own
    assert len(calls) > 11
    first = np.concatenate([one.values for one in calls[0]])
    for call in calls:
        assert np.concatenate([one.values for one in call]) == pytest.approx(first, abs=1e-6)
    check_cases(llm, cases)


def test_a_swap_takes_the_bases_away(llm, shape):
    rng = random.Random(5)
    cases = [Case(rng, shape, RoutePlan(), 4, (*BANNED, 9))]
    before = check_cases(llm, cases)
    swap_policy(llm, policy(shape, (9,)))
    try:
        assert max(abs(a - b) for a, b in zip(before, check_cases(llm, cases), strict=True)) > 1e-3
    finally:
        swap_policy(llm, policy(shape, BANNED))
    assert check_cases(llm, cases) == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize(
    ("move", "message"),
    [
        ((0, 0, 1, [0, 1, 4, 2]), "an expert is disabled by the engine's policy"),
        ((0, 0, 1, [0, 1, 4, 4]), "an expert is repeated"),
        ((0, 0, 1, [0, 1, 4, 16]), "there are 16 experts"),
        ((3, 0, 1, [0, 1, 4, 5]), "MoE layers are 0-2"),
        ((0, 2, 4, [0, 1, 4, 5]), "the prompt has 3 tokens"),
        ((0, 2, 2, [0, 1, 4, 5]), "the prompt has 3 tokens"),
    ],
)
def test_bad_moves_are_refused(llm, move, message):
    with pytest.raises(RouteError, match=message) as caught:
        ask(core_of(llm), [Cells.of([3, 4, 5], [6], None, [[], [move]])])
    assert not isinstance(caught.value, CellsUnavailable)


@pytest.mark.parametrize(
    ("base", "left", "message"),
    [
        (RoutePlan().force(0, [0], [4, 5, 6, 7]), 14, "need a base plan that only disables"),
        (RoutePlan().disable(1, "all", [9]), 14, "an expert is disabled by the base plan"),
        (RoutePlan(), 15, "an expert is disabled by the engine's policy"),
        (RoutePlan(), 3, "moves of 3 experts, top_k 4 are needed"),
    ],
)
def test_bad_bans_are_refused(llm, base, left, message):
    experts = [*range(2), *range(4, 16), 2][:left]
    with pytest.raises(RouteError, match=message) as caught:
        ask(core_of(llm), [Cells.of([3, 4, 5], [6], base.to_string(), [[(1, 0, 3, experts)]], chooses=True)])
    assert not isinstance(caught.value, CellsUnavailable)


def test_few_blocks_take_more_sweeps(tiny_model, shape):
    """Eight blocks hold one base of up to two blocks at a time, and candidates one or two at a time."""
    with engine(tiny_model("olmoe"), {"allow_overrides": True, "score_blocks": 14}) as llm:
        check_cells(llm, shape)
        with pytest.raises(CellsUnavailable, match="14 KV blocks for cells do not hold a prompt of 200 tokens"):
            ask(core_of(llm), [Cells.of([3] * 200, [6], None, [[]])])
        assert generate(llm, [[3, 4, 5]], [None])
