"""The kernels against their specification, ids exact; small enough to run under compute-sanitizer, too.

    python benchmarks/kernels_exact.py                                                       # on a GPU
    compute-sanitizer --tool memcheck --error-exitcode 9 python benchmarks/kernels_exact.py  # PYTORCH_NO_CUDA_MEMORY_CACHING=1

With that variable each tensor is an allocation of its own, so that an access one element past its end is seen.
"""

from __future__ import annotations

import itertools
import random
from typing import Any
from unittest import mock

from common import support_path

support_path()

import torch  # noqa: E402 - the test suite's helpers are importable from here on
from kernel_cases import WEIGHT_TOLERANCE, Case, loop, make_case  # noqa: E402
from vllm_unsafe_routes.kernels import (  # noqa: E402
    GatingSpec,
    RouteRows,
    fill_row_index,
    pack_allowed,
    route_topk,
    route_topk_reference,
    route_topk_triton,
)
from vllm_unsafe_routes.kernels.row_index import fill_row_index_reference  # noqa: E402

SPECS = {
    "Mixtral": GatingSpec(8, 2, renormalize=True),
    "OLMoE": GatingSpec(64, 8),
    "Qwen1.5-MoE": GatingSpec(60, 4),
    "DeepSeek-V2-Lite": GatingSpec(64, 6),
    "DeepSeek-V2": GatingSpec(160, 6, num_expert_group=8, topk_group=3, routed_scaling_factor=2.5),
    "DeepSeek-V3": GatingSpec(256, 8, "sigmoid", True, 2.5, 8, 4, "top2"),
    "512 experts": GatingSpec(512, 10, renormalize=True),
}
UNTOUCHED = -77
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def on_device(case: Case, device: str, stride: int) -> dict[str, Any]:
    """The case's arguments of `route_topk`, with `stride` columns between the rows of logits."""
    storage = torch.zeros(len(case.logits), case.spec.num_experts + stride, dtype=case.logits.dtype, device=device)
    logits = storage[:, : case.spec.num_experts]
    logits.copy_(case.logits)

    def moved(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    rows = None if case.rows is None else RouteRows(*map(moved, case.rows))
    return {
        "router_logits": logits,
        "row_index": moved(case.row_index),
        "rows": rows,
        "spec": case.spec,
        "correction_bias": moved(case.correction_bias),
        "is_padding": moved(case.is_padding),
    }


def check_route_topk(name: str, spec: GatingSpec, device: str, seed: int, num_tokens: int) -> float:
    """One random case, ids exact; returns the largest error of a weight."""
    bias = spec.scoring != "softmax"
    case = make_case(
        seed,
        spec,
        num_tokens,
        DTYPES[seed % 3],
        directives=("mixed", "all", "none")[seed % 3],
        correction_bias=bias,
        soft=bool(seed % 2),
        padding=bool(seed % 2),
        ties=not bias and not spec.grouped and not seed % 2,
    )
    expected_weights, expected_ids = loop(case)
    # The outputs are views into larger tensors whose other cells must stay as they are.
    weights = torch.full((num_tokens + 2, spec.top_k + 3), float(UNTOUCHED), device=device)
    ids = torch.full((num_tokens + 2, spec.top_k + 3), UNTOUCHED, dtype=torch.int32, device=device)
    inside = slice(1, -1), slice(0, spec.top_k)
    kept: dict[str, torch.Tensor] = {}
    if seed % 2:
        kept = {"routes_ids": torch.zeros_like(ids[inside]), "routes_weights": torch.zeros_like(weights[inside])}
    route_topk(**on_device(case, device, seed % 4), topk_weights=weights[inside], topk_ids=ids[inside], **kept)
    where = f"{name}, seed {seed}"
    assert ids[inside].tolist() == expected_ids, f"{where}: ids differ from the specification"
    if kept:
        same = torch.equal(kept["routes_ids"], ids[inside]) and torch.equal(kept["routes_weights"], weights[inside])
        assert same, f"{where}: the routes kept are others"
    error = (weights[inside].double().cpu() - torch.tensor(expected_weights, dtype=torch.float64)).abs().max().item()
    assert error <= WEIGHT_TOLERANCE, f"{where}: a weight is {error} off"
    ids[inside] = UNTOUCHED
    weights[inside] = UNTOUCHED
    assert (ids == UNTOUCHED).all() and (weights == UNTOUCHED).all(), f"{where}: wrote outside of its outputs"
    return error


def check_row_index(device: str, seed: int) -> None:
    """A random step's row index against the vectorised reference on CPU."""
    rng = random.Random(seed)
    num_layers, num_slots = rng.randrange(1, 28), 12
    base, listed, prompt_len = [-1] * num_slots, [0] * num_slots, [0] * num_slots
    cells: list[int] = []
    for slot in range(1, num_slots):
        listed[slot], prompt_len[slot] = rng.randrange(0, 40), rng.randrange(40, 80)
        base[slot] = len(cells)
        cells += [rng.randrange(-1, 400) for _ in range(num_layers * (listed[slot] + 2))]
    mapping = [rng.randrange(num_slots) for _ in range(rng.randrange(1, 20))]
    starts, positions = [0], list[int]()
    for _ in mapping:
        start = rng.randrange(0, 90)
        positions += range(start, start + rng.choice([1, 1, 1, rng.randrange(1, 300)]))
        starts.append(len(positions))
    positions += [0] * rng.randrange(0, 9)
    int32, int64 = torch.int32, torch.int64
    lists = (mapping, starts, positions, base, listed, prompt_len, cells, [rng.randrange(-1, 9) for _ in range(num_layers)])
    dtypes = (int32, int32, int64, int64, int32, int32, int32, int32)
    host = [torch.tensor(values, dtype=dtype) for values, dtype in zip(lists, dtypes, strict=True)]
    expected = torch.full((num_layers, len(positions) + 5), UNTOUCHED, dtype=int32)
    found = expected.to(device)
    fill_row_index_reference(expected, *host)
    fill_row_index(found, *(tensor.to(device) for tensor in host))
    assert torch.equal(found.cpu(), expected), f"row index, seed {seed}"


def check_many_tokens(experts: int, top_k: int, num_tokens: int = 16384) -> None:
    """Many tokens at once on a GPU, against the vectorised reference on the same logits."""
    spec = GatingSpec(experts, top_k)
    logits = torch.randn(num_tokens, experts, device="cuda").to(torch.bfloat16)
    allowed = torch.rand(256, experts).argsort(-1) < max(top_k, experts // 2)
    zeros = torch.zeros(256, dtype=torch.int32)
    rows = RouteRows(zeros, pack_allowed(allowed), zeros[:, None].repeat(1, top_k), torch.zeros(256, top_k))
    on_gpu = RouteRows(*(None if tensor is None else tensor.cuda() for tensor in rows))
    index = torch.randint(-1, 256, (num_tokens,), dtype=torch.int32)
    weights, ids = route_topk(logits, index.cuda(), on_gpu, spec)
    expected, expected_ids = route_topk_reference(logits.cpu(), index, rows, spec)
    assert torch.equal(ids.cpu().long(), expected_ids.long()), f"{experts}/{top_k}: ids differ at {num_tokens} tokens"
    assert (weights.cpu() - expected).abs().max() < 2 * WEIGHT_TOLERANCE, f"{experts}/{top_k}: weights differ"


def run_cases(device: str, num_seeds: int, num_tokens: int, names: tuple[str, ...] = tuple(SPECS)) -> dict[str, Any]:
    """All cases; returns what was run.

    Raises:
        AssertionError: the first difference.

    """
    worst = 0.0
    for several in (1, 4):
        # As few tokens as a case has would have a program each.
        with mock.patch.object(route_topk_triton, "tokens_per_program", lambda spec, *_, n=several: 1 if spec.grouped else n):
            for name, seed in itertools.product(names, range(num_seeds)):
                worst = max(worst, check_route_topk(name, SPECS[name], device, seed, num_tokens))
    for seed in range(num_seeds):
        check_row_index(device, seed)
    return {"gatings": len(names), "cases": 2 * len(names) * num_seeds, "row_index_cases": num_seeds, "worst_weight_error": worst}


if __name__ == "__main__":
    print(run_cases("cuda" if torch.cuda.is_available() else "cpu", 6, 9))
