"""Whatever stands where a number, a string or a list belongs: the answer is a `RouteError` that names it, nothing else."""

from __future__ import annotations

import contextlib
import json

import pytest

from vllm_unsafe_routes import RouteError, RoutePlan, RoutePolicy
from vllm_unsafe_routes.compiler import PlanCompiler
from vllm_unsafe_routes.engine.config import RouteConfig
from vllm_unsafe_routes.extras import RouteExtras
from vllm_unsafe_routes.jitter import Jitter
from vllm_unsafe_routes.shape import ModelShape

HOSTILE = {
    "infinite": float("inf"),
    "minus infinite": float("-inf"),
    "not a number": float("nan"),
    "negative": -1,
    "2^31": 1 << 31,
    "2^63": 1 << 63,
    "400 digits": 10**400,
    "a fraction": 1.5,
    "true": True,
    "null": None,
    "text": "zorblax",
    "digits": "9" * 5000,
    "a list": [[1]],
    "an object": {"a": 1},
    "empty": [],
}
PLAN = json.loads(RoutePlan().force(1, [3], [0, 1], [0.5, 0.5]).disable(0, "all", [2]).to_json())
POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [3], "protected": [5]}}, "weights": "masked"}
BIASED = {"version": "route-policy/2", "layers": {"1": {"disabled": [3], "bias": {"5": 0.5}}}}
SHAPE = ModelShape.from_hf_config(
    {"model_type": "mixtral", "num_hidden_layers": 4, "num_local_experts": 8, "num_experts_per_tok": 2}
)
READERS = {
    "plan": (PLAN, lambda document: PlanCompiler(SHAPE).compile(RoutePlan.from_json(document))),
    "plan as text": (PLAN, lambda document: RoutePlan.from_json(json.dumps(document))),
    "policy": (POLICY, lambda document: RoutePolicy.from_json(document).validate(SHAPE)),
    "biased policy": (BIASED, lambda document: PlanCompiler(SHAPE, RoutePolicy.from_json(document)).policy_rows()),
    "policy as text": (POLICY, lambda document: RoutePolicy.from_json(json.dumps(document))),
    "settings": ({"policy": POLICY, "allow_overrides": True, "route_table_rows": 5}, RouteConfig.from_dict),
    "noise": ({"scale": 0.5, "seed": 3, "layers": [1]}, lambda document: Jitter.from_dict(document).validate(SHAPE)),
    "request": (
        {"route_plan": "x", "route_delta": [1, 2, 0, 1], "return_routes": True, "routes_start": 3, "score_tokens": [1, 1, 5]},
        RouteExtras.parse,
    ),
    "router logits": (
        {"return_router_logits": [1, 2], "router_logits_start": 3, "router_logits_end": 9},
        RouteExtras.parse,
    ),
}


def variants(document, value):
    """The document with each of its values, in turn, replaced; and each of its keys."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, held in items:
        whole = dict(document) if isinstance(document, dict) else list(document)
        whole[key] = value
        yield whole
        if isinstance(held, dict | list):
            for inner in variants(held, value):
                whole = dict(document) if isinstance(document, dict) else list(document)
                whole[key] = inner
                yield whole
    if isinstance(document, dict) and isinstance(value, str | int | float):
        for key in document:
            yield {value if other == key else other: held for other, held in document.items()}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("name", READERS)
def test_nothing_but_a_route_error(name, hostile):
    document, read = READERS[name]
    read(document)
    for variant in variants(document, HOSTILE[hostile]):
        with contextlib.suppress(RouteError):
            read(variant)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"route_delta": [0, 0, float("inf"), 2, 3, 4]}, "route_delta[2] must be an integer from 0 to 2147483647, got inf"),
        ({"route_delta": [0, float("nan")]}, "route_delta[1] must be an integer from 0 to 2147483647, got nan"),
        ({"route_delta": [1 << 31]}, "route_delta[0] must be an integer from 0 to 2147483647, got 2147483648"),
        ({"score_tokens": [3, 1, -1]}, "score_tokens[2] must be an integer from 0 to 2147483647, got -1"),
        ({"score_tokens": [3, float("-inf"), 1]}, "score_tokens[1] must be an integer from 0 to 2147483647, got -inf"),
        ({"routes_start": 5}, "routes_start needs return_routes"),
        ({"return_routes": 1, "routes_start": float("inf")}, "routes_start must be an integer from 0 to 2147483647, got inf"),
        ({"return_routes": 1, "routes_start": True}, "routes_start must be an integer from 0 to 2147483647, got True"),
        ({"return_routes": float("nan")}, "return_routes must be true or false, got nan"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_limit(extra, message):
    with pytest.raises(RouteError) as caught:
        RouteExtras.parse(extra)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "extra",
    [{"return_routes": False}, {"return_routes": 0}, {"return_routes": "false"}, {"route_delta": [], "score_tokens": None}, {}],
)
def test_false_is_nothing(extra):
    assert RouteExtras.parse(extra) is None
