"""The metrics without an engine: names, increments, the dashboard and the document of them; and who may use the endpoint."""

from __future__ import annotations

import json
import re
import types
from collections import Counter
from pathlib import Path

import pytest

from vllm_unsafe_routes import RoutePolicy
from vllm_unsafe_routes.policy import ActivePolicy

pytestmark = pytest.mark.v1_only  # no runner is involved

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "unsafe-routes.json"
NAME = re.compile(r"vllm:unsafe_routes_\w+")
POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [3]}}}


def known():
    from vllm_unsafe_routes.engine.metrics import METRICS

    return {metric.name: metric for metric in METRICS}


def test_the_dashboard_shows_every_metric_and_no_other():
    board = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in NAME.findall(text)}
    assert named == set(known())
    for text in expressions:
        for labels in re.findall(r"by \(([^)]*)\)", text):
            used = {label.strip() for label in labels.split(",")}
            names = NAME.findall(text)
            assert any(used <= {*known()[name].labels, "model_name"} for name in names), text
    (query,) = [item["query"] for item in board["templating"]["list"] if item["name"] == "model_name"]
    assert set(NAME.findall(query)) <= set(known())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_document_lists_every_metric_with_its_labels():
    text = (ROOT / "docs" / "serving.md").read_text()
    rows = re.findall(r"^\| `(vllm:\w+)` \| (.*?) \|", text, re.MULTILINE)
    assert [(name, tuple(re.findall(r"`(\w+)`", labels))) for name, labels in rows] == [
        (metric.name, metric.labels) for metric in known().values()
    ]


@pytest.fixture
def exporter():
    from prometheus_client import REGISTRY

    from vllm_unsafe_routes.engine.metrics import Exporter

    made = Exporter("tiny", (1, 3))
    yield made
    for collector in made._made.values():
        REGISTRY.unregister(collector)


def sample(name, **labels):
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(f"vllm:unsafe_routes_{name}", {"model_name": "tiny", **labels})


def status(active, generation=0, tokens=0, displaced=(0, 0), **more):
    counts = {
        "tokens": {"enforce": tokens, "observe": 0},
        "displaced": {"enforce": list(displaced), "observe": [0, 0]},
        "missed": [0, tokens],
        "num_nan": [2, 0],
    }
    plain = dict(refused=0, table={"rows": [2, 64], "cells": [30, 900], "slots": [3, 8]}, held_requests=1, counts=counts)
    prompts = {"scored_prompts": 5, "flagged_prompts": 2}
    return {"active": active.to_dict(), "policy": active.digest, "generation": generation, **plain, **prompts, **more}


def test_states_become_increments(exporter):
    first = ActivePolicy(RoutePolicy.from_json(POLICY))
    second = ActivePolicy(first.policy, "observe")
    exporter.export_engine(status(first, tokens=10, displaced=(3, 1)))
    exporter.export_engine(status(first, tokens=10, displaced=(3, 1)))
    exporter.export_engine(status(second, generation=1, tokens=25, displaced=(7, 1), refused=2))
    assert sample("tokens_total", mode="enforce") == 25
    assert sample("tokens_total", mode="observe") is None
    assert sample("displaced_total", mode="enforce", layer="1") == 7
    assert sample("displaced_total", mode="enforce", layer="3") == 1
    assert [sample("router_misses_total", layer=layer) for layer in "13"] == [0, 25]
    assert [sample("nan_tokens_total", layer=layer) for layer in "13"] == [2, 0]
    assert sample("policy_info", digest=first.digest, mode="enforce") == 0
    assert sample("policy_info", digest=first.digest, mode="observe") == 1
    assert sample("plans_refused_total", reason="swapped_out") == 2
    assert sample("policy_swaps_total") == 1
    assert [sample(f"table_{part}") for part in ("rows_in_use", "rows", "cells_in_use", "cells")] == [2, 64, 30, 900]
    assert [sample(name) for name in ("table_slots_in_use", "table_slots", "held_requests")] == [3, 8, 1]
    assert [sample(f"{what}_prompts_total") for what in ("scored", "flagged")] == [5, 2]


def test_no_policy_counts_nothing(exporter):
    exporter.export_engine(status(ActivePolicy(), counts=None))
    exporter.export_front_end(types.SimpleNamespace(num_accepted=3, refused=Counter(policy=2)))
    exporter.export_front_end(types.SimpleNamespace(num_accepted=4, refused=Counter(policy=2, table=1)))
    assert sample("tokens_total", mode="enforce") is None
    assert sample("plans_accepted_total") == 4
    assert [sample("plans_refused_total", reason=reason) for reason in ("policy", "table", "invalid")] == [2, 1, 0]


def test_usage_becomes_increments(exporter):
    usage = {"labels": ["eval"], "layers": [1, 3], "counts": [[[5, 0], [2, 3]], [[0, 1], [0, 0]]]}
    exporter.export_usage({**usage, "counts": None})
    exporter.export_usage(usage)
    exporter.export_usage({**usage, "counts": [[[5, 0], [2, 4]], [[0, 1], [0, 0]]]})
    assert [sample("expert_tokens_total", layer="1", expert=expert, request_label="") for expert in "01"] == [5, None]
    assert [sample("expert_tokens_total", layer="3", expert=expert, request_label="") for expert in "01"] == [2, 4]
    assert sample("expert_tokens_total", layer="1", expert="1", request_label="eval") == 1


