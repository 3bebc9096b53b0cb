"""Hostile hours: a policy under everything at once, and whatever can be sent as a plan.

UNSAFE_ROUTES_ROUTINGS and UNSAFE_ROUTES_FUZZED say how much; a million of each unless they are set.
"""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import json
import os
import random
import threading
import time
import zlib
from collections import Counter

import httpx
import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from servers import server
from swaps import ADMIN, TOKEN, USAGE_PATH, eventually, put

from vllm_unsafe_routes import RoutePlan, RoutePolicy, receipt_of, receipts_of
from vllm_unsafe_routes.extras import KEYS
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.lab.language import vocabulary

pytestmark = [pytest.mark.v1_only, pytest.mark.long, pytest.mark.timeout(0)]  # server processes of their own, for hours

NUM_ROUTINGS = int(os.environ.get("UNSAFE_ROUTES_ROUTINGS", 10**6))
NUM_FUZZED = int(os.environ.get("UNSAFE_ROUTES_FUZZED", 10**6))
NUM_LAYERS, NUM_EXPERTS, TOP_K, NUM_WORKERS = 4, 16, 4, 12
# Each policy bans what the other leaves, beside what both ban.
BOTH = {0: [5], 3: [9, 10]}
BANNED = {"a": {**BOTH, 1: [0, 1, 2, 3], 2: [8, 9, 10]}, "b": {**BOTH, 1: [4, 5, 6, 7], 2: [0, 15]}}
POLICY = {
    name: {"version": "route-policy/1", "layers": {str(layer): {"disabled": experts} for layer, experts in banned.items()}}
    for name, banned in BANNED.items()
}
NAME_OF = {RoutePolicy.from_json(document).digest: name for name, document in POLICY.items()}
NGRAM = json.dumps({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3})
# So few KV blocks that requests preempt one another.
CROWDED = ("--num-gpu-blocks-override", "24", "--max-num-seqs", "10", "--max-num-batched-tokens", "128")


def start(folder, *flags):
    path = folder / "policy.json"
    path.write_text(json.dumps(POLICY["a"]))
    environment = {"VLLM_PLUGINS": "unsafe_routes,unsafe_routes_admin", "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN": TOKEN}
    flags = ("--api-server-count", "2", "--route-policy", str(path), "--no-skip-tokenizer-init", *CROWDED, *flags)
    return server(model_path(), folder / "log.txt", *flags, **environment)


def memory(started):
    """Bytes that all processes of the server hold for themselves."""
    root = psutil.Process(started.process.pid)
    return sum(process.memory_full_info().uss for process in (root, *root.children(recursive=True)))


def check_that_all_is_given_back(started, num_rows):
    def values(name):
        return [value for sample, value in started.metrics().items() if sample.startswith(name)]

    eventually(lambda: not any(values("vllm:num_requests_running") + values("vllm:num_requests_waiting")), 120)
    eventually(lambda: set(values("vllm:unsafe_routes_table_rows_in_use")) == {num_rows}, 60)
    assert not any(values("vllm:unsafe_routes_table_cells_in_use") + values("vllm:unsafe_routes_table_slots_in_use"))
    assert not any(values("vllm:unsafe_routes_held_requests") + values("vllm:unsafe_routes_router_misses"))
    assert not any(values("vllm:kv_cache_usage_perc"))


