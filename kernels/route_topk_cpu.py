"""Directed gating on the CPU: the reference's results with a fraction of its operations.

A policy puts a mask on every token of every step, so this path is part of serving, and on a few tokens every torch operation costs
more than what it computes. `mask_topk_cpu` is for steps in which the policy's is the only mask; `route_topk_cpu` looks once at
what the batch's rows ask for and leaves out what nobody asked for. Grouped selection and rows with fewer experts than top_k go to
the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .reference import finite, route_topk_reference, score, soft_wishes, steer
from .spec import (
    FLAG_EXPLICIT_WEIGHTS,
    FLAG_FORCED,
    FLAG_NATIVE_WEIGHTS,
    FLAG_SCORE_BIAS,
    FLAG_STEERED,
    GatingSpec,
    RouteRows,
)

# Up to so many, torch's stable sort takes less time than the operations around numpy's.
_FEW_TOKENS = 32


def route_topk_cpu(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    rows: RouteRows | None,
    spec: GatingSpec,
    correction_bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    only_directed: bool,
    native_ids: torch.Tensor | None = None,
) -> None:
    """Write routes; arguments as in `route_topk`, but for `native_ids`: gets what the gating picks without directives."""
    where: Any = ...
    all_directed = row_index is not None and int(row_index.numpy().min()) >= 0
    if only_directed and not all_directed:
        if row_index is None:
            return
        where = (row_index >= 0).nonzero().squeeze(1)
        if not len(where):
            return
        row_index, all_directed = row_index[where], True
        router_logits = router_logits[where]
        is_padding = None if is_padding is None else is_padding[where]
    x = finite(router_logits.to(torch.float32))
    if native_ids is not None:
        native_ids.copy_(_native(x, spec, correction_bias))
    result = None
    if all_directed and row_index is not None and rows is not None and is_padding is None and not spec.grouped:
        result = _route_all_directed(x, row_index.numpy(), rows, spec, correction_bias)
    if result is None:
        result = route_topk_reference(router_logits, row_index, rows, spec, correction_bias=correction_bias, is_padding=is_padding)
    if where is ...:
        topk_weights.copy_(result[0])
        topk_ids.copy_(result[1])
    else:
        topk_weights[where], topk_ids[where] = result[0], result[1].to(topk_ids.dtype)


def _route_all_directed(
    x: torch.Tensor,
    row: np.ndarray,
    rows: RouteRows,
    spec: GatingSpec,
    correction_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Weights and int64 ids of tokens that all have a row, by finite logits; None where only the reference knows the answer."""
    if row[0] == row[-1] and (row == row[0]).all():
        row = row[:1]  # one row for all: its mask broadcasts
    flags = rows.flags.numpy()[row]
    asked = int(np.bitwise_or.reduce(flags))
    may = _allowed(rows, row, flags, spec.num_experts)
    allowed, banned = torch.from_numpy(may), torch.from_numpy(~may)
    biased, promoted, demoted = x, None, None
    if asked & (FLAG_SCORE_BIAS | FLAG_STEERED):
        biased, promoted, demoted = soft_wishes(x, allowed, torch.from_numpy(flags), torch.from_numpy(row).long(), rows)
    own, choice = _choice(biased, banned, spec, correction_bias)
    ids = _best(choice, spec.top_k)
    if asked & FLAG_STEERED and promoted is not None and demoted is not None:
        ids = _best_steered(choice, promoted, demoted, spec.top_k)
        steered = steer(biased, allowed, promoted, demoted)
        own = score(steered, allowed.expand_as(steered), spec.scoring)
    if int(np.add.reduce(may, axis=1, dtype=np.int16).min()) < spec.top_k:
        return None
    if asked & FLAG_FORCED:
        forced = _having(flags, FLAG_FORCED)
        ids.numpy()[forced] = rows.forced_ids.numpy()[row[forced]]
    weights = own.gather(1, ids)
    if asked & FLAG_NATIVE_WEIGHTS:
        native = score(x, torch.ones_like(allowed), spec.scoring).gather(1, ids)
        weights = torch.where(torch.from_numpy(flags & FLAG_NATIVE_WEIGHTS).bool().unsqueeze(1), native, weights)
    weights = _scale(weights, spec)
    if asked & FLAG_EXPLICIT_WEIGHTS:
        explicit = _having(flags, FLAG_EXPLICIT_WEIGHTS)
        weights.numpy()[explicit] = rows.forced_weights.numpy()[row[explicit]]
    return weights, ids


def _having(flags: np.ndarray, flag: int) -> Any:
    """The rows with this flag, as an index; all of them by a slice, which also stands for the tokens of a row that all share."""
    has = (flags & flag) != 0
    return slice(None) if has.all() else has.nonzero()[0]


def unpack_words(words: np.ndarray, num_experts: int) -> np.ndarray:
    """`unpack_allowed` in one operation: int32 words, little-endian on every CPU that the engine runs on, to bool, last axis."""
    return np.unpackbits(words.view(np.uint8), axis=-1, count=num_experts, bitorder="little").view(bool)


