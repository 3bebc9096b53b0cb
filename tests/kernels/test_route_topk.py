"""The Triton kernel, interpreted, and the vectorised reference, both against the specification as a float64 loop."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import WEIGHT_TOLERANCE, Case, loop, make_case, random_rows
from vllm_unsafe_routes.kernels import GatingSpec, route_topk, route_topk_reference
from vllm_unsafe_routes.kernels.route_topk_cpu import mask_topk_cpu, route_topk_cpu
from vllm_unsafe_routes.kernels.spec import (
    FLAG_FORCED,
    FLAG_NATIVE_WEIGHTS,
    FLAG_SCORE_BIAS,
    RouteRows,
    RouteWatch,
    pack_allowed,
    unpack_allowed,
)

SENTINEL_ID, SENTINEL_WEIGHT = 77777, 12345.0

several = pytest.mark.parametrize("tokens_per_program", [1, 4], indirect=True, ids=["one", "several"])


def run_kernel(case: Case, ids_dtype=torch.int32, only_directed=False, routes=False):
    """Run the Triton kernel into outputs that are larger than needed and full of sentinels; returns their inner part."""
    num_tokens, top_k = len(case.logits), case.spec.top_k
    weights = torch.full((num_tokens + 2, top_k + 3), SENTINEL_WEIGHT)
    ids = torch.full((num_tokens + 2, top_k + 3), SENTINEL_ID, dtype=ids_dtype)
    inner_weights, inner_ids = weights[1:-1, :top_k], ids[1:-1, :top_k]
    used = (torch.full((num_tokens, top_k), -9, dtype=torch.int32), torch.full((num_tokens, top_k), math.nan))
    route_topk(
        case.logits,
        case.row_index,
        case.rows,
        case.spec,
        correction_bias=case.correction_bias,
        is_padding=case.is_padding,
        topk_weights=inner_weights,
        topk_ids=inner_ids,
        only_directed=only_directed,
        routes_ids=used[0] if routes else None,
        routes_weights=used[1] if routes else None,
    )
    for tensor, sentinel in ((weights, SENTINEL_WEIGHT), (ids.long(), SENTINEL_ID)):
        assert (tensor[[0, -1]] == sentinel).all()
        assert (tensor[:, top_k:] == sentinel).all()
    return inner_weights, inner_ids.long(), used


def run_cpu(case: Case):
    """What the CPU engine runs, into sentinels."""
    shape = (len(case.logits), case.spec.top_k)
    weights, ids = torch.full(shape, SENTINEL_WEIGHT), torch.full(shape, SENTINEL_ID, dtype=torch.int32)
    route_topk_cpu(case.logits, case.row_index, case.rows, case.spec, case.correction_bias, case.is_padding, weights, ids, False)
    return weights, ids


def check(case: Case) -> None:
    expected_weights, expected_ids = loop(case)
    arguments = (case.logits, case.row_index, case.rows, case.spec)
    extra = {"correction_bias": case.correction_bias, "is_padding": case.is_padding}
    for weights, ids in (run_kernel(case)[:2], route_topk_reference(*arguments, **extra), run_cpu(case)):
        assert ids.tolist() == expected_ids
        torch.testing.assert_close(weights, torch.tensor(expected_weights), rtol=0, atol=WEIGHT_TOLERANCE, equal_nan=False)


MODELS = {
    "mixtral": GatingSpec(8, 2, renormalize=True),
    "olmoe": GatingSpec(64, 8),
    "qwen1.5-moe": GatingSpec(60, 4),
    "deepseek-v2-lite": GatingSpec(64, 6),
    "deepseek-v2": GatingSpec(160, 6, num_expert_group=8, topk_group=3, routed_scaling_factor=2.5),
    "qwen3": GatingSpec(128, 8, renormalize=True),
    "deepseek-v3": GatingSpec(256, 8, "sigmoid", True, 2.5, 8, 4, "top2"),
    "kimi-k2": GatingSpec(384, 8, "sigmoid", True, 2.5),
    "deepseek-v4": GatingSpec(256, 6, "sqrtsoftplus", True, 2.5),
    "512 experts": GatingSpec(512, 10, renormalize=True),
    "llama-4": GatingSpec(16, 1, "sigmoid"),
    "odd": GatingSpec(9, 3, "sigmoid", num_expert_group=3, topk_group=2),
}


@several
@pytest.mark.parametrize("directives", ["none", "mixed"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, directives):
    spec = MODELS[name]
    check(make_case(1, spec, directives=directives, correction_bias=spec.scoring != "softmax", soft=True, stride=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_experts", [8, 60, 64, 128, 160, 256, 384, 512])
def test_expert_counts_and_dtypes(num_experts, dtype):
    check(make_case(num_experts, GatingSpec(num_experts, 4), dtype=dtype, num_tokens=6))


@pytest.mark.parametrize("top_k", range(1, 11))
def test_top_k(top_k):
    check(make_case(top_k, GatingSpec(60, top_k, renormalize=bool(top_k % 2)), num_tokens=6, directives="all"))


@several
@given(
    seed=st.integers(0, 1 << 30),
    shape=st.sampled_from([(8, 1, 1), (12, 3, 2), (16, 4, 2), (32, 4, 1), (33, 1, 1), (60, 6, 3), (64, 8, 4)]),
    top_k=st.integers(1, 8),
    scoring=st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]),
    flags=st.tuples(*[st.booleans()] * 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    directives=st.sampled_from(["none", "mixed", "all"]),
    group_score=st.sampled_from(["max", "top2"]),
)
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_mix(seed, shape, top_k, scoring, flags, dtype, directives, group_score):
    renormalize, bias, soft, padding, ties = flags
    spec = GatingSpec(shape[0], top_k, scoring, renormalize, 2.5, shape[1], shape[2], group_score)
    # Rounded logits tie often; float64 and float32 scores agree on those ties where both are exact.
    ties = ties and scoring == "softmax" and not bias and not soft and (shape[1] == 1 or group_score == "max")
    check(make_case(seed, spec, 4, dtype, directives, bias, soft, padding, stride=seed % 3, ties=ties))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint32], ids=str)
def test_index_dtypes(dtype):
    case = make_case(3, MODELS["olmoe"])
    _, ids, _ = run_kernel(case, ids_dtype=dtype)
    assert ids.tolist() == loop(case)[1]


@several
def test_only_directed_leaves_the_others_alone_and_reports_all():
    case = make_case(5, MODELS["olmoe"], num_tokens=12)
    weights, ids, _ = run_kernel(case, only_directed=True)
    undirected = case.row_index < 0
    assert 0 < undirected.sum() < 12
    assert (ids[undirected] == SENTINEL_ID).all()
    assert (weights[undirected] == SENTINEL_WEIGHT).all()
    assert ids[~undirected].tolist() == [row for row, free in zip(loop(case)[1], undirected, strict=True) if not free]
    weights, ids, (used_ids, used_weights) = run_kernel(case, only_directed=True, routes=True)
    assert used_ids.tolist() == ids.tolist()
    assert used_weights.tolist() == weights.tolist()


@several
@pytest.mark.parametrize("kernel", ["triton", "torch"])
def test_one_launch_keeps_native_picks_reports_routes_and_leaves_padding_alone(kernel, monkeypatch):
    """What the engine asks for: the model's gating has run, and wrote -1 for padded tokens."""
    monkeypatch.setenv("VLLM_UNSAFE_ROUTES_KERNEL", kernel)
    case = make_case(6, MODELS["olmoe"], num_tokens=16, directives="all", padding=True)
    case.row_index[::4] = -1
    native = torch.arange(16 * 8, dtype=torch.int64).reshape(16, 8) % 64
    native[case.is_padding] = -1
    weights, ids = torch.full((16, 8), 0.5).masked_fill(case.is_padding[:, None], 0), native.clone()
    kept, routes = torch.full((16, 8), -9, dtype=torch.int32), torch.full((16, 8), -9, dtype=torch.int32)
    used = torch.full((16, 8), math.nan)
    route_topk(
        case.logits,
        case.row_index,
        case.rows,
        case.spec,
        is_padding=case.is_padding,
        topk_weights=weights,
        topk_ids=ids,
        only_directed=True,
        native_ids=kept,
        routes_ids=routes,
        routes_weights=used,
    )
    assert kept.tolist() == native.tolist()
    free = case.row_index < 0
    assert (free & ~case.is_padding).any() and (~free & case.is_padding).any()
    expected = torch.where(free[:, None], native, torch.tensor(loop(case)[1]))
    assert ids.tolist() == routes.tolist() == expected.tolist()
    assert (ids[case.is_padding] == -1).all() and (weights[case.is_padding] == 0).all()
    assert used.tolist() == weights.tolist()


