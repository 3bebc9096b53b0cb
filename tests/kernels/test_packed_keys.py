"""16-bit logits are compared by keys that hold the expert's id as well: where such a key could go wrong."""

import math

import pytest
import torch
from kernel_cases import WEIGHT_TOLERANCE, Case, loop
from vllm_unsafe_routes.kernels import GatingSpec, RouteRows, pack_allowed, route_topk

INF, NAN = math.inf, math.nan
pytestmark = pytest.mark.parametrize("tokens_per_program", [1, 4], indirect=True, ids=["one", "several"])


def check(case: Case) -> torch.Tensor:
    weights, ids = route_topk(case.logits, case.row_index, case.rows, case.spec)
    expected_weights, expected_ids = loop(case)
    assert ids.tolist() == expected_ids
    torch.testing.assert_close(weights, torch.tensor(expected_weights), rtol=0, atol=WEIGHT_TOLERANCE)
    return ids


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_extreme_values_keep_their_order(dtype):
    """Infinities are clamped to float32's range, which lies beyond that of 16 bits but shares its upper bits."""
    limits = torch.finfo(dtype)
    # Triton's interpreter makes bfloat16's subnormal numbers zero.
    tiny = limits.smallest_normal / (1 if dtype == torch.bfloat16 else 4)
    values = [
        0.0,
        -INF,
        limits.min,
        INF,
        limits.max,
        NAN,
        -0.0,
        tiny,
        INF,
        -tiny,
        limits.max,
    ]
    spec = GatingSpec(len(values), len(values) - 1)
    ids = check(Case(spec, torch.tensor([values], dtype=dtype), None, None, None, None))
    assert ids.tolist() == [[3, 8, 4, 10, 7, 0, 6, 9, 2, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, 1.5, -1.5, INF, -INF, NAN])
def test_equal_logits_go_by_id(dtype, value):
    ids = check(Case(GatingSpec(512, 10), torch.full((1, 512), value, dtype=dtype), None, None, None, None))
    assert ids.tolist() == [list(range(10))]


@pytest.mark.parametrize("value", [1.0, -INF])
@pytest.mark.parametrize("left", [[], [5], [2, 5]])
def test_fewer_left_than_top_k(left, value):
    spec = GatingSpec(6, 3, renormalize=True)
    mask = torch.zeros(1, 6, dtype=torch.bool)
    mask[0, left] = True
    rows = RouteRows(torch.zeros(1, dtype=torch.int32), pack_allowed(mask), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3))
    logits = torch.full((1, 6), value, dtype=torch.bfloat16)
    check(Case(spec, logits, torch.zeros(1, dtype=torch.int32), rows, None, None))
