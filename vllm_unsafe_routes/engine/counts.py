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
        self._shape = shape
        self._index = index
        self._local_slots = local_slots
        self._always_kept = kept
        self._native_ids = torch.zeros((num_layers, capacity, shape.top_k), dtype=torch.int32, device=index.rows.device)
        self._views = LayerViews(self._native_ids)
        self._kept: frozenset[int] = frozenset()
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._banned = torch.zeros(0)
        self._mode = POLICY_MODES[0]
        self._sums = sums
        self.is_on = False

    def start(self, active: ActivePolicy) -> None:
        """Count under this policy from now on; nothing without one."""
        self.is_on = active.policy is not None
        self._mode = active.mode
        layers = self._shape.moe_layers
        countable = self._local_slots if self._always_kept is None else self._always_kept
        counted = [slot for slot in countable if active.at(layers[slot]).disabled]
        self._kept = frozenset(counted if self._always_kept is None else self._always_kept)
        device = self._native_ids.device
        self._slots = torch.tensor(counted, dtype=torch.int64, device=device)
        self._banned = banned_experts(self._shape, active, counted).to(device)

    def apply(self, slot: int, num_tokens: int) -> torch.Tensor | None:
        """Where the picks of the model's own gating go: int32 [num_tokens, top_k], None where they are not needed."""
        return self._views.at(slot, num_tokens) if slot in self._kept else None

    def collect(self, step: Step) -> None:
        """Count what the policy bans among the step's picks; tokens that a plan forces are not counted."""
        num_tokens, slots = step.num_tokens, self._slots
        if not num_tokens:
            return
        if len(slots):
            banned = self._banned.unsqueeze(1).expand(-1, num_tokens, -1)
            hits = banned.gather(2, self._native_ids[slots, :num_tokens].long())
            if not self._index.is_idle:
                hits = hits & ~self._index.is_forced(self._index.rows[slots, :num_tokens]).unsqueeze(2)
            self._sums.displaced[POLICY_MODES.index(self._mode)].index_add_(0, slots, hits.sum((1, 2)))
        self._sums.grew(self._mode, num_tokens)
