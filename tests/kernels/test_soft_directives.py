"""Biases, promoted and demoted experts as other people's code has them, and in the corners that random rows seldom reach."""

import math

import pytest
import torch
from kernel_cases import WEIGHT_TOLERANCE
from vllm_unsafe_routes.kernels import GatingSpec, RouteRows, pack_allowed, route_topk
from vllm_unsafe_routes.kernels.spec import FLAG_NATIVE_WEIGHTS, FLAG_SCORE_BIAS, FLAG_STEERED

EXPERTS, TOP_K = 16, 4


def one_row(flags, promoted=(), demoted=(), allowed=range(EXPERTS), bias=(), top_k=TOP_K):
    sets = torch.zeros(3, EXPERTS, dtype=torch.bool)
    for at, experts in enumerate((allowed, promoted, demoted)):
        sets[at, list(experts)] = True
    words = pack_allowed(sets)
    values = torch.zeros(1, EXPERTS)
    for expert, value in dict(bias).items():
        values[0, expert] = value
    nothing = torch.zeros(1, top_k)
    return RouteRows(torch.tensor([flags], dtype=torch.int32), words[:1], nothing.int(), nothing, values, words[None, 1:])


PLAIN = GatingSpec(EXPERTS, TOP_K)


def gate(logits, rows, spec=PLAIN, kernel="triton", **more):
    row_index = torch.zeros(len(logits), dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", kernel)
        weights, ids = route_topk(logits, row_index, rows, spec, **more)
    return weights, ids.tolist()


both = pytest.mark.parametrize("kernel", ["triton", "torch"])


@both
@pytest.mark.parametrize("renormalize", [False, True])
def test_it_is_steermoe_s_rule(kernel, renormalize):
    """As adobe-research/SteerMoE patches its models: log-softmax scores, max + 0.01, min - 0.01, then the model's own gating."""
    logits = torch.randn(32, EXPERTS, generator=torch.Generator().manual_seed(1)) * 2
    promoted, demoted = [3, 9], [0, 5, 6]
    scores = logits.log_softmax(-1)
    most, least = scores.amax(-1, keepdim=True), scores.amin(-1, keepdim=True)
    scores[:, promoted], scores[:, demoted] = most + 0.01, least - 0.01
    weights, ids = scores.softmax(-1).topk(TOP_K, dim=-1)
    if renormalize:
        weights /= weights.sum(-1, keepdim=True)
    spec = GatingSpec(EXPERTS, TOP_K, renormalize=renormalize)
    ours, our_ids = gate(logits, one_row(FLAG_STEERED, promoted, demoted), spec, kernel)
    assert [set(one) for one in our_ids] == [set(one) for one in ids.tolist()]
    for at in range(len(logits)):
        theirs = dict(zip(ids[at].tolist(), weights[at].tolist(), strict=True))
        assert ours[at].tolist() == pytest.approx([theirs[expert] for expert in our_ids[at]], abs=WEIGHT_TOLERANCE)


@both
def test_a_bias_is_as_if_the_gate_had_one(kernel):
    """`masked`: selection and weights are those of the changed logits; `native`: the selection alone."""
    logits = torch.randn(32, EXPERTS, generator=torch.Generator().manual_seed(2))
    bias = {2: 3.0, 7: -2.5, 15: 0.5}
    changed = logits.clone()
    for expert, value in bias.items():
        changed[:, expert] += value
    expected, ids = changed.softmax(-1).topk(TOP_K, dim=-1)
    weights, our_ids = gate(logits, one_row(FLAG_SCORE_BIAS, bias=bias), kernel=kernel)
    assert our_ids == ids.tolist()
    torch.testing.assert_close(weights, expected, rtol=0, atol=WEIGHT_TOLERANCE)
    weights, our_ids = gate(logits, one_row(FLAG_SCORE_BIAS | FLAG_NATIVE_WEIGHTS, bias=bias), kernel=kernel)
    assert our_ids == ids.tolist()
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids), rtol=0, atol=WEIGHT_TOLERANCE)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_promoted_expert_is_selected_where_the_margin_says_nothing(kernel, dtype):
    """0.01 above 1e30 is 1e30, and so is 0.01 below it."""
    logits = torch.full((1, EXPERTS), 1e30).to(dtype)
    assert gate(logits, one_row(FLAG_STEERED, [14], [0, 1]), kernel=kernel)[1] == [[14, 2, 3, 4]]
    logits[0, 5:] = math.nan
    assert gate(logits, one_row(FLAG_STEERED, [14, 12], [0, 1]), kernel=kernel)[1] == [[12, 14, 2, 3]]


@both
def test_demoted_experts_come_when_nothing_else_is_left(kernel):
    logits = torch.arange(EXPERTS, dtype=torch.float32)[None]
    allowed, demoted = [1, 2, 8, 9, 12, 15], [1, 9, 12, 15]
    assert gate(logits, one_row(FLAG_STEERED, [], demoted, allowed), kernel=kernel)[1] == [[8, 2, 15, 12]]
    assert gate(logits, one_row(FLAG_STEERED, [1], demoted, allowed), kernel=kernel)[1] == [[1, 8, 2, 15]]
    # All of them: as if none was.
    assert gate(logits, one_row(FLAG_STEERED, [], range(EXPERTS)), kernel=kernel)[1] == [[15, 14, 13, 12]]


@both
@pytest.mark.parametrize("group_score", ["max", "top2"])
def test_neither_groups_nor_corrections_undo_it(kernel, group_score):
    """Four groups of four, the two best count: the last ones, but for what is promoted and demoted."""
    spec = GatingSpec(EXPERTS, TOP_K, "sigmoid", num_expert_group=4, topk_group=2, group_score=group_score)
    logits = torch.arange(EXPERTS, dtype=torch.float32)[None] / 8
    correction = torch.zeros(EXPERTS)
    correction[[0, 15]] = torch.tensor([-9.0, 9.0])
    asked = one_row(FLAG_STEERED, [0], [15, 12])
    assert gate(logits, asked, spec, kernel, correction_bias=correction)[1] == [[0, 14, 13, 11]]
    # A group whose experts are all demoted offers nothing; then other groups' experts come before its own.
    asked = one_row(FLAG_STEERED, [], range(4, EXPERTS))
    assert gate(logits, asked, spec, kernel, correction_bias=correction)[1] == [[3, 2, 1, 0]]
    asked = one_row(FLAG_STEERED, [], range(3, EXPERTS))
    assert gate(logits, asked, spec, kernel, correction_bias=correction)[1] == [[2, 1, 0, 15]]
