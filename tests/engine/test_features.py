"""Features of vLLM that route control is served with: the table in docs/integration.md names the tests here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import engines
import numpy as np
import pytest
import torch
from engines import chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan, receipt_of

BANNED = {0: [0, 1, 2, 3, 4, 5], 1: [3], 2: [9, 10, 11]}
POLICY = {"version": "route-policy/1", "layers": {str(layer): {"disabled": experts} for layer, experts in BANNED.items()}}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
# The model drafts for itself, without policy and plans.
DRAFT = {"method": "draft_model", "num_speculative_tokens": 3}


def repetitive_prompts(count):
    """What an n-gram drafter finds something in."""
    rng = random.Random(3)
    parts = [random_prompt(rng, 20, VOCAB_SIZE) for _ in range(count)]
    return [part * 3 for part in parts]


def runners(llm):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return [module for module in worker.model_runner.get_model().modules() if isinstance(module, MoERunner)]


def record_picks(llm):
    """Layer -> all expert ids that vLLM's own capture hook is given from now on."""
    picks = {layer: [] for layer in BANNED}
    for runner in runners(llm):
        runner.router.set_capture_fn(lambda ids, layer=int(runner.layer_id): picks[layer].append(ids.clone()))
    return picks


def assert_none_is_banned(picks):
    for layer, banned in BANNED.items():
        ids = torch.cat(picks[layer])
        assert len(ids) and not np.isin(ids.numpy(), banned).any()


def plans_for(prompts):
    """What requests ask for: nothing, masks everywhere or of generated tokens, forces at listed prompt and generated tokens."""
    bound = [RoutePlan().for_prompt(prompt).force(1, ("generated", 2, 9), [4, 5, 6, 7]) for prompt in prompts[3:]]
    bound[0].disable(2, "generated", [0])
    masks = RoutePlan().disable(1, "all", [6, 7])
    listed = RoutePlan().disable(2, "generated", [1, 2]).force(0, [5, 59], [8, 9, 10, 11])
    return [None, masks.extra_args(), *(plan.extra_args(return_routes=True) for plan in (listed, *bound))]


def run_with_drafts(folder, drafts):
    """What each request says with and without speculation, the first under the policy alone, others under plans as well."""
    said = {}
    prompts = repetitive_prompts(6)
    for name, settings in (("plain", {}), ("drafted", {"speculative_config": drafts})):
        with engine(folder, {"policy": POLICY, "allow_overrides": True}, disable_log_stats=False, **settings) as llm:
            picks = record_picks(llm)
            outputs = generate(llm, prompts, [None] * 6, max_tokens=24) + generate(llm, prompts, plans_for(prompts), max_tokens=24)
            assert_none_is_banned(picks)
            said[name] = [[list(one.outputs[0].token_ids), chosen_logprobs(one), said_of(receipt_of(one))] for one in outputs]
            counted = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    said["accepted"] = counted["vllm:spec_decode_num_accepted_tokens"]
    said["drafted tokens"] = counted["vllm:spec_decode_num_draft_tokens"]
    return said


def said_of(receipt):
    routes = None if receipt.route_ids is None else np.sort(receipt.route_ids, -1).tolist()
    return [receipt.policy, receipt.plan, receipt.routes_set, receipt.tokens, routes]


@pytest.mark.v1_only  # stock vLLM's drafter for the V2 runner has a kernel that Triton's interpreter cannot run
@pytest.mark.parametrize("drafts", [NGRAM, DRAFT], ids=["ngram", "draft model"])
def test_policy_and_plans_hold_under_speculation(tiny_model, drafts):
    """In a process of its own: with numba, which the drafter imports, vLLM cannot start another engine in the same process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(engines.__file__).parent)}
    folder = str(tiny_model("olmoe"))
    command = [sys.executable, __file__, folder, json.dumps(drafts if drafts is NGRAM else {**drafts, "model": folder})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert 20 < said["accepted"] < said["drafted tokens"]
    for (tokens, logprobs, receipt), (other_tokens, other_logprobs, other_receipt) in zip(
        said["drafted"], said["plain"], strict=True
    ):
        assert (tokens, receipt) == (other_tokens, other_receipt)
        assert logprobs == pytest.approx(other_logprobs, abs=1e-5)


def test_a_policy_is_enforced_before_load_balancing_maps_experts_to_copies(tiny_model, monkeypatch):
    """On CPU vLLM has no mapping; what it would be given are logical experts that the policy permits."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    given = []
    own = BaseRouter._apply_eplb_mapping
    monkeypatch.setattr(BaseRouter, "_apply_eplb_mapping", lambda self, ids: (given.append(ids.clone()), own(self, ids))[1])
    with engine(tiny_model("olmoe"), {"policy": POLICY}) as llm:
        given.clear()
        generate(llm, repetitive_prompts(2), [None] * 2)
        assert_none_is_banned({layer: given[layer::3] for layer in BANNED})


@pytest.mark.v2_only
def test_native_routed_experts_beside_the_prefix_cache(tiny_model):
    """Rows of blocks that were found in the cache are those of the request that computed them, under the same plan."""
    prompts = [prompt[:50] for prompt in repetitive_prompts(3)]
    plans = [None, RoutePlan().disable(1, "all", [4, 5]), RoutePlan().force(1, [3, 40], [4, 5, 6, 7])]
    extras = [plan and plan.extra_args() for plan in plans]
    routes = {"policy": POLICY, "allow_overrides": True}
    with engine(tiny_model("olmoe"), routes, enable_return_routed_experts=True, enable_prefix_caching=True) as llm:
        computed = generate(llm, prompts, extras)
        cached = generate(llm, prompts, extras)
        others = generate(llm, prompts, [extras[1], extras[2], None])
        own = generate(llm, prompts, [{**(extra or {}), "return_routes": True} for extra in extras])
    assert [output.num_cached_tokens for output in computed] == [0, 0, 0]
    assert min(output.num_cached_tokens for output in cached) >= 32
    for first, second, other, ours in zip(computed, cached, others, own, strict=True):
        expected = first.outputs[0].routed_experts
        assert (second.outputs[0].routed_experts == expected).all()
        assert (receipt_of(ours).route_ids[: len(expected)] == expected).all()
        assert not (other.outputs[0].routed_experts == expected).all()


if __name__ == "__main__":
    print(json.dumps(run_with_drafts(Path(sys.argv[1]), json.loads(sys.argv[2]))))
