"""Two data-parallel engine cores behind two API servers: a policy is enforced, counted over both, swapped in both or in none.

Plans hold on both as on one engine alone.
"""

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
from engines import engine, generate, random_prompt
from servers import server
from swaps import ADMIN, BANNED, NAME_OF, NUM_EXPERTS, NUM_LAYERS, PATH, POLICY, TOKEN, TOP_K, USAGE_PATH, eventually, put
from tiny_models import VOCAB_SIZE
from transformers import AutoConfig

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of
from vllm_unsafe_routes.receipt import Receipt
from vllm_unsafe_routes.route_probe import RouteProbe

pytestmark = pytest.mark.v1_only  # server processes of their own

FLAGS = ("--data-parallel-size", "2", "--api-server-count", "2", "--max-num-batched-tokens", "64", "--route-usage-labels", "a,b")
FLAGS += ("--enable-route-overrides", "--router-logits-mib", "4")


@pytest.fixture(scope="module")
def probe(tiny_model):
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(tiny_model("olmoe")))
    weights = np.random.default_rng(4).normal(size=(NUM_LAYERS, NUM_EXPERTS))
    return RouteProbe(shape.fingerprint, shape.moe_layers, weights, 0.25, 0.25).to_dict()


@pytest.fixture(scope="module")
def two_cores(tiny_model, tmp_path_factory, probe):
    folder = tmp_path_factory.mktemp("cores")
    paths = {"--route-policy": POLICY["a"], "--route-monitor": probe}
    flags = list(FLAGS)
    for at, (flag, document) in enumerate(paths.items()):
        path = folder / f"{at}.json"
        path.write_text(json.dumps(document))
        flags += [flag, str(path)]
    (folder / "plugin").mkdir()
    environment = {
        # From vLLM 0.33 on every rank wants a memory node of its own, unless this is there.
        "VLLM_CPU_SIM_MULTI_NUMA": "0",
        "VLLM_PLUGINS": "unsafe_routes,unsafe_routes_admin,cpu_collectives",
        "VLLM_UNSAFE_ROUTES_ADMIN_TOKEN": TOKEN,
        "PYTHONPATH": os.pathsep.join([cpu_collectives.install(folder / "plugin"), os.environ.get("PYTHONPATH", "")]),
    }
    with server(tiny_model("olmoe"), folder / "log.txt", *flags, **environment) as started:
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


def plans_for(prompts):
    """None, masks everywhere, listed tokens, generated ones; all within policy a."""
    force = RoutePlan().force(0, [2, len(prompts[2]) - 1], [8, 9, 10, 11]).disable(1, [0, 70], [0, 1])
    bound = RoutePlan().for_prompt(prompts[3]).disable(1, "generated", [2, 3]).force(2, ("generated", 0, 3), [1, 3, 5, 7])
    return [None, RoutePlan().disable(1, "all", [6, 7]), force, bound]


def said_of(receipt):
    return [receipt.policy, receipt.plan, receipt.tokens, receipt.routes_set, receipt.cached_tokens]


def test_plans_logits_and_scores_are_those_of_one_engine(two_cores, tiny_model, probe):
    """With plans on both cores at once, and on one core beside an idle one."""
    prompts = [random_prompt(random.Random(seed), 80 + seed, VOCAB_SIZE) for seed in range(4)]
    wanted = {"return_routes": True, "return_router_logits": True}
    asked = [{**(plan.extra_args() if plan else {}), **wanted} for plan in plans_for(prompts)]
    routes = {"policy": POLICY["a"], "allow_overrides": True, "router_logits_mib": 4, "monitor": probe}
    with engine(tiny_model("olmoe"), routes) as llm:
        alone = [(list(one.outputs[0].token_ids), receipt_of(one)) for one in generate(llm, prompts, asked, max_tokens=8)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [pool.submit(complete, two_cores, prompts[at], rank=at % 2, **asked[at]) for at in range(4)]
    found = [one.result() for one in both]
    found += [complete(two_cores, prompts[at], rank=1 - at % 2, **asked[at]) for at in range(4)]
    for (tokens, receipt), (other_tokens, other) in zip(found, 2 * alone, strict=True):
        assert (tokens, said_of(receipt)) == (other_tokens, said_of(other))
        assert (np.sort(receipt.route_ids) == np.sort(other.route_ids)).all()
        np.testing.assert_allclose(receipt.router_logits, other.router_logits, atol=1e-4)
        assert receipt.monitor["score"] == pytest.approx(other.monitor["score"], abs=1e-5)
    assert len({tuple(tokens) for tokens, _ in alone}) == 4
    slots = "vllm:unsafe_routes_table_slots_in_use"
    eventually(lambda: two_cores.metrics().get(slots) == 0)
    assert two_cores.metrics()["vllm:unsafe_routes_scored_prompts_total"] >= 8


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
