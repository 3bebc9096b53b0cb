"""The seam at the logits on the real engine: what a policy and a plan do there is what they do at the router."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from engines import SETTINGS, chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE
from transformers import AutoConfig

from vllm_unsafe_routes import ModelShape, RouteError, RoutePlan, RoutePolicy, receipt_of
from vllm_unsafe_routes.engine.swap import SwapError, swap_policy

LOGITS = {"seam": "logits"}
POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [5]}}}


def policy_for(shape, **more):
    """Bans a third of the experts of every layer, others at each, and biases a third; groups of four keep enough."""
    layers = {}
    for slot, layer in enumerate(shape.moe_layers):
        disabled, biased = ([at for at in range(shape.num_experts) if (at + slot) % 3 == rest] for rest in (0, 1))
        layers[str(layer)] = {"disabled": disabled, "bias": {str(expert): expert / 4 - 2 for expert in biased}}
    return {"version": "route-policy/2", "layers": layers, **more}


def prompts(count=8, seed=4):
    rng = random.Random(seed)
    return [random_prompt(rng, rng.randrange(4, 40), VOCAB_SIZE) for _ in range(count)]


def runners(llm):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return [module for module in worker.model_runner.get_model().modules() if isinstance(module, MoERunner)]


def record_picks(llm):
    """MoE slot -> expert ids that vLLM's own capture hook is given from now on, [num_tokens, top_k] a call."""
    found = runners(llm)
    picks = [[] for _ in found]
    for runner, taken in zip(found, picks, strict=True):
        runner.router.set_capture_fn(lambda ids, taken=taken: taken.append(ids.sort(1).values.clone()))
    return picks


def counts(llm):
    return llm.llm_engine.engine_core.engine_core.unsafe_routes_status()["counts"]


def shape_of(folder):
    return ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))


