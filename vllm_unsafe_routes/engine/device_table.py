"""The route table on the device: rows shared by content, and each planned request's block of row indices.

All buffers are allocated once. What changes between two steps is written on the host and brought over by `flush`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_unsafe_routes.kernels.spec import RouteRows

from ..compiled import NO_ROW, CompiledPlan, RowLayout
from ..table import Arena, RowStore
from .config import RouteConfig
from .mirrored import Mirrored
from .step import NO_PLAN_SLOT


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A device copy of host values that does not stall the stream (the pinned buffer lives until the copy is done)."""
    tensor = torch.from_numpy(np.array(values)).to(dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class DeviceTable:
    """Rows and blocks of one worker.

    Args:
        config: sizes of the table.
        layout: of a row.
        device: where the model runs.

    Attributes:
        rows: the rows; a row's content is laid out as `compiled.RowLayout` says.
        slot_base: int64 [num_slots], where a request's block begins in `cells`, -1 for none.
        slot_listed: int32 [num_slots], positions with a column of their own.
        slot_prompt_len: int32 [num_slots].
        has_rows: bool [num_slots, MoE layers] on the host: a request has a row at some position, its plan's or the policy's.

    """

    def __init__(self, config: RouteConfig, layout: RowLayout, num_layers: int, device: torch.device) -> None:
        num_rows = config.route_table_rows
        self._store = RowStore(num_rows)
        self._layout = layout
        # In the order of a row's content.
        self._columns = (
            Mirrored((num_rows,), 0, np.int32, device),
            Mirrored((num_rows, layout.num_words), 0, np.int32, device),
            Mirrored((num_rows, layout.top_k), 0, np.int32, device),
            Mirrored((num_rows, layout.top_k), 0, np.float32, device),
            Mirrored((num_rows, 2, layout.num_words), 0, np.int32, device),
            Mirrored((num_rows, layout.num_experts), 0, np.float32, device),
        )
        *hard, steered, score_bias = (column.tensor for column in self._columns)
        self.rows = RouteRows(*hard, score_bias, steered)
        num_slots = config.route_table_slots + 1 if config.allow_overrides else 1
        num_cells = config.route_table_cells if config.allow_overrides else 1
        self._arena = Arena(num_cells)
        self._cells = Mirrored((num_cells,), NO_ROW, np.int32, device)
        self._base = Mirrored((num_slots,), -1, np.int64, device)
        self._listed = Mirrored((num_slots,), 0, np.int32, device)
        self._prompt_len = Mirrored((num_slots,), 0, np.int32, device)
        self.slot_base = self._base.tensor
        self.slot_listed, self.slot_prompt_len = self._listed.tensor, self._prompt_len.tensor
        self.has_rows = np.zeros((num_slots, num_layers), bool)
        self._free_slots = list(range(num_slots - 1, NO_PLAN_SLOT, -1))
        # Of each planned request: its slot and its block, int32 [MoE layers, listed positions + 2].
        self._placed: dict[str, tuple[int, np.ndarray]] = {}

    def __len__(self) -> int:
        return len(self._store)

    @property
    def cells(self) -> torch.Tensor:
        """int32 [num_cells], blocks of [MoE layers, listed positions + 2] row indices."""
        return self._cells.tensor

    @property
    def num_placed(self) -> int:
        """Requests that were given a block so far."""
        return self._arena.num_placed

    def start_policy(self, row_of: np.ndarray) -> None:
        """Requests without a plan have these rows from now on, int32 [MoE layers], -1 for none."""
        self.has_rows[NO_PLAN_SLOT] = row_of != NO_ROW

    def flush(self) -> None:
        """Bring everything that was written since to the device, before a forward pass reads it."""
        for mirrored in (*self._columns, self._cells, self._base, self._listed, self._prompt_len):
            mirrored.flush()

    def acquire(self, contents: Sequence[bytes]) -> list[int]:
        """Row indices of these contents, held until `release`."""
        contents = list(contents)
        ids, new = self._store.acquire(contents)
        if new:
            where = [ids[at] for at in new]
            # Of rows that are not soft the last two parts are left as they are: nothing reads them.
            parts = self._layout.columns(self._layout.table([contents[at] for at in new]))
            for column, values in zip(self._columns, parts, strict=False):
                column.write(where, values.reshape(-1, *column.host.shape[1:]))
        return ids

    def release(self, contents: Sequence[bytes]) -> None:
        """Let go of what `acquire` held."""
        self._store.release(list(contents))

    def place(self, req_id: str, plan: CompiledPlan, prompt_len: int, policy_row_of: np.ndarray) -> int:
        """Give a planned request its rows and its block; returns its slot.

        Args:
            req_id: the request.
            plan: its plan; the scheduler has seen to it that there is room.
            prompt_len: tokens of its prompt.
            policy_row_of: int32 [MoE layers], the policy's row, which holds where the plan says nothing.

        """
        slot = self._free_slots.pop()
        row_of = np.array([*self.acquire(plan.rows), NO_ROW], np.int32)  # index NO_ROW is the last entry
        block = np.where(plan.block == NO_ROW, policy_row_of[:, None], row_of[plan.block])
        base, moved = self._arena.place(req_id, block.size)
        self._placed[req_id] = slot, block
        for other, new_base, _ in moved:
            self._write_block(*self._placed[other], new_base)
        self._write_block(slot, block, base)
        self.has_rows[slot] = (block != NO_ROW).any(1)
        self._listed.write(slot, plan.num_listed)
        self._prompt_len.write(slot, prompt_len)
        return slot

    def _write_block(self, slot: int, block: np.ndarray, base: int) -> None:
        self._cells.write(slice(base, base + block.size), block.reshape(-1))
        self._base.write(slot, base)

    def remove(self, req_id: str, plan: CompiledPlan) -> None:
        """Give a planned request's room back."""
        self.release(plan.rows)
        self._arena.free(req_id)
        slot, _ = self._placed.pop(req_id)
        self._base.write(slot, -1)
        self._free_slots.append(slot)