def one_request(client, url, rng, tally):
    """A request of a random kind; its receipts must name a policy that was in force."""
    words = vocabulary()
    half = " ".join(words[:20]) if rng.random() < 0.4 else " ".join(rng.choice(words) for _ in range(rng.randrange(2, 18)))
    body = {"model": "tiny", "prompt": f"{half} {half}", "max_tokens": rng.randrange(1, 50), "temperature": rng.choice([0, 1.0])}
    body |= {"ignore_eos": True, "n": 1 if body["temperature"] == 0 else rng.choice([1, 1, 2])}
    if rng.random() < 0.4:
        body["stop"] = rng.sample(words, 3)
    kind = rng.choice(["whole", "whole", "stream", "abort"])
    tally[kind] += 1
    if kind == "whole":
        answer = client.post(f"{url}/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        said = answer.json()
        found = receipts_of(said) if body["n"] > 1 else [receipt_of(said)]
        assert len(found) == body["n"]
        assert {NAME_OF[receipt.policy] for receipt in found} <= set(BANNED)
        tally.update(choice["finish_reason"] for choice in said["choices"])
        tally["cached tokens"] += sum(receipt.cached_tokens for receipt in found)
        return
    with client.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        stops_at = rng.randrange(1, 6) if kind == "abort" else None
        for number, line in enumerate(answer.iter_lines()):
            assert '"error"' not in line, line
            if number == stops_at:
                return


def test_no_banned_expert_in_hours_of_everything(tmp_path):
    """Speculation, prefix hits, preemption, aborts, stop strings, samples and swaps, behind two API servers."""
    tally, counted, wrong = Counter(), 0, 0
    with start(tmp_path, "--speculative-config", NGRAM, "--route-usage") as started:
        over = threading.Event()

        def work(seed):
            rng = random.Random(seed)
            with httpx.Client(timeout=180) as client:
                while not over.is_set():
                    one_request(client, started.url, rng, tally)

        def usage(method):
            return np.array(httpx.request(method, started.url + USAGE_PATH, headers=ADMIN, timeout=180).json()["counts"])

        def picks(counts, banned):
            return sum(int(counts[layer, experts].sum()) for layer, experts in banned.items())

        began, at_first, name = time.monotonic(), None, "a"
        with concurrent.futures.ThreadPoolExecutor(NUM_WORKERS) as pool:
            workers = [pool.submit(work, seed) for seed in range(NUM_WORKERS)]
            try:
                while counted < NUM_ROUTINGS:
                    wrong += picks(usage("DELETE"), BOTH)
                    time.sleep(15)
                    counts = usage("GET")
                    wrong += picks(counts, BANNED[name])
                    counted += int(counts.sum()) // TOP_K
                    assert not any(worker.done() for worker in workers)
                    if at_first is None and counted > NUM_ROUTINGS // 5:
                        at_first = memory(started)
                    name = "b" if name == "a" else "a"
                    answer = put(started, POLICY[name])
                    assert answer.status_code == 200, answer.text
                    tally["swaps"] += 1
                    tally["carried over"] += answer.json()["requests_restarted"]
            finally:
                over.set()
            for worker in workers:
                worker.result()
        check_that_all_is_given_back(started, len(BANNED[name]))
        at_last = memory(started)
        accepted = sum(value for sample, value in started.metrics().items() if "num_accepted_tokens_total" in sample)
    seconds = time.monotonic() - began
    print(f"\n{counted} routings in {seconds:.0f} s, {wrong} of banned experts; {dict(tally)}; {accepted:.0f} drafts accepted;")
    print(f"memory {at_first / 2**20:.0f} MiB after a fifth, {at_last / 2**20:.0f} MiB at the end")
    assert wrong == 0
    assert min(tally[what] for what in ("whole", "stream", "abort", "stop", "length", "cached tokens", "swaps")) > 0 < accepted
    assert at_last < 1.1 * at_first + (64 << 20)


GOOD = RoutePlan().disable(1, "all", [4, 5]).force(2, [0, 1], [1, 2, 3, 4]).allow(3, "prompt", [0, 1, 2, 3, 4, 5])
MESSAGES = [{"role": "user", "content": vocabulary()[0]}]
JSON = {"Content-Type": "application/json"}
SCALARS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from([0, 1, -1, 3, 15, 16, 2**31, 1e308, "", "true"]),
)


@st.composite
def broken_json(draw):
    """The readable form with one part replaced by anything, or left out."""
    document = json.loads(GOOD.to_json())
    objects = st.dictionaries(st.text(max_size=5), SCALARS, max_size=2)
    value = draw(st.one_of(st.none(), SCALARS, st.lists(SCALARS, max_size=4), objects))
    part = draw(st.sampled_from([document, *document["directives"]]))
    key = draw(st.sampled_from([*part, "more"]))
    if draw(st.booleans()):
        part[key] = value
    else:
        part.pop(key, None)
    return json.dumps(document)


@st.composite
def positions_and_experts(draw):
    """A plan of the right form, whatever it asks for; many are fine."""
    limits = draw(st.sampled_from([-1, 0, 0])), draw(st.sampled_from([2, 15, 15, 20]))
    numbers = st.lists(st.integers(*limits), unique=True, max_size=6)
    entry = {
        "layer": draw(st.sampled_from([0, 1, 2, 3, 3, -1, 4])),
        "positions": draw(st.one_of(st.sampled_from(["all", "prompt", "generated"]), numbers)),
        draw(st.sampled_from(["disable", "allow", "force"])): draw(numbers),
    }
    return json.dumps({"version": "route-plan/1", "weights": draw(st.sampled_from(["masked", "native"])), "directives": [entry]})


PLANS = st.one_of(st.just(GOOD.to_string()), broken_json(), positions_and_experts(), SCALARS)
XARGS = st.one_of(
    st.fixed_dictionaries({"route_plan": PLANS}, optional={"return_routes": SCALARS}),
    st.dictionaries(st.sampled_from(KEYS), st.one_of(SCALARS, st.lists(SCALARS, max_size=8)), max_size=3),
)


REQUESTS = st.tuples(XARGS, st.sampled_from(["completions", "completions", "chat/completions"]), st.booleans())
NUM_SEEDS = 600
MOST_EDITS = 4