def assert_same(outputs, others, tolerance=1e-5):
    for output, other in zip(outputs, others, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert chosen_logprobs(output, with_prompt=True) == pytest.approx(chosen_logprobs(other, with_prompt=True), abs=tolerance)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_a_policy_does_there_what_it_does_at_the_router(family, tiny_model):
    folder = tiny_model(family)
    policy = policy_for(shape_of(folder))
    said = []
    for routes in ({}, LOGITS):
        with engine(folder, {"policy": policy, **routes}, **SETTINGS.get(family, {})) as llm:
            assert all("_maybe_dispatch" in vars(runner) for runner in runners(llm)) is bool(routes)
            picks = record_picks(llm)
            outputs = generate(llm, prompts(), [None] * 8, prompt_logprobs=0)
            said.append((outputs, [torch.cat(taken) for taken in picks], counts(llm)))
    (outputs, picks, counted), (others, other_picks, other_counted) = said
    assert_same(outputs, others)
    for layer, ids, other in zip(policy["layers"].values(), picks, other_picks, strict=True):
        assert torch.equal(ids, other) and not np.isin(ids.numpy(), layer["disabled"]).any()
    assert counted == other_counted
    assert min(counted["displaced"]["enforce"]) > 0 and not any(counted["missed"])
    assert [receipt_of(output).policy for output in outputs] == [receipt_of(output).policy for output in others]


def plans_for(count):
    """Of each kind that a mask can say, and none."""
    kinds = [
        RoutePlan().disable(0, "all", [0, 3, 5]).disable(2, [1, 2], [7]),
        RoutePlan().allow(1, "prompt", [2, 4, 6, 8, 10]),
        RoutePlan().bias(1, "all", {4: 2.5, 5: -3.0}).disable(2, [1, 2], [7]),
        RoutePlan().force(0, [0, 2], [1, 7, 9, 12]).force(2, "generated", [1, 3, 5, 15]),
        None,
    ]
    return [kinds[at % len(kinds)] for at in range(count)]


@pytest.fixture(scope="module")
def with_plans(tiny_model):
    """The same plans in engines that differ in their seam."""
    extras = [plan and plan.extra_args() for plan in plans_for(8)]
    layers = {"1": {"disabled": [3, 9]}, "2": {"bias": {"4": 1.0, "8": -2.0}}}
    policy = {"version": "route-policy/2", "layers": layers}
    said = []
    for routes in ({}, LOGITS):
        with engine(tiny_model("olmoe"), {"allow_overrides": True, "policy": policy, **routes}) as llm:
            picks = record_picks(llm)
            said.append((generate(llm, prompts(), extras, prompt_logprobs=0), [torch.cat(taken) for taken in picks]))
            if routes:
                said.append([refusal_of(llm, extra) for extra in NOT_A_MASK.values()])
                said.append(counts(llm))
    return said


NOT_A_MASK = {
    "native weights": RoutePlan("native").disable(0, "all", [1]).extra_args(),
    "explicit weights": RoutePlan().force(0, [1], [1, 2, 3, 4], [0.5, 0.5, 0.5, 0.5]).extra_args(),
    "promotion": RoutePlan().promote(0, "all", [1]).extra_args(),
    "routes": RoutePlan().disable(0, "all", [1]).extra_args(return_routes=True),
}


def refusal_of(llm, extra):
    with pytest.raises(RouteError) as caught:
        generate(llm, [[5, 6, 7]], [extra])
    return str(caught.value).partition(" (parameter=")[0]


def test_plans_that_mask_do_there_what_they_do_at_the_router(with_plans):
    (outputs, picks), (others, other_picks), _, counted = with_plans
    assert_same(outputs, others)
    assert all(torch.equal(ids, other) for ids, other in zip(picks, other_picks, strict=True))
    assert not any(counted["missed"])
    for output, other, plan in zip(outputs, others, plans_for(8), strict=True):
        assert receipt_of(output).routes_set == receipt_of(other).routes_set
        assert (receipt_of(other).routes_set > 0) is (plan is not None)


def test_what_a_mask_cannot_say_is_refused_by_name(with_plans):
    native, explicit, promoted, routes = with_plans[2]
    assert native == explicit == promoted
    assert native == "seam 'logits' masks and biases only: no 'native' or explicit weights, promote or demote"
    assert routes == "return_routes cannot be honoured with seam 'logits', where kernels do not say what they pick"


@pytest.mark.v1_only  # says nothing about the runner
@pytest.mark.parametrize(
    ("family", "routes", "message"),
    [
        ("deepseek_v3", {"allow_overrides": True}, r"MoE layer 1 \(.*its correction bias lifts experts, and is the same"),
        ("deepseek_v2", {"allow_overrides": True}, r"MoE layer 1 \(.*it chooses among groups, and a plan may leave too"),
        (
            "deepseek_v2",
            {"policy": {"version": "route-policy/1", "layers": {"2": {"disabled": [0, 1, 2, 4, 5, 6]}}}},
            "policy layer 2: some of its groups are left with too few experts for top_k 4",
        ),
        (
            "olmoe",
            {"policy": {"version": "route-policy/1", "layers": {"2": {"disabled": [0]}}, "weights": "native"}},
            "policy weights 'native' cannot be kept with seam 'logits'",
        ),
        ("olmoe", {"allow_overrides": True, "gating": "fused"}, "gating 'fused', usage and monitor need routers"),
        ("olmoe", {"usage": []}, "gating 'fused', usage and monitor need routers, which nobody asks with seam 'logits'"),
    ],
)
def test_an_engine_that_could_not_keep_its_word_does_not_start(family, routes, message, tiny_model):
    with (
        pytest.raises(RouteError, match=message),
        engine(tiny_model(family), {**routes, **LOGITS}, **SETTINGS.get(family, {})),
    ):
        pass


def as_monolithic(monkeypatch, leaks=False):
    """Let vLLM's CPU experts route inside themselves, by vLLM's own helper for such kernels: none of the real ones runs here.

    `leaks`: it reads the model's own correction bias, as a kernel that keeps a copy would.
    """
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.router.cpu_router import select_experts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    def apply_monolithic(self, layer, x, router_logits, input_ids=None):
        bias = layer._parameters["e_score_correction_bias"] if leaks else layer.e_score_correction_bias
        weights, ids = select_experts(
            hidden_states=x,
            router_logits=router_logits,
            top_k=layer.top_k,
            use_grouped_topk=layer.use_grouped_topk,
            renormalize=layer.renormalize,
            topk_group=layer.topk_group,
            num_expert_group=layer.num_expert_group,
            scoring_func=layer.scoring_func,
            routed_scaling_factor=layer.routed_scaling_factor,
            e_score_correction_bias=bias,
        )
        return self.apply(layer, x, weights, ids, None, None)

    monkeypatch.setattr(FusedMoEMethodBase, "is_monolithic", property(lambda self: True))
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "apply_monolithic", apply_monolithic)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_kernel_that_routes_inside_itself(family, tiny_model, monkeypatch):
    folder = tiny_model(family)
    policy, other = policy_for(shape_of(folder)), POLICY
    settings = SETTINGS.get(family, {})
    with engine(folder, {"policy": policy}, **settings) as llm:
        expected = generate(llm, prompts(), [None] * 8, prompt_logprobs=0), counts(llm)
        swap_policy(llm, RoutePolicy.from_json(other))
        later = generate(llm, prompts(), [None] * 8, prompt_logprobs=0)
    as_monolithic(monkeypatch)
    with engine(folder, {"policy": policy}, **settings) as llm:
        assert all("_maybe_dispatch" in vars(runner) and "_compute_routing" not in vars(runner.router) for runner in runners(llm))
        assert_same(generate(llm, prompts(), [None] * 8, prompt_logprobs=0), expected[0])
        assert counts(llm) == expected[1]
        with pytest.raises(SwapError, match="policy layer 1: weights 'native' cannot be kept at the logits, where its kernel wei"):
            swap_policy(llm, RoutePolicy.from_json({**other, "weights": "native"}))
        assert_same(generate(llm, prompts(), [None] * 8, prompt_logprobs=0), expected[0])
        swap_policy(llm, RoutePolicy.from_json(other))
        assert_same(generate(llm, prompts(), [None] * 8, prompt_logprobs=0), later)


