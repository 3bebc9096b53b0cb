"""Masks of a short step on the CPU, for all layers at once.

Between two layers the experts' weights pass through the caches, so that each further operation of a layer costs a CPU microseconds
in which it waits for its own code. What a decode step's rows hold is therefore unpacked before its first layer.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch

from vllm_unsafe_routes.kernels.route_topk_cpu import unpack_words
from vllm_unsafe_routes.kernels.spec import FLAG_NATIVE_WEIGHTS, RouteRows

from ..shape import ModelShape
from .router import LayerMask

# Masks of longer steps would take memory, and there the operations count for little.
_MOST_TOKENS = 64


def step_masks(
    rows: torch.Tensor, num_tokens: int, slots: Collection[int], table: RouteRows, shape: ModelShape
) -> dict[int, LayerMask]:
    """What the tokens' rows ask of MoE slots, where that is a mask for each token and nothing else.

    Args:
        rows: int32 [MoE layers, capacity], the row index.
        num_tokens: of the step; nothing is returned for a long one.
        slots: MoE slots at which every token has a row.
        table: the route table.
        shape: of the model.

    """
    if not slots or num_tokens > _MOST_TOKENS:
        return {}
    chosen, row_of = np.array(sorted(slots), np.int64), rows.numpy()[:, :num_tokens]
    flags = table.flags.numpy()[row_of[chosen]]
    plain = (flags == flags[:, :1]).all(1) & ((flags[:, 0] | FLAG_NATIVE_WEIGHTS) == FLAG_NATIVE_WEIGHTS)
    chosen, native = chosen[plain], flags[plain, 0] != 0
    allowed = unpack_words(table.allowed.numpy()[row_of[chosen]], shape.num_experts)
    # With fewer experts than top_k the last ones are none: the reference knows how.
    enough = np.add.reduce(allowed, axis=-1, dtype=np.int32).min(1) >= shape.top_k
    found = zip(chosen.tolist(), torch.from_numpy(~allowed).unbind(), native.tolist(), enough.tolist(), strict=True)
    return {slot: LayerMask(banned, None, is_native) for slot, banned, is_native, suffices in found if suffices}
