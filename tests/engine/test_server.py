"""A real `api_server` process on loopback, driven by the `openai` client."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import random

import openai
import pytest
from engines import random_prompt
from oracle import Oracle
from servers import server
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan, receipt_of

pytestmark = pytest.mark.v1_only  # a server process of its own

POLICY = {
    "version": "route-policy/1",
    "layers": {"1": {"disabled": [3], "protected": [5]}, "2": {"disabled": [0, 1]}},
}


def complete(client, prompt, plan=None, **xargs):
    """One completion of token ids; `plan` may be a RoutePlan or any raw value."""
    if plan is not None:
        xargs["route_plan"] = plan.to_string() if isinstance(plan, RoutePlan) else plan
    return client.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=5,
        temperature=0,
        logprobs=0,
        extra_body={"vllm_xargs": xargs, "return_tokens_as_token_ids": True, "detokenize": False, "ignore_eos": True},
    )


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(random.Random(2), 40, VOCAB_SIZE)


@pytest.fixture(scope="module")
def started(tiny_model, tmp_path_factory):
    """A server with a policy and with overrides."""
    folder = tmp_path_factory.mktemp("server")
    policy = folder / "policy.json"
    policy.write_text(json.dumps(POLICY))
    flags = ("--route-policy", str(policy), "--enable-route-overrides", "--router-logits-mib", "1", "--additional-config")
    settings = '{"unsafe_routes": {"route_table_rows": 40}}'
    with server(tiny_model("olmoe"), folder / "log.txt", *flags, settings, VLLM_LOGGING_LEVEL="INFO") as started:
        yield started


@pytest.fixture(scope="module")
def guarded(started):
    """Its client."""
    return started.client


def test_the_engine_s_process_says_that_routes_are_controlled(started):
    """The sign of life that README tells users to look for, among vLLM's own lines and in their form."""
    (line,) = [line for line in started.log.read_text().splitlines() if "Route control: " in line]
    assert "INFO" in line and "APIServer" not in line
    assert "3 MoE layers bound (3 here), 16 experts, top 4, policy " in line and "(enforce), overrides on" in line


def test_a_plan_is_accepted_and_has_a_receipt(guarded, prompt):
    plan = RoutePlan().force(1, [3, 4], [5, 7, 9, 11]).disable(0, "all", [2])
    planned, plain = complete(guarded, prompt, plan, return_routes=True), complete(guarded, prompt)
    receipt = receipt_of(planned)
    assert receipt.plan == plan.digest
    assert receipt.policy is not None
    assert receipt.routes_set == 2 + len(prompt) + 4
    assert receipt.route_ids.shape == (len(prompt) + 4, 3, 4)
    assert sorted(receipt.route_ids[3, 1].tolist()) == [5, 7, 9, 11]
    assert not (receipt.route_ids[:, 0] == 2).any()
    assert not (receipt.route_ids[:, 1] == 3).any()
    assert not (receipt.route_ids[:, 2] <= 1).any()
    assert planned.choices[0].logprobs.token_logprobs != plain.choices[0].logprobs.token_logprobs
    assert (receipt_of(plain).plan, receipt_of(plain).policy) == (None, receipt.policy)


def test_router_logits_come_back_and_have_a_limit(guarded, prompt, tiny_model):
    oracle = Oracle(tiny_model("olmoe"))
    receipt = receipt_of(complete(guarded, prompt, return_router_logits=[0], router_logits_start=30))
    expected = oracle.router_logits(prompt, len(prompt), None)[30:, :1].numpy()  # the first layer's depend on no route
    assert receipt.router_logits.shape == (len(prompt) + 4 - 30, 1, 16)
    assert receipt.router_logits[: len(expected)] == pytest.approx(expected, abs=1e-4)
    xargs = {"return_router_logits": True}
    with pytest.raises(openai.BadRequestError) as caught:
        guarded.completions.create(model="tiny", prompt=prompt, max_tokens=200, n=32, extra_body={"vllm_xargs": xargs})
    message = "return_router_logits: 239 tokens x 3 layers x 16 experts of 32 samples are 1.4 MiB, more than router_logits_mib 1"
    assert message in str(caught.value.body) and caught.value.param == "return_router_logits"


def many_routes(count):
    plan = RoutePlan()
    for position, experts in enumerate(itertools.islice(itertools.combinations(range(16), 4), count)):
        plan.force(0, [position], experts)
    return plan


