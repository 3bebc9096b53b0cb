"""Expert usage: what is counted on the device is what requests' captured routes say, however batches are mixed."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from batch_runner import run_batch
from engines import engine, generate, random_prompt
from mixes import random_plan
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, receipt_of
from vllm_unsafe_routes.receipt import Receipt

LABELS = ("eval", "prod")
POLICY = {"version": "route-policy/1", "layers": {"0": {"disabled": [0, 1, 2]}}}


def usage_of(receipts, shape):
    """[layers, num_experts] of captured routes."""
    counts = np.zeros((len(shape.moe_layers), shape.num_experts), int)
    for receipt in receipts:
        for slot in range(len(counts)):
            counts[slot] += np.bincount(receipt.route_ids[:, slot].ravel(), minlength=shape.num_experts)
    return counts.tolist()


def mixed(shape, count, captured=True):
    """Prompts and extras: with and without plans, labels and captured routes."""
    rng = random.Random(3)
    prompts = [random_prompt(rng, rng.randrange(4, 60), VOCAB_SIZE) for _ in range(count)]
    extras = []
    for number, prompt in enumerate(prompts):
        extra = random_plan(rng, shape, len(prompt)).extra_args() if number % 3 == 0 else {}
        if captured:
            extra["return_routes"] = True
        if number % 4:
            extra["usage_label"] = LABELS[number % 2]
        extras.append(extra or None)
    return prompts, extras


@pytest.mark.parametrize("policy", [None, POLICY], ids=["free", "policy"])
def test_counts_equal_captured_routes(policy, tiny_model):
    from transformers import AutoConfig

    from vllm_unsafe_routes.engine.usage import expert_usage

    folder = tiny_model("olmoe")
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    prompts, extras = mixed(shape, 14)
    routes = {"allow_overrides": True, "usage": list(LABELS), "policy": policy}
    if policy is not None:  # plans must not force what it bans
        extras = [{key: value for key, value in extra.items() if key != "route_plan"} for extra in extras]
    with engine(folder, routes, max_num_batched_tokens=64, max_num_seqs=6, enable_prefix_caching=False) as llm:
        outputs = generate(llm, prompts, extras, max_tokens=7)
        found = expert_usage(llm, reset=True)
        assert not np.any(expert_usage(llm)["counts"])
        generate(llm, prompts, [None] * len(prompts), max_tokens=3)
        later = expert_usage(llm)
    receipts = [receipt_of(output) for output in outputs]
    assert found["layers"] == list(shape.moe_layers)
    assert found["counts"] == usage_of(receipts, shape)
    for label in LABELS:
        chosen = [receipt for receipt, extra in zip(receipts, extras, strict=True) if extra.get("usage_label") == label]
        assert len(chosen) > 2
        assert found["by_label"][label] == usage_of(chosen, shape)
    assert found["since"] < later["since"]
    tokens = sum(len(prompt) + 2 for prompt in prompts)
    assert [sum(layer) for layer in later["counts"]] == [tokens * shape.top_k] * len(shape.moe_layers)
    assert not np.any(list(later["by_label"].values()))
    if policy is not None:
        assert not np.any(np.array(later["counts"])[0, :3])


def test_counting_alone_changes_no_token(tiny_model):
    from vllm_unsafe_routes.engine.usage import expert_usage

    rng = random.Random(5)
    prompts = [random_prompt(rng, rng.randrange(4, 40), VOCAB_SIZE) for _ in range(6)]

    def run(routes):
        with engine(tiny_model("olmoe"), routes) as llm:
            outputs = generate(llm, prompts, [None] * 6)
            return [output.outputs[0].token_ids for output in outputs], expert_usage(llm) if routes else None

    (plain, _), (counted, usage) = run(None), run({"usage": []})
    assert plain == counted
    assert usage["by_label"] == {} and np.array(usage["counts"]).min() >= 0 < np.array(usage["counts"]).sum()


def test_a_label_that_nothing_counts_under_is_refused(tiny_model):
    from vllm_unsafe_routes.engine.swap import SwapError
    from vllm_unsafe_routes.engine.usage import expert_usage

    with engine(tiny_model("olmoe"), {"usage": list(LABELS)}) as llm:
        with pytest.raises(ValueError, match="usage_label 'evil' is not one of eval, prod; --route-usage-labels names them"):
            generate(llm, [[5, 6, 7]], [{"usage_label": "evil"}])
        with pytest.raises(ValueError, match=r"usage_label \['eval'\] is not one of"):
            generate(llm, [[5, 6, 7]], [{"usage_label": ["eval"]}])
        assert generate(llm, [[5, 6, 7]], [{"usage_label": "eval"}])[0].kv_transfer_params is None
        with pytest.raises(ValueError, match="route overrides are not enabled"):
            generate(llm, [[5, 6, 7]], [{"usage_label": "eval", "return_routes": True}])
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        with pytest.raises(ValueError, match="usage_label 'eval' needs an engine that counts by label"):
            generate(llm, [[5, 6, 7]], [{"usage_label": "eval"}])
        with pytest.raises(SwapError, match="start it with --route-usage"):
            expert_usage(llm)


@pytest.mark.v1_only
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_ranks_do_not_count_twice(parallel, tiny_model, tmp_path):
    from transformers import AutoConfig

    folder = tiny_model("qwen3_moe")
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    prompts, extras = mixed(shape, 8)
    settings = {parallel: 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 64}
    if parallel == "pipeline_parallel_size":
        settings["enforce_eager"] = False  # as in test_distributed.py; and under torch.compile
    job = {"model": str(folder), "routes": {"allow_overrides": True, "usage": list(LABELS)}, "settings": settings, "usage": True}
    *results, usage = run_batch({**job, "prompts": prompts, "extras": extras, "sampling": {"max_tokens": 5}}, tmp_path)
    receipts = [Receipt.from_dict(result["receipt"]) for result in results]
    assert usage["counts"] == usage_of(receipts, shape)
    by_label = Counter(extra.get("usage_label") for extra in extras)
    assert [sum(layer) > 0 for layer in usage["by_label"]["eval"]] == [by_label["eval"] > 0] * len(shape.moe_layers)


@pytest.mark.parametrize("usage", [True, "eval", ["a", "a"], ["no blanks"], [""], [str(number) for number in range(33)]])
def test_labels_are_checked_at_start(usage):
    from vllm_unsafe_routes import RouteError
    from vllm_unsafe_routes.engine.config import RouteConfig

    with pytest.raises(RouteError, match="usage must"):
        RouteConfig.from_dict({"usage": usage})
