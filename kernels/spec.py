"""What a routing kernel is told: the model's gating and the rows of the route table. The one owner of the bit layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

NO_DIRECTIVE = -1
FLAG_FORCED = 1
FLAG_EXPLICIT_WEIGHTS = 2
FLAG_NATIVE_WEIGHTS = 4
FLAG_SCORE_BIAS = 8
FLAG_STEERED = 16
# How far a promoted expert's logit is put above the largest, a demoted one's below the smallest: SteerMoE's (arXiv 2509.09660).
STEERING_MARGIN = 0.01
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2")


@dataclass(frozen=True, slots=True)
class GatingSpec:
    """How a model gates.

    Attributes:
        num_experts: routed experts.
        top_k: experts that a token gets.
        scoring: "softmax" over the experts, "sigmoid" or "sqrtsoftplus" (DeepSeek-V4) of each.
        renormalize: whether the selected weights are divided by their sum.
        routed_scaling_factor: factor on the final weights.
        num_expert_group: groups of consecutive experts; 1: no grouping.
        topk_group: groups that a token may choose from.
        group_score: "max": a group's best expert (DeepSeek-V2); "top2": the sum of its two best (DeepSeek-V3).

    Raises:
        ValueError: names the field, the value and the limit.

    """

    num_experts: int
    top_k: int
    scoring: str = "softmax"
    renormalize: bool = False
    routed_scaling_factor: float = 1.0
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: str = "max"

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k {self.top_k} is out of range for {self.num_experts} experts")
        if self.scoring not in SCORINGS:
            raise ValueError(f"scoring {self.scoring!r} is not one of {', '.join(SCORINGS)}")
        if self.group_score not in GROUP_SCORES:
            raise ValueError(f"group_score {self.group_score!r} is not one of {', '.join(GROUP_SCORES)}")
        if self.num_expert_group < 1 or self.num_experts % self.num_expert_group:
            raise ValueError(f"num_expert_group {self.num_expert_group} does not divide {self.num_experts} experts")
        if not 1 <= self.topk_group <= self.num_expert_group:
            raise ValueError(f"topk_group {self.topk_group} is out of range for {self.num_expert_group} groups")

    @property
    def grouped(self) -> bool:
        """Whether the groups limit anything."""
        return self.topk_group < self.num_expert_group


class RouteRows(NamedTuple):
    """The route table on the device, shared by all layers: one row is one directive for one (layer, token).

    Attributes:
        flags: int32 [num_rows], `FLAG_*` bits.
        allowed: int32 [num_rows, ceil(num_experts / 32)]; bit e % 32 of word e // 32: expert e may be selected. Of a forced row
            only the generic path reads it; there it holds the forced experts.
        forced_ids: int32 [num_rows, top_k], read with FLAG_FORCED.
        forced_weights: float32 [num_rows, top_k], read with FLAG_EXPLICIT_WEIGHTS; final, used as they are.
        score_bias: float32 [num_rows, num_experts] or None, read with FLAG_SCORE_BIAS; added to the logits before scoring.
        steered: int32 [num_rows, 2, ceil(num_experts / 32)] or None, read with FLAG_STEERED; bits of the promoted experts, then of
            the demoted ones.

    """

    flags: torch.Tensor
    allowed: torch.Tensor
    forced_ids: torch.Tensor
    forced_weights: torch.Tensor
    score_bias: torch.Tensor | None = None
    steered: torch.Tensor | None = None


class RouteWatch(NamedTuple):
    """What the kernel writes down of its own runs, graph replays included; for one layer.

    Attributes:
        step: int32 [2]: number of the forward pass, and its tokens without padding.
        mark: int32 [1], gets the number.
        num_nan: int64 [1], grows by the tokens, padding left out, that the kernel routed and whose logits hold a NaN.

    """

    step: torch.Tensor
    mark: torch.Tensor
    num_nan: torch.Tensor


def pack_allowed(mask: torch.Tensor) -> torch.Tensor:
    """Pack bool [..., num_experts] into int32 words [..., ceil(num_experts / 32)]."""
    num_experts = mask.shape[-1]
    num_words = (num_experts + 31) // 32
    padded = torch.nn.functional.pad(mask, (0, num_words * 32 - num_experts)).unflatten(-1, (num_words, 32))
    words = (padded.long() << torch.arange(32, device=mask.device)).sum(-1)
    # Bit 31 is the sign of an int32.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_allowed(words: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Unpack int32 words [..., ceil(num_experts / 32)] into bool [..., num_experts]."""
    expert = torch.arange(num_experts, device=words.device)
    return ((words[..., expert // 32] >> (expert % 32)) & 1).bool()