BAD = {
    "layer without experts": (RoutePlan().disable(7, "all", [1]), "layer 7 has no experts; MoE layers are 0-2"),
    "expert out of range": (
        RoutePlan().force(1, [17], [5, 6, 7, 64]),
        "layer 1, position 17: expert 64 is out of range for 16 experts (0-15)",
    ),
    "wrong number forced": (
        RoutePlan().force(1, [17], [5, 6]),
        "layer 1, position 17: 2 forced experts, exactly top_k 4",
    ),
    "two forces": (
        RoutePlan().force(0, [1], [1, 2, 3, 4]).force(0, "all", [5, 6, 7, 8]),
        "two forces for one (layer, position)",
    ),
    "position past the prompt": (
        RoutePlan().force(0, [40], [1, 2, 3, 4]),
        "layer 0, position 40: the prompt has 40 tokens (0-39)",
    ),
    "too few left": (RoutePlan().allow(0, "all", [1, 2, 3]), "3 experts left, top_k 4 are needed"),
    "another model": (
        RoutePlan(model="feedfacefeedface").disable(0, "all", [1]),
        "the plan is for model feedfacefeedface",
    ),
    "forces a banned expert": (RoutePlan().force(1, [0], [3, 5, 7, 9]), "expert 3 is disabled by the engine's policy"),
    "excludes a protected one": (RoutePlan().disable(1, "all", [5]), "expert 5 is protected by the engine's policy"),
    "too many routes": (many_routes(39), "39 distinct routes, more than the 38 that the route table holds"),
    "unknown key": ('{"version": "route-plan/1", "directives": [], "speed": 3}', "plan has unknown keys speed"),
    "unknown version": ('{"version": "route-plan/9"}', "plan version 'route-plan/9' is not 'route-plan/1' or 'route-plan/2'"),
    "repeated expert": (
        '{"version": "route-plan/1", "directives": [{"layer": 0, "positions": "all", "disable": [1, 1]}]}',
        "expert 1 is repeated",
    ),
    "damaged": (RoutePlan().disable(0, "all", [1]).to_string()[:-9], "damaged"),
    "not a plan": ("zorblax", "expected 'rp1:' or 'rp2:' or a JSON object"),
    "not a string": (7, "route_plan must be a string"),
}


def test_each_bad_plan_is_a_400_while_others_go_on(guarded, prompt):
    good = RoutePlan().disable(0, "all", [2])
    expected = complete(guarded, prompt, good).choices[0].logprobs.tokens

    def attempt(name):
        with pytest.raises(openai.BadRequestError) as caught:
            complete(guarded, prompt, BAD[name][0])
        return name, caught.value.status_code, str(caught.value.body)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        going_on = [pool.submit(complete, guarded, prompt, good) for _ in range(12)]
        for name, status, body in pool.map(attempt, BAD):
            assert status == 400
            assert BAD[name][1] in body, (name, body)
        for future in going_on:
            assert future.result().choices[0].logprobs.tokens == expected


def test_beam_search_refuses_a_plan_and_goes_on_without_one(guarded, prompt):
    """vLLM gives the inner requests of a beam search no extra arguments: the plan would be dropped."""
    plan = RoutePlan().disable(0, "all", [1]).to_string()
    with pytest.raises(openai.BadRequestError, match="route_plan cannot be honoured with use_beam_search"):
        guarded.completions.create(
            model="tiny", prompt=prompt, max_tokens=2, extra_body={"use_beam_search": True, "vllm_xargs": {"route_plan": plan}}
        )


def test_several_samples_of_one_plan(guarded, prompt):
    plan = RoutePlan().disable(2, "all", [9])
    answer = guarded.completions.create(
        model="tiny",
        prompt=prompt,
        max_tokens=3,
        n=3,
        temperature=0.7,
        seed=1,
        extra_body={
            "vllm_xargs": {"route_plan": plan.to_string()},
            "detokenize": False,
            "return_tokens_as_token_ids": True,
        },
        logprobs=0,
    )
    assert len(answer.choices) == 3
    assert receipt_of(answer).plan == plan.digest


def test_overrides_are_off_unless_enabled(tiny_model, tmp_path, prompt):
    with server(tiny_model("olmoe"), tmp_path / "log.txt") as started:
        client = started.client
        with pytest.raises(openai.BadRequestError, match="start the server with --enable-route-overrides"):
            complete(client, prompt, RoutePlan().disable(0, "all", [2]))
        assert complete(client, prompt).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        (json.dumps({**POLICY, "model": "feedfacefeedface"}), "the policy is for model feedfacefeedface"),
        (json.dumps({"version": "route-policy/1", "layers": {"0": {"disabled": list(range(13))}}}), "3 experts left"),
    ],
    ids=["missing", "truncated", "another model", "bans too much"],
)
def test_a_bad_policy_stops_the_start(tiny_model, tmp_path, content, message):
    policy = tmp_path / "policy.json"
    if content is not None:
        policy.write_text(content)
    with (
        pytest.raises(AssertionError, match=message),
        server(tiny_model("olmoe"), tmp_path / "log.txt", "--route-policy", str(policy)),
    ):
        pass
