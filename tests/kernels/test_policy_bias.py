"""A policy's bias in compiled rows: whatever a plan asks, tokens that it does not force are routed as if the gate had the bias."""

import random

import pytest
import torch
from mixes import random_biases, random_plan
from vllm_unsafe_routes.kernels.reference import route_topk_reference
from vllm_unsafe_routes.kernels.spec import FLAG_FORCED, FLAG_NATIVE_WEIGHTS, GatingSpec, RouteRows

from vllm_unsafe_routes import LayerPolicy, ModelShape, RoutePolicy
from vllm_unsafe_routes.compiled import NO_ROW
from vllm_unsafe_routes.compiler import PlanCompiler

SHAPE = ModelShape("olmoe", 2, 64, (0, 1), num_experts=16, top_k=4)
LENGTH = 8
SPECS = {
    "softmax": GatingSpec(16, 4, renormalize=True),
    "softmax, groups": GatingSpec(16, 4, num_expert_group=4, topk_group=2),
    "sigmoid, correction": GatingSpec(16, 4, "sigmoid", True),
}


def rows_of(compiler, plan):
    """The rows of every layer and position, [2 * LENGTH, 4-byte units], and which tokens have one."""
    layout, compiled = compiler.layout, compiler.compile(plan)
    contents = []
    for slot, policy_row in enumerate(compiler.policy_rows()):
        at = [compiled.block[slot, compiled.column(position, LENGTH)] for position in range(LENGTH)]
        contents += [policy_row if row == NO_ROW else compiled.rows[row] for row in at]
    longest = layout.mask_row(0, False).ljust(4 * layout.num_ints, b"\0")
    parts = layout.columns(layout.table([longest, *(content or b"" for content in contents)]))
    flags, allowed, ids, weights, steered, bias = (torch.from_numpy(part[1:].copy()) for part in parts)
    directed = torch.tensor([content is not None for content in contents])
    rows = RouteRows(flags, allowed, ids, weights, bias, steered.unflatten(1, (2, -1)))
    return rows, torch.where(directed, torch.arange(2 * LENGTH), -1).int(), directed


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("weights", ["masked", "native"])
def test_it_is_as_if_the_gate_had_it(name, weights):
    """Logits and the policy are in quarters, so that scores which tie do so in whatever order is added."""
    spec, rng, generator = SPECS[name], random.Random(3), torch.Generator().manual_seed(3)
    correction = torch.randn(16, generator=generator) if "correction" in name else None
    seen = set()
    for _ in range(20):
        drawn = random_biases(rng, SHAPE, weights)
        layers = {at: LayerPolicy(bias={e: round(4 * v) / 4 for e, v in entry.bias.items()}) for at, entry in drawn.layers.items()}
        policy, plan = RoutePolicy(layers, weights), random_plan(rng, SHAPE, LENGTH)
        logits = (torch.randn(2 * LENGTH, 16, generator=generator) * 8).round() / 4
        added = torch.zeros(2, 16)
        for layer, entry in policy.layers.items():
            for expert, value in entry.bias.items():
                added[layer, expert] = value
        rows, row_index, _ = rows_of(PlanCompiler(SHAPE, policy), plan)
        plain_rows, plain_index, planned = rows_of(PlanCompiler(SHAPE), plan)
        assert (row_index >= 0).all()
        forced = (rows.flags & FLAG_FORCED) != 0
        moved = torch.where(forced[:, None], logits, logits + added.repeat_interleave(LENGTH, 0))
        ours, our_ids = route_topk_reference(logits, row_index, rows, spec, correction_bias=correction)
        theirs, their_ids = route_topk_reference(moved, plain_index, plain_rows, spec, correction_bias=correction)
        native = (rows.flags & FLAG_NATIVE_WEIGHTS) != 0
        assert (native[~planned] == (weights == "native")).all()
        assert torch.equal(our_ids, their_ids), plan
        same = ~native | forced
        torch.testing.assert_close(ours[same], theirs[same], rtol=0, atol=1e-5)
        seen |= {(bool(f), bool(n), bool(p)) for f, n, p in zip(forced, native, planned, strict=True)}
    assert len(seen) >= 4
