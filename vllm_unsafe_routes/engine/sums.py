"""What a worker counts by MoE layer: sums on the device, read at most twice a second, without waiting."""

from __future__ import annotations

import time

import torch

from ..policy import POLICY_MODES
from .host_copies import HostCopy
from .log import logger_of
from .progress import RouteCounts

logger = logger_of(__name__)

_SECONDS_BETWEEN_READS = 0.5


class DeviceSums:
    """The sums, and a copy of them on its way to the host.

    Args:
        num_layers: MoE layers of the model.
        device: where the model runs.

    Attributes:
        displaced: int64 [policy modes, MoE layers], picks of the model's own gating that the policy bans.
        missed: int64 [MoE layers], forward passes in which the layer's router was not called.
        num_nan: int64 [MoE layers], tokens whose router logits held a NaN.

    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._sums = torch.zeros((len(POLICY_MODES) + 2, num_layers), dtype=torch.int64, device=device)
        self.displaced, self.missed, self.num_nan = self._sums[:-2], self._sums[-2], self._sums[-1]
        self._tokens = dict.fromkeys(POLICY_MODES, 0)
        # The copy under way, and the token numbers that belong to it.
        self._copy: HostCopy | None = None
        self._tokens_then = self._tokens
        self._read_at = 0.0
        self._is_new = False
        self._has_warned = False

    def grew(self, mode: str | None = None, num_tokens: int = 0) -> None:
        """A step added to the sums; with a mode, this many tokens were computed under a policy."""
        if mode is not None:
            self._tokens[mode] += num_tokens
        self._is_new = True

    def read(self) -> RouteCounts:
        """What was counted so far; waits for the device."""
        return self._counts(self._tokens, HostCopy(self._sums))

    def due(self) -> RouteCounts | None:
        """What was counted as of some steps ago if it changed and was not said lately, else None; never waits."""
        now = time.monotonic()
        if self._copy is None and self._is_new and now - self._read_at >= _SECONDS_BETWEEN_READS:
            self._read_at, self._is_new = now, False
            self._copy, self._tokens_then = HostCopy(self._sums), dict(self._tokens)
        if self._copy is None or not self._copy.is_ready:
            return None
        copy, self._copy = self._copy, None
        return self._counts(self._tokens_then, copy)

    def _counts(self, tokens: dict[str, int], copy: HostCopy) -> RouteCounts:
        *displaced, missed, num_nan = copy.wait().tolist()
        if any(missed) and not self._has_warned:
            self._has_warned = True
            logger.error(
                "Routers were not asked in some steps, by MoE layer %s: experts may be picked without route control", missed
            )
        return RouteCounts(dict(tokens), dict(zip(POLICY_MODES, displaced, strict=True)), missed, num_nan)
