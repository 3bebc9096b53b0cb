"""The specification of directed gating, in plain torch on any device. The CPU engine runs it; the Triton kernel must equal it.

For one token with router logits `x`, row `r` of the route table (or none) and gating `s`:

    x = float32(x), clamped to the finite range; NaN -> lowest
    allowed = all experts, or those whose bits are set in the row
    biased = x + score_bias[r], clamped as well                 if FLAG_SCORE_BIAS, else x
    promoted, demoted = the allowed experts whose bits are set in steered[r]        if FLAG_STEERED without FLAG_FORCED, else none
    steered = max(biased among allowed) + margin at promoted, min(biased among allowed) - margin at demoted, biased elsewhere
    score(v, among) = softmax of v over `among` (0 elsewhere)   softmax
                    | sigmoid(v) | sqrt(softplus(v))            elementwise, whatever `among` is
    choice = biased if softmax without correction bias          (monotone, and exact where probabilities underflow)
           | score(biased, allowed) + correction_bias           else
    eligible = experts of the topk_group best groups; a group's score is the best (or the sum of the two best) choice among its
               allowed experts that are not demoted, -inf if it has none; equal groups: the smaller first
    ids = the top_k allowed experts by (promoted first, demoted last, eligible first, larger choice first, smaller id first), the
          promoted ones among themselves by smaller id alone
        | forced_ids[r]                                         if FLAG_FORCED: order kept, groups do not matter
    w = score(steered, allowed or the forced experts)[ids] | score(x, all)[ids]     if FLAG_NATIVE_WEIGHTS
    w = w / sum(w), zeros if the sum is 0                       if renormalize
    w = w * routed_scaling_factor
    w = forced_weights[r]                                       if FLAG_EXPLICIT_WEIGHTS

So a bias moves selection and, unless weights are native, weights; a promoted expert is selected whatever its logit, its
correction or its group, while the others compete as ever; a demoted one is selected only where nothing else is left. With softmax
and without masks this is SteerMoE's rule (arXiv 2509.09660, adobe-research/SteerMoE: log-softmax scores put to max + 0.01 and
min - 0.01 before the model's own top-k), but for ties that its margin cannot part. What an expert is promoted or demoted for is
undone neither by corrections nor by groups; what a mask excludes is out whatever its bias.

An allowed expert whose logit is -inf or NaN can be selected, last. A row that leaves fewer experts than top_k (the engine refuses
such plans) repeats its best expert with weight 0, expert 0 if it leaves none: ids are always in range. Tokens marked as
padding get ids -1 and weights 0, which is vLLM's own convention. Zero tokens and any row stride are fine.
"""

from __future__ import annotations

import torch

from .spec import (
    FLAG_EXPLICIT_WEIGHTS,
    FLAG_FORCED,
    FLAG_NATIVE_WEIGHTS,
    FLAG_SCORE_BIAS,
    FLAG_STEERED,
    STEERING_MARGIN,
    GatingSpec,
    RouteRows,
    unpack_allowed,
)


