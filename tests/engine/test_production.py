"""A day in production: two API servers, a policy that is swapped, plans, streams with stop strings, metrics, Ctrl-C."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import signal
import threading
from collections import Counter

import httpx
import numpy as np
import openai
import psutil
import pytest
from servers import server

from vllm_unsafe_routes import RoutePlan, RoutePolicy, receipt_of
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.lab.language import vocabulary

pytestmark = pytest.mark.v1_only  # server processes of their own

ADMIN = {"Authorization": "Bearer zorblax"}
PATH = "/unsafe-routes/policy"
NUM_LAYERS, TOP_K = 4, 4
BANNED = {"a": {0: [0, 1, 2, 3], 2: [8, 9, 10]}, "b": {1: [4, 5, 6, 7], 3: [0, 15]}}
POLICY = {
    name: {"version": "route-policy/1", "layers": {str(layer): {"disabled": experts} for layer, experts in banned.items()}}
    for name, banned in BANNED.items()
}
NAME_OF = {RoutePolicy.from_json(document).digest: name for name, document in POLICY.items()}
NUM_WORKERS, REQUESTS_EACH = 8, 12


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("production")
    policy = folder / "policy.json"
    policy.write_text(json.dumps(POLICY["a"]))
    flags = ("--api-server-count", "2", "--route-policy", str(policy), "--enable-route-overrides", "--no-skip-tokenizer-init")
    environment = {"VLLM_PLUGINS": "unsafe_routes,unsafe_routes_admin", "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN": "zorblax"}
    with server(model_path(), folder / "log.txt", *flags, VLLM_LOGGING_LEVEL="INFO", **environment) as started:
        policy.unlink()  # its content has gone to every process
        yield started


def num_connections(process, port):
    """Connections of clients that a process holds open."""
    held = process.net_connections("tcp4")
    return sum(item.laddr.port == port and item.status == psutil.CONN_ESTABLISHED for item in held)


def test_the_flags_reach_every_api_server(started):
    plan = RoutePlan().disable(1, "all", [4])
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 2, "vllm_xargs": plan.extra_args()}
    with contextlib.ExitStack() as stack:
        for _ in range(16):  # each over a connection of its own, which the less busy server accepts
            client = stack.enter_context(httpx.Client(timeout=60))
            answer = client.post(f"{started.url}/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            receipt = receipt_of(answer.json())
            assert (receipt.plan, NAME_OF[receipt.policy]) == (plan.digest, "a")
            assert client.get(started.url + PATH, headers=ADMIN).status_code == 200
        port = int(started.url.rsplit(":", 1)[1])
        accepted = [num_connections(child, port) for child in psutil.Process(started.process.pid).children()]
    assert sum(accepted) == 16 and sum(number > 0 for number in accepted) == 2
    assert any(sample.startswith("vllm:unsafe_routes_plans_accepted_total") for sample in started.metrics())


def one_request(client, rng):
    """A streamed chat, some with a plan, most with stop strings; returns its last chunk, the plan and how many tokens came."""
    plan = RoutePlan().disable(rng.randrange(NUM_LAYERS), "all", [rng.choice([11, 12, 13])]) if rng.random() < 0.6 else None
    xargs = {"return_routes": 1, **(plan.extra_args() if plan else {})}
    if rng.random() < 0.3:
        xargs.pop("return_routes")
    words = vocabulary()
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": " ".join(rng.choice(words) for _ in range(rng.randrange(3, 40)))}],
        max_tokens=rng.randrange(8, 60),
        temperature=1.0,
        stop=rng.sample(words, 4),
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": xargs, "ignore_eos": True},
    )
    last = usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.choices and chunk.choices[0].finish_reason is not None:
            last = chunk
    return last, plan, usage


def test_a_day_in_production(started):
    swapped, under, ended = threading.Event(), Counter(), Counter()

    def work(seed):
        rng = random.Random(seed)
        for number in range(REQUESTS_EACH):
            if number == REQUESTS_EACH // 2:
                swapped.wait(120)
            client = openai.OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0, timeout=120)
            last, plan, usage = one_request(client, rng)
            receipt = receipt_of(last)
            name = NAME_OF[receipt.policy]
            under[name] += 1
            ended[last.choices[0].finish_reason] += 1
            assert receipt.plan == (plan.digest if plan else None)
            assert (receipt.prompt_tokens, receipt.tokens) == (usage.prompt_tokens, usage.total_tokens)
            if number > REQUESTS_EACH // 2:
                assert name == "b"
            if receipt.route_ids is None:
                continue
            assert receipt.route_ids.shape == (receipt.tokens - 1, NUM_LAYERS, TOP_K)
            assert (receipt.route_ids >= 0).all()
            assert not any(np.isin(receipt.route_ids[:, layer], banned).any() for layer, banned in BANNED[name].items())

    with concurrent.futures.ThreadPoolExecutor() as pool:
        workers = [pool.submit(work, seed) for seed in range(NUM_WORKERS)]
        while sum(under.values()) < NUM_WORKERS * 2 and not any(worker.done() for worker in workers):
            started.metrics()
        answer = httpx.put(started.url + PATH, json=POLICY["b"], headers=ADMIN, timeout=120)
        assert answer.status_code == 200, answer.text
        swapped.set()
        for worker in workers:
            worker.result()
    assert sum(under.values()) == NUM_WORKERS * REQUESTS_EACH
    assert min(under["a"], under["b"], ended["stop"], ended["length"]) > 0, (under, ended)
    metrics = started.metrics()
    assert metrics['vllm:unsafe_routes_tokens_total{mode="enforce"}'] > 0
    (accepted,) = [value for sample, value in metrics.items() if sample.startswith("vllm:unsafe_routes_plans_accepted_total")]
    assert accepted > 0


# Last: it ends the server of this file.
def test_ctrl_c_leaves_nothing_running(started):
    everything = [psutil.Process(started.process.pid), *psutil.Process(started.process.pid).children(recursive=True)]
    assert len(everything) >= 4
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 230, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{started.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
        os.kill(started.process.pid, signal.SIGINT)
        started.process.wait(60)
    _, alive = psutil.wait_procs(everything, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