@pytest.mark.v1_only
@pytest.mark.parametrize(
    ("family", "leaks", "routes", "message"),
    [
        (
            "deepseek_v3",
            True,
            {"policy": POLICY},
            r"not obey masked logits \(.*: a banned expert has part in its output\); choose another",
        ),
        ("olmoe", False, {"usage": []}, "for plans and usage choose a modular one with --moe-backend triton, or"),
        ("olmoe", False, {"allow_overrides": True}, "for plans and usage choose a modular one with --moe-backend triton, or"),
    ],
    ids=["leaks", "usage", "plans"],
)
def test_a_kernel_that_cannot_be_controlled_stops_the_engine(family, leaks, routes, message, tiny_model, monkeypatch):
    as_monolithic(monkeypatch, leaks)
    with pytest.raises(RouteError, match=message), engine(tiny_model(family), routes, **SETTINGS.get(family, {})):
        pass


def test_observing_changes_nothing(tiny_model):
    folder = tiny_model("olmoe")
    policy = policy_for(shape_of(folder))
    for entry in policy["layers"].values():
        del entry["bias"]  # what it moves cannot be counted
    said = []
    for routes in ({"policy_mode": "observe"}, {"policy_mode": "observe", **LOGITS}):
        with engine(folder, {"policy": policy, **routes}) as llm:
            said.append((generate(llm, prompts(), [None] * 8, prompt_logprobs=0), counts(llm)))
    assert_same(said[0][0], said[1][0], tolerance=0)
    assert said[0][1] == said[1][1] and min(said[0][1]["displaced"]["observe"]) > 0


@pytest.mark.parametrize("when", [lambda tokens: tokens == 1, lambda tokens: tokens > 1], ids=["decode steps", "longer steps"])
def test_a_layer_that_does_not_ask_before_it_hands_logits_on(tiny_model, monkeypatch, when):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    own = MoERunner._forward_impl

    def _forward_impl(self, hidden_states, *args, **kwargs):
        bound = vars(self).get("_maybe_dispatch")
        if bound is None or self.layer_id != 1 or not when(len(hidden_states)):
            return own(self, hidden_states, *args, **kwargs)
        del self._maybe_dispatch
        try:
            return own(self, hidden_states, *args, **kwargs)
        finally:
            self._maybe_dispatch = bound

    monkeypatch.setattr(MoERunner, "_forward_impl", _forward_impl)
    routes = {"policy": policy_for(shape_of(tiny_model("olmoe"))), **LOGITS}
    with (
        pytest.raises(RouteError, match="MoE layer 1: its router is bound, but a warm-up step"),
        engine(tiny_model("olmoe"), routes),
    ):
        pass


@pytest.mark.v1_only
def test_nan_logits_are_counted_there_too(tiny_model, monkeypatch):
    routes = {"policy": policy_for(shape_of(tiny_model("olmoe"))), **LOGITS}
    with engine(tiny_model("olmoe"), routes) as llm:
        runner = runners(llm)[1]
        own, fourth = runner._maybe_dispatch, torch.tensor([4])
        broken = lambda states, logits: own(states, logits.index_fill(1, fourth, torch.nan))  # noqa: E731
        monkeypatch.setitem(vars(runner), "_maybe_dispatch", broken)
        output = generate(llm, [[5, 6, 7, 8]], [None], max_tokens=3)[0]
        assert counts(llm)["num_nan"] == [0, 4 + 2, 0]
        assert np.isfinite(chosen_logprobs(output)).all()
