"""Masked logits and biases under the specification itself: the routes that it gives to a mask, and nothing else changed."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import WEIGHT_TOLERANCE
from vllm_unsafe_routes.kernels.mask_logits import bias_logits, groups_suffice, mask_bias, mask_logits
from vllm_unsafe_routes.kernels.reference import route_topk_reference
from vllm_unsafe_routes.kernels.spec import FLAG_SCORE_BIAS, GatingSpec, RouteRows, pack_allowed

EXPERTS, TOP_K, TOKENS = 16, 4, 64
GROUPS = dict(num_expert_group=4, topk_group=2)
SPECS = {
    "softmax": (GatingSpec(EXPERTS, TOP_K), False),
    "softmax, renormalised": (GatingSpec(EXPERTS, TOP_K, renormalize=True), False),
    "softmax, groups": (GatingSpec(EXPERTS, TOP_K, **GROUPS), False),
    "softmax, bias": (GatingSpec(EXPERTS, TOP_K, renormalize=True), True),
    "sigmoid": (GatingSpec(EXPERTS, TOP_K, "sigmoid"), False),
    "sigmoid, bias, groups": (GatingSpec(EXPERTS, TOP_K, "sigmoid", True, 2.5, **GROUPS, group_score="top2"), True),
    "sqrtsoftplus, bias": (GatingSpec(EXPERTS, TOP_K, "sqrtsoftplus", True), True),
}


def sorted_routes(weights, ids):
    order = ids.argsort(1)
    return weights.gather(1, order), ids.gather(1, order)


@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_they_give_the_routes_of_a_mask(name, dtype, biased):
    """And of a bias, which 16 bits hold only in part: halves on halves are exact in all of them."""
    spec, has_bias = SPECS[name]
    generator = torch.Generator().manual_seed(3)
    banned = torch.isin(torch.arange(EXPERTS), torch.tensor([0, 1, 5, 9, 10, 15]))
    assert groups_suffice(banned, spec)
    logits = (torch.randn(TOKENS, EXPERTS, generator=generator) * 3).to(dtype)
    score_bias = torch.zeros(EXPERTS)
    if biased:
        logits, score_bias[::2] = (logits * 2).round() / 2, torch.arange(-4.0, 4.0) / 2
    bias = torch.randn(EXPERTS, generator=generator) / 3 if has_bias else None
    rows = RouteRows(
        torch.full((1,), FLAG_SCORE_BIAS, dtype=torch.int32),
        pack_allowed(~banned[None]),
        torch.zeros(1, TOP_K, dtype=torch.int32),
        torch.zeros(1, TOP_K),
        score_bias[None],
    )
    expected = route_topk_reference(logits, torch.zeros(TOKENS, dtype=torch.int32), rows, spec, correction_bias=bias)
    masked = mask_logits(bias_logits(logits, score_bias), banned[None], spec.scoring)
    found = route_topk_reference(masked, None, None, spec, correction_bias=None if bias is None else mask_bias(bias, banned))
    assert masked.dtype == dtype
    for ours, theirs in zip(sorted_routes(*found), sorted_routes(*expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=WEIGHT_TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_bias_of_nothing_keeps_logits_and_a_large_one_stays_finite(dtype):
    logits = torch.tensor([[torch.nan, torch.inf, -0.0, 1.0, 6e4]]).to(dtype)
    same = bias_logits(logits, torch.zeros(5))
    torch.testing.assert_close(same, logits, equal_nan=True, rtol=0, atol=0)
    assert same[0, 2].signbit()
    assert bias_logits(logits, torch.full((5,), 3e38)).isfinite().all()


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_a_token_without_a_ban_keeps_its_logits(scoring):
    logits = torch.tensor([[torch.nan, 2e5, -3e5, 1.0]]).repeat(2, 1)
    banned = torch.tensor([[False] * 4, [False, False, False, True]])
    masked = mask_logits(logits, banned, scoring)
    torch.testing.assert_close(masked[0], logits[0], equal_nan=True, rtol=0, atol=0)
    assert masked[1].isfinite().all() and masked[1, 3] < -1e29


def test_allowed_logits_of_a_usual_size_keep_their_bits():
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(5)) * 10
    banned = torch.arange(EXPERTS) % 3 == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        typed = logits.to(dtype)
        assert (mask_logits(typed, banned[None], "softmax") == typed)[:, ~banned].all()


def test_a_lifted_logit_keeps_its_place_and_its_weight():
    logits = torch.tensor([[100.0, -200.0, 24.0, 0.0]])
    masked = mask_logits(logits, torch.tensor([[False, False, False, True]]), "softmax")
    assert masked[0, :3].tolist() == [100.0, 25.0, 25.0]
    torch.testing.assert_close(masked.softmax(1), torch.tensor([[1.0, 0, 0, 0]]), atol=1e-30, rtol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_masked_bias_is_below_every_allowed_one(dtype, scale):
    bias = (torch.randn(EXPERTS, generator=torch.Generator().manual_seed(2)) * scale).to(dtype)
    banned = torch.arange(EXPERTS) < 6
    masked = mask_bias(bias, banned)
    assert masked.dtype == dtype and (masked == bias)[~banned].all()
    assert masked[banned].max() <= masked[~banned].min() - 1


@pytest.mark.parametrize(
    ("allowed", "suffices"),
    [
        ([4, 4, 4, 4], True),
        ([2, 2, 4, 4], True),
        ([1, 2, 4, 4], False),  # the two best groups may be the two smallest
        ([0, 0, 1, 3], True),  # groups without an allowed expert come last
        ([0, 1, 1, 4], False),
    ],
    ids=str,
)
def test_groups_that_hold_too_few(allowed, suffices):
    spec = GatingSpec(EXPERTS, TOP_K, **GROUPS)
    banned = torch.cat([torch.arange(4) >= left for left in allowed])
    assert groups_suffice(banned, spec) is suffices
    assert groups_suffice(banned, GatingSpec(EXPERTS, TOP_K))
