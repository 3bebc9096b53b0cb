"""`unsafe-routes replay`: files of every kind that it reads, what it says, and its exit status."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_unsafe_routes import Receipt
from vllm_unsafe_routes.cli import main
from vllm_unsafe_routes.commands.replay import load
from vllm_unsafe_routes.study.model import Model

SHAPE = Model("lab").shape
ROUTES = np.stack([np.random.default_rng(at).permutation(SHAPE.num_experts)[: SHAPE.top_k] for at in range(20)]).astype(np.int32)
ROUTES = ROUTES.reshape(5, len(SHAPE.moe_layers), SHAPE.top_k)
OTHER = ROUTES.copy()
OTHER[3, 2] = (ROUTES[3, 2] + 1) % SHAPE.num_experts
LOGPROBS = [-1.0, -2.0, -3.0]


def receipt(ids, scores=None):
    return Receipt(None, None, 0, 0, ids, np.zeros(ids.shape, np.float32), scores)


def write(path, value):
    if isinstance(value, np.ndarray):
        np.save(path, value)
    else:
        path.write_text(json.dumps(value))
    return path


def answer(logprobs):
    return {"choices": [{"logprobs": {"token_logprobs": logprobs}}]}


FILES = {
    "receipt": ("json", receipt(ROUTES).to_dict()),
    "our answer": ("json", {"kv_transfer_params": {"unsafe_routes": receipt(ROUTES).to_dict()}, **answer(LOGPROBS)}),
    "vllm's answer": ("json", {"choices": [{"routed_experts": receipt(ROUTES).routed_experts(SHAPE, "vllm")}]}),
    "sglang's answer": ("json", {"meta_info": {"routed_experts": receipt(ROUTES).routed_experts(SHAPE, "sglang")}}),
    "dynamo": ("json", receipt(ROUTES).routed_experts(SHAPE, "dynamo")),
    "array": ("npy", ROUTES),
    "bare": ("json", receipt(ROUTES).routed_experts(SHAPE, "vllm")),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read(tmp_path, name):
    kind, value = FILES[name]
    found = load(write(tmp_path / f"a.{kind}", value), SHAPE)
    np.testing.assert_array_equal(found.routes, ROUTES)
    assert (found.logprobs is not None) == (name == "our answer")


def run(capsys, *arguments):
    status = main(["replay", *map(str, arguments), "--model", "lab"])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_routes_that_part(capsys, tmp_path):
    one, other = write(tmp_path / "one.npy", ROUTES), write(tmp_path / "other.json", receipt(OTHER).to_dict())
    status, out, _ = run(capsys, one, other)
    layer = SHAPE.moe_layers[2]
    assert status == 2
    assert "routes            19 of 20 (token, layer) alike" in out
    picked = [sorted(ids[3, 2].tolist()) for ids in (ROUTES, OTHER)]
    assert f"first divergence  token 3, layer {layer}: {picked[0]} and {picked[1]}" in out and f"{layer}: 20.0%" in out
    assert run(capsys, one, one) == (0, "routes            20 of 20 (token, layer) alike\n", "")


def test_log_probabilities_that_part(capsys, tmp_path):
    one = write(tmp_path / "one.json", answer([None, *LOGPROBS]))
    other = write(tmp_path / "other.json", {"choices": [{"logprobs": {"content": [{"logprob": at} for at in (0, -1, -2.2, -3)]}}]})
    status, out, _ = run(capsys, one, other)
    assert status == 2 and "2 of 3 within 0.001 nats" in out and "token 2: -2.000000 and -2.200000" in out
    assert run(capsys, one, other, "--tolerance", 0.3)[0] == 0
    assert run(capsys, write(tmp_path / "a.npy", np.array(LOGPROBS)), write(tmp_path / "b.json", LOGPROBS))[0] == 0


def test_scores_of_a_receipt_are_log_probabilities(tmp_path):
    scores = np.array([[-1.0, -9.0], [-2.0, -9.0]], np.float32)
    assert load(write(tmp_path / "a.json", receipt(ROUTES, scores).to_dict()), SHAPE).logprobs.tolist() == [-1.0, -2.0]


def test_padding_is_named_and_cut_off_where_the_valid_part_is_said(capsys, tmp_path):
    padded = write(tmp_path / "padded.npy", np.concatenate([ROUTES, np.zeros_like(ROUTES[:1])]))
    plain = write(tmp_path / "plain.npy", ROUTES)
    status, _, err = run(capsys, padded, plain)
    assert status == 1 and f"{padded}: position 5, layer {SHAPE.moe_layers[0]}: " in err and "say with num_tokens" in err
    assert run(capsys, padded, plain, "--num-tokens", 5)[0] == 0


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (LOGPROBS, {"choices": [{"routed_experts": FILES["bare"][1]}]}, "have neither routes nor log-probabilities in common"),
        ({"choices": [{}]}, LOGPROBS, "there are neither routes nor log-probabilities"),
        (7, LOGPROBS, "expected an object, a list or a string, got int"),
    ],
    ids=["nothing in common", "nothing", "a number"],
)
def test_what_cannot_be_compared_is_said(capsys, tmp_path, one, other, message):
    status, _, err = run(capsys, write(tmp_path / "one.json", one), write(tmp_path / "other.json", other))
    assert status == 1 and message in err
    status, _, err = run(capsys, tmp_path / "nowhere.json", tmp_path / "one.json")
    assert status == 1 and "nowhere.json cannot be read" in err
