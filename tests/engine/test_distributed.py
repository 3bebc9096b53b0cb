"""Tensor parallel 2 and pipeline parallel 2 give the same routes and outputs as one process."""

import random

import pytest
from batch_runner import run_batch
from engines import random_prompt
from mixes import random_plan
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape
from vllm_unsafe_routes.receipt import Receipt

pytestmark = pytest.mark.v1_only  # processes of their own


@pytest.fixture(scope="module")
def job(tiny_model):
    from transformers import AutoConfig

    folder = tiny_model("qwen3_moe")  # has a dense layer between, and two KV heads to split
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    rng = random.Random(8)
    prompts = [random_prompt(rng, rng.randrange(8, 60), VOCAB_SIZE) for _ in range(8)]
    extras = [None] + [{**random_plan(rng, shape, len(prompt)).extra_args(at % 2 == 0)} for at, prompt in enumerate(prompts[1:])]
    return {
        "model": str(folder),
        "routes": {"allow_overrides": True},
        "settings": {"max_num_batched_tokens": 64},
        "prompts": prompts,
        "extras": extras,
        "sampling": {"prompt_logprobs": 0, "max_tokens": 5},
        "cells": [
            prompts[0],
            [5, 6, 7],
            None,
            [[], *([(layer, 3, 4, [0, expert])] for layer in shape.moe_layers for expert in (3, 5))],
        ],
    }


@pytest.fixture(scope="module")
def single(job, tmp_path_factory):
    return run_batch(job, tmp_path_factory.mktemp("single"))


@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_processes_equal_one(parallel, job, single, tmp_path):
    settings = {**job["settings"], parallel: 2, "distributed_executor_backend": "mp"}
    if parallel == "pipeline_parallel_size":
        # Stock vLLM's CPU worker makes its pipeline buffers in the warm-up of compiled mode only; this also shows the
        # bound routers under torch.compile.
        settings["enforce_eager"] = False
    double = run_batch({**job, "settings": settings}, tmp_path)
    if parallel == "pipeline_parallel_size":
        assert double[-1] == {"error": "cells cannot be scored with pipeline parallelism"}
    else:
        assert double[-1]["scores"] == pytest.approx(single[-1]["scores"], abs=1e-4)
        assert len({round(score, 4) for score in double[-1]["scores"]}) > 4
    for one, two, extra in zip(single[:-1], double[:-1], job["extras"], strict=True):
        assert one["token_ids"] == two["token_ids"]
        values = [[float.fromhex(value) for value in result["logprobs"]] for result in (one, two)]
        assert values[0] == pytest.approx(values[1], abs=1e-4)
        if extra is None:
            assert two["receipt"] is None
            continue
        first, second = Receipt.from_dict(one["receipt"]), Receipt.from_dict(two["receipt"])
        assert (first.plan, first.routes_set) == (second.plan, second.routes_set)
        assert (first.route_ids is None) == (not extra.get("return_routes"))
        if first.route_ids is not None:
            assert (first.route_ids >= 0).all()
            assert (first.route_ids == second.route_ids).mean() > 0.999  # order among equals may differ by rounding
            assert second.route_weights == pytest.approx(first.route_weights, abs=1e-3)
