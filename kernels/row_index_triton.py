"""The Triton kernel of `fill_row_index`; the contract is the loop in `row_index.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .spec import NO_DIRECTIVE

_NO_DIRECTIVE = tl.constexpr(NO_DIRECTIVE)


@triton.jit(do_not_specialize=["num_reqs", "num_tokens"])
def fill_row_index_kernel(
    row_index_ptr,  # int32 [num_layers, capacity]
    stride_layer,
    idx_mapping_ptr,  # int32 [num_reqs]
    query_start_loc_ptr,  # int32 [num_reqs + 1]
    positions_ptr,  # int64 [num_tokens]
    slot_base_ptr,  # int64 [num_slots]
    slot_listed_ptr,  # int32 [num_slots]
    slot_prompt_len_ptr,  # int32 [num_slots]
    arena_ptr,  # int32 [num_cells]
    policy_rows_ptr,  # int32 [num_layers]
    num_reqs,
    num_tokens,
    BLOCK: tl.constexpr,
):
    req = tl.program_id(0)
    layer = tl.program_id(1)
    out_ptr = row_index_ptr + layer.to(tl.int64) * stride_layer
    start = tl.load(query_start_loc_ptr + req)
    if req == num_reqs:  # one program more than requests: the padded tail
        for first in range(start, num_tokens, BLOCK):
            offs = first + tl.arange(0, BLOCK)
            tl.store(out_ptr + offs, _NO_DIRECTIVE, mask=offs < num_tokens)
        return
    end = tl.load(query_start_loc_ptr + req + 1)
    slot = tl.load(idx_mapping_ptr + req)
    base = tl.load(slot_base_ptr + slot)
    listed = tl.load(slot_listed_ptr + slot)
    prompt_len = tl.load(slot_prompt_len_ptr + slot)
    policy_row = tl.load(policy_rows_ptr + layer)
    block_ptr = arena_ptr + base + layer.to(tl.int64) * (listed + 2)
    for first in range(start, end, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < end
        position = tl.load(positions_ptr + offs, mask=mask, other=0).to(tl.int32)
        column = tl.where(position < listed, position, tl.where(position < prompt_len, listed, listed + 1))
        has_plan = tl.full([BLOCK], 0, tl.int64) + base >= 0
        row = tl.load(block_ptr + column, mask=mask & has_plan, other=0)
        tl.store(out_ptr + offs, tl.where(has_plan, row, policy_row), mask=mask)


def launch_arguments(
    row_index: torch.Tensor,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    slot_base: torch.Tensor,
    slot_listed: torch.Tensor,
    slot_prompt_len: torch.Tensor,
    arena: torch.Tensor,
    policy_rows: torch.Tensor,
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional and keyword arguments of the launch; tensors without memory serve for compilation alone."""
    num_reqs, num_layers = idx_mapping.shape[0], row_index.shape[0]
    positional = (
        row_index,
        row_index.stride(0),
        idx_mapping,
        query_start_loc,
        positions,
        slot_base,
        slot_listed,
        slot_prompt_len,
        arena,
        policy_rows,
        num_reqs,
        positions.shape[0],
    )
    return (num_reqs + 1, num_layers), positional, {"BLOCK": 128}


def launch(*tensors: torch.Tensor) -> None:
    """Launch the kernel; arguments as in `launch_arguments`."""
    grid, positional, keywords = launch_arguments(*tensors)
    fill_row_index_kernel[grid](*positional, **keywords)
