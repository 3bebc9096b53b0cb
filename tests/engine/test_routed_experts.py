"""Our export equals vLLM's own routed experts for the same requests, and what another program recorded is replayed."""

import random

import numpy as np
import pytest
from engines import chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of
from vllm_unsafe_routes.routed_experts import read


def shape_of(folder):
    from transformers import AutoConfig

    return ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))


# The second has a dense layer; vLLM returns routed experts on the V2 runner only, with prefix caching.
@pytest.mark.v2_only
@pytest.mark.parametrize("family", ["olmoe", "glm4_moe"])
def test_the_export_is_what_vllm_returns(family, tiny_model):
    folder = tiny_model(family)
    shape = shape_of(folder)
    rng = random.Random(11)
    prompts = [random_prompt(rng, length, VOCAB_SIZE) for length in (5, 40, 71)]
    layer = shape.moe_layers[-1]
    plain = {"return_routes": True}
    extras = [plain, RoutePlan().disable(layer, "all", [1]).extra_args(return_routes=True), plain]
    settings = {"enable_prefix_caching": True, "enable_return_routed_experts": True}
    with engine(folder, {"allow_overrides": True}, max_num_batched_tokens=64, **settings) as llm:
        outputs = generate(llm, prompts, extras)
    for output in outputs:
        native = output.outputs[0].routed_experts
        found, start = read(native, shape, "vllm")
        exported, _ = read(receipt_of(output).routed_experts(shape, "vllm"), shape, "vllm")
        assert start == 0 and native.shape == (len(output.prompt_token_ids) + 5, shape.num_hidden_layers, shape.top_k)
        np.testing.assert_array_equal(np.sort(exported), np.sort(found))


def test_another_program_s_routes_are_replayed(tiny_model):
    folder = tiny_model("olmoe")
    shape = shape_of(folder)
    prompt = random_prompt(random.Random(12), 20, VOCAB_SIZE)
    with engine(folder, {"allow_overrides": True}) as llm:
        (rollout,) = generate(llm, [prompt], [{"return_routes": True}])
        longer = [*prompt, *rollout.outputs[0].token_ids[:-1]]
        recorded = receipt_of(rollout).routed_experts(shape, "prime-rl")
        plan = RoutePlan.from_routed_experts(recorded, shape, "prime-rl", num_tokens=len(longer))
        (replay,) = generate(llm, [longer], [plan.extra_args(True)], prompt_logprobs=0, max_tokens=1)
    receipt = receipt_of(replay)
    assert receipt.routes_set == len(longer) * len(shape.moe_layers)
    np.testing.assert_array_equal(np.sort(receipt.route_ids), np.sort(receipt_of(rollout).route_ids))
    # Recorded routes are the model's own, so with native weights the replay is the rollout.
    assert chosen_logprobs(replay, True)[len(prompt) - 1 : -1] == pytest.approx(chosen_logprobs(rollout)[:-1], abs=1e-5)
