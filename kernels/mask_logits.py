"""Router logits changed so that a gating which knows nothing of bans selects no banned expert.

For kernels that route inside themselves. Excluding an expert by its logit alone has four traps, and each line here answers one:

- -inf: native kernels clear winners to finite values, which then beat it. A banned logit is large and finite.
- Underflow: a probability that is 0 ties with a banned one. Allowed logits are lifted to where their scores are not 0.
- A correction bias lifts a banned expert whose score is 0. Banned experts get a bias below every allowed one (`mask_bias`).
- Groups: a gating takes its best groups and no others, so these must hold top_k allowed experts (`groups_suffice`).

What it costs: allowed logits over 1e4, or too far below, are moved to that limit, and NaN with them. Too far is 75 below the best
allowed one under softmax (a probability under 3e-33), and -75 under scorings of each expert. Any other logit stays as it is, bit
for bit.
"""

from __future__ import annotations

import torch

from .reference import finite
from .spec import GatingSpec

# e^-75 is far from the smallest float32 and bfloat16, also after division by the number of experts.
_RANGE = 75.0
_LARGEST = 1e4
_BANNED = {torch.float32: -1e30, torch.bfloat16: -1e30, torch.float16: -6e4}


def bias_logits(router_logits: torch.Tensor, score_bias: torch.Tensor) -> torch.Tensor:
    """Logits with a bias, rounded to what they were; where it is 0 they stay bit for bit.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16.
        score_bias: float32 [num_experts] or [num_tokens, num_experts].

    """
    limits = torch.finfo(router_logits.dtype)
    moved = finite(router_logits.float() + score_bias).clamp(limits.min, limits.max).to(router_logits.dtype)
    return torch.where(score_bias != 0, moved, router_logits)


def mask_logits(router_logits: torch.Tensor, banned: torch.Tensor, scoring: str) -> torch.Tensor:
    """Logits under which no banned expert is selected.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16.
        banned: bool [num_tokens, num_experts], or [1, num_experts] for all tokens; a token without a ban keeps its logits.
        scoring: as in `GatingSpec`.

    Returns:
        New logits, of the same dtype.

    """
    values = router_logits.float()
    values = torch.where(values.isnan(), -torch.inf, values)
    lowest = torch.full_like(values[:, :1], -_RANGE)
    if scoring == "softmax":
        best = values.masked_fill(banned, -torch.inf).amax(-1, keepdim=True)
        lowest = best.clamp(_RANGE - _LARGEST, _LARGEST) - _RANGE
    values = values.clamp(max=_LARGEST).maximum(lowest)
    values = values.masked_fill(banned, _BANNED[router_logits.dtype]).to(router_logits.dtype)
    return torch.where(banned.any(-1, keepdim=True), values, router_logits)


def mask_bias(correction_bias: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """A correction bias that lifts no banned expert over an allowed one, whatever the scores.

    It is not lower than it must be: where a group's score is the sum of its two best, a group with one allowed expert still counts.

    Args:
        correction_bias: float [num_experts].
        banned: bool [num_experts].

    """
    lowest = correction_bias.masked_fill(banned, torch.inf).amin()
    return torch.where(banned, lowest - (1 + lowest.abs() / 8), correction_bias)


def groups_suffice(banned: torch.Tensor, spec: GatingSpec) -> bool:
    """Whether any groups that a gating may choose hold top_k allowed experts.

    Args:
        banned: bool [num_experts].
        spec: the gating; without groups it is true.

    """
    if not spec.grouped:
        return True
    allowed = (~banned).unflatten(0, (spec.num_expert_group, -1)).sum(1)
    # A group without an allowed expert comes after all others.
    fewest = allowed[allowed > 0].sort().values[: spec.topk_group]
    return int(fewest.sum()) >= spec.top_k
