"""What is counted under a policy: tokens, and picks of the model's own gating that the policy bans.

The picks are kept while the layers run. After the last one they are counted in one go for all layers; the sums stay on the device
and are read at most twice a second, without waiting.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..policy import POLICY_MODES, ActivePolicy
from ..shape import ModelShape
from .host_copies import HostCopy
from .policy_rows import banned_experts
from .progress import RouteCounts
from .row_index import RowIndex
from .step import Step

# The counts are reported at most this often.
_SECONDS_BETWEEN_COUNTS = 0.5


class PolicyCounts:
    """Counting in one worker.

    Args:
        shape: the model.
        index: the row index, which says what a plan forces.
        local_slots: MoE slots of this pipeline rank.
        kept: MoE slots whose picks are kept whatever a policy bans, because captured graphs repeat it; at others only tokens are
            counted. None: no graphs, the picks are kept where the active policy bans something.

    Attributes:
        is_on: a policy is active.

    """

    def __init__(self, shape: ModelShape, index: RowIndex, local_slots: Sequence[int], kept: Sequence[int] | None) -> None:
        num_layers, capacity = index.rows.shape
        self._shape = shape
        self._index = index
        self._local_slots = local_slots
        self._always_kept = kept
        self._native_ids = torch.zeros((num_layers, capacity, shape.top_k), dtype=torch.int32, device=index.rows.device)
        self._kept: frozenset[int] = frozenset()
        self._slots = torch.zeros(0, dtype=torch.int64)
        self._banned = torch.zeros(0)
        self._mode = 0
        self._sums = _Sums(num_layers, index.rows.device)
        self.is_on = False

    def start(self, active: ActivePolicy) -> None:
        """Count under this policy from now on; nothing without one."""
        self.is_on = active.policy is not None
        self._mode = POLICY_MODES.index(active.mode)
        layers = self._shape.moe_layers
        countable = self._local_slots if self._always_kept is None else self._always_kept
        counted = [slot for slot in countable if active.banned(layers[slot])]
        self._kept = frozenset(counted if self._always_kept is None else self._always_kept)
        device = self._native_ids.device
        self._slots = torch.tensor(counted, dtype=torch.int64, device=device)
        self._banned = banned_experts(self._shape, active, counted).to(device)

    def apply(self, slot: int, num_tokens: int) -> torch.Tensor | None:
        """Where the picks of the model's own gating go: int32 [num_tokens, top_k], None where they are not needed."""
        return self._native_ids[slot, :num_tokens] if slot in self._kept else None

    def collect(self, step: Step) -> None:
        """Count what the policy bans among the step's picks; tokens that a plan forces are not counted."""
        num_tokens, slots = step.num_tokens, self._slots
        if not num_tokens:
            return
        displaced = None
        if len(slots):
            banned = self._banned.unsqueeze(1).expand(-1, num_tokens, -1)
            hits = banned.gather(2, self._native_ids[slots, :num_tokens].long())
            if not self._index.is_idle:
                hits = hits & ~self._index.is_forced(self._index.rows[slots, :num_tokens]).unsqueeze(2)
            displaced = hits.sum((1, 2))
        self._sums.add(self._mode, num_tokens, slots, displaced)

    def read(self) -> RouteCounts:
        """What was counted so far; waits for the device."""
        return self._sums.read()

    def due(self) -> RouteCounts | None:
        """What was counted as of some steps ago if it changed and was not said lately, else None; never waits."""
        return self._sums.due()


class _Sums:
    """Sums on the device, and a copy of them on its way to the host."""

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._tokens = dict.fromkeys(POLICY_MODES, 0)
        self._displaced = torch.zeros((len(POLICY_MODES), num_layers), dtype=torch.int64, device=device)
        # The copy under way, and the token numbers that belong to it.
        self._copy: HostCopy | None = None
        self._tokens_then = self._tokens
        self._read_at = 0.0
        self._is_new = False

    def add(self, mode: int, num_tokens: int, slots: torch.Tensor, displaced: torch.Tensor | None) -> None:
        """Add a step's numbers; `displaced` is int64 [len(slots)], on the device."""
        self._tokens[POLICY_MODES[mode]] += num_tokens
        if displaced is not None:
            self._displaced[mode].index_add_(0, slots, displaced)
        self._is_new = True

    def read(self) -> RouteCounts:
        return _counts(self._tokens, HostCopy(self._displaced))

    def due(self) -> RouteCounts | None:
        now = time.monotonic()
        if self._copy is None and self._is_new and now - self._read_at >= _SECONDS_BETWEEN_COUNTS:
            self._read_at, self._is_new = now, False
            self._copy, self._tokens_then = HostCopy(self._displaced), dict(self._tokens)
        if self._copy is None or not self._copy.is_ready:
            return None
        copy, self._copy = self._copy, None
        return _counts(self._tokens_then, copy)


def _counts(tokens: dict[str, int], displaced: HostCopy) -> RouteCounts:
    values = displaced.wait()
    return RouteCounts(dict(tokens), {mode: values[at].tolist() for at, mode in enumerate(POLICY_MODES)})
