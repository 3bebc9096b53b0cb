"""Every native gating that vLLM has on CPU, and the specification, asked with hostile logits; and what each trap looks like."""

from __future__ import annotations

import re

import pytest
import torch
from vllm_unsafe_routes.kernels.mask_logits import groups_suffice, mask_logits
from vllm_unsafe_routes.kernels.reference import route_topk_reference
from vllm_unsafe_routes.kernels.spec import GatingSpec

from vllm_unsafe_routes.engine import probe as probing
from vllm_unsafe_routes.engine.probe import probe

EXPERTS, TOP_K = 16, 4
CPU = torch.device("cpu")
GROUPS = dict(num_expert_group=4, topk_group=2)
TOP2 = dict(**GROUPS, group_score="top2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_router(top_k=TOP_K, **options):
    """vLLM's gating on CPU: torch code, and a C++ kernel for sqrtsoftplus."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    router = CPURouter(top_k=top_k, global_num_experts=EXPERTS, **options)

    def native(logits, bias):
        router.e_score_correction_bias = bias
        return router._compute_routing(logits, logits, None)

    return native


def as_written(function):
    """Without vLLM's torch.compile, which does not run beside the interpreted Triton of the V2 runner."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def grouped(scoring, renormalize):
    """vLLM's own torch code for groups, which GPUs run for DeepSeek-V2."""
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import grouped_topk

    gate = as_written(grouped_topk)
    return lambda logits, bias: gate(logits, logits, TOP_K, renormalize, 4, 2, scoring, 1.0, bias)


def custom(path, **options):
    module, _, name = path.partition(":")
    function = __import__(module, fromlist=["x"])
    for part in name.split("."):
        function = getattr(function, part)
    return cpu_router(custom_routing_function=as_written(function), **options)


def reference(spec):
    return lambda logits, bias: route_topk_reference(logits, None, None, spec, correction_bias=bias)


SPECS = {
    "softmax": (GatingSpec(EXPERTS, TOP_K), False),
    "softmax, renormalised": (GatingSpec(EXPERTS, TOP_K, renormalize=True), False),
    "softmax, groups": (GatingSpec(EXPERTS, TOP_K, **GROUPS), False),
    "softmax, bias": (GatingSpec(EXPERTS, TOP_K, renormalize=True), True),
    "sigmoid": (GatingSpec(EXPERTS, TOP_K, "sigmoid"), False),
    "sigmoid, groups": (GatingSpec(EXPERTS, TOP_K, "sigmoid", **GROUPS), False),
    "sigmoid, groups, bias": (GatingSpec(EXPERTS, TOP_K, "sigmoid", True, **TOP2), True),
    # The C++ kernel knows the size of DeepSeek-V4 and few others.
    "top 2": (GatingSpec(EXPERTS, 2), False),
    "sqrtsoftplus, bias": (GatingSpec(256, 8, "sqrtsoftplus", True), True),
}
IN_GROUPS = dict(use_grouped_topk=True, **GROUPS)
NATIVE = {
    "CPU softmax": (lambda: cpu_router(renormalize=False), "softmax"),
    "CPU softmax, renormalised": (cpu_router, "softmax, renormalised"),
    "CPU softmax, groups": (lambda: cpu_router(renormalize=False, **IN_GROUPS), "softmax, groups"),
    "CPU sigmoid, groups": (lambda: cpu_router(renormalize=False, scoring_func="sigmoid", **IN_GROUPS), "sigmoid, groups"),
    "CPU sigmoid, groups, bias": (lambda: cpu_router(scoring_func="sigmoid", **IN_GROUPS), "sigmoid, groups, bias"),
    "CPU sqrtsoftplus, bias": (lambda: cpu_router(top_k=8, scoring_func="sqrtsoftplus"), "sqrtsoftplus, bias"),
    "Llama-4": (lambda: custom("vllm.model_executor.models.llama4:Llama4MoE.custom_routing_function"), "sigmoid"),
    "Cohere-2": (lambda: custom("vllm.model_executor.models.cohere2_moe:token_choice_with_bias"), "sigmoid"),
    "PhiMoE": (
        lambda: custom("vllm.model_executor.models.phimoe:phimoe_routing_function", top_k=2, renormalize=False),
        "top 2",
    ),
    "torch softmax, groups": (lambda: grouped("softmax", False), "softmax, groups"),
    "torch sigmoid, groups": (lambda: grouped("sigmoid", False), "sigmoid, groups"),
    "torch sigmoid, groups, bias": (lambda: grouped("sigmoid", True), "sigmoid, groups, bias"),
    **{f"specification {name}": (lambda name=name: reference(SPECS[name][0]), name) for name in SPECS},
}
# Scores in float16 are 0 from e^-17 on, and these compute them in the logits' dtype: the probe refuses what cannot be trusted.
IN_16_BITS = ("torch softmax, groups", "torch sigmoid, groups", "torch sigmoid, groups, bias")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NATIVE)
def test_native_gatings(name, dtype):
    make, spec = NATIVE[name]
    said = probe(make(), *SPECS[spec], CPU, dtype)
    if dtype == torch.float16 and name in IN_16_BITS:
        assert said is not None and "that underflow, " in said
    else:
        assert said is None


