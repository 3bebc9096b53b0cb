"""Receipts of requests that end in other ways than by length: a stop string, an abort; and of every sample of a request."""

import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import engines
import numpy as np
import pytest
from engines import engine, generate, random_prompt

from vllm_unsafe_routes import RouteError, RoutePlan, receipt_of, receipts_of
from vllm_unsafe_routes.lab import model_path

POLICY = {"version": "route-policy/1", "layers": {"2": {"disabled": [0, 1]}}}
PLAN = RoutePlan().force(1, [3], [5, 7, 9, 11]).disable(0, "all", [2])
PROMPT = random_prompt(random.Random(7), 40, 190)
NUM_LAYERS, TOP_K = 4, 4


@pytest.fixture(scope="module")
def llm():
    with engine(model_path(), {"policy": POLICY, "allow_overrides": True}, skip_tokenizer_init=False) as llm:
        yield llm


@pytest.fixture(scope="module")
def whole(llm):
    """A request of twelve tokens with a plan and its routes; and a text of three words that comes after a few of them."""
    (output,) = generate(llm, [PROMPT], [PLAN.extra_args(return_routes=True)], max_tokens=12, detokenize=True)
    return output, " ".join(output.outputs[0].text.split()[4:7])


def run(llm, extra, stop, **sampling):
    (output,) = generate(llm, [PROMPT], [extra], max_tokens=12, detokenize=True, stop=stop, **sampling)
    return output


def num_routes(receipt):
    """(layer, token) routes that `PLAN` sets. The last token is never fed back; what the cache gave was routed alike before."""
    return receipt.tokens - 1 - receipt.cached_tokens + (receipt.cached_tokens <= 3)


@pytest.mark.parametrize("wants_routes", [False, True], ids=["plan", "routes"])
def test_a_stop_string_leaves_a_receipt_of_the_tokens_that_count(llm, whole, wants_routes):
    first, stop = whole
    output = run(llm, PLAN.extra_args(return_routes=wants_routes), [stop])
    completion, receipt = output.outputs[0], receipt_of(output)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    num_tokens = len(PROMPT) + len(completion.token_ids)
    assert num_tokens < len(PROMPT) + 12
    assert (receipt.plan, receipt.policy, receipt.policy_mode) == (PLAN.digest, receipt_of(first).policy, "enforce")
    assert (receipt.tokens, receipt.routes_set) == (num_tokens, num_routes(receipt))
    if not wants_routes:
        assert receipt.route_ids is None
        return
    assert receipt.route_ids.shape == receipt.route_weights.shape == (num_tokens - 1, NUM_LAYERS, TOP_K)
    assert np.array_equal(receipt.route_ids, receipt_of(first).route_ids[: num_tokens - 1])
    assert (receipt.route_ids >= 0).all()


@pytest.mark.parametrize("extra", [None, {"return_routes": True}], ids=["policy", "routes"])
def test_a_stop_string_without_a_plan(llm, whole, extra):
    plain = run(llm, None, None)
    stop = " ".join(plain.outputs[0].text.split()[3:5])
    receipt = receipt_of(run(llm, extra, [stop]))
    assert (receipt.plan, receipt.policy, receipt.routes_set) == (None, receipt_of(whole[0]).policy, 0)
    assert (receipt.route_ids is None) == (extra is None)


def test_what_a_receipt_says_of_its_tokens(llm, whole):
    receipt = receipt_of(run(llm, PLAN.extra_args(), [whole[1]]))
    output = run(llm, PLAN.extra_args(return_routes=True), [whole[1]])
    again, num_output = receipt_of(output), len(output.outputs[0].token_ids)
    digest = hashlib.sha256(np.array(PROMPT, "<i4").tobytes()).hexdigest()[:32]
    for one in (receipt, again):
        assert (one.prompt_tokens, one.prompt_digest, one.tokens) == (len(PROMPT), digest, len(PROMPT) + num_output)
        assert (one.routes_start, one.routes_set) == (0, num_routes(one))
    assert again.cached_tokens == 0


