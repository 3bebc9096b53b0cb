"""What is counted under a policy: tokens, and picks of the model's own gating that the policy bans.

The picks are kept while the layers run. After the last one they are counted in one go for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..policy import POLICY_MODES, ActivePolicy
from ..shape import ModelShape
from .layer_views import LayerViews
from .policy_rows import banned_experts
from .row_index import RowIndex
from .step import Step
from .sums import DeviceSums


class PolicyCounts:
    """Counting in one worker.

    Args:
        shape: the model.
        sums: where is counted.
        index: the row index, which says what a plan forces.
        local_slots: MoE slots of this pipeline rank.
        kept: MoE slots whose picks are kept whatever a policy bans, because captured graphs repeat it; at others only tokens are
            counted. None: no graphs, the picks are kept where the active policy bans something.

    Attributes:
        is_on: a policy is active.

    """

    def __init__(
        self, shape: ModelShape, sums: DeviceSums, index: RowIndex, local_slots: Sequence[int], kept: Sequence[int] | None
    ) -> None:
        num_layers, capacity = index.rows.shape
        device = index.rows.device
        self._shape = shape
        self._index = index
        self._local_slots = local_slots
        self._always_kept = kept
        self._native_ids = torch.zeros((num_layers, capacity, shape.top_k), dtype=torch.int32, device=device)
        self._views = LayerViews(self._native_ids)
        self._kept = self._counted = frozenset[int]()
        # int64 [num_layers, 1, 1] and bool [num_layers * num_experts]: an expert's place in the table of all bans, which is empty
        # at layers where nothing is counted.
        self._places = (torch.arange(num_layers, device=device) * shape.num_experts)[:, None, None]
        self._banned = torch.zeros(num_layers * shape.num_experts, dtype=torch.bool, device=device)
        self._mode = POLICY_MODES[0]
        self._sums = sums
        self.is_on = False

    def start(self, active: ActivePolicy) -> None:
        """Count under this policy from now on; nothing without one."""
        self.is_on = active.policy is not None
        self._mode = active.mode
        layers = self._shape.moe_layers
        countable = self._local_slots if self._always_kept is None else self._always_kept
        self._counted = frozenset(slot for slot in countable if active.at(layers[slot]).disabled)
        self._kept = self._counted if self._always_kept is None else frozenset(self._always_kept)
        banned = banned_experts(self._shape, active, range(len(layers)))
        banned[[slot for slot in range(len(layers)) if slot not in self._counted]] = False
        self._banned.copy_(banned.view(-1))

    def apply(self, slot: int, num_tokens: int, by_kernel: bool) -> torch.Tensor | None:
        """Where the picks of the model's own gating go: int32 [num_tokens, top_k], None where they are not needed.

        Args:
            slot: the MoE slot.
            num_tokens: of the step.
            by_kernel: the route kernel writes them.

        """
        return self._views.at(slot, num_tokens) if slot in (self._kept if by_kernel else self._counted) else None

    def collect(self, step: Step) -> None:
        """Count what the policy bans among the step's picks; tokens that a plan forces are not counted."""
        num_tokens = step.num_tokens
        if not num_tokens:
            return
        if self._counted:
            hits = self._banned.take(self._native_ids[:, :num_tokens] + self._places)
            if self._index.has_forced:
                hits &= ~self._index.is_forced(self._index.rows[:, :num_tokens]).unsqueeze(2)
            self._sums.displaced[POLICY_MODES.index(self._mode)].add_(hits.sum((1, 2)))
        self._sums.grew(self._mode, num_tokens)
