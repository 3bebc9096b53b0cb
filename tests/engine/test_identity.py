"""Where nobody asks for anything, nothing changes: bitwise against stock vLLM for the same batch."""

import random

import pytest
from batch_runner import run_batch
from engines import random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan


@pytest.fixture(scope="module")
def job(tiny_model):
    rng = random.Random(3)
    prompts = [random_prompt(rng, rng.randrange(8, 64), VOCAB_SIZE) for _ in range(16)]
    sampling = {"prompt_logprobs": 0, "max_tokens": 8}
    return {
        "model": str(tiny_model("olmoe")),
        "routes": None,
        "settings": {"enable_prefix_caching": False},
        "prompts": prompts,
        "extras": [None] * len(prompts),
        "sampling": sampling,
    }


@pytest.fixture(scope="module")
def stock(job, tmp_path_factory):
    return run_batch(job, tmp_path_factory.mktemp("stock"), VLLM_UNSAFE_ROUTES_DISABLE="1")


def test_installed_but_unconfigured(job, stock, tmp_path):
    assert run_batch(job, tmp_path) == stock


def test_overrides_enabled_but_unused(job, stock, tmp_path):
    assert run_batch({**job, "routes": {"allow_overrides": True}}, tmp_path) == stock


def test_plan_less_requests_beside_planned_ones(job, stock, tmp_path):
    """Half of the requests get a plan that moves no token to another expert set size: the others must not notice."""
    plan = RoutePlan().disable(1, "all", [0, 1, 2]).force(2, [1, 3], [4, 5, 6, 7])
    plan.bias(0, "all", {2: 3.0, 5: -3.0}).promote(2, "generated", [9]).demote(0, "prompt", [1, 2])
    extras = [plan.extra_args() if at % 2 else None for at in range(len(job["prompts"]))]
    mixed = run_batch({**job, "routes": {"allow_overrides": True}, "extras": extras}, tmp_path)
    assert mixed[0::2] == stock[0::2]
    assert all(one["logprobs"] != other["logprobs"] for one, other in zip(mixed[1::2], stock[1::2], strict=True))
    assert all(one["receipt"]["plan"] == plan.digest for one in mixed[1::2])


def test_the_off_switch_switches_off(job, stock, tmp_path):
    routes = {"policy": {"version": "route-policy/1", "layers": {"0": {"disabled": [0, 1, 2, 3]}}}}
    off = run_batch({**job, "routes": routes}, tmp_path / "off", VLLM_UNSAFE_ROUTES_DISABLE="1")
    assert off == stock
    on = run_batch({**job, "routes": routes}, tmp_path / "on")
    assert on != stock
