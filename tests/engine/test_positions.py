"""Plans that say generated steps and positions from the prompt's end, beside others in one batch, against transformers."""

import random

import pytest
from engines import chosen_logprobs, engine, generate, random_prompt
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of

STEPS = 8


def plans_for(prompt, shape):
    first, last = shape.moe_layers[0], shape.moe_layers[-1]
    experts = list(range(shape.top_k))
    return [
        None,
        RoutePlan().for_prompt(prompt).force(first, ("generated", 1, 3), experts),
        RoutePlan().for_prompt(prompt).force(first, ("generated", 2, 4), experts[::-1]),
        RoutePlan().for_prompt(prompt).allow(last, [-1], range(6)).disable(first, ("prompt", -4, None), experts),
        # Steps and a span: what is listed also has the span's mask.
        RoutePlan().for_prompt(prompt).disable(last, "generated", [0, 1]).disable(last, ("generated", 3, 5), [2, 3]),
        RoutePlan().for_prompt(prompt).disable(last, "prompt", [5]).force(last, ("generated", 6, 200), experts),
    ]


@pytest.mark.parametrize("caching", [False, True], ids=["", "prefix-cache"])
def test_logprobs_equal_transformers(caching, tiny_model):
    folder = tiny_model("olmoe")
    oracle = Oracle(folder)
    shape = ModelShape.from_hf_config(oracle.config)
    prompts = [random_prompt(random.Random(5), length, VOCAB_SIZE) for length in (9, 45)]
    asked = [(prompt, plan) for prompt in prompts for plan in plans_for(prompt, shape)]
    with engine(folder, {"allow_overrides": True}, max_num_batched_tokens=64, enable_prefix_caching=caching) as llm:
        for _ in range(2 if caching else 1):  # the second time from the cache, if there is one
            extras = [plan and plan.extra_args() for _, plan in asked]
            outputs = generate(llm, [prompt for prompt, _ in asked], extras, max_tokens=STEPS)
            check(outputs, asked, oracle, shape)
        tokens, layer = [*prompts[0], *outputs[0].outputs[0].token_ids], shape.moe_layers[0]
        for prompt, plan, message in (
            (tokens, asked[1][1], "the plan is for a prompt of 9 tokens, this one has 17"),
            (
                prompts[0],
                RoutePlan().for_prompt(prompts[0]).disable(layer, ("generated", 0, 300), [1]),
                "308 is out of range",
            ),
            (prompts[0], RoutePlan().disable(layer, [9], [1]), "position 9: the prompt has 9 tokens"),
        ):
            with pytest.raises(ValueError, match=message):
                generate(llm, [prompt], [plan.extra_args()])


def check(outputs, asked, oracle, shape):
    for (prompt, plan), output in zip(asked, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)
        expected = oracle.token_logprobs(tokens, len(prompt), plan)[len(prompt) - 1 :]
        assert chosen_logprobs(output) == pytest.approx(expected, abs=1e-4), plan and plan.to_json()
        if plan is None:
            continue
        # Each (layer, token) counts once, and the last generated token has no route.
        told = {
            (item.layer, position)
            for item in plan.directives
            for position in (
                {"prompt": range(len(prompt)), "generated": range(len(prompt), len(tokens) - 1)}[item.positions]
                if isinstance(item.positions, str)
                else item.positions
            )
            if position < len(tokens) - 1
        }
        receipt = receipt_of(output)
        assert receipt.routes_set == len([one for one in told if one[1] >= receipt.cached_tokens])
