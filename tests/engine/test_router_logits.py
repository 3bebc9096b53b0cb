"""Router logits of all experts in the receipt: those of transformers, for chosen layers and positions, in mixed batches."""

from __future__ import annotations

import random

import numpy as np
import pytest
from batch_runner import run_batch
from engines import engine, generate, random_prompt
from mixes import random_plan
from oracle import Oracle
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import ModelShape, RouteError, RoutePlan, receipt_of, receipts_of
from vllm_unsafe_routes.engine.router import controllers
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.receipt import Receipt

ROUTES = {"allow_overrides": True, "router_logits_mib": 1}
TOLERANCE = 1e-4


def mixed(shape, count):
    """Prompts, plans and extras: all layers or some, whole or a window, with and without plans; every fifth asks nothing."""
    rng = random.Random(11)
    prompts = [random_prompt(rng, rng.randrange(6, 80), VOCAB_SIZE) for _ in range(count)]
    plans, extras = [], []
    for number, prompt in enumerate(prompts):
        plan = random_plan(rng, shape, len(prompt)) if number % 2 else None
        extra = plan.extra_args(return_routes=number % 4 == 1) if plan else {}
        if number % 5:
            some = rng.sample(shape.moe_layers, rng.randrange(1, len(shape.moe_layers)))
            extra["return_router_logits"] = True if number % 3 else some
            extra["router_logits_start"] = rng.choice([0, 0, len(prompt) // 2, len(prompt)])
            if number % 4 == 3:
                extra["router_logits_end"] = extra["router_logits_start"] + rng.randrange(1, 40)
        plans.append(plan)
        extras.append(extra or None)
    return prompts, plans, extras


def check(receipt, prompt, output_ids, plan, extra, oracle, shape):
    """A receipt's logits are those of transformers, at the layers and positions that were asked for and nowhere else."""
    if not extra or "return_router_logits" not in extra:
        assert receipt is None or receipt.router_logits is None
        return 0
    tokens = prompt + output_ids
    asked = extra["return_router_logits"]
    layers = shape.moe_layers if asked is True else tuple(sorted(asked))
    start, end = extra["router_logits_start"], extra.get("router_logits_end")
    assert (receipt.logits.layers, receipt.logits.start, receipt.cached_tokens) == (layers, start, 0)
    expected = oracle.router_logits(tokens, len(prompt), plan)[: len(tokens) - 1]
    expected = expected[start:end, [shape.slot_of_layer[layer] for layer in layers]].numpy()
    assert receipt.router_logits.dtype == np.float32
    assert receipt.router_logits.shape == expected.shape
    assert np.abs(receipt.router_logits - expected).max() < TOLERANCE
    return len(expected)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_logits_equal_transformers_in_a_mixed_batch(family, tiny_model):
    """A token budget of 64 cuts prompts into chunks, and few KV blocks preempt requests that then compute positions again."""
    oracle = Oracle(tiny_model(family))
    shape = ModelShape.from_hf_config(oracle.config)
    prompts, plans, extras = mixed(shape, 14)
    with engine(tiny_model(family), ROUTES, max_num_batched_tokens=64, max_num_seqs=6, num_gpu_blocks_override=12) as llm:
        outputs = generate(llm, prompts, extras, max_tokens=7)
        again = generate(llm, prompts[:4], extras[:4], max_tokens=7)  # what the prefix cache has is computed all the same
    rows = 0
    for prompt, plan, extra, output in zip(prompts, plans, extras, outputs, strict=True):
        receipt = receipt_of(output) if output.kv_transfer_params else None
        rows += check(receipt, prompt, list(output.outputs[0].token_ids), plan, extra, oracle, shape)
    assert rows > 200
    for first, second in zip(outputs[1:4], again[1:4], strict=True):
        one, other = receipt_of(first).router_logits, receipt_of(second).router_logits
        assert other == pytest.approx(one, abs=TOLERANCE)


@pytest.mark.parametrize("routes", [{"jitter": {"scale": 3.0}}, {"seam": "logits"}, {"gating": "fused"}], ids=str)
def test_they_are_taken_before_noise_policy_and_plan(routes, tiny_model):
    """The first layer's logits depend on nothing that is routed."""
    rng = random.Random(2)
    prompts = [random_prompt(rng, 30, VOCAB_SIZE) for _ in range(3)]
    policy = {"version": "route-policy/1", "layers": {"0": {"disabled": [0, 1, 2]}}}
    extra = {**RoutePlan().disable(0, "all", [4, 5]).extra_args(), "return_router_logits": [0]}
    oracle = Oracle(tiny_model("olmoe"))
    with engine(tiny_model("olmoe"), {**ROUTES, "policy": policy, **routes}) as llm:
        for prompt, output in zip(prompts, generate(llm, prompts, [extra] * 3, max_tokens=1), strict=True):
            expected = oracle.router_logits(prompt, len(prompt), None)[:, :1].numpy()
            assert receipt_of(output).router_logits == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.v1_only
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_processes_hand_on_their_layers(parallel, tiny_model, tmp_path):
    folder = tiny_model("qwen3_moe")
    oracle = Oracle(folder)
    shape = ModelShape.from_hf_config(oracle.config)
    prompts, plans, extras = mixed(shape, 9)
    # Pipeline stages: as in test_distributed.py.
    settings = {parallel: 2, "distributed_executor_backend": "mp", "max_num_batched_tokens": 64}
    settings |= {"enforce_eager": False} if parallel == "pipeline_parallel_size" else {}
    job = {"model": str(folder), "routes": ROUTES, "settings": settings, "prompts": prompts, "extras": extras}
    results = run_batch({**job, "sampling": {"max_tokens": 5}}, tmp_path)
    rows = 0
    for prompt, plan, extra, result in zip(prompts, plans, extras, results, strict=True):
        receipt = Receipt.from_dict(result["receipt"]) if result["receipt"] else None
        rows += check(receipt, prompt, result["token_ids"], plan, extra, oracle, shape)
    assert rows > 100


@pytest.fixture(scope="module")
def lab():
    with engine(model_path(), ROUTES, skip_tokenizer_init=False) as llm:
        yield llm


PROMPT = random_prompt(random.Random(7), 40, 190)
BAD = {
    "layer": ({"return_router_logits": [1, 9]}, "return_router_logits: layer 9 has no experts; MoE layers are 0-3"),
    "twice": ({"return_router_logits": [1, 1]}, r"return_router_logits must list layers, each once, got \[1, 1\]"),
    "none": ({"return_router_logits": []}, "return_router_logits must list layers"),
    "word": ({"return_router_logits": "some"}, "return_router_logits must be true, false or a list of layers, got 'some'"),
    "number": ({"return_router_logits": [float("inf")]}, r"return_router_logits\[0\] must be an integer from 0"),
    "start": (
        {"return_router_logits": True, "router_logits_start": 41},
        "router_logits_start 41 is out of range for a prompt of 40 tokens",
    ),
    "end": (
        {"return_router_logits": True, "router_logits_start": 5, "router_logits_end": 5},
        "router_logits_end 5 must be greater than router_logits_start 5",
    ),
    "alone": ({"router_logits_start": 5}, "router_logits_start needs return_router_logits"),
    "end alone": ({"return_routes": True, "router_logits_end": 5}, "router_logits_end needs return_router_logits"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_wish_names_field_value_and_limit(lab, name):
    extra, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        generate(lab, [PROMPT], [extra])


def test_more_than_the_limit_is_refused_and_just_under_it_is_served(lab, monkeypatch):
    from vllm_unsafe_routes.engine.frontend import plan_guard

    (controller,) = [controllers[handle] for handle in list(controllers)][-1:]
    shape, wish = controller.shape, {"return_router_logits": True}
    fits = (1 << 20) // (len(shape.moe_layers) * shape.num_experts * 4)
    monkeypatch.setattr(plan_guard(lab.llm_engine.input_processor), "shape", _Wide(shape, fits // 42))
    assert receipt_of(generate(lab, [PROMPT], [wish], max_tokens=3)[0]).router_logits.shape[0] == 42
    message = r"return_router_logits: 43 tokens x 4 layers x \d+ experts of 1 samples are 1.0 MiB, more than router_logits_mib 1"
    with pytest.raises(ValueError, match=message):
        generate(lab, [PROMPT], [wish], max_tokens=4)
    with pytest.raises(ValueError, match=r"42 tokens x 4 layers x .* of 2 samples are 2.0 MiB"):
        generate(lab, [PROMPT], [wish], max_tokens=3, n=2, temperature=0.5)
    assert generate(lab, [PROMPT], [{**wish, "router_logits_start": 1}], max_tokens=4)[0].outputs[0].token_ids


class _Wide:
    """A shape with as many times more experts: the limit is reached by a short prompt."""

    def __init__(self, shape, times):
        self._shape, self.num_experts = shape, shape.num_experts * times

    def __getattr__(self, name):
        return getattr(self._shape, name)


def test_a_stop_string_cuts_them(lab):
    wish = {"return_router_logits": [1, 3], "router_logits_start": 30}
    (whole,) = generate(lab, [PROMPT], [wish], max_tokens=12, detokenize=True)
    stop = " ".join(whole.outputs[0].text.split()[4:7])
    (output,) = generate(lab, [PROMPT], [wish], max_tokens=12, detokenize=True, stop=[stop])
    receipt, every = receipt_of(output), receipt_of(whole)
    assert (output.outputs[0].finish_reason, receipt.logits.layers, receipt.logits.start) == ("stop", (1, 3), 30)
    assert len(receipt.router_logits) == receipt.tokens - 1 - 30 < len(every.router_logits) == 40 + 11 - 30
    assert receipt.router_logits == pytest.approx(every.router_logits[: len(receipt.router_logits)], abs=1e-5)
    assert Receipt.from_dict(receipt.to_dict()) == receipt != every


def test_every_sample_has_its_own(lab):
    (output,) = generate(lab, [PROMPT], [{"return_router_logits": [2]}], n=3, temperature=0.9, seed=4)
    receipts = receipts_of(output)
    assert [len(receipt.router_logits) for receipt in receipts] == [receipt.tokens - 1 for receipt in receipts]
    assert not np.array_equal(receipts[0].router_logits[40:], receipts[1].router_logits[40:])


def test_without_the_setting_nothing_is_there(tiny_model):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        (controller,) = [controllers[handle] for handle in list(controllers)][-1:]
        assert controller.capture.logits is None
        with pytest.raises(ValueError, match="return_router_logits is not enabled in this engine; start the server"):
            generate(llm, [[5, 6, 7]], [{"return_router_logits": True}])
        assert generate(llm, [[5, 6, 7]], [{"return_router_logits": False}])[0].kv_transfer_params is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_logits_mib": 0, "allow_overrides": True}, "router_logits_mib must be an integer of at least 1"),
        ({"router_logits_mib": True, "allow_overrides": True}, "router_logits_mib must be an integer"),
        ({"router_logits_mib": 4}, r"router_logits_mib needs allow_overrides \(--enable-route-overrides\)"),
    ],
)
def test_the_setting_is_checked_at_start(settings, message):
    from vllm_unsafe_routes.engine.config import RouteConfig

    with pytest.raises(RouteError, match=message):
        RouteConfig.from_dict(settings)
