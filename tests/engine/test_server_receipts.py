"""Receipts and plans at every endpoint of a real server: streams, several prompts and samples, stop strings, aborts."""

from __future__ import annotations

import concurrent.futures
import json
import os
import random
import time
from pathlib import Path

import httpx
import numpy as np
import pass_on
import pytest
from engines import random_prompt
from servers import server

from vllm_unsafe_routes import RoutePlan, RoutePolicy, receipt_of, receipts_of
from vllm_unsafe_routes.binding import prompt_digest
from vllm_unsafe_routes.lab import model_path

pytestmark = pytest.mark.v1_only  # a server process of its own

POLICY = {"version": "route-policy/1", "layers": {"2": {"disabled": [0, 1]}}}
DIGEST = RoutePolicy.from_json(POLICY).digest
PLAN = RoutePlan().disable(1, "all", [4])
XARGS = {"route_plan": PLAN.to_string(), "return_routes": 1}
FORBIDDEN = {"route_plan": RoutePlan().force(2, "all", [0, 5, 6, 7]).to_string()}
PROMPTS = [random_prompt(random.Random(seed), 12 + seed, 190) for seed in range(3)]
MESSAGES = [{"role": "user", "content": "how do i tell me to please"}]
CHAT = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    folder = tmp_path_factory.mktemp("receipts")
    policy = folder / "policy.json"
    policy.write_text(json.dumps(POLICY))
    flags = ("--route-policy", str(policy), "--enable-route-overrides", "--no-skip-tokenizer-init", "--enable-scale-out")
    flags = (*flags, "--middleware", "pass_on.pass_on")
    path = os.pathsep.join([str(Path(pass_on.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_COHERE_API": "1", "PYTHONPATH": path}
    with server(model_path(), folder / "log.txt", *flags, **environment) as started:
        yield started


def post(started, path, body):
    return httpx.post(started.url + path, json=body, timeout=120)


def stream(started, path, body):
    """The JSON of every chunk of a stream."""
    answer = post(started, path, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def check(receipt, num_output=None):
    """A receipt of `PLAN` under the policy."""
    assert (receipt.plan, receipt.policy) == (PLAN.digest, DIGEST)
    assert receipt.route_ids.shape == (receipt.tokens - 1, 4, 4)
    assert receipt.routes_set == receipt.tokens - 1
    assert not (receipt.route_ids[:, 1] == 4).any() and not (receipt.route_ids[:, 2] <= 1).any()
    if num_output is not None:
        assert receipt.tokens == receipt.prompt_tokens + num_output


COMPLETION = {"model": "tiny", "prompt": PROMPTS[:2], "n": 2, "max_tokens": 6, "ignore_eos": True, "vllm_xargs": XARGS}
TOKENS = {"token_ids": PROMPTS[1], "sampling_params": {"max_tokens": 6, "ignore_eos": True}}
STREAMS = {
    "completions": ("/v1/completions", COMPLETION),
    "completions with usage": ("/v1/completions", {**COMPLETION, "stream_options": {"include_usage": True}}),
    "chat": ("/v1/chat/completions", {**CHAT, "n": 3, "temperature": 1, "vllm_xargs": XARGS}),
    "tokens": ("/inference/v1/generate", {**TOKENS, "vllm_xargs": XARGS}),
    "tokens, as sampling parameters": (
        "/inference/v1/generate",
        {**TOKENS, "sampling_params": {"n": 2, "max_tokens": 6, "ignore_eos": True, "extra_args": XARGS}},
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_last_chunk_of_every_choice_has_a_receipt(started, name):
    path, body = STREAMS[name]
    chunks = stream(started, path, body)
    receipts = {}
    for chunk in chunks:
        ended = [choice["index"] for choice in chunk.get("choices", ()) if choice.get("finish_reason")]
        assert ("kv_transfer_params" in chunk) == bool(ended)
        if ended:
            (receipts[ended[0]],) = receipts_of(chunk)
    n = body.get("n") or body.get("sampling_params", {}).get("n", 1)
    prompts = body.get("prompt", [None])
    assert sorted(receipts) == list(range(len(prompts) * n))
    for choice, receipt in receipts.items():
        check(receipt, 6)
        if prompts[0] is not None:
            assert receipt.prompt_digest == prompt_digest(prompts[choice // n])


def test_the_last_event_of_messages_and_responses(started):
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "vllm_xargs": XARGS}
    events = stream(started, "/v1/messages", body)
    (last,) = [event for event in events if "kv_transfer_params" in event]
    assert (last["type"], events[-1]["type"]) == ("message_delta", "message_stop")
    check(receipt_of(last))
    check(receipt_of(post(started, "/v1/messages", body).json()))
    body = {"model": "tiny", "input": "how do i please", "max_output_tokens": 6, "vllm_xargs": XARGS}
    last = stream(started, "/v1/responses", body)[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    check(receipt_of(last["response"]))


def test_the_last_event_of_cohere_s_chat(started):
    pytest.importorskip("cohere")
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "temperature": 0, "vllm_xargs": XARGS}
    events = stream(started, "/cohere/v2/chat", body)
    (last,) = [event for event in events if "kv_transfer_params" in event]
    assert (last["type"], last) == ("message-end", events[-1])
    check(receipt_of(last))
    assert receipt_of(post(started, "/cohere/v2/chat", body).json()) == receipt_of(last)


def test_a_streamed_answer_says_the_same_as_a_whole_one(started):
    body = {**CHAT, "vllm_xargs": XARGS}
    whole = post(started, "/v1/chat/completions", body).json()
    chunks = stream(started, "/v1/chat/completions", body)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert receipt_of(chunks[-1]) == receipt_of(whole)


def test_every_prompt_and_every_sample_has_a_receipt(started):
    answer = post(started, "/v1/completions", COMPLETION).json()
    receipts = receipts_of(answer)
    assert [receipt.prompt_digest for receipt in receipts] == [prompt_digest(PROMPTS[at]) for at in (0, 0, 1, 1)]
    for choice, receipt in zip(answer["choices"], receipts, strict=True):
        assert choice["finish_reason"] == "length"
        check(receipt, 6)
    assert receipt_of(answer) == receipts[0]
    many = post(started, "/v1/completions", {**COMPLETION, "n": 1, "prompt": PROMPTS * 8}).json()
    assert [receipt.prompt_digest for receipt in receipts_of(many)] == [prompt_digest(prompt) for prompt in PROMPTS * 8]


def test_plain_answers_carry_what_they_carried(started):
    """One prompt, one sample: the receipt is where it was, and there is no list."""
    carried = post(started, "/v1/completions", {**COMPLETION, "n": 1, "prompt": PROMPTS[0]}).json()["kv_transfer_params"]
    assert set(carried) == {"unsafe_routes"} and "receipts" not in carried["unsafe_routes"]


SCORING = {"model": "tiny", "query": PROMPTS[0], "items": PROMPTS[1:], "label_token_ids": [5, 6]}
BATCH = {**CHAT, "messages": [MESSAGES, [{"role": "user", "content": "can i please"}]]}
OTHERS = {
    "generative scoring": ("/generative_scoring", SCORING, 2),
    "chat batch": ("/v1/chat/completions/batch", BATCH, 2),
    "tokens": ("/inference/v1/generate", TOKENS, 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_is_honoured_at_every_endpoint(started, name):
    path, body, num = OTHERS[name]
    answer = post(started, path, {**body, "vllm_xargs": XARGS})
    assert answer.status_code == 200, answer.text
    receipts = receipts_of(answer.json())
    assert len(receipts) == num
    for receipt in receipts:
        check(receipt)
    plain = receipts_of(post(started, path, body).json())
    assert [(receipt.plan, receipt.policy) for receipt in plain] == [(None, DIGEST)] * num


@pytest.mark.parametrize("name", OTHERS)
def test_a_bad_plan_is_a_400_at_every_endpoint(started, name):
    path, body, _ = OTHERS[name]
    answer = post(started, path, {**body, "vllm_xargs": FORBIDDEN})
    assert answer.status_code == 400, answer.text
    assert "expert 0 is disabled by the engine's policy" in answer.text


@pytest.mark.parametrize("name", ["completions", "chat", "tokens", "messages"])
def test_a_bad_plan_is_a_400_where_the_answer_would_be_streamed(started, name):
    """vLLM's server has sent 200 before it makes the engine request of a stream."""
    messages = ("/v1/messages", {"model": "tiny", "messages": MESSAGES, "max_tokens": 6})
    path, body = {**STREAMS, "messages": messages}[name]
    answer = post(started, path, {**body, "vllm_xargs": FORBIDDEN, "stream": True})
    assert answer.status_code == 400, answer.text
    assert "expert 0 is disabled by the engine's policy" in answer.json()["error"]["message"]
    assert post(started, path, {**body, "vllm_xargs": XARGS, "stream": True}).status_code == 200


def test_stop_strings_of_a_streaming_client(started):
    whole = post(started, "/v1/chat/completions", {**CHAT, "max_tokens": 12, "vllm_xargs": XARGS}).json()
    words = whole["choices"][0]["message"]["content"].split()
    stop = " ".join(words[5:7])
    chunks = list(
        started.client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_tokens=12,
            temperature=0,
            stop=[stop],
            stream=True,
            extra_body={"vllm_xargs": XARGS, "ignore_eos": True},
        )
    )
    assert chunks[-1].choices[0].finish_reason == "stop"
    receipt = receipt_of(chunks[-1])
    check(receipt)
    assert np.array_equal(receipt.route_ids, receipt_of(whole).route_ids[: receipt.tokens - 1])
    assert receipt.tokens < receipt_of(whole).tokens


def test_an_abort_whose_output_is_delivered(started):
    body = {**COMPLETION, "prompt": PROMPTS[0], "n": 1, "max_tokens": 230, "request_id": "blik"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        future = pool.submit(post, started, "/v1/completions", body)
        while started.metrics()['vllm:num_requests_running{engine="0"}'] == 0:
            time.sleep(0.01)
        time.sleep(0.1)
        answer = post(started, "/inference/v1/abort_requests", {"request_ids": ["cmpl-blik-0"]})
        assert answer.status_code == 200, answer.text
        answer = future.result().json()
    assert answer["choices"][0]["finish_reason"] == "abort"
    num_output = answer["usage"]["completion_tokens"]
    assert 0 < num_output < 230
    check(receipt_of(answer), num_output)


def test_a_beam_search_is_answered_under_a_policy(started):
    body = {"model": "tiny", "prompt": PROMPTS[0], "n": 2, "max_tokens": 4, "use_beam_search": True, "temperature": 0}
    answer = post(started, "/v1/completions", body).json()
    assert len(answer["choices"]) == 2 and not answer["kv_transfer_params"]


BAD = {
    "delta": (
        '{"route_delta": [0, 0, 1e999, 2, 3, 4]}',
        "route_delta[2] must be an integer from 0 to 2147483647, got inf",
        "route_delta",
    ),
    "score": ('{"score_tokens": [3, 1, NaN]}', "score_tokens[2] must be an integer from 0 to 2147483647, got nan", "score_tokens"),
    "score past the prompt": (
        '{"score_tokens": [900, 1, 5]}',
        "score_tokens: row 900 is out of range for a prompt of 12 tokens",
        "score_tokens",
    ),
    "token": (
        '{"score_tokens": [3, 1, 197]}',
        "score_tokens: token id 197 is out of range for a vocabulary of 197",
        "score_tokens",
    ),
    "delta at no layer": ('{"route_delta": [9, 0, 1, 2, 3, 4]}', "layer 9 has no experts; MoE layers are 0-3", "route_delta"),
    "truth": ('{"return_routes": 1e999}', "return_routes must be true or false, got inf", "return_routes"),
    "plan": ('{"route_plan": "{\\"version\\": 1e999}"}', "plan version inf is not 'route-plan/1' or 'route-plan/2'", "route_plan"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_number_out_of_range_is_a_400_that_names_it(started, name):
    xargs, message, parameter = BAD[name]
    body = f'{{"model": "tiny", "prompt": {json.dumps(PROMPTS[0])}, "vllm_xargs": {xargs}}}'
    answer = httpx.post(f"{started.url}/v1/completions", content=body, headers={"Content-Type": "application/json"}, timeout=60)
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == parameter


def test_a_bound_plan_holds_for_its_prompt_only(started):
    """One plan for position 4, sent as chat, as ids, as text with and without the chat's marks, and truncated."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    plan = RoutePlan().force(1, [4], [5, 7, 9, 11]).for_prompt(ids)
    xargs = {"vllm_xargs": plan.extra_args(), "max_tokens": 2, "temperature": 0}
    answers = {
        name: post(started, path, {"model": "tiny", **xargs, **body})
        for name, path, body in (
            ("chat", "/v1/chat/completions", {"messages": MESSAGES}),
            ("ids", "/v1/completions", {"prompt": ids}),
            ("text", "/v1/completions", {"prompt": text, "add_special_tokens": False}),
            ("bare text", "/v1/completions", {"prompt": MESSAGES[0]["content"]}),
            ("truncated", "/v1/completions", {"prompt": ids, "truncate_prompt_tokens": 6}),
            ("other ids", "/v1/completions", {"prompt": [*ids[:-1], 9]}),
        )
    }
    for name in ("chat", "ids", "text"):
        receipt = receipt_of(answers[name].json())
        assert (receipt.plan, receipt.prompt_tokens, receipt.prompt_digest) == (plan.digest, len(ids), prompt_digest(ids))
    for name in ("bare text", "truncated"):
        assert answers[name].status_code == 400
        assert f"the plan is for a prompt of {len(ids)} tokens, this one has" in answers[name].text
    assert answers["other ids"].status_code == 400
    assert f"the plan is for the prompt with digest {prompt_digest(ids)}" in answers["other ids"].text