def route_topk_reference(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    rows: RouteRows | None,
    spec: GatingSpec,
    *,
    correction_bias: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Directed gating of a batch of tokens; the module's docstring is the formula.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16.
        row_index: int32 [num_tokens], row of each token or -1; None: no token has a directive.
        rows: the route table; may be None with `row_index`.
        spec: the model's gating.
        correction_bias: float [num_experts], steers the selection, never the weights.
        is_padding: bool [num_tokens].
        compute_dtype: float32, or float64 where tests want a reference without rounding.

    Returns:
        Weights float32 [num_tokens, top_k] and ids int32 [num_tokens, top_k].

    """
    num_tokens, num_experts, top_k = router_logits.shape[0], spec.num_experts, spec.top_k
    x = finite(router_logits.to(torch.float32)).to(compute_dtype)
    allowed = torch.ones_like(x, dtype=torch.bool)
    biased, flags, row = x, None, None
    promoted = demoted = None
    if row_index is not None and rows is not None:
        directed = row_index >= 0
        row = row_index.clamp(min=0).long()
        flags = torch.where(directed, rows.flags[row], 0)
        forced_ids = rows.forced_ids[row].long()
        forced = (flags & FLAG_FORCED).bool().unsqueeze(1)
        allowed = unpack_allowed(rows.allowed[row], num_experts) | ~directed.unsqueeze(1)
        only_forced = torch.zeros_like(allowed).scatter_(1, torch.where(forced, forced_ids, 0), True)
        allowed = torch.where(forced, only_forced, allowed)
        biased, promoted, demoted = soft_wishes(x, allowed, flags, row, rows)

    own = score(biased, allowed, spec.scoring)
    if spec.scoring == "softmax" and correction_bias is None:
        choice = biased
    else:
        choice = own if correction_bias is None else own + correction_bias.to(compute_dtype)
    if promoted is None or demoted is None:
        ids, num_left = _select(choice, allowed, spec)
    else:
        ids, num_left = _select(choice, allowed, spec, promoted, demoted)
        own = score(steer(biased, allowed, promoted, demoted), allowed, spec.scoring)
    if flags is not None:
        ids = torch.where(forced, forced_ids, ids)
        num_left = torch.where(forced, top_k, num_left)

    weights = own.gather(1, ids)
    if flags is not None:
        native = score(x, torch.ones_like(allowed), spec.scoring).gather(1, ids)
        weights = torch.where((flags & FLAG_NATIVE_WEIGHTS).bool().unsqueeze(1), native, weights)
    weights = torch.where(torch.arange(top_k, device=x.device) < num_left, weights, 0)
    if spec.renormalize:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 0)
    weights = weights * spec.routed_scaling_factor
    weights = weights.to(torch.float32)
    if flags is not None and rows is not None:
        explicit = (flags & FLAG_EXPLICIT_WEIGHTS).bool().unsqueeze(1)
        weights = torch.where(explicit, rows.forced_weights[row], weights)
    if is_padding is not None:
        weights = weights.masked_fill(is_padding.unsqueeze(1), 0)
        ids = ids.masked_fill(is_padding.unsqueeze(1), -1)
    assert weights.shape == (num_tokens, top_k)
    return weights, ids.to(torch.int32)


def finite(values: torch.Tensor) -> torch.Tensor:
    """Clamp to the finite float32 range; NaN becomes the lowest."""
    largest = torch.finfo(torch.float32).max
    values = values.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
    # Nothing else of float32 lies outside.
    return values if values.dtype == torch.float32 else values.clamp(-largest, largest)


def soft_wishes(
    x: torch.Tensor, allowed: torch.Tensor, flags: torch.Tensor, row: torch.Tensor, rows: RouteRows
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Biased logits, promoted and demoted experts; None, None: the table knows no such experts.

    Args:
        x: finite logits [num_tokens, num_experts].
        allowed: bool [num_tokens or 1, num_experts].
        flags: int32 [num_tokens or 1], 0 for a token without a row.
        row: int64, of the same shape, any row for such a token.
        rows: the route table.

    """
    biased, num_experts = x, x.shape[1]
    if rows.score_bias is not None:
        biased = torch.where((flags & FLAG_SCORE_BIAS).bool().unsqueeze(1), finite(x + rows.score_bias[row]), x)
    if rows.steered is None:
        return biased, None, None
    among = allowed & ((flags & (FLAG_STEERED | FLAG_FORCED)) == FLAG_STEERED).unsqueeze(1)
    promoted = unpack_allowed(rows.steered[row, 0], num_experts) & among
    return biased, promoted, unpack_allowed(rows.steered[row, 1], num_experts) & among & ~promoted


def steer(values: torch.Tensor, allowed: torch.Tensor, promoted: torch.Tensor, demoted: torch.Tensor) -> torch.Tensor:
    """Logits [num_tokens, num_experts], the promoted ones just above the largest allowed, the demoted just below the smallest."""
    top = values.masked_fill(~allowed, -torch.inf).amax(-1, keepdim=True)
    low = values.masked_fill(~allowed, torch.inf).amin(-1, keepdim=True)
    return torch.where(promoted, finite(top + STEERING_MARGIN), torch.where(demoted, finite(low - STEERING_MARGIN), values))


def score(values: torch.Tensor, among: torch.Tensor, scoring: str) -> torch.Tensor:
    """Scores of `values` [num_tokens, num_experts]; softmax runs over the experts in `among`."""
    if scoring == "sigmoid":
        return values.sigmoid()
    if scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(values).sqrt()
    # A row without any expert has NaN here; its weights are never used.
    return values.masked_fill(~among, -torch.inf).softmax(-1)


def _select(
    choice: torch.Tensor,
    allowed: torch.Tensor,
    spec: GatingSpec,
    promoted: torch.Tensor | None = None,
    demoted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [num_tokens, top_k] and how many of them are real, int64 [num_tokens, 1]."""
    others = allowed if demoted is None else allowed & ~demoted
    # An expert of a higher place beats all of a lower one.
    place = allowed.to(torch.int8) + others.to(torch.int8)
    if spec.grouped:
        masked = choice.masked_fill(~others, -torch.inf).unflatten(1, (spec.num_expert_group, -1))
        has_any = others.unflatten(1, (spec.num_expert_group, -1))
        if spec.group_score == "max" or masked.shape[-1] == 1:
            group_score = masked.amax(-1)
        else:
            best, at = masked.topk(2, dim=-1)
            group_score = torch.where(has_any.gather(-1, at), best, 0).sum(-1)
        group_score = group_score.masked_fill(~has_any.any(-1), -torch.inf)
        # A group without an allowed expert comes last; among equals the smaller group comes first.
        order = torch.argsort(group_score, dim=-1, descending=True, stable=True)[:, : spec.topk_group]
        chosen = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, order, True)
        place += others & chosen.repeat_interleave(masked.shape[-1], dim=1)
    if promoted is not None:
        place = place.masked_fill(promoted, 4)
        choice = choice.masked_fill(promoted, 0)
    # Scores are finite, so -inf sets the excluded experts apart; stable sorting puts the smaller id first among equals.
    order = torch.argsort(choice.masked_fill(~allowed, -torch.inf), dim=-1, descending=True, stable=True)
    if spec.grouped or promoted is not None:
        order = order.gather(1, torch.argsort(place.gather(1, order), dim=-1, descending=True, stable=True))
    ids = order[:, : spec.top_k]
    num_left = allowed.sum(-1, keepdim=True)
    best = torch.where(num_left > 0, ids[:, :1], 0)
    is_real = torch.arange(spec.top_k, device=ids.device) < num_left
    return torch.where(is_real, ids, best), num_left
