"""SteerMoE's recipe against a plain transformers twin: the same differences, the same experts, and the same effect."""

import random

import pytest
import torch
from engines import chosen_logprobs, engine, generate, random_prompt
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.search.steering import risk_difference, steering_plan


class Twin:
    """The published code's steps over a transformers model, with loops: counts, risk differences, and changed router logits."""

    def __init__(self, folder):
        self.oracle = Oracle(folder)
        self.top_k = self.oracle.config.num_experts_per_tok
        self.manual: dict[int, list[int]] = {}

    def differences(self, first, second, num_experts):
        """(layer, expert) -> risk difference."""
        rates = []
        for prompts in (first, second):
            hits, tokens = {}, 0
            for prompt in prompts:
                self.oracle.logprobs(prompt, len(prompt), None)
                tokens += len(prompt)
                for layer, routes in self.oracle.routes.items():
                    for ids, _ in routes:
                        for expert in ids:
                            hits[layer, expert] = hits.get((layer, expert), 0) + 1
            rates.append({(layer, e): hits.get((layer, e), 0) / tokens for layer in self.oracle.routes for e in range(num_experts)})
        return {at: rates[0][at] - rates[1][at] for at in rates[0]}

    def steered(self, token_ids, chosen):
        """Log-probability of each token after the first with OLMoE's gates changed as adobe-research/SteerMoE changes them."""
        handles = []
        for layer, block in enumerate(self.oracle.model.model.layers):

            def hook(module, inputs, output, layer=layer):
                logits, weights, ids = output
                scores = torch.log_softmax(logits.float(), dim=-1)
                most, least = scores.max(-1).values, scores.min(-1).values
                for expert, sign in chosen.get(layer, {}).items():
                    scores[:, expert] = most + 0.01 if sign > 0 else least - 0.01
                weights, ids = scores.softmax(-1).topk(self.top_k, dim=-1)
                return logits, weights, ids

            handles.append(block.mlp.gate.register_forward_hook(hook))
        try:
            return self.oracle.token_logprobs(token_ids, len(token_ids), None)
        finally:
            for handle in handles:
                handle.remove()


def test_it_is_what_the_twin_does(tiny_model):
    folder = tiny_model("olmoe")
    twin = Twin(folder)
    shape = ModelShape.from_hf_config(twin.oracle.config)
    rng = random.Random(4)
    # Two kinds of made-up prompts: of small and of large token ids.
    first, second = ([[rng.randrange(*ids) for _ in range(rng.randrange(5, 20))] for _ in range(6)] for ids in ((3, 60), (70, 128)))
    asked = random_prompt(rng, 24, VOCAB_SIZE)
    with engine(folder, {"allow_overrides": True}) as llm:
        difference = run_search(make_backend(llm), risk_difference(make_backend(llm), first, second))
        plan = steering_plan(shape, difference, num_promoted=5, num_demoted=6)
        (output,) = generate(llm, [asked], [plan.extra_args()], prompt_logprobs=0)
    expected = twin.differences(first, second, shape.num_experts)
    assert {
        (layer, expert): pytest.approx(difference[slot, expert], abs=1e-9)
        for slot, layer in enumerate(shape.moe_layers)
        for expert in range(shape.num_experts)
    } == expected
    ranked = sorted(expected, key=lambda at: (-abs(expected[at]), at))
    chosen: dict = {layer: {} for layer in shape.moe_layers}
    for sign, count in ((1, 5), (-1, 6)):
        for layer, expert in [at for at in ranked if sign * expected[at] > 0][:count]:
            if sign < 0 or list(chosen[layer].values()).count(1) < shape.top_k - 1:
                chosen[layer][expert] = sign
    wished = {layer: {} for layer in shape.moe_layers}
    for item in plan.directives:
        wished[item.layer] |= dict.fromkeys(item.experts, 1 if item.kind == "promote" else -1)
    assert wished == chosen
    tokens = asked + list(output.outputs[0].token_ids)
    assert chosen_logprobs(output, with_prompt=True) == pytest.approx(twin.steered(tokens, chosen), abs=1e-4)


def test_no_more_are_promoted_than_a_layer_has_room_for():
    import numpy as np

    shape = ModelShape("olmoe", 2, 64, (0, 1), num_experts=8, top_k=3)
    difference = np.zeros((2, 8))
    difference[0] = [0.5, 0.4, 0.3, 0.2, -0.1, 0, 0, 0]
    plan = steering_plan(shape, difference, num_promoted=4, num_demoted=4, positions="prompt")
    assert [(item.kind, item.layer, item.experts) for item in plan.directives] == [("promote", 0, (0, 1)), ("demote", 0, (4,))]
    assert [item.kind for item in steering_plan(shape, -difference, 9, 1).directives] == ["promote", "demote"]
