"""Router logits as the model's routers computed them, of all experts, handed back for `return_router_logits`.

They are kept before noise, policy and plan. Captured graphs write every step's logits to a buffer that is allocated at load, where
the engine's settings allow the feature; else there is no such buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group

from ..extras import LogitsSpec
from ..shape import ModelShape
from .progress import StepProgress, StepReport
from .step import Part, Step


class _Wanted(NamedTuple):
    """Logits of one request in this step.

    Attributes:
        part: the request.
        spec: what it asks for.
        positions: of those that it computes in this step.

    """

    part: Part
    spec: LogitsSpec
    positions: range


class LogitsCapture:
    """Captured router logits of one worker.

    Args:
        shape: the model.
        capacity: most tokens of a forward pass.
        local_slots: MoE slots of this pipeline rank, consecutive.
        device: where the model runs.
        always: captured graphs repeat what is decided now, so every step is written.

    """

    def __init__(self, shape: ModelShape, capacity: int, local_slots: Sequence[int], device: torch.device, always: bool) -> None:
        self._slot_of_layer = shape.slot_of_layer
        self._place = {slot: place for place, slot in enumerate(local_slots)}
        self._values = torch.zeros((len(local_slots), capacity, shape.num_experts), dtype=torch.float32, device=device)
        self._always = always
        self._wanted: list[_Wanted] = []

    @property
    def is_on(self) -> bool:
        """Whether somebody wants logits of this step."""
        return bool(self._wanted)

    def stage(self, step: Step) -> None:
        """See whose logits are wanted."""
        self._wanted = []
        for part in step.parts:
            spec = part.resident.extras.logits
            if spec is not None and (positions := spec.within(part.start, part.start + part.num_tokens)):
                self._wanted.append(_Wanted(part, spec, positions))

    def apply(self, slot: int, router_logits: torch.Tensor) -> None:
        """Keep the logits of MoE layer `slot`, [num_tokens, num_experts]."""
        if self._always or self._wanted:
            values = self._values[self._place[slot], : len(router_logits)]
            values.copy_(router_logits[:, : values.shape[1]])

    def collect(self, report: StepReport) -> None:
        """Hand to the report what is wanted, and no more: the copies of a step are never larger than the buffer."""
        for part, spec, positions in self._wanted:
            slots = [self._slot_of_layer[layer] for layer in spec.layers]
            places = [self._place[slot] for slot in slots if slot in self._place]
            first = part.first + positions.start - part.start
            values = self._values[:, first : first + len(positions)]
            entry = report.progress[part.req_id]
            entry.logits_start = positions.start
            report.copies.take(values if len(places) == len(values) else values[places], _writer(entry))
        group = get_pp_group()
        if self._wanted and group.world_size > 1:
            report.copies.resolve()
            self._merge_pipeline(report, group)

    def _merge_pipeline(self, report: StepReport, group: Any) -> None:
        """Put this rank's layers behind those of earlier pipeline ranks and hand all on; the last rank reports."""
        entries = {wanted.part.req_id: report.progress[wanted.part.req_id] for wanted in self._wanted}
        if not group.is_first_rank:
            for req_id, earlier in group.recv_object(group.rank_in_group - 1).items():
                entries[req_id].router_logits = np.concatenate([earlier, entries[req_id].router_logits], axis=1)
        if not group.is_last_rank:
            group.send_object({req_id: entry.router_logits for req_id, entry in entries.items()}, group.rank_in_group + 1)


def _writer(entry: StepProgress) -> Any:
    def use(values: np.ndarray) -> None:
        entry.router_logits = values.transpose(1, 0, 2).copy()

    return use
