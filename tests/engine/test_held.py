"""Requests that wait outside the scheduler for room in the route table: they are waiting requests like others."""

import asyncio

import pytest
from engines import BLOCK_SIZE, engine

from vllm_unsafe_routes import RoutePlan

ONE_SLOT = {"allow_overrides": True, "route_table_slots": 1}
PLANS = [RoutePlan().disable(1, "all", [expert]).extra_args() for expert in range(4)]


@pytest.mark.v1_only  # the scheduler is the same
@pytest.mark.parametrize(("policy", "order"), [("priority", "0231"), ("fcfs", "0123")])
def test_they_enter_in_the_scheduler_s_order(tiny_model, policy, order):
    from vllm import SamplingParams, TokensPrompt

    with engine(tiny_model("olmoe"), ONE_SLOT, scheduling_policy=policy, disable_log_stats=False) as llm:
        core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
        for number, (plan, priority) in enumerate(zip(PLANS, (9, 7, 1, 3), strict=True)):
            params = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False, extra_args=plan)
            core.add_request(str(number), TokensPrompt(prompt_token_ids=[5, 6, 7]), params, priority=priority)
        assert scheduler.unsafe_routes_admission.num_held == 3
        assert scheduler.make_stats().num_waiting_reqs == 1 + 3
        finished = [output.request_id for _ in range(20) for output in core.step() if output.finished]
        assert "".join(finished) == order
        assert scheduler.make_stats().num_waiting_reqs == 0


@pytest.mark.v1_only
def test_one_that_comes_late_and_fits_passes_those_that_do_not(tiny_model):
    from vllm import SamplingParams, TokensPrompt

    plans = [RoutePlan(), RoutePlan(), RoutePlan().disable(0, [0], [8])]
    for position in range(4):
        plans[0].disable(0, [position], [position])
        plans[1].disable(0, [position], [position + 4])
    with engine(tiny_model("olmoe"), {"allow_overrides": True, "route_table_rows": 6}, scheduling_policy="priority") as llm:
        core, scheduler = llm.llm_engine, llm.llm_engine.engine_core.engine_core.scheduler
        for number, (plan, priority) in enumerate(zip(plans, (5, 5, 1), strict=True)):
            params = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False, extra_args=plan.extra_args())
            core.add_request(str(number), TokensPrompt(prompt_token_ids=[5, 6, 7, 8]), params, priority=priority)
        assert scheduler.unsafe_routes_admission.num_held == 1
        finished = [output.request_id for _ in range(20) for output in core.step() if output.finished]
        assert finished == ["2", "0", "1"]


@pytest.mark.v1_only
def test_they_end_as_aborted_when_generation_is_paused(tiny_model):
    """In the engine core's own process: `pause_generation(mode="abort")`, which sleep and shutdown go through as well."""
    from vllm import AsyncEngineArgs, SamplingParams, TokensPrompt
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = dict(
        skip_tokenizer_init=True,
        disable_log_stats=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=BLOCK_SIZE,
    )
    arguments = AsyncEngineArgs(model=str(tiny_model("olmoe")), additional_config={"unsafe_routes": ONE_SLOT}, **settings)

    async def ends_of(llm, name, plan, max_tokens):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=plan)
        async for output in llm.generate(TokensPrompt(prompt_token_ids=[5, 6, 7]), params, name):
            last = output
        return last.outputs[0].finish_reason

    async def run():
        llm = AsyncLLM.from_engine_args(arguments)
        try:
            tasks = [asyncio.create_task(ends_of(llm, str(number), plan, 250)) for number, plan in enumerate(PLANS[:3])]
            while (await llm.engine_core.call_utility_async("unsafe_routes_status"))["held_requests"] < 2:
                await asyncio.sleep(0.01)
            await llm.pause_generation(mode="abort")
            assert await asyncio.wait_for(asyncio.gather(*tasks), 30) == ["abort"] * 3
            await llm.resume_generation()
            assert await asyncio.wait_for(ends_of(llm, "4", PLANS[3], 4), 30) == "length"
            assert (await llm.engine_core.call_utility_async("unsafe_routes_status"))["table"]["slots"][0] == 0
        finally:
            llm.shutdown()

    asyncio.run(run())
