"""Routes in other programs' forms, byte for byte as they write them; and what is no route."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest

from vllm_unsafe_routes import ModelShape, Receipt, RouteError, RoutePlan
from vllm_unsafe_routes.routed_experts import FORMS, read, write

# Four layers, the first of them dense.
SHAPE = ModelShape("made-up", 4, 64, (1, 2, 3), num_experts=8, top_k=2)
# Three tokens; every row has two experts.
IDS = np.array([[[0, 1], [2, 3], [4, 5]], [[6, 7], [1, 0], [3, 2]], [[5, 4], [7, 6], [0, 7]]], np.int32)
ALL_LAYERS = np.concatenate([np.zeros((3, 1, 2), np.int32), IDS], axis=1)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def b64(array):
    return base64.b64encode(array.tobytes()).decode()


# Written by hand from what the programs do.
PADDED = np.concatenate([ALL_LAYERS, np.zeros((1, 4, 2), np.int32)])
EXPECTED = {
    "vllm": npy(ALL_LAYERS.astype(np.uint8)),
    "sglang": b64(ALL_LAYERS.astype("<i4")),
    "dynamo": {"data": b64(ALL_LAYERS.astype(np.uint8)), "shape": [3, 4, 2], "dtype": "uint8", "start": 0},
    "prime-rl": {"data": PADDED.astype(np.uint8).tobytes(), "shape": [4, 4, 2], "dtype": "uint8"},
    "tunix": np.concatenate([np.concatenate([np.full((3, 1, 2), -1), IDS], axis=1), np.full((1, 4, 2), -1)]).astype(np.int32),
    "tensorrt-llm": IDS,
}


def receipt(ids, start=0):
    return Receipt(None, None, 0, 0, route_ids=ids, route_weights=np.zeros(ids.shape, np.float32), routes_start=start)


@pytest.mark.parametrize("form", FORMS)
def test_a_receipt_writes_each_form(form):
    found = receipt(IDS).routed_experts(SHAPE, form)
    expected = EXPECTED[form]
    if isinstance(expected, np.ndarray):
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("form", FORMS)
def test_each_form_reads_back(form):
    ids, start = read(EXPECTED[form], SHAPE, form, num_tokens=3 if form == "prime-rl" else None)
    np.testing.assert_array_equal(ids[:3], IDS)
    assert start == 0 and (form == "tunix") == (len(ids) == 4)
    plan = RoutePlan.from_routed_experts(EXPECTED[form], SHAPE, form, num_tokens=3)
    assert len(plan) == 9 and plan.weights == "native" and plan.model == SHAPE.fingerprint
    assert {(item.layer, *item.positions): item.experts for item in plan.directives}[2, 1] == (1, 0)


def test_many_experts_take_two_bytes():
    shape = replace(SHAPE, num_experts=300)
    ids = IDS + 290
    for form, dtype in (("vllm", np.uint16), ("dynamo", "uint16")):
        found = write(ids, shape, form)
        if form == "dynamo":
            assert found["dtype"] == dtype
        else:
            assert np.load(io.BytesIO(base64.b64decode(found))).dtype == dtype
        np.testing.assert_array_equal(read(found, shape, form)[0], ids)
    with pytest.raises(RouteError, match="names experts in one byte, and the model has 300"):
        write(ids, shape, "prime-rl")


def test_a_start_is_said_and_read():
    found = receipt(IDS, start=32).routed_experts(SHAPE, "dynamo", start=33)
    assert (found["start"], found["shape"]) == (33, [2, 4, 2])
    plan = RoutePlan.from_routed_experts(found, SHAPE, "dynamo")
    assert {item.positions for item in plan.directives} == {(33,), (34,)}
    moved = RoutePlan.from_routed_experts(EXPECTED["vllm"], SHAPE, first_position=7)
    assert {item.positions for item in moved.directives} == {(7,), (8,), (9,)}
    with pytest.raises(RouteError, match=r"start 31 is out of range \(32-35\)"):
        receipt(IDS, start=32).routed_experts(SHAPE, "vllm", start=31)


def test_tokens_from_the_prefix_cache_have_no_route():
    ids = IDS.copy()
    ids[:2] = -1
    for form in FORMS:
        if form != "tunix":
            with pytest.raises(RouteError, match="the routes of 2 tokens are not known, the first at position 0: their KV came"):
                receipt(ids).routed_experts(SHAPE, form)
    assert (receipt(ids).routed_experts(SHAPE, "tunix")[:2] == -1).all()
    assert len(RoutePlan.from_routed_experts(receipt(ids).routed_experts(SHAPE, "tunix"), SHAPE, "tunix")) == 3
    np.testing.assert_array_equal(receipt(ids).routed_experts(SHAPE, "tensorrt-llm", start=2), IDS[2:])


def with_row(token, layer, row, base=ALL_LAYERS):
    changed = base.copy()
    changed[token, layer] = row
    return changed


ONE = replace(SHAPE, top_k=1)
ZEROS = np.zeros((1, 4, 1), np.int32)


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        pytest.param(
            PADDED,
            {},
            r"position 3, layer 1: \[0, 0\] repeats an expert: padding or a dense layer.*; say with num_tokens",
            id="zeros",
        ),
        pytest.param(with_row(1, 2, [3, 3]), {}, r"position 1, layer 2: \[3, 3\] repeats an expert", id="repeats"),
        pytest.param(with_row(1, 2, [3, 3]), {"num_tokens": 2}, r"layer 2: \[3, 3\] repeats.*never a route$", id="valid-part"),
        pytest.param(with_row(2, 3, [1, 8]), {}, r"position 2, layer 3: \[1, 8\] names an expert out of range for 8", id="range"),
        pytest.param(with_row(2, 3, [1, -1]), {}, r"layer 3: \[1, -1\] has a negative expert; only tunix", id="negative"),
        pytest.param(with_row(2, 3, [1, -1]), {"form": "tunix"}, r"layer 3: \[1, -1\] has a negative expert$", id="half-negative"),
        pytest.param(ALL_LAYERS[:, :2], {}, r"\[3, 2, 2\], expected \[num_tokens, 4 layers or 3 MoE layers, 2\]", id="layers"),
        pytest.param(ALL_LAYERS[..., :1], {}, r"shape \[3, 4, 1\], expected", id="top-k"),
        pytest.param(ALL_LAYERS.astype(float), {}, "must be integers, got float64", id="floats"),
        pytest.param(ALL_LAYERS, {"num_tokens": 4}, r"num_tokens 4 is out of range for 3 rows \(1-3\)", id="num-tokens"),
        pytest.param(ALL_LAYERS, {"form": "cuneiform"}, "form 'cuneiform' is not one of vllm, sglang", id="form"),
        pytest.param("????", {}, "are not base64", id="base64"),
        pytest.param(b64(np.arange(3)), {}, "are base64 of a .npy file", id="no-npy"),
        pytest.param(b64(np.arange(3, dtype=np.int32)), {"form": "sglang"}, r"of 12 bytes are not int32 \[-1, 4, 2\]", id="bytes"),
        pytest.param({"data": "", "shape": [1]}, {"form": "dynamo"}, "need data, shape and dtype: KeyError: 'dtype'", id="keys"),
        pytest.param({"data": "", "shape": [1], "dtype": "float8"}, {"form": "dynamo"}, "dtype 'float8' is not one of", id="dtype"),
        pytest.param(7, {}, "of vllm cannot be a int", id="type"),
    ],
)
def test_what_is_no_route_is_named(value, options, message):
    options = {"form": "vllm", **options}
    with pytest.raises(RouteError, match=message):
        read(value, SHAPE, options.pop("form"), **options)


def test_with_one_expert_a_token_zeros_are_padding_unless_they_are_said_to_be_valid():
    routes = np.concatenate([np.full((1, 4, 1), 3, np.int32), ZEROS])
    with pytest.raises(RouteError, match=r"position 1, layer 1: \[0\] and all other layers are 0: padding"):
        read(routes, ONE, "vllm")
    assert read(routes, ONE, "vllm", num_tokens=2)[0].shape == (2, 3, 1)


def test_a_receipt_without_routes_says_so():
    with pytest.raises(RouteError, match="the receipt has no routes: send return_routes"):
        Receipt(None, None, 0, 0).routed_experts(SHAPE)
