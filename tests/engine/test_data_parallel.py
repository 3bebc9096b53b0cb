"""A policy in two data-parallel engine cores behind two API servers: enforced, counted over both, swapped in both or in none."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import types

import cpu_collectives
import httpx
import numpy as np
import pytest
from engines import random_prompt
from servers import server
from swaps import ADMIN, BANNED, NAME_OF, NUM_EXPERTS, NUM_LAYERS, PATH, POLICY, TOKEN, TOP_K, USAGE_PATH, eventually, put
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes.receipt import Receipt

pytestmark = pytest.mark.v1_only  # server processes of their own

FLAGS = ("--data-parallel-size", "2", "--api-server-count", "2", "--max-num-batched-tokens", "64", "--route-usage-labels", "a,b")


@pytest.fixture(scope="module")
def two_cores(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cores")
    path = folder / "policy.json"
    path.write_text(json.dumps(POLICY["a"]))
    (folder / "plugin").mkdir()
    environment = {
        "VLLM_PLUGINS": "unsafe_routes,unsafe_routes_admin,cpu_collectives",
        "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join([cpu_collectives.install(folder / "plugin"), os.environ.get("PYTHONPATH", "")]),
    }
    with server(tiny_model("olmoe"), folder / "log.txt", "--route-policy", str(path), *FLAGS, **environment) as started:
        yield started


def complete(started, prompt, max_tokens=8, rank=None, **xargs):
    """The token ids and the receipt; `rank` is the core that serves it."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"vllm_xargs": xargs, "detokenize": False, "return_token_ids": True}
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    answer = httpx.post(f"{started.url}/v1/completions", json=body, headers=headers, timeout=180)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    return said["choices"][0]["token_ids"], Receipt.from_dict(said["kv_transfer_params"]["unsafe_routes"])


def usage(started, method="GET"):
    return httpx.request(method, started.url + USAGE_PATH, headers=ADMIN, timeout=60).json()


def num_banned(counts, name):
    return sum(counts[layer][expert] for layer, banned in BANNED[name].items() for expert in banned)


def test_the_cores_agree_and_their_counts_add_up(two_cores):
    """One request at a time: the other core runs dummy steps, which nothing counts."""
    usage(two_cores, "DELETE")
    prompts = [random_prompt(random.Random(seed), 40 + seed, VOCAB_SIZE) for seed in range(3)]
    for prompt in prompts:
        answers = [complete(two_cores, prompt, rank=rank, usage_label="ab"[rank]) for rank in range(2)]
        assert answers[0][0] == answers[1][0]
        assert [NAME_OF[receipt.policy] for _, receipt in answers] == ["a", "a"]
    found = usage(two_cores)
    assert found["by_label"]["a"] == found["by_label"]["b"]
    computed = sum(len(prompt) + 7 for prompt in prompts)
    assert [sum(layer) for layer in found["counts"]] == [2 * computed * TOP_K] * NUM_LAYERS
    assert num_banned(found["counts"], "a") == 0
    sample = 'vllm:unsafe_routes_tokens_total{mode="enforce"}'
    eventually(lambda: two_cores.metrics().get(sample, 0) >= 2 * computed)
    assert not any(value for name, value in two_cores.metrics().items() if "misses" in name or "nan_tokens" in name)


def test_a_swap_reaches_both_cores_under_load(two_cores):
    assert put(two_cores, POLICY["a"]).status_code == 200
    policies = []

    def work(seed):
        rng = random.Random(seed)
        for _ in range(6):
            _, receipt = complete(two_cores, random_prompt(rng, 30, VOCAB_SIZE), 12)
            policies.append(NAME_OF[receipt.policy])

    with concurrent.futures.ThreadPoolExecutor() as pool:
        workers = [pool.submit(work, seed) for seed in range(6)]
        eventually(lambda: len(policies) > 5, 120)
        assert put(two_cores, POLICY["b"]).status_code == 200
        for worker in workers:
            worker.result()
    assert set(policies) == {"a", "b"}
    usage(two_cores, "DELETE")
    for rank in range(2):
        _, receipt = complete(two_cores, [5, 6, 7, 8], rank=rank)
        assert NAME_OF[receipt.policy] == "b"
    counts = usage(two_cores)["counts"]
    assert num_banned(counts, "b") == 0 < num_banned(counts, "a")


def test_of_two_swaps_at_once_one_wins_everywhere(two_cores):
    for _ in range(4):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asked = [pool.submit(put, two_cores, POLICY[name]) for name in "abab"]
        statuses = [answer.result().status_code for answer in asked]
        assert set(statuses) <= {200, 409} and 200 in statuses
        ruling = {NAME_OF[complete(two_cores, [5, 6, 7, 8], rank=rank)[1].policy] for rank in range(2)}
        assert len(ruling) == 1
        assert NAME_OF[httpx.get(two_cores.url + PATH, headers=ADMIN, timeout=60).json()["digest"]] in ruling


def test_a_dummy_step_is_counted_by_nobody():
    import torch

    from vllm_unsafe_routes.engine.data_parallel import leave_dummies_out
    from vllm_unsafe_routes.engine.step import NO_STEP
    from vllm_unsafe_routes.engine.sums import DeviceSums
    from vllm_unsafe_routes.engine.watch import Watch

    watch = Watch(DeviceSums(1, torch.device("cpu")), types.SimpleNamespace(moe_layers=(0,)), [0])
    controller = types.SimpleNamespace(watch=watch, step=NO_STEP._replace(num_tokens=3))
    worker = types.SimpleNamespace(execute_dummy_batch=lambda: watch.apply(0, torch.full((3, 4), torch.nan)))
    watch.stage(controller.step)
    worker.execute_dummy_batch()
    assert watch.sums.read().num_nan == [3]
    leave_dummies_out(worker, controller)
    worker.execute_dummy_batch()
    assert (watch.sums.read().num_nan, controller.step) == ([3], NO_STEP)


def test_a_bad_policy_changes_neither_core(two_cores):
    assert put(two_cores, POLICY["a"]).status_code == 200
    answer = put(two_cores, {"version": "route-policy/1", "layers": {"1": {"disabled": list(range(NUM_EXPERTS - 1))}}})
    assert (answer.status_code, answer.json()["error"]["message"].endswith("the old policy is in force")) == (400, True)
    assert put(two_cores, POLICY["b"]).status_code == 200
    assert not np.any([NAME_OF[complete(two_cores, [5, 6, 7], rank=rank)[1].policy] != "b" for rank in range(2)])
