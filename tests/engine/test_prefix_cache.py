"""Cached KV blocks are shared exactly where tokens, plan and policy agree up to the block's end."""

import random

import cpu_offload
import pytest
from engines import BLOCK_SIZE, chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE
from vllm.distributed.kv_transfer import get_kv_transfer_group

from vllm_unsafe_routes import RoutePlan, receipt_of

NUM_BLOCKS = 5


@pytest.fixture(scope="module")
def llm(tiny_model):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield llm


@pytest.fixture
def prompt(request):
    return random_prompt(random.Random(request.node.name), NUM_BLOCKS * BLOCK_SIZE + 7, VOCAB_SIZE)


def run(llm, prompt, *plans):
    """One after another, so that each can reuse what the one before has cached."""
    outputs = [generate(llm, [prompt], [plan and plan.extra_args()])[0] for plan in plans]
    return outputs, [output.num_cached_tokens for output in outputs]


def base_plan(position):
    return RoutePlan().force(0, [2], [0, 1, 2, 3]).force(1, [position], [4, 5, 6, 7])


@pytest.mark.parametrize("position", [0, 31, 32, 40, 100, 159])
def test_candidates_reuse_every_full_block_before_their_difference(llm, prompt, position):
    candidates = [base_plan(5).force(2, [position], [k, k + 4, k + 8, k + 9]) for k in range(4)]
    _, cached = run(llm, prompt, *candidates)
    shared = position // BLOCK_SIZE * BLOCK_SIZE
    assert cached == [0, shared, shared, shared]
    _, again = run(llm, prompt, candidates[2])
    assert again == [NUM_BLOCKS * BLOCK_SIZE]


def test_a_clean_request_after_a_planned_one_is_clean(llm, prompt):
    plan = RoutePlan().disable(0, "prompt", [0, 1, 2, 3, 4, 5]).disable(1, "prompt", [8, 9, 10, 11])
    (planned, clean, clean_again, planned_again), cached = run(llm, prompt, plan, None, None, plan)
    full = NUM_BLOCKS * BLOCK_SIZE
    assert cached == [0, 0, full, full]
    assert chosen_logprobs(clean) == pytest.approx(chosen_logprobs(clean_again), abs=1e-5)
    assert chosen_logprobs(planned) == pytest.approx(chosen_logprobs(planned_again), abs=1e-5)
    assert chosen_logprobs(planned) != pytest.approx(chosen_logprobs(clean), abs=1e-3)


def test_plans_that_say_the_same_share_and_weight_modes_do_not(llm, prompt):
    one = RoutePlan().disable(0, [70], [1, 2]).disable(0, [70], [3])
    other = RoutePlan().disable(0, [70], [3, 2, 1])
    native = RoutePlan(weights="native").disable(0, [70], [1, 2, 3])
    _, cached = run(llm, prompt, one, other, native)
    assert cached == [0, NUM_BLOCKS * BLOCK_SIZE, 64]


def test_generated_tokens_of_a_plan_are_not_a_clean_prefix(llm, prompt):
    """A plan on generated tokens: their blocks must not serve a prompt that holds the same tokens."""
    plan = RoutePlan().disable(1, "generated", [0, 1, 2, 3, 4, 5, 6])
    first = generate(llm, [prompt], [plan.extra_args()], max_tokens=64)[0]
    longer = prompt + list(first.outputs[0].token_ids)
    clean, reused = generate(llm, [longer], [None])[0], len(prompt) // BLOCK_SIZE * BLOCK_SIZE
    assert clean.num_cached_tokens == reused
    same = generate(llm, [prompt], [plan.extra_args()], max_tokens=64)[0]
    assert same.outputs[0].token_ids == first.outputs[0].token_ids


def test_offloaded_blocks_are_shared_as_cached_ones_are(tiny_model):
    """Receipts and log-probabilities say the same of both; who wants routes back reads neither cache nor store."""
    prompt = random_prompt(random.Random(5), NUM_BLOCKS * BLOCK_SIZE + 7, VOCAB_SIZE)
    full, plans = NUM_BLOCKS * BLOCK_SIZE, [None, base_plan(70), base_plan(100), RoutePlan().disable(2, "generated", [1, 2])]
    routes = {"allow_overrides": True, "policy": {"version": "route-policy/1", "layers": {"1": {"disabled": [3]}}}}
    settings = {"enable_prefix_caching": True, "kv_transfer_config": cpu_offload.SETTINGS}
    with engine(tiny_model("olmoe"), routes, **settings) as llm:
        computed, from_cache = (run(llm, prompt, *plans)[0] for _ in range(2))
        assert llm.reset_prefix_cache()
        loaded, num_cached = run(llm, prompt, *plans)
        store = get_kv_transfer_group().connector_worker.worker
        assert store.num_loaded == 2 * NUM_BLOCKS + NUM_BLOCKS - 2
        assert llm.reset_prefix_cache()
        whole = generate(llm, [prompt], [plans[1].extra_args(return_routes=True)])[0]
    assert [output.num_cached_tokens for output in computed] == [0, 0, 64, full]
    assert num_cached == [full] * 4
    assert [receipt_of(output) for output in loaded] == [receipt_of(output) for output in from_cache]
    for one, other in zip(computed, loaded, strict=True):
        assert chosen_logprobs(one) == pytest.approx(chosen_logprobs(other), abs=1e-5)
    assert (whole.num_cached_tokens, receipt_of(whole).route_ids.shape[0]) == (0, full + 7 + 5)
    assert set(receipt_of(whole).route_ids[70, 1]) == {4, 5, 6, 7}


def test_a_policy_separates_engines_that_share_a_cache():
    """Blocks of another policy never match: its digest is in the first block's key, and so in the whole chain."""
    import types

    from vllm_unsafe_routes.engine.cache import CONTEXT_ATTRIBUTE, RouteContext, route_extra_keys

    def keys(policy, start):
        request = types.SimpleNamespace(request_id="r", num_prompt_tokens=64)
        setattr(request, CONTEXT_ATTRIBUTE, RouteContext(None, None, policy))
        return route_extra_keys(request, start, start + 32)

    assert keys("a", 0) != keys("b", 0) != keys(None, 0) == ()
    assert keys("a", 32) == ()