class Client:
    """An engine client that answers utility calls from a list."""

    core_engines = ("first",)

    def __init__(self, *answers):
        self.answers, self.calls = list(answers), []
        self.engine_core = self
        self.unsafe_routes_monitor = types.SimpleNamespace(refresh=self.refresh)
        self.vllm_config = types.SimpleNamespace(additional_config={"unsafe_routes": {"allow_overrides": True}})

    async def refresh(self):
        self.calls.append("refresh")

    async def call_utility_all_async(self, method, *arguments):
        self.calls.append(method)
        return [self.answers.pop(0) for _ in self.core_engines]

    async def _call_utility_async(self, method, *arguments, engine):
        self.calls.append((method, engine, arguments[-1]))
        return self.answers.pop(0)


@pytest.fixture
def site(monkeypatch):
    """`site(client, token)`: an HTTP client of an app with the endpoint."""
    import asyncio

    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from vllm_unsafe_routes.engine import admin, plugin

    def make(client, token="zorblax"):
        if token is None:
            monkeypatch.delenv(admin.TOKEN_ENV, raising=False)
        else:
            monkeypatch.setenv(admin.TOKEN_ENV, token)
        app, endpoint = FastAPI(), admin.PolicyEndpoint()
        endpoint.attach_router(app)
        asyncio.run(endpoint.init_state(client, app.state, types.SimpleNamespace()))
        return TestClient(app, headers={"Authorization": "Bearer zorblax"})

    plugin.register()
    return make


PATH = "/unsafe-routes/policy"
USAGE_PATH = "/unsafe-routes/usage"


def test_without_a_token_everything_is_refused(site):
    client = Client()
    for answer in (site(client, None).get(PATH), site(client, None).put(PATH, json=POLICY), site(client, "").get(PATH)):
        assert answer.status_code == 403
        assert "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN is not set" in answer.json()["error"]["message"]
    assert client.calls == []


def test_a_server_without_route_control_says_so(site):
    client = Client()
    client.vllm_config.additional_config = {}
    answer = site(client).put(PATH, json=POLICY)
    assert answer.status_code == 409
    assert "--route-policy PATH" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("kind", "code"), [("bad_policy", 400), ("conflict", 409)])
def test_what_the_engine_refuses(site, kind, code):
    client = Client({"error": "no", "kind": kind})
    answer = site(client).put(PATH, json=POLICY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (code, "no; the old policy is in force")
    assert client.calls == ["unsafe_routes_replace_policy"]


def test_the_front_end_follows_before_it_answers(site):
    said = {"policy": "new", "mode": "enforce", "previous": "old", "num_restarted": 3, "aborted": ["r"]}
    client = Client(said)
    answer = site(client).put(PATH, json=POLICY)
    assert client.calls == ["unsafe_routes_replace_policy", "refresh"]
    assert answer.json() == {
        "digest": "new",
        "mode": "enforce",
        "previous_digest": "old",
        "requests_restarted": 3,
        "requests_aborted": 1,
    }


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_usage_is_refused_like_the_policy(site, method):
    assert site(Client(), None).request(method, USAGE_PATH).status_code == 403
    client = Client({"error": "not counted", "kind": "conflict"})
    answer = site(client).request(method, USAGE_PATH)
    assert (answer.status_code, answer.json()["error"]["message"]) == (409, "not counted")
    assert client.calls == ["unsafe_routes_usage"]


def test_several_cores_are_asked_for_a_claim_and_answer_as_one(site):
    parts = [{"policy": "new", "mode": "enforce", "previous": "old", "num_restarted": n, "aborted": ["r"] * n} for n in (1, 2)]
    client = Client({}, *parts, {"error": "another", "kind": "conflict"})
    client.core_engines = ("first", "second")
    visitor = site(client)
    answer = visitor.put(PATH, json=POLICY).json()
    assert (answer["requests_restarted"], answer["requests_aborted"]) == (3, 3)
    assert visitor.put(PATH, json=POLICY).status_code == 409
    claim = ("unsafe_routes_replace_policy", "first", "claim")
    assert client.calls == [claim, "unsafe_routes_replace_policy", "refresh", claim]


def test_the_states_of_several_cores_are_one():
    import asyncio

    from vllm_unsafe_routes.engine.data_parallel import status_of_all

    active = ActivePolicy(RoutePolicy.from_json(POLICY))
    client = Client(status(active, 1, tokens=10, displaced=(3, 1)), status(active, 2, counts=None, refused=4))
    client.core_engines = ("first", "second")
    merged = asyncio.run(status_of_all(client))
    assert (merged["generation"], merged["refused"], merged["table"]["rows"], merged["table"]["slots"]) == (2, 4, [4, 128], [6, 16])
    assert merged["counts"]["displaced"] == {"enforce": [3, 1], "observe": [0, 0]}


def test_a_body_without_end(site, monkeypatch):
    from vllm_unsafe_routes.engine import admin

    monkeypatch.setattr(admin, "MAX_BODY_BYTES", 100)
    client = Client()
    answer = site(client).put(PATH, content=b" " * 101)
    assert (answer.status_code, client.calls) == (400, [])
    assert "larger than 100 bytes" in answer.json()["error"]["message"]


def test_the_endpoint_without_the_plugin_that_controls_routes_stops_the_start(site, monkeypatch):
    from vllm_unsafe_routes.engine import admin

    monkeypatch.setattr(admin, "is_registered", lambda: False)
    with pytest.raises(RuntimeError, match="but not unsafe_routes, which controls the routes; name both"):
        site(Client())