@pytest.mark.parametrize("only_directed", [False, True])
def test_the_kernel_notes_that_it_ran_and_which_tokens_hold_a_nan(only_directed):
    case = make_case(6, MODELS["olmoe"], num_tokens=8, directives="all")
    case.row_index[0] = -1
    case.logits[[0, 2, 2, 7], [3, 0, 63, 9]] = NAN
    marks, num_nan = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    outputs = torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int32)
    for number, num_tokens in ((5, 8), (6, 7), (7, 0)):  # the last token pads the second batch; the third is a dummy
        watch = RouteWatch(torch.tensor([number, num_tokens], dtype=torch.int32), marks[1:2], num_nan[1:2])
        options = dict(topk_weights=outputs[0], topk_ids=outputs[1], only_directed=only_directed)
        route_topk(case.logits, case.row_index, case.rows, case.spec, **options, watch=watch)
        assert marks.tolist() == [0, number, 0, 0]
    # Of the first token nothing is read if it has no directive.
    assert num_nan.tolist() == [0, 3 if only_directed else 5, 0, 0]


def special(values, spec, rows=None, row_index=None, bias=None):
    logits = torch.tensor([values], dtype=torch.float32)
    return Case(spec, logits, row_index, rows, bias, None)


INF, NAN = math.inf, math.nan


