"""A policy on a real server: never bypassed, replaced under load, and gone with the engine rather than without it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field

import httpx
import numpy as np
import psutil
import pytest
from engines import random_prompt
from servers import server
from swaps import ADMIN, BANNED, NAME_OF, NUM_EXPERTS, NUM_LAYERS, PATH, POLICY, TOKEN, TOP_K, USAGE_PATH, eventually, put
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan
from vllm_unsafe_routes.receipt import Receipt

pytestmark = pytest.mark.v1_only  # server processes of their own

# So few KV blocks that a dozen requests preempt one another.
CROWDED = ("--num-gpu-blocks-override", "16", "--max-num-seqs", "12", "--max-num-batched-tokens", "64")


def start(tiny_model, folder, *flags):
    path = folder / "policy.json"
    path.write_text(json.dumps(POLICY["a"]))
    return server(
        tiny_model("olmoe"),
        folder / "log.txt",
        *("--route-policy", str(path), "--enable-route-overrides", *flags),
        VLLM_PLUGINS="unsafe_routes,unsafe_routes_admin",
        VLLM_UNSAFE_ROUTES_ADMIN_TOKEN=TOKEN,
    )


@pytest.fixture(scope="module")
def guarded(tiny_model, tmp_path_factory):
    with start(tiny_model, tmp_path_factory.mktemp("guarded"), *CROWDED, "--route-usage-labels", "counted") as started:
        yield started


@pytest.fixture
def under_a(guarded):
    """The server with policy a in force."""
    assert put(guarded, POLICY["a"], "enforce").status_code == 200
    return guarded


def active(started):
    answer = httpx.get(started.url + PATH, headers=ADMIN, timeout=60).json()
    return NAME_OF[answer["digest"]], answer["mode"]


def complete(started, prompt, plan=None, max_tokens=8, **xargs):
    if plan is not None:
        xargs["route_plan"] = plan.to_string() if isinstance(plan, RoutePlan) else plan
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"vllm_xargs": xargs, "detokenize": False, "return_token_ids": True}
    return httpx.post(f"{started.url}/v1/completions", json=body, timeout=180)


def receipt_of_answer(answer):
    assert answer.status_code == 200, answer.text
    return Receipt.from_dict(answer.json()["kv_transfer_params"]["unsafe_routes"])


def num_banned(receipt, name):
    return sum(int(np.isin(receipt.route_ids[:, layer], banned).sum()) for layer, banned in BANNED[name].items())


class TestEndpoint:
    @pytest.mark.parametrize(
        "headers", [{}, {"Authorization": "Bearer zorblay"}, {"Authorization": TOKEN}], ids=["no", "wrong", "bare"]
    )
    def test_who_has_no_token_is_refused(self, under_a, headers):
        assert put(under_a, POLICY["b"], headers=headers).status_code == 401
        answer = httpx.get(under_a.url + PATH, headers=headers)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert "digest" not in answer.text
        assert active(under_a) == ("a", "enforce")

    def test_a_swap_takes_effect_at_once(self, under_a):
        prompt = random_prompt(random.Random(3), 70, VOCAB_SIZE)
        before = receipt_of_answer(complete(under_a, prompt, return_routes=True))
        assert (NAME_OF[before.policy], num_banned(before, "a")) == ("a", 0)
        assert num_banned(before, "b") > 0
        said = put(under_a, POLICY["b"]).json()
        assert (NAME_OF[said["digest"]], NAME_OF[said["previous_digest"]], said["mode"]) == ("b", "a", "enforce")
        assert active(under_a) == ("b", "enforce")
        plain, routed = complete(under_a, prompt), complete(under_a, prompt, return_routes=True)
        assert (NAME_OF[receipt_of_answer(plain).policy], receipt_of_answer(plain).cached_tokens) == ("b", 0)
        assert num_banned(receipt_of_answer(routed), "b") == 0
        # Plans are checked under it, by the front end.
        answer = complete(under_a, prompt, RoutePlan().force(0, [1], [8, 9, 1, 2]))
        assert answer.status_code == 400
        assert "expert 8 is disabled by the engine's policy" in answer.text
        assert complete(under_a, prompt, RoutePlan().force(0, [1], [0, 1, 2, 3])).status_code == 200

    def test_a_plan_that_the_new_policy_forbids_ends_with_the_reason(self, under_a):
        prompt = random_prompt(random.Random(5), 20, VOCAB_SIZE)
        plan = RoutePlan().force(0, "generated", [8, 9, 10, 11])
        refused_before = under_a.metrics()['vllm:unsafe_routes_plans_refused_total{reason="swapped_out"}']
        with concurrent.futures.ThreadPoolExecutor() as pool:
            future = pool.submit(complete, under_a, prompt, plan, 230)
            eventually(lambda: under_a.metrics()['vllm:num_requests_running{engine="0"}'] > 0)
            said = put(under_a, POLICY["b"]).json()
            choice = future.result().json()["choices"][0]
        assert said["requests_aborted"] == 1
        assert choice["finish_reason"] == "abort"
        assert "the route policy was replaced by" in choice["stop_reason"]
        assert "layer 0, positions 'generated': expert 8 is disabled by the engine's policy" in choice["stop_reason"]
        eventually(lambda: under_a.metrics()['vllm:unsafe_routes_plans_refused_total{reason="swapped_out"}'] == refused_before + 1)

    def test_observe_over_http(self, under_a):
        prompt = random_prompt(random.Random(4), 30, VOCAB_SIZE)
        assert put(under_a, POLICY["a"], "observe").json()["mode"] == "observe"
        receipt = receipt_of_answer(complete(under_a, prompt, return_routes=True))
        assert (NAME_OF[receipt.policy], receipt.policy_mode) == ("a", "observe")
        assert num_banned(receipt, "a") > 0
        assert put(under_a, POLICY["a"], "watch").status_code == 400


FAULTS = {
    "truncated": (json.dumps(POLICY["b"]).encode()[:-20], "is not JSON"),
    "empty": (b"", "is not JSON"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "another model": ({**POLICY["b"], "model": "feedfacefeedface"}, "the policy is for model feedfacefeedface"),
    "bans too much": ({"version": "route-policy/1", "layers": {"1": {"disabled": list(range(13))}}}, "3 experts left, top_k 4"),
    "unknown layer": ({"version": "route-policy/1", "layers": {"9": {"disabled": [1]}}}, "policy layer 9 has no experts"),
    "unknown version": ({"version": "route-policy/3", "layers": {}}, "policy version 'route-policy/3'"),
    "no layers": ({"version": "route-policy/1"}, "policy layers must be an object"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_policy_changes_nothing_and_says_why(under_a, name):
    document, message = FAULTS[name]
    answer = put(under_a, document)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["message"].endswith("the old policy is in force")
    assert active(under_a) == ("a", "enforce")
    receipt = receipt_of_answer(
        complete(under_a, random_prompt(random.Random(1), 12, VOCAB_SIZE), max_tokens=2, return_routes=True)
    )
    assert (NAME_OF[receipt.policy], num_banned(receipt, "a")) == ("a", 0)


def test_a_body_that_breaks_off_changes_nothing(under_a):
    import socket

    body = json.dumps(POLICY["b"]).encode()
    host, port = under_a.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"PUT {PATH} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body[: len(body) // 2])
    time.sleep(0.3)
    assert active(under_a) == ("a", "enforce")


def test_the_metrics_of_a_policy(under_a):
    def sample(name, **labels):
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        return under_a.metrics().get(f"vllm:unsafe_routes_{name}" + ("{" + text + "}" if text else ""), 0.0)

    digests = {name: digest for digest, name in NAME_OF.items()}
    tokens, displaced = sample("tokens_total", mode="enforce"), sample("displaced_total", layer="0", mode="enforce")
    accepted, refused = sample("plans_accepted_total"), sample("plans_refused_total", reason="policy")
    prompt = random_prompt(random.Random(6), 50, VOCAB_SIZE)
    assert complete(under_a, prompt, RoutePlan().disable(1, "all", [0])).status_code == 200
    assert complete(under_a, prompt, RoutePlan().force(0, [1], [0, 1, 2, 3])).status_code == 400
    eventually(lambda: sample("plans_refused_total", reason="policy") == refused + 1)
    eventually(lambda: sample("tokens_total", mode="enforce") >= tokens + 57)
    assert displaced + 10 < sample("displaced_total", layer="0", mode="enforce") <= displaced + 57 * TOP_K
    assert sample("plans_accepted_total") == accepted + 1
    assert sample("policy_info", digest=digests["a"], mode="enforce") == 1
    assert sample("table_rows_in_use") == NUM_LAYERS
    assert sample("table_rows") == 65536
    put(under_a, POLICY["b"])
    assert sample("policy_info", digest=digests["a"], mode="enforce") == 0
    assert sample("policy_info", digest=digests["b"], mode="enforce") == 1
    assert sample("policy_swaps_total") > 0


def test_expert_usage_over_http_and_as_metrics(under_a):
    def usage(method, headers=ADMIN):
        return httpx.request(method, under_a.url + USAGE_PATH, headers=headers, timeout=60)

    assert usage("DELETE", {}).status_code == 401
    prompt = random_prompt(random.Random(7), 40, VOCAB_SIZE)
    complete(under_a, prompt)
    assert usage("DELETE").status_code == 200
    assert not np.any(usage("GET").json()["counts"])
    receipt = receipt_of_answer(complete(under_a, prompt, usage_label="counted", return_routes=True))
    expected = [np.bincount(receipt.route_ids[:, slot].ravel(), minlength=NUM_EXPERTS).tolist() for slot in range(NUM_LAYERS)]
    complete(under_a, prompt, max_tokens=2)
    found = usage("GET").json()
    assert found["layers"] == [0, 1, 2]
    assert found["by_label"] == {"counted": expected}
    assert sum(map(sum, found["counts"])) > sum(map(sum, expected))
    assert usage("DELETE").json() == found
    assert not np.any(usage("GET").json()["counts"])
    refused = complete(under_a, prompt, usage_label="other")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "usage_label")
    for slot, counts in enumerate(expected):
        for expert, count in enumerate(counts):
            sample = f'vllm:unsafe_routes_expert_tokens_total{{expert="{expert}",layer="{slot}",request_label="counted"}}'
            eventually(lambda sample=sample, count=count: under_a.metrics().get(sample, 0) == count)


@dataclass
class Tally:
    """What a load saw."""

    routings: int = 0
    banned: int = 0
    of_other: int = 0
    refused: int = 0
    aborted: int = 0
    cached: int = 0
    across_a_swap: int = 0
    swaps: int = 0
    late: int = 0
    by_policy: dict[str, int] = field(default_factory=lambda: {"a": 0, "b": 0})


def hostile_plan(rng, prompt_len):
    """A plan of somebody who wants a banned expert; which one is banned changes under way."""
    name, layer = rng.choice("ab"), rng.randrange(NUM_LAYERS)
    wanted = rng.sample(BANNED[name][layer], TOP_K)
    kind = rng.choice(["force", "force_all", "weights", "allow", "disable_rest", "native", "json", "delta"])
    span = rng.choice(["prompt", "generated", "all", [rng.randrange(prompt_len)]])
    if kind == "force":
        return {"plan": RoutePlan().force(layer, span, wanted)}
    if kind == "force_all":
        return {"plan": RoutePlan().force(layer, "all", wanted).force((layer + 1) % NUM_LAYERS, "all", wanted)}
    if kind == "weights":
        return {"plan": RoutePlan().force(layer, span, wanted, [0.25] * TOP_K)}
    if kind == "allow":
        return {"plan": RoutePlan().allow(layer, span, BANNED[name][layer])}
    if kind == "disable_rest":
        return {"plan": RoutePlan().disable(layer, span, [e for e in range(NUM_EXPERTS) if e not in BANNED[name][layer]])}
    if kind == "native":
        return {"plan": RoutePlan(weights="native").force(layer, span, wanted)}
    if kind == "delta":
        return {"route_delta": [layer, rng.randrange(prompt_len), *wanted]}
    return {"plan": RoutePlan().force(layer, span, wanted).to_json()}


def load(started, routings, workers, requests_between_swaps, seed=1):
    """Concurrent requests, hostile plans among them, until so many (layer, token) routings were seen, with swaps all the time."""
    rng = random.Random(seed)
    prefixes = [random_prompt(rng, length, VOCAB_SIZE) for length in (32, 64)]
    tally, lock, stop = Tally(), threading.Lock(), threading.Event()
    # Swaps are paced by what has ended, not by the clock: on a slow machine requests would start again and never end.
    ended = threading.Semaphore(0)
    # (time of acknowledgement, policy) of every swap; a request sent after the last one must run under it.
    acknowledged = [(0.0, active(started)[0])]

    def one(number):
        own = random.Random(f"{seed}-{number}")
        prompt = list(own.choice(prefixes)) if own.random() < 0.6 else []
        prompt += random_prompt(own, own.randrange(4, 40), VOCAB_SIZE)
        request = hostile_plan(own, len(prompt)) if own.random() < 0.5 else {}
        wants_routes = own.random() < 0.8
        if not request and own.random() < 0.3:
            request = {"plan": RoutePlan().disable(own.randrange(NUM_LAYERS), "all", [own.randrange(NUM_EXPERTS)])}
        with lock:
            num_known, (_, expected) = len(acknowledged), acknowledged[-1]
        answer = complete(started, prompt, max_tokens=own.randrange(8, 60), return_routes=wants_routes, **request)
        with lock:
            was_quiet = len(acknowledged) == num_known and not swapping.is_set()
        if answer.status_code == 400:
            with lock:
                tally.refused += 1
            return
        body = answer.json()
        assert answer.status_code == 200, answer.text
        if body["choices"][0]["finish_reason"] == "abort":
            assert "the route policy was replaced by" in body["choices"][0]["stop_reason"]
            with lock:
                tally.aborted += 1
            return
        receipt = Receipt.from_dict(body["kv_transfer_params"]["unsafe_routes"])
        name = NAME_OF[receipt.policy]
        with lock:
            tally.late += was_quiet and name != expected
            tally.cached += receipt.cached_tokens
            tally.across_a_swap += bool(receipt.earlier_policies)
            tally.by_policy[name] += 1
            if receipt.route_ids is not None:
                assert (receipt.route_ids >= 0).all()
                assert receipt.route_ids.shape == (len(prompt) + body["usage"]["completion_tokens"] - 1, NUM_LAYERS, TOP_K)
                tally.routings += receipt.route_ids.shape[0] * NUM_LAYERS
                tally.banned += num_banned(receipt, name)
                tally.of_other += num_banned(receipt, "b" if name == "a" else "a")

    swapping = threading.Event()

    def swap():
        names = ["b", "a"]
        while True:
            for _ in range(requests_between_swaps):
                ended.acquire()
            if stop.is_set():
                return
            name = names[tally.swaps % 2]
            with lock:
                swapping.set()
            assert put(started, {**POLICY[name], "model": "feedfacefeedface"}).status_code == 400
            answer = put(started, POLICY[name])
            assert answer.status_code == 200, answer.text
            with lock:
                acknowledged.append((time.monotonic(), name))
                swapping.clear()
                tally.swaps += 1

    with concurrent.futures.ThreadPoolExecutor(workers + 1) as pool:
        swapper = pool.submit(swap)
        number, pending = 0, set()
        try:
            while tally.routings < routings:
                while len(pending) < workers:
                    pending.add(pool.submit(one, number))
                    number += 1
                done, pending = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    future.result()
                    ended.release()
                if swapper.done():
                    swapper.result()
            for future in pending:
                future.result()
        finally:
            stop.set()
            ended.release(requests_between_swaps)
        swapper.result()
    return tally


def check_never_bypassed(started, routings, workers, requests_between_swaps):
    preempted = started.metrics()['vllm:num_preemptions_total{engine="0"}']
    tally = load(started, routings, workers, requests_between_swaps)
    preempted = started.metrics()['vllm:num_preemptions_total{engine="0"}'] - preempted
    print(f"{tally}, {preempted:.0f} preemptions")
    assert tally.routings >= routings
    assert tally.banned == 0, tally
    assert tally.late == 0, tally
    # The checks above could see something: each of the things that might break it has happened.
    assert tally.of_other > tally.routings
    assert min(tally.by_policy.values()) > 0
    assert tally.refused > 0
    assert tally.cached > 0
    assert tally.swaps >= 2
    assert tally.across_a_swap > 0
    assert preempted > 0
    return tally


def test_no_banned_expert_is_selected_under_load(under_a):
    check_never_bypassed(under_a, 6_000, workers=10, requests_between_swaps=12)


@pytest.mark.long
def test_no_banned_expert_is_selected_in_100000_routings(under_a):
    tally = check_never_bypassed(under_a, 100_000, workers=14, requests_between_swaps=25)
    assert tally.aborted > 0


def processes_of(started, what):
    children = psutil.Process(started.process.pid).children(recursive=True)
    return [child for child in children if what in " ".join(child.cmdline()) or what in child.name()]


def expect_the_end(started):
    """The server ends by itself, nothing of it is left, and nobody answers in its place."""
    started.process.wait(120)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{started.url}/health", timeout=5)


# Last: it ends the server of this file.
def test_a_killed_engine_core_takes_the_server_with_it(under_a):
    (core,) = processes_of(under_a, "EngineCore")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(complete, under_a, random_prompt(random.Random(1), 20, VOCAB_SIZE), None, 230)
        eventually(lambda: under_a.metrics()['vllm:num_requests_running{engine="0"}'] > 0)
        os.kill(core.pid, signal.SIGKILL)
        with contextlib.suppress(httpx.TransportError):  # the server may go first
            assert future.result().status_code >= 500
    expect_the_end(under_a)


@pytest.mark.long
def test_a_killed_worker_takes_the_server_with_it(tiny_model, tmp_path):
    flags = ("--tensor-parallel-size", "2", "--distributed-executor-backend", "mp")
    with start(tiny_model, tmp_path, *flags) as started:
        assert put(started, POLICY["b"]).status_code == 200
        prompt = random_prompt(random.Random(2), 20, VOCAB_SIZE)
        receipt = receipt_of_answer(complete(started, prompt, return_routes=True))
        assert (NAME_OF[receipt.policy], num_banned(receipt, "b")) == ("b", 0)
        workers = processes_of(started, "Worker")
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        expect_the_end(started)
