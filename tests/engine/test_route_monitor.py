"""The served probe: each prompt's score is that of its captured routes, however batches are mixed, and nothing else changes."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
from engines import chosen_logprobs, engine, generate, random_prompt
from mixes import random_plan
from servers import server
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RouteError, receipt_of
from vllm_unsafe_routes.engine.router import controllers
from vllm_unsafe_routes.route_probe import RouteProbe
from vllm_unsafe_routes.search.usage import expert_counts


@pytest.fixture(scope="module")
def shape(tiny_model):
    from transformers import AutoConfig

    return ModelShape.from_hf_config(AutoConfig.from_pretrained(tiny_model("olmoe")))


@pytest.fixture(scope="module")
def probe(shape):
    weights = np.random.default_rng(4).normal(size=(len(shape.moe_layers), shape.num_experts))
    return RouteProbe(shape.fingerprint, tuple(shape.moe_layers), weights, 0.25, 0.25)


def expected_score(probe, shape, receipt, num_prompt):
    return probe.score(expert_counts(receipt.route_ids[:num_prompt], shape.num_experts), num_prompt)


def test_scores_are_those_of_captured_routes_in_a_mixed_batch(tiny_model, shape, probe):
    """Prompts in chunks, few KV blocks (preemption), some with plans; requests that ask for nothing are scored as well."""
    rng = random.Random(6)
    prompts = [random_prompt(rng, rng.randrange(4, 90), VOCAB_SIZE) for _ in range(14)]
    plans = [random_plan(rng, shape, len(prompt)).extra_args() if at % 3 == 0 else {} for at, prompt in enumerate(prompts)]
    routes = {"allow_overrides": True, "monitor": probe.to_dict()}
    settings = {"max_num_batched_tokens": 64, "max_num_seqs": 6, "num_gpu_blocks_override": 14, "enable_prefix_caching": False}
    with engine(tiny_model("olmoe"), routes, **settings) as llm:
        captured = generate(llm, prompts, [{**plan, "return_routes": True} for plan in plans], max_tokens=40)
        plain = generate(llm, prompts, [plan or None for plan in plans], max_tokens=40)
        admission = llm.llm_engine.engine_core.engine_core.scheduler.unsafe_routes_admission
        scores = admission.receipts.scores
    flagged = 0
    for prompt, first, second in zip(prompts, captured, plain, strict=True):
        receipt, said = receipt_of(first), receipt_of(second).monitor
        score = expected_score(probe, shape, receipt, len(prompt))
        for one in (receipt.monitor, said):
            assert one["score"] == pytest.approx(score, abs=1e-5)
            assert (one["flagged"], one["tokens"], one["probe"]) == (score > 0.25, len(prompt), probe.digest)
        assert list(first.outputs[0].token_ids) == list(second.outputs[0].token_ids)
        flagged += score > 0.25
    assert 0 < flagged < len(prompts)
    assert scores.num_scored >= 28 and scores.num_flagged >= 2 * flagged


def test_it_only_observes_and_says_what_the_cache_had(tiny_model, shape, probe):
    rng = random.Random(9)
    prompts = [random_prompt(rng, 70, VOCAB_SIZE) for _ in range(3)]

    def run(routes):
        with engine(tiny_model("olmoe"), routes, enable_prefix_caching=True) as llm:
            outputs = [generate(llm, prompts, [None] * 3) for _ in range(2)]
            (controller,) = [controllers[handle] for handle in list(controllers)][-1:] if routes else [None]
            assert controller is None or controller.capture.monitor is not None
        return outputs

    (plain, _), (first, second) = run(None), run({"monitor": probe.to_dict()})
    for one, two, three in zip(plain, first, second, strict=True):
        assert list(one.outputs[0].token_ids) == list(two.outputs[0].token_ids) == list(three.outputs[0].token_ids)
        assert chosen_logprobs(one) == chosen_logprobs(two)
        receipts = receipt_of(two), receipt_of(three)
        assert [receipt.monitor["tokens"] + receipt.cached_tokens for receipt in receipts] == [70, 70]
        assert receipts[1].monitor["tokens"] == 6 and one.kv_transfer_params is None


@pytest.mark.v1_only  # a server process of its own
def test_the_server_flags_and_counts_and_refuses_nobody(tiny_model, shape, probe, tmp_path):
    path = tmp_path / "probe.json"
    probe.save(path)
    rng = random.Random(2)
    prompts = [random_prompt(rng, rng.randrange(5, 50), VOCAB_SIZE) for _ in range(8)]
    flags = ("--route-monitor", str(path), "--enable-route-overrides")
    with server(tiny_model("olmoe"), tmp_path / "log.txt", *flags) as started:
        said = []
        for prompt in prompts:
            answer = started.client.completions.create(
                model="tiny",
                prompt=prompt,
                max_tokens=3,
                extra_body={"vllm_xargs": {"return_routes": True}, "detokenize": False, "ignore_eos": True},
            )
            receipt = receipt_of(answer)
            assert receipt.monitor["score"] == pytest.approx(expected_score(probe, shape, receipt, len(prompt)), abs=1e-5)
            said.append(receipt.monitor["flagged"])
        assert 0 < sum(said) < 8
        deadline = time.monotonic() + 30
        while (values := started.metrics()).get("vllm:unsafe_routes_scored_prompts_total", 0) < 8:
            assert time.monotonic() < deadline, values
            time.sleep(0.5)
        assert values["vllm:unsafe_routes_flagged_prompts_total"] == sum(said)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"monitor": 7}, "monitor must be a path or a route-probe/1 object, got 7"),
        ({"monitor": "/nowhere.json"}, "probe /nowhere.json cannot be read"),
        ({"monitor": {"version": "route-probe/1"}}, "the probe lacks bias, layers, model, threshold, weights"),
    ],
)
def test_the_setting_is_checked_at_start(settings, message):
    from vllm_unsafe_routes.engine.config import RouteConfig

    with pytest.raises(RouteError, match=message):
        RouteConfig.from_dict(settings)


def test_another_model_s_probe_and_the_seam_at_logits_are_refused(shape, probe):
    from vllm_unsafe_routes.engine.config import RouteConfig

    config = RouteConfig.from_dict({"monitor": {**probe.to_dict(), "model": "feedface"}})
    with pytest.raises(RouteError, match="the probe is for model feedface, this is"):
        config.compiler(shape)
    with pytest.raises(RouteError, match="usage and monitor need routers"):
        RouteConfig.from_dict({"monitor": json.loads(json.dumps(probe.to_dict())), "seam": "logits"})
