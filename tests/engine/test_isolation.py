"""Every request is routed by its own plan only, whatever else is in the engine: a random property test.

Random mixes of plans, shared prefixes, chunked prefill, preemption, abort and n > 1 sampling run through one engine; each
request is then run again alone, without a prefix cache, and must give the same tokens and log-probabilities.
The seed is printed with a failure. `UNSAFE_ROUTES_SEED=7 pytest ...` repeats one; the long mode runs a thousand requests.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import pytest
from engines import engine, random_prompt
from mixes import random_plan
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of

TOLERANCE = 1e-4
V1_RUNNER = os.environ.get("UNSAFE_ROUTES_TEST_RUNNER") != "v2"
# Small token budgets cut prompts into chunks; so few KV blocks force preemption.
CROWDED = dict(max_num_batched_tokens=64, max_num_seqs=12, num_gpu_blocks_override=14, enable_prefix_caching=True)
ALONE = dict(max_num_batched_tokens=256, max_num_seqs=4, enable_prefix_caching=False)


@dataclass
class Case:
    """One request of the mix."""

    prompt: list[int]
    plan: RoutePlan | None
    sampling: dict[str, Any]
    aborted_after: int | None

    def params(self) -> Any:
        from vllm import SamplingParams

        extra = self.plan.extra_args() if self.plan else None
        return SamplingParams(ignore_eos=True, detokenize=False, logprobs=0, extra_args=extra, **self.sampling)


def random_cases(rng: random.Random, shape: ModelShape, count: int) -> list[Case]:
    prefixes = [random_prompt(rng, length, VOCAB_SIZE) for length in (32, 64, 96)]
    base_plans: list[RoutePlan] = []
    cases = []
    for _ in range(count):
        prompt = list(rng.choice(prefixes)) if rng.random() < 0.6 else []
        prompt += random_prompt(rng, rng.randrange(4, 50), VOCAB_SIZE)
        plan = None
        if rng.random() < 0.75:
            if base_plans and rng.random() < 0.4:  # many requests with one plan, as in a search
                fitting = [item for item in base_plans if longest_position(item) < len(prompt)]
                plan = rng.choice(fitting) if fitting else None
            if plan is None:
                plan = random_plan(rng, shape, len(prompt))
                base_plans.append(plan)
        sampling: dict[str, Any] = dict(temperature=0.0, max_tokens=rng.randrange(1, 24))
        if rng.random() < 0.25:
            sampling.update(temperature=0.8, n=rng.choice([1, 2, 3]))
            # Stock V1 on CPU cannot chunk the prompt of a seeded request ("CPU Generator does not use offset").
            sampling.update({"top_k": 1} if V1_RUNNER else {"seed": rng.randrange(1 << 30)})
        aborted = rng.randrange(1, 8) if rng.random() < 0.1 else None
        cases.append(Case(prompt, plan, sampling, aborted))
    return cases


def longest_position(plan: RoutePlan) -> int:
    return max((max(item.positions) for item in plan.directives if not isinstance(item.positions, str)), default=-1)


def run(llm: Any, cases: list[Case], rng: random.Random | None) -> dict[int, Any]:
    """Drive the engine step by step; with `rng`, requests arrive and are aborted along the way. Case number -> output."""
    from vllm import TokensPrompt

    core, waiting, done, steps_left = llm.llm_engine, list(enumerate(cases)), {}, {}
    while waiting or core.has_unfinished_requests():
        arrivals = len(waiting) if rng is None else rng.randrange(0, 6)
        for number, case in waiting[:arrivals]:
            core.add_request(str(number), TokensPrompt(prompt_token_ids=case.prompt), case.params())
            if rng is not None and case.aborted_after is not None:
                steps_left[number] = case.aborted_after
        waiting = waiting[arrivals:]
        for output in core.step():
            if output.finished:
                done[int(output.request_id)] = output
        for number in list(steps_left):
            steps_left[number] -= 1
            if steps_left[number] == 0:
                core.abort_request([str(number)])
                del steps_left[number]
    return done


def results(output: Any) -> list[tuple[list[int], list[float]]]:
    values = []
    for completion in sorted(output.outputs, key=lambda item: item.index):
        tokens = list(completion.token_ids)
        values.append((tokens, [row[token].logprob for token, row in zip(tokens, completion.logprobs, strict=True)]))
    return values


def check_mix(folder: Any, seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    cases = random_cases(random.Random(seed), shape, count)
    preempted = []
    own = Scheduler._preempt_request
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda self, *a, **k: (preempted.append(1), own(self, *a, **k))[1])
    with engine(folder, {"allow_overrides": True, "route_table_rows": 400, "route_table_slots": 9}, **CROWDED) as llm:
        crowded = run(llm, cases, random.Random(seed + 1))
        cached = sum(output.num_cached_tokens or 0 for output in crowded.values())
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        admission = scheduler.unsafe_routes_admission
        assert len(admission.ledger) == 0, f"seed {seed}: rows are still held"
        assert len(admission.ledger.rows) == 0
        assert len(admission.receipts) == 0
    with engine(folder, {"allow_overrides": True}, **ALONE) as llm:
        for number, output in sorted(crowded.items()):
            case = cases[number]
            alone = run(llm, [case], None)[0]
            for (tokens, logprobs), (expected_tokens, expected) in zip(results(output), results(alone), strict=True):
                where = f"seed {seed}, request {number}: {case.plan and case.plan.to_json()}"
                assert tokens == expected_tokens, where
                assert logprobs == pytest.approx(expected, abs=TOLERANCE), where
            if case.plan is not None:
                assert receipt_of(output).plan == case.plan.digest
    aborted = {number for number, case in enumerate(cases) if case.aborted_after is not None}
    assert set(range(count)) - set(crowded) <= aborted, f"seed {seed}: requests were lost"
    assert preempted, f"seed {seed}: nothing was preempted, the mix is too easy"
    assert cached, f"seed {seed}: nothing was reused from the prefix cache"


def test_a_random_mix(tiny_model, monkeypatch):
    check_mix(tiny_model("olmoe"), int(os.environ.get("UNSAFE_ROUTES_SEED", "1")), 48, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 20))
def test_a_thousand_requests(tiny_model, monkeypatch, seed):
    check_mix(tiny_model(["olmoe", "qwen3_moe"][seed % 2]), seed, 110, monkeypatch)
