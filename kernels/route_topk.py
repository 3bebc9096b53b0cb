"""The routing op: model gating with per-token directives, in one kernel.

`route_topk` is the public op; `reference.py` says what it computes. CUDA and ROCm run `route_topk_triton.py`, the CPU runs
`route_topk_cpu.py` on the tokens that have a directive. One program gates one token: a row of logits fits in one warp's registers.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from .route_topk_cpu import route_topk_cpu
from .spec import GatingSpec, RouteRows, RouteWatch

_LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INDEX_DTYPES = (torch.int32, torch.int64, torch.uint32)
# Tests run the Triton kernel on CPU through its interpreter with this set to "triton".
KERNEL_ENV = "VLLM_UNSAFE_ROUTES_KERNEL"


def route_topk(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    rows: RouteRows | None,
    spec: GatingSpec,
    *,
    correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    topk_weights: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    indices_dtype: torch.dtype = torch.int32,
    only_directed: bool = False,
    native_ids: torch.Tensor | None = None,
    routes_ids: torch.Tensor | None = None,
    routes_weights: torch.Tensor | None = None,
    watch: RouteWatch | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate a batch of tokens, obeying each token's directive.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16; any row stride, experts contiguous.
        row_index: int32 [num_tokens], the token's row of the table or -1; None: no directives at all.
        rows: the route table; needed with `row_index`.
        spec: the model's gating.
        correction_bias: float32 [num_experts], added to the scores for the selection only.
        is_padding: bool [num_tokens]; padded tokens get ids -1 and weights 0.
        topk_weights: float32 [num_tokens, top_k], written; allocated if None.
        topk_ids: int32, int64 or uint32 [num_tokens, top_k], written; allocated with `indices_dtype` if None.
        indices_dtype: dtype of an allocated `topk_ids`.
        only_directed: leave tokens without a directive as they are in the outputs (the model's own gating wrote them).
        native_ids: int32 [num_tokens, top_k], with `only_directed`: what the model's own gating picked for each token.
        routes_ids: int32 [num_tokens, top_k]; with `routes_weights`, the routes of all tokens as they are afterwards.
        routes_weights: float32 [num_tokens, top_k].
        watch: what the Triton kernel notes of this run; on the CPU the caller can see for itself.

    Returns:
        `topk_weights` and `topk_ids`.

    Raises:
        ValueError: a shape, dtype or combination that is not supported; the message names it.

    """
    num_tokens = router_logits.shape[0]
    if topk_weights is None or topk_ids is None:
        if only_directed:
            raise ValueError("only_directed needs the model's own topk_weights and topk_ids")
        shape = (num_tokens, spec.top_k)
        topk_weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
        topk_ids = torch.empty(shape, dtype=indices_dtype, device=router_logits.device)
    if native_ids is not None and not only_directed:
        raise ValueError("native_ids needs only_directed: nothing else ran the model's own gating")
    _check(router_logits, row_index, rows, spec, correction_bias)
    _check_outputs(topk_weights, topk_ids, native_ids, routes_ids, routes_weights, (num_tokens, spec.top_k))
    # Only traced code needs the op; its dispatch costs more than gating a few tokens.
    run: Any = torch.ops.unsafe_routes.route_topk if torch.compiler.is_compiling() else _dispatch
    run(
        router_logits,
        row_index,
        *(rows or (None,) * 6),
        correction_bias,
        is_padding,
        topk_weights,
        topk_ids,
        native_ids,
        routes_ids,
        routes_weights,
        *(watch or (None,) * 3),
        spec.top_k,
        spec.scoring,
        spec.renormalize,
        spec.routed_scaling_factor,
        spec.num_expert_group,
        spec.topk_group,
        spec.group_score,
        only_directed,
    )
    return topk_weights, topk_ids


def uses_triton(device: torch.device) -> bool:
    """Whether `route_topk` runs the Triton kernel there."""
    return device.type == "cuda" or os.environ.get(KERNEL_ENV) == "triton"


