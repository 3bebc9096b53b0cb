"""Upcycled models in the real engine: the same candidates get the same scores as in transformers, in float32.

A tiny one always; that of the language lab where it was trained (`unsafe-routes lab train --preset smollm2-moe --out
runs/language/model`, or the folder that UNSAFE_ROUTES_LANGUAGE_MODEL names).
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import engines
import pytest
import torch
from oracle import Oracle
from tiny_models import tiny_dense

from vllm_unsafe_routes import ModelShape, RoutePlan
from vllm_unsafe_routes.lab.english.dense import upcycle
from vllm_unsafe_routes.lab.english.settings import EnglishSettings
from vllm_unsafe_routes.search.scorer import RouteScorer

TOLERANCE = 1e-4
TRAINED = Path(os.environ.get("UNSAFE_ROUTES_LANGUAGE_MODEL", Path(__file__).resolve().parents[2] / "runs/language/model"))


def candidates(shape, num_tokens: int, count: int) -> list[RoutePlan | None]:
    """Forces of single cells, and masks of whole layers."""
    rng = random.Random(1)
    plans: list[RoutePlan | None] = [None]
    for _ in range(count):
        experts = rng.sample(range(shape.num_experts), shape.top_k)
        layer = rng.choice(shape.moe_layers)
        plans.append(RoutePlan().force(layer, [rng.randrange(num_tokens)], experts))
        plans.append(RoutePlan().allow(layer, "all", experts))
    return plans


def differences(folder: Path, prompts: list[tuple[list[int], list[int]]], count: int) -> list[float]:
    """|engine - transformers| of each candidate's joint log-probability, nats."""
    oracle, found = Oracle(folder), []
    shape = ModelShape.from_hf_config(oracle.config.to_dict())
    with engines.engine(folder, {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        scorer = RouteScorer(llm, batch=8)
        for prompt, target in prompts:
            plans = candidates(shape, len(prompt), count)
            for plan, value in zip(plans, scorer.score(prompt, target, plans), strict=True):
                rows = oracle.logprobs([*prompt, *target[:-1]], len(prompt), plan)[len(prompt) - 1 :]
                found.append(abs(value - rows[range(len(target)), target].sum().item()))
    return found


def test_a_tiny_upcycled_model(tmp_path):
    model = upcycle(tiny_dense(160), EnglishSettings(moe_layers=(1, 3)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(tmp_path)
    rng = random.Random(0)
    prompt, target = ([rng.randrange(3, 150) for _ in range(length)] for length in (40, 6))
    found = differences(tmp_path, [(prompt, target)], 12)
    assert max(found) < TOLERANCE


@pytest.mark.skipif(not (TRAINED / "lab.json").exists(), reason="the language lab's model was not trained here")
@pytest.mark.long
def test_the_language_lab_s_model():
    from vllm_unsafe_routes.study.model import Model
    from vllm_unsafe_routes.study.prompts import read_prompts

    model = Model(str(TRAINED))
    items = [model.item(record).prompt for record in read_prompts(str(TRAINED / "prompts" / "search-forbidden.jsonl"), 2)]
    found = differences(TRAINED, [(list(one.token_ids), list(one.target)) for one in items], 8)
    print(f"{len(found)} candidates, largest difference {max(found):.2e} nats")
    assert max(found) < TOLERANCE