@several
@pytest.mark.parametrize(
    "values",
    [
        [0.0, -0.0, 0.0, -0.0, 0.0],
        [NAN, 1.0, NAN, 2.0, -1.0],
        [NAN] * 5,
        [-INF] * 5,
        [INF, 1.0, INF, 0.0, 3.0],
        [-INF, 3.0, -INF, -INF, -INF],
        [3e38, -3e38, 3e38, 1.0, 0.0],
        [200.0, 100.0, 0.0, -100.0, -200.0],
    ],
    ids=["zeros", "nan", "all nan", "all -inf", "+inf", "one finite", "huge", "underflow"],
)
@pytest.mark.parametrize("renormalize", [False, True])
def test_corners(values, renormalize):
    check(special(values, GatingSpec(5, 3, renormalize=renormalize)))


@several
@pytest.mark.parametrize("left", [[], [3], [1, 4]])
@pytest.mark.parametrize("grouping", [(1, 1), (3, 1)])
def test_fewer_left_than_top_k(left, grouping):
    """Such plans are refused; should a row slip through, ids stay in range and nothing banned gets weight."""
    spec = GatingSpec(6, 3, renormalize=True, num_expert_group=grouping[0], topk_group=grouping[1])
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, left] = True
    rows = RouteRows(torch.zeros(1, dtype=torch.int32), pack_allowed(mask), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3))
    case = special([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], spec, rows, torch.zeros(1, dtype=torch.int32))
    check(case)
    weights, ids, _ = run_kernel(case)
    assert all(expert in left or weight == 0 for expert, weight in zip(ids[0].tolist(), weights[0].tolist(), strict=True))


def test_a_banned_expert_stays_out_whatever_its_bias():
    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, 2] = False
    rows = RouteRows(torch.zeros(1, dtype=torch.int32), pack_allowed(mask), torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 2))
    bias = torch.zeros(8)
    bias[2] = 1e6
    case = special([0.0] * 8, GatingSpec(8, 2, "sigmoid"), rows, torch.zeros(1, dtype=torch.int32), bias)
    check(case)
    assert 2 not in run_kernel(case)[1]


def test_zero_tokens():
    weights, ids = route_topk(torch.empty(0, 8), None, None, GatingSpec(8, 2))
    assert weights.shape == ids.shape == (0, 2)