def make_seeds():
    """Requests of all forms. Hypothesis needs longer for one than a server does, so most of what is sent are changes of these."""
    seeds = []

    @given(requests=st.lists(REQUESTS, min_size=60, max_size=60))
    @settings(
        max_examples=NUM_SEEDS // 60, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    def collect(requests):
        seeds.extend(requests)

    collect()
    return seeds


def edited(rng, raw, other):
    """Some parts of `raw` changed, cut, repeated, or replaced by parts of `other`."""
    raw = bytearray(raw)
    for _ in range(rng.randrange(1, MOST_EDITS + 1)):
        at = rng.randrange(len(raw) + 1)
        start = rng.randrange(len(other) + 1)
        part = other[start : start + rng.randrange(1, 12)]
        new = rng.choice([b"", rng.randbytes(rng.randrange(1, 6)), part, raw[at : at + 3] * 3])
        raw[at : at + rng.choice([0, 1, 1, 3, 20])] = new
    return bytes(raw)


def mutant(rng, seeds):
    """A seed with its parts exchanged for another's, and its plan changed outside or inside of its compression."""
    (xargs, endpoint, stream), (others, *_) = rng.choice(seeds), rng.choice(seeds)
    xargs = {**xargs, **{key: value for key, value in others.items() if rng.random() < 0.3}}
    plan = xargs.get("route_plan")
    if isinstance(plan, str) and plan and rng.random() < 0.7:
        other = str(others.get("route_plan", "")).encode()
        if plan == GOOD.to_string() and rng.random() < 0.7:
            inside = edited(rng, zlib.decompress(base64.b64decode(plan[4:])), other)
            xargs["route_plan"] = "rp1:" + base64.b64encode(zlib.compress(inside)).decode()
        else:
            xargs["route_plan"] = edited(rng, plan.encode("utf-8", "surrogatepass"), other).decode("latin-1")
    return xargs, endpoint, stream


def fuzz(connection, xargs, endpoint, stream):
    """The status of the answer, which must be one."""
    body = {"model": "tiny", "max_tokens": 2, "stream": stream, "vllm_xargs": xargs}
    body |= {"prompt": [5, 6, 7]} if endpoint == "completions" else {"messages": MESSAGES}
    # NaN and infinities are no JSON; a hostile client does not care.
    content = json.dumps(body).encode()
    try:
        connection.request("POST", f"/v1/{endpoint}", content, JSON)
        answer = connection.getresponse()
    except ConnectionError:  # it was idle for too long; a server that is gone refuses the next one
        connection.close()
        connection.request("POST", f"/v1/{endpoint}", content, JSON)
        answer = connection.getresponse()
    text = answer.read()
    assert answer.status in (200, 400, 422), (xargs, answer.status, text)
    assert b'"code":500' not in text and b"InternalServerError" not in text, (xargs, text)
    return answer.status


def test_whatever_is_sent_as_a_plan(tmp_path):
    """No answer but 200 and 400, the server lives, its memory is flat, and rows and slots come back."""
    statuses, sizes, seeds, over = Counter(), [], make_seeds(), threading.Event()
    with start(tmp_path, "--enable-route-overrides") as started, concurrent.futures.ThreadPoolExecutor(NUM_WORKERS) as pool:
        address = started.url.removeprefix("http://")

        def work(seed):
            rng, connection = random.Random(seed), http.client.HTTPConnection(address, timeout=180)
            while statuses.total() < NUM_FUZZED and not over.is_set():
                statuses[fuzz(connection, *mutant(rng, seeds))] += 1

        began = time.monotonic()
        workers = [pool.submit(work, seed) for seed in range(NUM_WORKERS)]
        try:
            while any(not worker.done() for worker in workers):
                concurrent.futures.wait(workers, 30, concurrent.futures.FIRST_EXCEPTION)
                for worker in workers:
                    if worker.done():
                        worker.result()
                if len(sizes) < 50 * statuses.total() // NUM_FUZZED:
                    sizes.append(memory(started))
                seconds = time.monotonic() - began
                print(
                    f"{statuses.total()} requests in {seconds:.0f} s: {dict(statuses)}, {memory(started) / 2**20:.0f} MiB",
                    flush=True,
                )
        finally:
            over.set()
        check_that_all_is_given_back(started, len(BANNED["a"]))
        sizes.append(memory(started))
        body = {"model": "tiny", "prompt": [5, 6, 7], "vllm_xargs": GOOD.extra_args()}
        found = httpx.post(f"{started.url}/v1/completions", json=body, timeout=180)
        assert receipt_of(found.json()).plan == GOOD.digest
    assert min(statuses[200], statuses[400]) > 0
    assert sizes[-1] < 1.1 * sizes[0] + (64 << 20)
