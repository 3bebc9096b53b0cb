"""Scores in the receipt: log-probabilities of given tokens at given prompt rows, under plans and deltas, on both runners."""

import random

import numpy as np
import pytest
from engines import engine, generate, random_prompt
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of
from vllm_unsafe_routes.engine.router import controllers
from vllm_unsafe_routes.extras import RouteExtras, ScoreSpec

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def oracle(tiny_model):
    return Oracle(tiny_model("olmoe"))


@pytest.fixture(scope="module")
def llm(tiny_model):
    # A token budget this small cuts most prompts into chunks.
    with engine(tiny_model("olmoe"), {"allow_overrides": True}, enable_prefix_caching=True, max_num_batched_tokens=96) as llm:
        yield llm


def target_spec(prompt, target):
    return ScoreSpec(len(prompt) - 1, np.array(target, np.int32)[:, None])


def score(llm, items):
    """(prompt, target, plan string, delta) -> [len(target)] each, all in flight together."""
    extras = [RouteExtras(plan, delta, score=target_spec(prompt, target)).to_extra_args() for prompt, target, plan, delta in items]
    outputs = generate(llm, [prompt + target[:-1] for prompt, target, _, _ in items], extras, max_tokens=1)
    return [receipt_of(output) for output in outputs]


def random_route(rng, shape):
    return rng.sample(range(shape.num_experts), shape.top_k)


def test_targets_equal_transformers(llm, oracle):
    shape = ModelShape.from_hf_config(oracle.config)
    rng = random.Random(5)
    items, plans = [], []
    base = random_prompt(rng, 100, VOCAB_SIZE)
    for at in range(20):
        prompt = base[: rng.randrange(2, 100)] if at % 2 else random_prompt(rng, rng.randrange(2, 60), VOCAB_SIZE)
        target = random_prompt(rng, rng.randrange(1, 50), VOCAB_SIZE)
        plan = RoutePlan(weights=rng.choice(["masked", "native"]))
        plan.force(0, rng.choice(["prompt", "generated", "all"]), random_route(rng, shape))
        plan.disable(1, [0, len(prompt) - 1], [3, 5])
        position = rng.randrange(len(prompt))
        delta = (2, position, *random_route(rng, shape)) if at % 4 else ()
        items.append((prompt, target, plan.to_string(), delta))
        if delta:
            plan.force(2, [position], delta[2:])
        plans.append(plan)
    for (prompt, target, _, _), plan, receipt in zip(items, plans, score(llm, items), strict=True):
        rows = oracle.logprobs(prompt + target[:-1], len(prompt), plan)[len(prompt) - 1 :]
        expected = rows[range(len(target)), target].tolist()
        assert receipt.scores.shape == (len(target), 1)
        assert receipt.scores[:, 0].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_scores_in_pieces_are_the_same(llm, tiny_model, monkeypatch):
    """A whole vocabulary for every scored row would not fit beside a large model: the output layer runs on some rows at a time."""
    from vllm_unsafe_routes.engine import scoring

    rng = random.Random(6)
    items = [
        (random_prompt(rng, rng.randrange(2, 40), VOCAB_SIZE), random_prompt(rng, rng.randrange(1, 30), VOCAB_SIZE), None, ())
        for _ in range(8)
    ]
    whole = score(llm, items)
    (controller,) = [controllers[handle] for handle in list(controllers)][-1:]
    sizes = []
    own = scoring.log_probs
    monkeypatch.setattr(scoring, "log_probs", lambda logits, ids: sizes.append(len(ids)) or own(logits, ids))
    monkeypatch.setattr(controller, "_scoring", scoring.Scoring(scoring.PIECE_BYTES // 4 // 5))
    pieces = score(llm, items)
    assert max(sizes) == 5 and len(sizes) > 2
    for one, other in zip(pieces, whole, strict=True):
        assert one.scores.ravel().tolist() == pytest.approx(other.scores.ravel().tolist(), abs=1e-5)


def test_a_score_is_computed_again_however_often_it_is_asked(llm):
    rng = random.Random(9)
    prompt, target = random_prompt(rng, 70, VOCAB_SIZE), random_prompt(rng, 60, VOCAB_SIZE)
    first, second = (score(llm, [(prompt, target, None, ())])[0] for _ in range(2))
    assert first.scores.ravel().tolist() == pytest.approx(second.scores.ravel().tolist(), abs=TOLERANCE)
    assert (first.cached_tokens, second.cached_tokens) == (0, 64)


def test_many_candidates_for_the_next_token(llm, oracle):
    rng = random.Random(3)
    prompt, candidates = random_prompt(rng, 40, VOCAB_SIZE), [3, 9, 12, 77]
    spec = ScoreSpec(len(prompt) - 1, np.array([candidates], np.int32))
    output = generate(llm, [prompt], [RouteExtras(score=spec).to_extra_args()], max_tokens=1)[0]
    expected = oracle.logprobs(prompt, len(prompt), None)[-1, candidates].tolist()
    assert receipt_of(output).scores[0].tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_a_delta_gives_the_same_tokens_as_the_whole_plan(llm):
    rng = random.Random(4)
    prompt = random_prompt(rng, 50, VOCAB_SIZE)
    base = RoutePlan().force(0, [3], [0, 1, 2, 3]).disable(1, "all", [4, 5, 6])
    whole = RoutePlan.from_json(base.to_json()).force(1, [3], [0, 1, 2, 3]).force(2, [49], [7, 6, 5, 4])
    delta = (1, 3, 0, 1, 2, 3, 2, 49, 7, 6, 5, 4)
    outputs = generate(
        llm,
        [prompt] * 2,
        [RouteExtras(base.to_string(), delta, True).to_extra_args(), whole.extra_args(return_routes=True)],
    )
    one, other = map(receipt_of, outputs)
    assert (one.route_ids == other.route_ids).all()
    assert one.routes_set == other.routes_set
    assert one.plan != base.digest


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"score_tokens": [5]}, r"score_tokens must be \[first row, width"),
        ({"score_tokens": [39, 1, 5, 5]}, "row 40 is out of range for a prompt of 40 tokens"),
        ({"score_tokens": [3, 1, 10**6]}, "token id 1000000 is out of range"),
        ({"score_tokens": "3,1,4"}, "score_tokens must be a flat list"),
        ({"route_delta": [0, 1, 2]}, "route_delta has 3 integers, no multiple of 6"),
        ({"route_delta": [0, 40, 0, 1, 2, 3]}, r"layer 0, position 40: the prompt has 40 tokens \(0-39\)"),
        ({"route_delta": [0, 1, 0, 1, 2, 2]}, "layer 0, position 1: an expert is repeated"),
        ({"route_delta": [0, 1, 0, 1, 2, 99]}, "layer 0, position 1: expert 99 is out of range"),
        ({"route_delta": [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]}, "two forces for one"),
        (
            {"route_delta": [0, 1, 0, 1, 2, 3], "route_plan": RoutePlan().disable(0, "all", [2]).to_string()},
            "expert 2 is forced and disabled by the same plan",
        ),
        (
            {"route_delta": [0, 1, 0, 1, 2, 3], "route_plan": RoutePlan().force(0, "all", [2, 3, 4, 5]).to_string()},
            "two forces for one",
        ),
    ],
)
def test_bad_extras_are_refused(llm, extras, message):
    with pytest.raises(ValueError, match=message):
        generate(llm, [list(range(3, 43))], [extras])