@pytest.mark.parametrize("num_experts", [1, 31, 32, 33, 64, 512])
def test_bits_round_trip(num_experts):
    mask = torch.rand(7, num_experts, generator=torch.Generator().manual_seed(num_experts)) < 0.5
    mask[0], mask[1] = True, False
    assert (unpack_allowed(pack_allowed(mask), num_experts) == mask).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_ids": torch.empty(4, 2, dtype=torch.int16)}, "topk_ids dtype torch.int16"),
        ({"topk_weights": torch.empty(4, 3)}, "topk_weights must be torch.float32"),
        ({"row_index": torch.zeros(4, dtype=torch.int64)}, "row_index must be int32"),
        ({"rows": None}, "row_index and rows come together"),
        ({"router_logits": torch.zeros(4, 9)}, "expected \\[num_tokens, 8\\]"),
        ({"router_logits": torch.zeros(4, 8, dtype=torch.float64)}, "router_logits dtype torch.float64"),
        ({"correction_bias": torch.zeros(7)}, "correction_bias has shape"),
        ({"native_ids": torch.zeros(4, 2)}, "native_ids needs only_directed"),
        ({"native_ids": torch.zeros(4, 2), "only_directed": True}, "native_ids must be torch.int32"),
        ({"routes_ids": torch.zeros(4, 2, dtype=torch.int32)}, "routes_ids and routes_weights come together"),
    ],
)
def test_unsupported_arguments_are_named(change, message):
    import random

    spec = GatingSpec(8, 2)
    arguments = {
        "router_logits": torch.zeros(4, 8),
        "row_index": torch.zeros(4, dtype=torch.int32),
        "rows": random_rows(random.Random(0), spec, 4, False),
        "spec": spec,
        "topk_weights": torch.empty(4, 2),
        "topk_ids": torch.empty(4, 2, dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        route_topk(**{**arguments, **change})


def test_the_op_traces_and_is_registered_right(monkeypatch):
    case = make_case(9, MODELS["olmoe"])

    def gate(logits, row_index):
        weights, ids = route_topk(logits * 2, row_index, case.rows, case.spec)
        return weights + 1, ids

    monkeypatch.delenv("VLLM_UNSAFE_ROUTES_KERNEL")  # the interpreter cannot run under fake tensors' tracing
    compiled = torch.compile(gate, backend="aot_eager", fullgraph=True)(case.logits, case.row_index)
    for one, other in zip(compiled, gate(case.logits, case.row_index), strict=True):
        assert torch.equal(one, other)
    outputs = (torch.zeros(8, 8), torch.zeros(8, 8, dtype=torch.int32))
    arguments = (case.logits, case.row_index, *case.rows, None, None, *outputs, None, None, None, None, None, None)
    settings_of = (8, "softmax", False, 1.0, 1, 1, "max", False)
    torch.library.opcheck(torch.ops.unsafe_routes.route_topk.default, (*arguments, *settings_of))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("rows", ["one", "many"])
@pytest.mark.parametrize("num_tokens", [3, 100])
@pytest.mark.parametrize(("num_experts", "soft"), [(60, False), (60, True), (64, True), (512, False)])
def test_the_cpu_path_equals_the_reference(scoring, rows, num_tokens, num_experts, soft):
    """Also where it sorts by keys (many tokens) and broadcasts one row (a policy); coarse logits tie often, zeros of both signs."""
    import random

    spec = GatingSpec(num_experts, 4, scoring, renormalize=scoring != "softmax")
    generator = torch.Generator().manual_seed(num_experts)
    logits = (torch.randn(num_tokens, num_experts, generator=generator) * 2).round() * torch.tensor([1.0, -0.0]).repeat(
        num_experts // 2
    )
    table = random_rows(random.Random(num_tokens), spec, 8, soft)
    row_index = torch.randint(0, 8, (num_tokens,), generator=generator, dtype=torch.int32)
    if rows == "one":
        row_index = torch.full_like(row_index, int(((table.flags & FLAG_FORCED) == 0).nonzero()[-1]))
    bias = torch.randn(num_experts, generator=generator) if scoring == "sigmoid" else None
    case = Case(spec, logits.to(torch.bfloat16), row_index, table, bias, None)
    weights, ids = run_cpu(case)
    expected_weights, expected_ids = route_topk_reference(case.logits, row_index, table, spec, correction_bias=bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=WEIGHT_TOLERANCE)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 3, 100])
@pytest.mark.parametrize("biased", [False, True])
def test_one_mask_for_all_equals_the_reference(scoring, native, num_tokens, biased):
    """The CPU's way through a step under a policy, where nothing reads the table; coarse logits tie, corners are among them."""
    spec = GatingSpec(60, 4, scoring, renormalize=scoring != "sqrtsoftplus", routed_scaling_factor=2.5 if native else 1.0)
    generator = torch.Generator().manual_seed(num_tokens)
    logits = (torch.randn(num_tokens, 60, generator=generator) * 2).round().to(torch.bfloat16)
    logits[0, :5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 0.0])
    kept = logits.clone()
    banned = torch.zeros(1, 60, dtype=torch.bool)
    banned[0, torch.randperm(60, generator=generator)[: 56 if num_tokens == 3 else 9]] = True
    bias = torch.randn(60, generator=generator) if scoring == "sigmoid" else None
    score_bias = (torch.randn(60, generator=generator) * 2).round() if biased else None
    flags = torch.full((1,), (FLAG_NATIVE_WEIGHTS if native else 0) | (FLAG_SCORE_BIAS if biased else 0), dtype=torch.int32)
    rows = RouteRows(flags, pack_allowed(~banned), torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 4))
    if score_bias is not None:
        rows = rows._replace(score_bias=score_bias[None])
    row_index = torch.zeros(num_tokens, dtype=torch.int32)
    expected_weights, expected_ids = route_topk_reference(logits, row_index, rows, spec, correction_bias=bias)
    weights, ids = torch.full((num_tokens, 4), SENTINEL_WEIGHT), torch.full((num_tokens, 4), SENTINEL_ID, dtype=torch.int64)
    native_ids = torch.full((num_tokens, 4), SENTINEL_ID, dtype=torch.int32)
    mask_topk_cpu(logits, banned, spec, bias, native, weights, ids, score_bias, native_ids)
    assert ids.tolist() == expected_ids.tolist()
    assert native_ids.tolist() == route_topk_reference(logits, None, None, spec, correction_bias=bias)[1].tolist()
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=WEIGHT_TOLERANCE)
    assert torch.equal(logits.isnan(), kept.isnan()) and torch.equal(logits.nan_to_num(), kept.nan_to_num())