@pytest.mark.parametrize("start", [1, 30, len(PROMPT), len(PROMPT) + 3])
def test_routes_from_a_position_on(llm, whole, start):
    """A conversation's next turn asks for the rows that it has not got yet; chunks and the cut at a stop string count as well."""
    extra = {**PLAN.extra_args(return_routes=True), "routes_start": start}
    if start > len(PROMPT):
        with pytest.raises(RouteError, match="routes_start 43 is out of range for a prompt of 40 tokens"):
            run(llm, extra, None)
        return
    receipt, every = receipt_of(run(llm, extra, [whole[1]])), receipt_of(run(llm, PLAN.extra_args(return_routes=True), [whole[1]]))
    assert (receipt.routes_start, every.routes_start) == (start, 0)
    assert np.array_equal(receipt.route_ids, every.route_ids[start:])
    assert np.array_equal(receipt.route_weights, every.route_weights[start:])
    assert (receipt.tokens, receipt.routes_set) == (every.tokens, every.routes_set)
    part = RoutePlan.from_routes(receipt.route_ids[:1], layers=range(4), first_position=receipt.routes_start)
    assert {item.positions for item in part.directives} == {(start,)}


@pytest.mark.parametrize("stops", [False, True], ids=["by length", "by a stop string"])
def test_every_sample_has_a_receipt(llm, whole, stops):
    stop = whole[1].split()[:1] if stops else None
    output = run(llm, PLAN.extra_args(return_routes=True), stop, n=3, temperature=0.8, seed=5)
    receipts = receipts_of(output)
    assert len(receipts) == len(output.outputs) == 3
    assert receipts[0] == receipt_of(output)
    for completion, receipt in zip(output.outputs, receipts, strict=True):
        assert receipt.tokens == len(PROMPT) + len(completion.token_ids)
        assert receipt.plan == PLAN.digest
        assert receipt.route_ids.shape == (receipt.tokens - 1, NUM_LAYERS, TOP_K)
        assert not (receipt.route_ids[:, 0] == 2).any()


def test_many_requests_that_end_in_their_own_ways(llm, whole):
    """Chunked, preempted or not, each answer has the receipt of its own tokens."""
    rng = random.Random(3)
    prompts = [random_prompt(rng, rng.randrange(4, 90), 190) for _ in range(24)]
    plans = [RoutePlan().disable(at % NUM_LAYERS, "all", [at % 12 + 3]) for at in range(24)]
    extras = [plan.extra_args(return_routes=at % 2 == 0) for at, plan in enumerate(plans)]
    words = sorted(set(whole[0].outputs[0].text.split()))[:3]
    outputs = generate(llm, prompts, extras, max_tokens=30, detokenize=True, stop=words)
    for at, (output, plan) in enumerate(zip(outputs, plans, strict=True)):
        receipt = receipt_of(output)
        assert (receipt.plan, receipt.tokens) == (plan.digest, len(prompts[at]) + len(output.outputs[0].token_ids))
        assert receipt.routes_set == receipt.tokens - 1 - receipt.cached_tokens
        if at % 2 == 0:
            assert receipt.route_ids.shape[0] == receipt.tokens - 1
    assert {output.outputs[0].finish_reason for output in outputs} >= {"stop"}


@pytest.mark.v1_only  # stock vLLM's drafter for the V2 runner has a kernel that Triton's interpreter cannot run
@pytest.mark.long
def test_a_stop_string_amid_accepted_drafts():
    """In a process of its own: with numba, which the drafter imports, vLLM cannot start another engine in the same process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(engines.__file__).parent)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def check_stop_strings_amid_drafts():
    """Several tokens come in one step; those after the stop string do not count."""
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with engine(model_path(), {"policy": POLICY}, skip_tokenizer_init=False, speculative_config=drafts) as llm:
        (plain,) = generate(llm, [PROMPT], [None], max_tokens=40, detokenize=True)
        words = plain.outputs[0].text.split()
        for at in range(3, 30):
            (output,) = generate(llm, [PROMPT], [None], max_tokens=40, detokenize=True, stop=[" ".join(words[at : at + 2])])
            receipt = receipt_of(output)
            assert output.outputs[0].finish_reason == "stop"
            assert receipt.tokens == len(PROMPT) + len(output.outputs[0].token_ids) < len(PROMPT) + 40
            assert receipt.policy == receipt_of(plain).policy


def test_an_output_without_a_receipt_says_why():
    with engine(model_path(), {"allow_overrides": True}) as llm:
        (output,) = generate(llm, [PROMPT], [None])
        with pytest.raises(RouteError, match="no receipt: neither a plan, return_routes nor a policy"):
            receipt_of(output)
        with pytest.raises(RouteError, match="no receipt"):
            receipts_of(output)


if __name__ == "__main__":
    check_stop_strings_amid_drafts()