def only_inf(logits, banned, scoring):
    return logits.masked_fill(banned, -torch.inf)


def only_finite(logits, banned, scoring):
    return logits.masked_fill(banned, -1e4)


def leaves_nan(logits, banned, scoring):
    return torch.where(logits.isnan() & ~banned, logits, mask_logits(logits, banned, scoring))


def own_bias(bias, banned):
    return bias


# What is left out of the mechanism -> a native gating that shows it, and how.
TRAPS = {
    "no lift": ({"mask_logits": only_inf}, "CPU softmax, groups", "probabilities that underflow, .*: it selects the banned expert"),
    "too small a value": ({"mask_logits": only_finite}, "CPU softmax, renormalised", "very low logits, .*: it selects the banned"),
    "no care for NaN": ({"mask_logits": leaves_nan}, "CPU softmax", "NaN among the allowed, .*: its weights are"),
    "no masked bias": ({"mask_bias": own_bias}, "CPU sigmoid, groups, bias", "infinite logits, .*: it selects the banned expert"),
    "no masked bias in C++": ({"mask_bias": own_bias}, "CPU sqrtsoftplus, bias", "lifts the banned: it selects the banned expert"),
}


@pytest.mark.parametrize("name", TRAPS)
def test_every_trap_is_seen(name, monkeypatch):
    changes, native, message = TRAPS[name]
    for what, value in changes.items():
        monkeypatch.setattr(probing, what, value)
    make, spec = NATIVE[native]
    said = probe(make(), *SPECS[spec], CPU)
    assert said is not None and re.search(message, said)


def test_groups_that_hold_too_few_would_leak():
    """Why `groups_suffice` is asked: two groups with one allowed expert each are the best, and four experts are wanted."""
    banned = torch.cat([torch.arange(4) >= left for left in (1, 1, 4, 4)])
    logits = torch.where(torch.arange(EXPERTS) < 8, 5.0, 0.0)[None]
    make, spec = NATIVE["torch softmax, groups"]
    assert not groups_suffice(banned, SPECS[spec][0])
    ids = make()(mask_logits(logits, banned[None], "softmax"), None)[1]
    assert banned[ids[0].long()].any()


def repeats(logits, bias):
    weights, ids = cpu_router()(logits, bias)
    return weights, ids[:, :1].expand_as(ids)


def ignores(logits, bias):
    return torch.ones(len(logits), TOP_K), torch.arange(TOP_K).expand(len(logits), TOP_K)


def marks_as_padding(logits, bias):
    weights, ids = cpu_router()(logits, bias)
    return weights, ids.masked_fill(ids == ids[:, -1:], -1)


@pytest.mark.parametrize(
    ("native", "message"),
    [(repeats, r"it selects \[(\d+), \1, \1, \1\]"), (ignores, "the banned expert 0"), (marks_as_padding, "-1")],
)
def test_a_gating_of_its_own_mind(native, message):
    said = probe(native, *SPECS["softmax"], CPU)
    assert said is not None and re.search(message, said)
