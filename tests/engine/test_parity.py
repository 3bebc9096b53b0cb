"""The engine against transformers with the same directives, for every family, in float32, many requests in one batch."""

import random

import pytest
from cell_checks import check_cells
from engines import SETTINGS, chosen_logprobs, engine, generate, random_prompt
from mixes import random_biases, random_plan
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RoutePolicy, receipt_of
from vllm_unsafe_routes.engine.swap import swap_policy

TOLERANCE = 1e-4
NUM_REQUESTS = 24
FAMILIES = [
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "llama4_text",
    "gpt_oss",
]


# The V1 runner shares everything below the row index with V2; three families there are enough for every run.
ON_BOTH_RUNNERS = ("olmoe", "qwen3_moe", "deepseek_v3")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ON_BOTH_RUNNERS else [pytest.mark.v2_only]) for name in FAMILIES]
)
def test_logprobs_equal_transformers(family, tiny_model):
    folder = tiny_model(family)
    oracle = Oracle(folder)
    shape = ModelShape.from_hf_config(oracle.config)
    rng = random.Random(11)
    prompts = [random_prompt(rng, rng.randrange(4, 70), VOCAB_SIZE) for _ in range(NUM_REQUESTS)]
    plans = [None if at % 6 == 0 else random_plan(rng, shape, len(prompt)) for at, prompt in enumerate(prompts)]
    with engine(folder, {"allow_overrides": True}, **SETTINGS.get(family, {})) as llm:
        outputs = generate(llm, prompts, [plan and plan.extra_args() for plan in plans], prompt_logprobs=0)
        check_cells(llm, shape, oracle)
        check_biases(llm, oracle, shape, prompts[:4], plans[:4])

    oracle.policy = RoutePolicy({})
    num_changed = 0
    for prompt, plan, output in zip(prompts, plans, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)
        engine_says = chosen_logprobs(output, with_prompt=True)
        expected = oracle.token_logprobs(tokens, len(prompt), plan)
        assert engine_says == pytest.approx(expected, abs=TOLERANCE), (plan, plan and plan.to_json())
        if plan is None:
            continue
        clean = oracle.token_logprobs(tokens, len(prompt), None)
        if max(abs(a - b) for a, b in zip(expected, clean, strict=True)) > 10 * TOLERANCE:
            num_changed += 1
            assert max(abs(a - b) for a, b in zip(engine_says, clean, strict=True)) > 5 * TOLERANCE
        receipt = receipt_of(output)
        assert receipt.plan == plan.digest
        assert receipt.routes_set > 0
    # A plan may happen to ask for what the router does anyway; nearly all of these do not.
    assert num_changed >= 0.8 * sum(plan is not None for plan in plans)


def check_biases(llm, oracle, shape, prompts, plans):
    """A policy that biases every token: with plans on top of it, and alone, where a CPU step does not read the table."""
    rng = random.Random(5)
    for weights in ("masked", "native"):
        policy = oracle.policy = random_biases(rng, shape, weights)
        swap_policy(llm, policy)
        for some in (plans, [None] * len(plans)):
            outputs = generate(llm, prompts, [plan and plan.extra_args() for plan in some], prompt_logprobs=0)
            for prompt, plan, output in zip(prompts, some, outputs, strict=True):
                tokens = prompt + list(output.outputs[0].token_ids)
                says = chosen_logprobs(output, with_prompt=True)
                assert says == pytest.approx(oracle.token_logprobs(tokens, len(prompt), plan), abs=TOLERANCE), (weights, plan)
                assert receipt_of(output).policy == policy.digest
