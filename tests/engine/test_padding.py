"""Padded tokens: vLLM gives them no expert (ids -1) where its own gating can, and route control leaves it at that."""

import random

import pytest
import torch
from engines import chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan, receipt_of

NUM_EXPERTS, TOP_K, NUM_TOKENS, NUM_REAL = 16, 4, 8, 5
POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [3], "protected": []}}}


def routers():
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    size = dict(top_k=TOP_K, global_num_experts=NUM_EXPERTS)
    return {
        "topk": FusedTopKRouter(**size),
        "bias": FusedTopKBiasRouter(**size, e_score_correction_bias=torch.zeros(NUM_EXPERTS), scoring_func="sigmoid"),
        "grouped": GroupedTopKRouter(**size, num_expert_group=4, topk_group=2),
    }


@pytest.mark.parametrize("fused", [False, True], ids=["native", "fused"])
@pytest.mark.parametrize(("name", "skips"), [("topk", True), ("bias", True), ("grouped", False)])
def test_a_directive_for_a_padded_token_leaves_it_without_experts(name, skips, fused):
    """The classes are vLLM's GPU ones. What their kernels write for padding is written here, because no CPU has them."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context
    from vllm_unsafe_routes.kernels.spec import RouteRows, pack_allowed

    from vllm_unsafe_routes.engine.router import LayerBinding, Routing, gating_of

    router = routers()[name]
    binding = LayerBinding(router, gating_of(router, NUM_EXPERTS), fused)
    allowed = torch.ones(1, NUM_EXPERTS, dtype=torch.bool)
    allowed[0, 3] = False
    forced = torch.zeros(1, TOP_K)
    rows = RouteRows(torch.zeros(1, dtype=torch.int32), pack_allowed(allowed), forced.int(), forced)
    is_padding = torch.arange(NUM_TOKENS) >= NUM_REAL
    shape = (NUM_TOKENS, TOP_K)
    ids = torch.arange(TOP_K, dtype=torch.int32).repeat(NUM_TOKENS, 1)
    weights = torch.full(shape, 0.25)
    if skips:
        ids[NUM_REAL:], weights[NUM_REAL:] = -1, 0.0
    logits = torch.randn(NUM_TOKENS, NUM_EXPERTS, generator=torch.Generator().manual_seed(1))
    logits[:, 3] = 9.0
    kept = torch.zeros(shape, dtype=torch.int32)
    with set_forward_context(None, VllmConfig(), num_tokens=NUM_TOKENS, is_padding=is_padding):
        # A policy's row index covers all columns.
        binding.direct(Routing(weights, ids, logits, logits, kept), torch.zeros(NUM_TOKENS, dtype=torch.int32), rows)
    assert not (ids == 3).any()
    assert (ids[:NUM_REAL] >= 0).all() and (weights[:NUM_REAL] > 0).all()
    assert (ids[NUM_REAL:] == -1).all() == skips
    assert (weights[NUM_REAL:] == 0).all() == skips
    assert (kept[:NUM_REAL] == 3).any()


@pytest.mark.v2_only
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_padded_batches_give_the_same_routes_and_counts(kernel, tiny_model, monkeypatch):
    """Batches padded to a multiple of 8, as for captured graphs: outputs, receipts and counts as without padding."""
    import vllm.v1.worker.gpu.model_runner as model_runner

    rng = random.Random(5)
    prompts = [random_prompt(rng, rng.randrange(3, 20), VOCAB_SIZE) for _ in range(5)]
    plan = RoutePlan().disable(0, "all", [1, 2]).force(2, [0, 1], [4, 5, 6, 7])
    extras = [plan.extra_args(return_routes=True), None, RoutePlan().extra_args(return_routes=True), None, None]
    monkeypatch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", kernel)

    def outputs():
        with engine(tiny_model("olmoe"), {"allow_overrides": True, "policy": POLICY, "usage": ["eval"]}) as llm:
            outputs = generate(llm, prompts, extras)
            core = llm.llm_engine.engine_core.engine_core
            return outputs, [core.unsafe_routes_status()["counts"], core.unsafe_routes_usage("read")["counts"]]

    expected, expected_counts = outputs()
    own, padded = model_runner.dispatch_cg_and_sync_dp, []

    def dispatch(*args, **kwargs):
        batch, state = own(*args, **kwargs)
        padded.append(-batch.num_tokens % 8)
        return type(batch)(**{**vars(batch), "num_tokens": batch.num_tokens + padded[-1]}), state

    monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatch)
    found, counts = outputs()
    assert any(padded)
    assert counts == expected_counts
    for output, other in zip(found, expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert chosen_logprobs(output) == pytest.approx(chosen_logprobs(other), abs=1e-5)
        one, two = receipt_of(output), receipt_of(other)
        assert one.routes_set == two.routes_set
        if two.route_ids is not None:
            assert (one.route_ids == two.route_ids).all()
