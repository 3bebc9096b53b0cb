"""Hardened routing: a searched route is not the route of the next request; a forced one is."""

from __future__ import annotations

import argparse
import random

import numpy as np
import pytest
from engines import chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RouteError, RoutePlan, receipt_of
from vllm_unsafe_routes.engine.config import CONFIG_KEY, RouteConfig
from vllm_unsafe_routes.engine.flags import merge_cli_arguments

RETURN = {"return_routes": True}
SHAPE = ModelShape("olmoe", 3, 64, (0, 1, 2), num_experts=16, top_k=4)
JITTER = {"scale": 0.5, "seed": 7, "layers": [1]}


def prompt():
    return random_prompt(random.Random(2), 60, VOCAB_SIZE)


def routes(llm, *extras):
    """Sorted ids of each request in turn, [tokens, layers, top_k]."""
    return [np.sort(receipt_of(generate(llm, [prompt()], [extra])[0]).route_ids, axis=-1) for extra in extras]


def test_free_layers_move_and_forced_tokens_stay(tiny_model):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}, enable_prefix_caching=False) as llm:
        plain = generate(llm, [prompt()], [RETURN])[0]
        (clean,) = routes(llm, RETURN)
    plan = RoutePlan().force(1, "all", [2, 5, 7, 11]).disable(2, "all", [0, 1])
    own = {"allow_overrides": True, "jitter": JITTER}
    with engine(tiny_model("olmoe"), own, enable_prefix_caching=False) as llm:
        first, second = routes(llm, RETURN, RETURN)
        # Layer 0 comes before the noise; its prompt rows are the model's own.
        assert (first[:60, 0] == clean[:60, 0]).all()
        moved = (first[:60, 1] != clean[:60, 1]).any(-1)
        assert 0.05 < moved.mean() < 1
        assert (first[:60, 1] != second[:60, 1]).any(), "the same noise twice"
        assert chosen_logprobs(generate(llm, [prompt()], [None])[0]) != chosen_logprobs(plain)
        extra = plan.extra_args(return_routes=True)
        outputs = [generate(llm, [prompt()], [extra])[0] for _ in range(2)]
        for output in outputs:
            ids = np.sort(receipt_of(output).route_ids, axis=-1)
            assert (ids[:, 1] == [2, 5, 7, 11]).all()
            assert not np.isin(ids[:, 2], [0, 1]).any()
        # Only layer 1 has noise and there all is forced, so the request repeats bit for bit.
        assert chosen_logprobs(outputs[0]) == chosen_logprobs(outputs[1])


def test_noise_never_selects_a_banned_expert_and_its_seed_repeats_it(tiny_model):
    policy = {"version": "route-policy/1", "layers": {"1": {"disabled": [0, 1, 2, 3, 4, 5, 6, 7]}}}
    own = {"allow_overrides": True, "policy": policy, "jitter": {"scale": 50.0, "seed": 3}}

    def run(seed):
        own["jitter"]["seed"] = seed
        with engine(tiny_model("olmoe"), own, enable_prefix_caching=False) as llm:
            return routes(llm, RETURN, {**RoutePlan().disable(1, "all", [8]).extra_args(), **RETURN})

    once, again, other = run(3), run(3), run(4)
    for ids in (*once, *other):
        assert (ids[:, 1] > 7).all()
    assert (once[1][:, 1] > 8).all()
    assert all((one == two).all() for one, two in zip(once, again, strict=True))
    assert (once[0] != other[0]).any()


@pytest.mark.v2_only
def test_the_triton_kernel_inside_the_engine(tiny_model, monkeypatch):
    own = {"allow_overrides": True, "jitter": {"scale": 0.5, "seed": 5}}
    found = []
    for kernel in ("", "triton"):
        monkeypatch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", kernel)
        with engine(tiny_model("olmoe"), own, enable_prefix_caching=False) as llm:
            found.append(routes(llm, RETURN, RoutePlan().force(0, [3], [1, 2, 3, 4]).extra_args(return_routes=True)))
    for one, two in zip(*found, strict=True):
        assert (one == two).all()


@pytest.mark.parametrize(
    ("jitter", "message"),
    [
        ({}, "jitter scale must be a number above 0"),
        ({"scale": 0}, "jitter scale must be a number above 0 and at most 1000, got 0"),
        ({"scale": float("nan")}, "jitter scale must be a number above 0"),
        ({"scale": True}, "jitter scale must be a number above 0"),
        ({"scale": 1, "seed": -1}, "jitter seed must be an integer from 0"),
        ({"scale": 1, "layers": []}, "jitter layers must be a list of layer indices"),
        ({"scale": 1, "layers": 3}, "jitter layers must be a list of layer indices"),
        ({"scale": 1, "power": 2}, "jitter has unknown keys power"),
        (0.5, "jitter must be an object with a scale, got 0.5"),
    ],
    ids=str,
)
def test_bad_settings(jitter, message):
    with pytest.raises(RouteError, match=message):
        RouteConfig.from_dict({"jitter": jitter})


def test_a_layer_without_experts():
    with pytest.raises(RouteError, match="jitter layer 5 has no experts; MoE layers are 0-2"):
        RouteConfig.from_dict({"jitter": {"scale": 1, "layers": [5]}}).compiler(SHAPE)


def test_a_seed_is_drawn_once():
    first, second = (RouteConfig.from_dict({"jitter": {"scale": 1}}) for _ in range(2))
    assert first.jitter["seed"] != second.jitter["seed"]
    assert RouteConfig.from_dict(first.to_dict()) == first
    assert first.enabled
    assert not RouteConfig.from_dict({"jitter": None}).enabled


def test_the_flag():
    def merged(value, given=None):
        return merge_cli_arguments({CONFIG_KEY: given or {}}, argparse.Namespace(route_jitter=value))[CONFIG_KEY]

    assert merged("0.5") == {"jitter": {"scale": 0.5}}
    assert merged('{"scale": 0.5, "layers": [1]}') == {"jitter": {"scale": 0.5, "layers": [1]}}
    with pytest.raises(RouteError, match="--route-jitter must be a number or a JSON object, got 'much'"):
        merged("much")
    with pytest.raises(RouteError, match="are both given; keep one"):
        merged("0.5", {"jitter": {"scale": 1}})