def _check(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    rows: RouteRows | None,
    spec: GatingSpec,
    correction_bias: torch.Tensor | None,
) -> None:
    num_tokens = router_logits.shape[0]
    if router_logits.dtype not in _LOGIT_DTYPES:
        raise ValueError(f"router_logits dtype {router_logits.dtype} is not one of {_LOGIT_DTYPES}")
    if router_logits.ndim != 2 or router_logits.shape[1] != spec.num_experts:
        raise ValueError(f"router_logits has shape {tuple(router_logits.shape)}, expected [num_tokens, {spec.num_experts}]")
    if router_logits.stride(1) != 1 and num_tokens:
        raise ValueError("router_logits: the experts of a token must be contiguous")
    if (row_index is None) != (rows is None):
        raise ValueError("row_index and rows come together")
    if rows is not None and (rows.score_bias is None) != (rows.steered is None):
        raise ValueError("score_bias and steered come together")
    if row_index is not None and (row_index.dtype != torch.int32 or row_index.shape != (num_tokens,)):
        raise ValueError(f"row_index must be int32 [{num_tokens}], got {row_index.dtype} {tuple(row_index.shape)}")
    if correction_bias is not None and correction_bias.shape != (spec.num_experts,):
        raise ValueError(f"correction_bias has shape {tuple(correction_bias.shape)}, expected [{spec.num_experts}]")


def _check_outputs(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    native_ids: torch.Tensor | None,
    routes_ids: torch.Tensor | None,
    routes_weights: torch.Tensor | None,
    shape: tuple[int, int],
) -> None:
    if topk_ids.dtype not in _INDEX_DTYPES:
        raise ValueError(f"topk_ids dtype {topk_ids.dtype} is not one of {_INDEX_DTYPES}")
    if (routes_ids is None) != (routes_weights is None):
        raise ValueError("routes_ids and routes_weights come together")
    for name, tensor, dtype in (
        ("topk_weights", topk_weights, torch.float32),
        ("topk_ids", topk_ids, topk_ids.dtype),
        ("native_ids", native_ids, torch.int32),
        ("routes_ids", routes_ids, torch.int32),
        ("routes_weights", routes_weights, torch.float32),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or (shape[0] and tensor.stride(1) != 1):
            raise ValueError(f"{name} must be {dtype} {list(shape)} with contiguous rows, got {tensor.dtype} {tuple(tensor.shape)}")


def _dispatch(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    flags: torch.Tensor | None,
    allowed: torch.Tensor | None,
    forced_ids: torch.Tensor | None,
    forced_weights: torch.Tensor | None,
    score_bias: torch.Tensor | None,
    steered: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    native_ids: torch.Tensor | None,
    routes_ids: torch.Tensor | None,
    routes_weights: torch.Tensor | None,
    watch_step: torch.Tensor | None,
    watch_mark: torch.Tensor | None,
    watch_num_nan: torch.Tensor | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    routed_scaling_factor: float,
    num_expert_group: int,
    topk_group: int,
    group_score: str,
    only_directed: bool,
) -> None:
    if not router_logits.shape[0]:
        return
    spec = GatingSpec(
        router_logits.shape[1],
        top_k,
        scoring,
        renormalize,
        routed_scaling_factor,
        num_expert_group,
        topk_group,
        group_score,
    )
    rows = watch = None
    if flags is not None and allowed is not None and forced_ids is not None and forced_weights is not None:
        rows = RouteRows(flags, allowed, forced_ids, forced_weights, score_bias, steered)
    if watch_step is not None and watch_mark is not None and watch_num_nan is not None:
        watch = RouteWatch(watch_step, watch_mark, watch_num_nan)
    arguments = (router_logits, row_index, rows, spec, correction_bias, is_padding, topk_weights, topk_ids)
    if uses_triton(router_logits.device):
        from .route_topk_triton import launch

        launch(*arguments, native_ids, routes_ids, routes_weights, watch, only_directed)
    elif router_logits.device.type == "cpu":
        if watch is not None:
            raise ValueError("watch needs the Triton kernel")
        if native_ids is not None:
            native_ids.copy_(topk_ids)
        route_topk_cpu(*arguments, only_directed)
        if routes_ids is not None and routes_weights is not None:
            routes_ids.copy_(topk_ids)
            routes_weights.copy_(topk_weights)
    else:
        raise ValueError(f"route_topk has no kernel for device {router_logits.device.type!r}")


_route_topk = torch.library.custom_op(
    "unsafe_routes::route_topk",
    _dispatch,
    mutates_args=("topk_weights", "topk_ids", "native_ids", "routes_ids", "routes_weights", "watch_mark", "watch_num_nan"),
)


@_route_topk.register_fake
def _(*arguments: Any) -> None:
    return None
