"""Which row of the route table each (MoE layer, token) of a step has; -1 is "no directive".

Nothing is launched for steps without plans: a policy alone is written once, for all tokens that a step can have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_unsafe_routes.kernels.route_topk import uses_triton
from vllm_unsafe_routes.kernels.row_index import fill_row_index
from vllm_unsafe_routes.kernels.spec import FLAG_FORCED

from ..compiled import NO_ROW
from .device_table import DeviceTable, upload
from .layer_views import LayerViews
from .step import NO_PLAN_SLOT, Part, Step


class RowIndex:
    """The row index of one worker.

    Args:
        table: the route table.
        num_layers: MoE layers of the model.
        capacity: most tokens that one forward pass can have, padding included.
        num_drafts: most drafts of a request in a step, which may turn out to be rejected.

    Attributes:
        rows: int32 [MoE layers, capacity].
        views: of `rows`, by layer.
        policy_rows: int32 [MoE layers], on the device: the policy's row of each layer, -1 for none.
        is_idle: every token of the step has the policy's rows.
        lasts: the step has the rows of the step before it.
        covered: MoE slots at which every token of the step is known to have a row; on a GPU none is.
        has_forced: some token of the step may have a forced row.
        bare: MoE slots at which none has. On a GPU those where no plan of the step's requests has a row anywhere.

    """

    def __init__(self, table: DeviceTable, num_layers: int, capacity: int, num_drafts: int = 0) -> None:
        self._table = table
        self._num_drafts = num_drafts
        self._device = table.cells.device
        self.rows = torch.full((num_layers, capacity), NO_ROW, dtype=torch.int32, device=self._device)
        self.views = LayerViews(self.rows)
        self.policy_rows = torch.full((num_layers,), NO_ROW, dtype=torch.int32, device=self._device)
        self.is_idle = self.lasts = self.has_forced = False
        self._last: tuple[Any, ...] | None = None
        self.covered: frozenset[int] = frozenset()
        self.bare: frozenset[int] = frozenset()
        if uses_triton(self._device):
            # One request of no tokens: the kernel is compiled at load, not under the first planned request.
            start_loc = torch.zeros(2, dtype=torch.int32, device=self._device)
            self._fill(np.zeros(1, np.int32), start_loc, torch.zeros(0, dtype=torch.int64, device=self._device))

    def _fill(self, slots: np.ndarray, query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        table = self._table
        fill_row_index(
            self.rows,
            upload(slots, torch.int32, self._device),
            query_start_loc,
            positions,
            table.slot_base,
            table.slot_listed,
            table.slot_prompt_len,
            table.cells,
            self.policy_rows,
        )

    def start_policy(self, row_of: np.ndarray) -> None:
        """Take the rows of another policy, int32 [MoE layers]; the next step has them."""
        self.policy_rows.copy_(torch.from_numpy(row_of))
        self._table.start_policy(row_of)
        self.is_idle, self._last = False, None

    def stage(self, step: Step) -> None:
        """Write the row of every token of the coming forward pass; padded tokens of a step with plans get -1."""
        self._table.flush()
        planned = [part for part in step.parts if part.resident.plan is not None]
        if planned:
            assert step.query_start_loc is not None and step.positions is not None
            last, self._last = self._last, self._lasting(step, planned)
            self.lasts = last is not None and last == self._last
            if not self.lasts:
                slot_of = {part.req_id: part.resident.slot for part in planned}
                slots = np.array([slot_of.get(req_id, NO_PLAN_SLOT) for req_id in step.req_ids], np.int32)
                self._fill(slots, step.query_start_loc[: len(slots) + 1], step.positions)
                self.is_idle = False
                self._look(step.num_tokens, slots)
        elif not self.is_idle:
            self.rows.copy_(self.policy_rows[:, None].expand_as(self.rows))
            self.is_idle, self._last = True, None
            self._look(1, np.array([NO_PLAN_SLOT]))

    def _lasting(self, step: Step, planned: Sequence[Part]) -> tuple[Any, ...] | None:
        """What the rows follow from, where every token lies behind its prompt and the columns of its plan: steps that only decode.

        None: they follow from the positions as well.
        """
        if any(part.start - self._num_drafts < part.resident.settled for part in planned):
            return None
        assert step.positions is not None
        slots = [part.resident.slot for part in planned]
        return self._table.num_placed, len(step.positions), slots, list(step.req_ids), dict(step.num_scheduled)

    def _look(self, num_tokens: int, slots: np.ndarray) -> None:
        """See which MoE slots are covered and which bare, by the first tokens; on a GPU by the requests' slots of the table."""
        self.covered, self.has_forced = frozenset(), not self.is_idle
        if self._device.type == "cpu" and (self.is_idle or not uses_triton(self._device)):
            rows = self.rows[:, :num_tokens]
            has_row = rows.numpy() != NO_ROW
            self.has_forced = self.has_forced and bool(self.is_forced(rows).any())
            self.covered = frozenset(has_row.all(1).nonzero()[0].tolist())
            self.bare = frozenset((~has_row.any(1)).nonzero()[0].tolist())
        else:
            self.bare = frozenset((~self._table.has_rows[slots].any(0)).nonzero()[0].tolist())

    def is_forced(self, rows: torch.Tensor) -> torch.Tensor:
        """bool, the shape of `rows`: tokens whose experts a plan forces, by their entries of the row index."""
        flags = self._table.rows.flags[rows.clamp(min=0).long()]
        return (rows >= 0).logical_and((flags & FLAG_FORCED) != 0)
