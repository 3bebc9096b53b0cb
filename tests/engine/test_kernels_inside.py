"""The Triton kernels, interpreted, inside the real V2 engine: the tokens of the torch path. So does fused gating on any runner."""

import random

import numpy as np
import pytest
from engines import SETTINGS, chosen_logprobs, engine, generate, random_prompt
from mixes import random_plan
from tiny_models import VOCAB_SIZE
from transformers import AutoConfig

from vllm_unsafe_routes import ModelShape, RoutePlan, receipt_of

POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [3], "protected": []}}}


def outputs_of(folder, family, plans, prompts, **routes):
    with engine(folder, {"allow_overrides": True, "policy": POLICY, **routes}, **SETTINGS.get(family, {})) as llm:
        return generate(llm, prompts, [plan and plan.extra_args(return_routes=True) for plan in plans], prompt_logprobs=0)


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("kernel", "gating"),
    [
        pytest.param("triton", "native", marks=pytest.mark.v2_only),
        pytest.param("triton", "fused", marks=pytest.mark.v2_only),
        ("torch", "fused"),
    ],
)
def test_same_as_the_torch_path(family, kernel, gating, tiny_model, monkeypatch):
    folder = tiny_model(family)
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    rng = random.Random(21)
    prompts = [random_prompt(rng, rng.randrange(3, 40), VOCAB_SIZE) for _ in range(10)]
    plans = []
    for at, prompt in enumerate(prompts):
        plan = None
        while at % 4 and plan is None:
            plan = random_plan(rng, shape, len(prompt))
            if any(3 in item.experts for item in plan.directives if item.layer == 1 and item.kind in ("allow", "force", "promote")):
                plan = None  # the policy would refuse it
        plans.append(plan)
    expected = outputs_of(folder, family, plans, prompts)
    if kernel == "triton":
        monkeypatch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", "triton")
    for output, other, plan in zip(outputs_of(folder, family, plans, prompts, gating=gating), expected, plans, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        ours, theirs = (chosen_logprobs(one, with_prompt=True) for one in (output, other))
        assert ours == pytest.approx(theirs, abs=1e-5)
        if plan is not None:
            ids, expected_ids = receipt_of(output).route_ids, receipt_of(other).route_ids
            # A model's own gating may hand on its choice in any order.
            assert (np.sort(ids, axis=-1) == np.sort(expected_ids, axis=-1)).all()
            assert not (ids[:, shape.slot_of_layer[1]] == 3).any()


@pytest.mark.v2_only
def test_the_row_index_kernel_runs_at_load(tiny_model, monkeypatch):
    """On a GPU its first launch compiles it, which must not fall into the first planned request."""
    from vllm_unsafe_routes.kernels import row_index_triton

    monkeypatch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", "triton")
    launches = []
    own = row_index_triton.launch
    monkeypatch.setattr(row_index_triton, "launch", lambda *tensors: launches.append(len(tensors[3])) or own(*tensors))
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        assert launches == [0]
        generate(llm, [[5, 6, 7]], [RoutePlan().disable(0, "all", [1]).extra_args()])
    assert launches[1] == 3
