"""Random plans of every kind, for any model."""

from __future__ import annotations

import random

from vllm_unsafe_routes import LayerPolicy, ModelShape, RoutePlan, RoutePolicy


def random_plan(rng: random.Random, shape: ModelShape, prompt_len: int) -> RoutePlan:
    """One to four directives of every kind and span; always valid for a prompt of `prompt_len` tokens."""
    native = shape.native_weights and rng.random() < 0.3
    plan = RoutePlan(weights="native" if native else "masked", model=rng.choice([None, shape.fingerprint]))
    experts, top_k = range(shape.num_experts), shape.top_k
    for layer in rng.sample(shape.moe_layers, rng.randrange(1, len(shape.moe_layers) + 1)):
        kind = rng.choice(["disable", "allow", "force", "force_all", "mixed", "weights", "soft", "soft"])
        some = sorted(rng.sample(range(prompt_len), min(prompt_len, rng.randrange(1, 6))))
        span = rng.choice(["prompt", "generated", "all", some])
        if kind == "disable":
            plan.disable(layer, span, rng.sample(experts, rng.randrange(1, shape.num_experts - top_k + 1)))
        elif kind == "allow":
            plan.allow(layer, span, rng.sample(experts, rng.randrange(top_k, shape.num_experts)))
        elif kind == "force":
            for position in some:
                plan.force(layer, [position], rng.sample(experts, top_k))
        elif kind == "force_all":
            plan.force(layer, span, rng.sample(experts, top_k))
        elif kind == "weights":
            plan.force(layer, span, rng.sample(experts, top_k), [rng.uniform(0.05, 0.6) for _ in range(top_k)])
        elif kind == "soft":
            _add_soft(rng, plan, layer, (span, some), range(shape.num_experts), top_k)
        else:
            banned = rng.sample(experts, 1)
            plan.disable(layer, "all", banned)
            left = [expert for expert in experts if expert not in banned]
            plan.force(layer, some, rng.sample(left, top_k))
    return plan


def _add_soft(rng: random.Random, plan: RoutePlan, layer: int, spans: tuple[object, object], experts: range, top_k: int) -> None:
    """A bias, promoted and demoted experts, two or all of these together, over a mask now and then."""
    first, second, *left = rng.sample(experts, len(experts))
    wishes = rng.sample(["bias", "promote", "demote", "disable"], rng.randrange(1, 5))
    span, other = rng.sample(spans, 2)
    if "bias" in wishes:
        plan.bias(layer, span, {expert: rng.uniform(-3, 3) for expert in rng.sample(experts, rng.randrange(1, len(experts)))})
        plan.bias(layer, other, {first: rng.uniform(-3, 3)})
    if "promote" in wishes and top_k > 1:
        plan.promote(layer, span, [first])
        if top_k > 2:
            plan.promote(layer, other, [first, left[0]])
    if "demote" in wishes:
        plan.demote(layer, span, rng.sample(left[1:], rng.randrange(1, len(left))))
    if "disable" in wishes and len(left) > top_k:
        plan.disable(layer, other, [second])


def random_biases(rng: random.Random, shape: ModelShape, weights: str) -> RoutePolicy:
    """A policy that biases half of the experts of every layer, and bans none."""
    half = shape.num_experts // 2
    return RoutePolicy(
        {
            layer: LayerPolicy(bias={expert: rng.uniform(-3, 3) for expert in rng.sample(range(shape.num_experts), half)})
            for layer in shape.moe_layers
        },
        weights,
    )