def _allowed(rows: RouteRows, row: np.ndarray, flags: np.ndarray, num_experts: int) -> np.ndarray:
    """`unpack_allowed` of these rows, bool [len(row), num_experts]; of a forced one its own experts, whatever its words hold."""
    allowed = unpack_words(rows.allowed.numpy()[row], num_experts)
    forced = ((flags & FLAG_FORCED) != 0).nonzero()[0]
    if len(forced):
        allowed[forced] = False
        allowed[forced[:, None], rows.forced_ids.numpy()[row[forced]]] = True
    return allowed


def mask_topk_cpu(
    router_logits: torch.Tensor,
    banned: torch.Tensor,
    spec: GatingSpec,
    correction_bias: torch.Tensor | None,
    native_weights: bool,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    score_bias: torch.Tensor | None = None,
    native_ids: torch.Tensor | None = None,
) -> None:
    """Gate all tokens under one mask and one bias, as `route_topk` does with one such row for all.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16.
        banned: bool [1, num_experts], True where an expert may not be selected; leaves at least `spec.top_k`.
        spec: the model's gating, without groups.
        correction_bias: float [num_experts] or None.
        native_weights: the row's FLAG_NATIVE_WEIGHTS.
        topk_weights: float32 [num_tokens, top_k], written.
        topk_ids: int [num_tokens, top_k], written.
        score_bias: float32 [num_experts], added to the logits before scoring, or None.
        native_ids: int [num_tokens, top_k] or None: gets what the gating picks without mask and bias.

    """
    assert not spec.grouped
    x = finite(router_logits.to(torch.float32))
    if native_ids is not None:
        native_ids.copy_(_native(x, spec, correction_bias))
    own, choice = _choice(x if score_bias is None else finite(x + score_bias), banned, spec, correction_bias)
    ids = _best(choice, spec.top_k)
    weights = score(x, ~torch.zeros_like(banned), spec.scoring) if native_weights else own
    topk_weights.copy_(_scale(weights.gather(1, ids), spec))
    topk_ids.copy_(ids)


def _choice(
    x: torch.Tensor, banned: torch.Tensor, spec: GatingSpec, correction_bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [num_tokens, num_experts], and what is compared, -inf where banned."""
    masked = x.masked_fill(banned, -torch.inf)
    # The other scorings are elementwise and do not look at which experts are among them.
    own = masked.softmax(-1) if spec.scoring == "softmax" else score(x, banned, spec.scoring)
    if correction_bias is None and spec.scoring == "softmax":
        return own, masked
    choice = own if correction_bias is None else own + correction_bias
    return own, choice.masked_fill(banned, -torch.inf)


def _native(x: torch.Tensor, spec: GatingSpec, correction_bias: torch.Tensor | None) -> torch.Tensor:
    """Ids of the best without a directive, int64 [num_tokens, top_k]."""
    if correction_bias is None and spec.scoring == "softmax":
        return _best(x, spec.top_k)
    own = score(x, torch.ones_like(x, dtype=torch.bool), spec.scoring)
    return _best(own if correction_bias is None else own + correction_bias, spec.top_k)


def _scale(weights: torch.Tensor, spec: GatingSpec) -> torch.Tensor:
    if spec.renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 0)
    return weights * spec.routed_scaling_factor if spec.routed_scaling_factor != 1.0 else weights


def _best_steered(choice: torch.Tensor, promoted: torch.Tensor, demoted: torch.Tensor, top_k: int) -> torch.Tensor:
    """As `_best`, with the promoted experts first, by smaller id, and the demoted ones last of those that are not banned."""
    place = (choice > -torch.inf).to(torch.int8) * 2 - demoted.to(torch.int8)
    place = place.masked_fill(promoted, 3)
    order = torch.argsort(choice.masked_fill(promoted, 0), dim=-1, descending=True, stable=True)
    order = order.gather(1, torch.argsort(place.gather(1, order), dim=-1, descending=True, stable=True))
    return order[:, :top_k]


def _best(choice: torch.Tensor, top_k: int) -> torch.Tensor:
    """Ids of the `top_k` largest of each row, float32, equal ones by smaller id; int64 [num_tokens, top_k].

    For many tokens numpy sorts distinct keys of a row, the inverted order-preserving bits of the score above the id: a fifth of
    torch.topk's time. For few the number of operations counts.
    """
    if len(choice) <= _FEW_TOKENS:
        return choice.sort(dim=-1, descending=True, stable=True)[1][:, :top_k]
    num_experts = choice.shape[1]
    shift = (num_experts - 1).bit_length()
    bits = (choice + 0.0).numpy().view(np.int32)  # adding 0 makes -0 equal 0
    keys = (~(bits ^ ((bits >> 31) & 0x7FFFFFFF))).astype(np.int64)
    keys <<= shift
    keys |= np.arange(num_experts)
    keys.sort(axis=-1)
    return torch.from_numpy(keys[:, :top_k] & ((1 << shift) - 1))
