"""Seeded noise on router logits in the worker; `kernels/jitter.py` is the formula."""

from __future__ import annotations

import torch

from vllm_unsafe_routes.kernels.jitter import jitter_logits

from ..jitter import Jitter
from ..shape import ModelShape
from .row_index import RowIndex
from .step import Step


class LogitJitter:
    """The noise of one worker.

    Args:
        jitter: its settings.
        shape: the model.
        index: the row index, which says what a plan forces.
        always: captured graphs repeat what is decided now, whatever plans a later step has.

    Attributes:
        slots: MoE slots that have noise.

    """

    def __init__(self, jitter: Jitter, shape: ModelShape, index: RowIndex, always: bool) -> None:
        self._jitter = jitter
        self._index = index
        self._always = always
        self.slots = frozenset(
            slot for slot, layer in enumerate(shape.moe_layers) if jitter.layers is None or layer in jitter.layers
        )
        # Forward passes so far: the noise's counter, on the device so that captured graphs read the present one.
        self._pass = torch.zeros(1, dtype=torch.int64, device=index.rows.device)

    def stage(self, step: Step) -> None:
        """Count the forward pass."""
        self._pass.add_(1)

    def apply(self, slot: int, router_logits: torch.Tensor) -> torch.Tensor:
        """The logits of MoE layer `slot`, [num_tokens, num_experts], with noise; tokens that a plan forces keep theirs."""
        forced, jitter = None, self._jitter
        if self._always or not self._index.is_idle:
            forced = self._index.is_forced(self._index.rows[slot, : router_logits.shape[0]])
        jittered: torch.Tensor = jitter_logits(router_logits, self._pass, forced, layer=slot, seed=jitter.seed, scale=jitter.scale)
        return jittered
