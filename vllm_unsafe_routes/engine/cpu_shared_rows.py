"""Tokens of candidates that are still in the same state go through an MoE layer once.

Candidates of one prompt differ in a single (layer, position). Below that layer, and before that position, all their tokens are
equal at every layer; the prefix cache shares whole KV blocks before the position, this shares the rest. Which tokens are equal is
not concluded from plans but read off the hidden states: a token is left out where its hidden state and its route-table row equal,
bit for bit, those of the same position of the first such candidate in the batch, and then gets that one's output.

Only what is scored is compared, and only in an eager engine on one CPU process: shapes depend on the data, which captured graphs
and other ranks could not follow.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.config import CompilationMode
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from .step import Step

# With fewer equal tokens than this share, gathering costs more than it saves.
_WORTH_IT = 0.1


def can_share_rows(vllm_config: Any, device: torch.device) -> bool:
    """Whether this engine may run a layer's experts on some of the batch's tokens."""
    return (
        device.type == "cpu"
        and vllm_config.parallel_config.world_size_across_dp == 1
        and vllm_config.compilation_config.mode == CompilationMode.NONE
        and not vllm_config.aux_output_config.enable_return_routed_experts
    )


class SharedRows:
    """Which tokens of a step may stand for others.

    Args:
        model: the loaded model; its MoE layers are wrapped.
        slot_of_layer: decoder layer -> index among the MoE layers.
        row_index: int32 [MoE layer, token], the route-table row of each token, -1 for none.

    Attributes:
        row_index: int32, the rows of the tokens that the layer in hand computes, None where it computes all.
        num_tokens: (token, layer) pairs of the steps in which something could be shared.
        num_computed: of these, the pairs that went through the experts.

    """

    def __init__(self, model: torch.nn.Module, slot_of_layer: Mapping[int, int], row_index: torch.Tensor) -> None:
        self._all_rows = row_index
        self._prompts: dict[str, bytes] = {}
        self._leader: torch.Tensor | None = None
        self._positions = torch.arange(row_index.shape[1])
        self.row_index: torch.Tensor | None = None
        self.num_tokens = 0
        self.num_computed = 0
        for module in model.modules():
            if isinstance(module, MoERunner):
                _wrap_forward(module, self, slot_of_layer[int(module.layer_id)])

    def add(self, req_id: str, token_ids: Sequence[int]) -> None:
        """A scored request with these prompt tokens has come."""
        self._prompts[req_id] = np.array(token_ids, np.int32).tobytes()

    def remove(self, req_id: str) -> None:
        """A request has gone; unknown ids are fine."""
        self._prompts.pop(req_id, None)

    def stage(self, step: Step) -> None:
        """Find the requests of the coming forward pass that compute the same positions of the same prompt."""
        self._leader = None
        starts = {part.req_id: part.start for part in step.parts if part.req_id in self._prompts}
        if not starts:
            return
        first_of: dict[tuple[bytes, int, int], int] = {}
        pieces, at, found = [], 0, False
        for req_id in step.req_ids:
            num_tokens, first = step.num_scheduled[req_id], at
            if req_id in starts:
                first = first_of.setdefault((self._prompts[req_id], starts[req_id], num_tokens), at)
                found = found or first != at
            pieces.append(np.arange(first, first + num_tokens))
            at += num_tokens
        if found:
            self._leader = torch.from_numpy(np.concatenate(pieces))

    def choose(self, slot: int, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Which tokens to compute, int64 [num_computed], and each token's place among them, int64 [num_tokens]; None: all."""
        leader = self._leader
        if leader is None or len(leader) != len(hidden_states):
            return None
        rows = self._all_rows[slot, : len(leader)]
        equal = (hidden_states == hidden_states[leader]).all(1) & (rows == rows[leader])
        computed = ~equal | (leader == self._positions[: len(leader)])
        kept = computed.nonzero()[:, 0]
        self.num_tokens += len(leader)
        if len(kept) > (1 - _WORTH_IT) * len(leader):
            self.num_computed += len(leader)
            return None
        self.num_computed += len(kept)
        place = computed.cumsum(0) - 1
        self.row_index = rows[kept]
        return kept, torch.where(computed, place, place[leader])


def _wrap_forward(runner: Any, shared: SharedRows, slot: int) -> None:
    own: Callable[..., torch.Tensor] = runner.forward
    # The runners belong to the model, and what is shared to the controller.
    reference = weakref.ref(shared)

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        shared = reference()
        chosen = None
        if shared is not None and input_ids is None and shared_experts_input is None:
            chosen = shared.choose(slot, hidden_states)
        if shared is None or chosen is None:
            return own(hidden_states, router_logits, input_ids, shared_experts_input)
        kept, place = chosen
        try:
            return own(hidden_states[kept], router_logits[kept])[place]
        finally:
            shared.row_index = None

    runner.forward = types.MethodType(forward, runner)
