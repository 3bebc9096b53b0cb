"""From (request slot, position) to the row of every (MoE layer, token), on the device.

The contract, as a plain double loop. Request `b` of the batch has tokens query_start_loc[b] to query_start_loc[b + 1]:

    for l in range(num_layers):
        for b in range(num_reqs):
            slot = idx_mapping[b]
            base, listed = slot_base[slot], slot_listed[slot]
            for t in range(query_start_loc[b], query_start_loc[b + 1]):
                p = positions[t]
                column = p if p < listed else listed if p < slot_prompt_len[slot] else listed + 1
                row_index[l, t] = arena[base + l * (listed + 2) + column] if base >= 0 else policy_rows[l]
        row_index[l, query_start_loc[num_reqs] : len(positions)] = -1
"""

from __future__ import annotations

import numpy as np
import torch

from .route_topk import uses_triton
from .spec import NO_DIRECTIVE


def fill_row_index(
    row_index: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    slot_base: torch.Tensor,
    slot_listed: torch.Tensor,
    slot_prompt_len: torch.Tensor,
    arena: torch.Tensor,
    policy_rows: torch.Tensor,
) -> None:
    """Write the rows of one step's tokens; no host synchronisation on GPUs.

    Args:
        row_index: int32 [num_layers, capacity], written up to len(positions).
        idx_mapping: int32 [num_reqs], the slot of each request of the batch.
        query_start_loc: int32 [num_reqs + 1].
        positions: int64 [num_tokens, padding included].
        slot_base: int64 [num_slots], where the slot's block starts in the arena; -1: no plan.
        slot_listed: int32 [num_slots], positions with a column of their own.
        slot_prompt_len: int32 [num_slots].
        arena: int32 [num_cells], blocks of [num_layers, listed + 2] row ids.
        policy_rows: int32 [num_layers], the row of a token without a plan, or -1.

    """
    arguments = (
        row_index,
        idx_mapping,
        query_start_loc,
        positions,
        slot_base,
        slot_listed,
        slot_prompt_len,
        arena,
        policy_rows,
    )
    if uses_triton(row_index.device):
        from .row_index_triton import launch

        launch(*arguments)
    else:
        fill_row_index_reference(*arguments)


def fill_row_index_reference(
    row_index: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    slot_base: torch.Tensor,
    slot_listed: torch.Tensor,
    slot_prompt_len: torch.Tensor,
    arena: torch.Tensor,
    policy_rows: torch.Tensor,
) -> None:
    """The same in numpy; what CPU engines run."""
    num_tokens = int(query_start_loc[-1])
    slot = np.repeat(idx_mapping.numpy(), np.diff(query_start_loc.numpy()))
    position = positions.numpy()[:num_tokens]
    base, listed = slot_base.numpy()[slot], slot_listed.numpy()[slot].astype(np.int64)
    default = listed + (position >= slot_prompt_len.numpy()[slot])
    column = np.where(position < listed, position, default)
    layer = np.arange(row_index.shape[0])[:, None]
    cell = np.where(base >= 0, base + layer * (listed + 2) + column, 0)
    rows = row_index.numpy()
    rows[:, :num_tokens] = np.where(base >= 0, arena.numpy()[cell], policy_rows.numpy()[:, None])
    rows[:, num_tokens : len(positions)] = NO_DIRECTIVE
