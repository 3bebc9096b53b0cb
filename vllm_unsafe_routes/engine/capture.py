"""The routes as they are used: written by the route kernel layer by layer, handed back for `return_routes`, counted for `usage`.

Router logits are captured beside them (`logits_capture.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group

from .layer_views import LayerViews
from .logits_capture import LogitsCapture
from .progress import StepProgress, StepReport
from .prompt_monitor import PromptMonitor
from .step import Step
from .usage import ExpertUsage


class RouteCapture:
    """Captured routes of one worker.

    Args:
        size: (MoE layers, most tokens of a forward pass, top_k).
        device: where the model runs.
        always: captured graphs repeat what is decided now, so the route kernel writes every step.
        local_slots: MoE slots of this pipeline rank.
        usage: counts the routes of every step, if they are to be counted.
        logits: captures router logits, if requests may ask for them.
        monitor: scores prompts, if a probe is served.

    """

    def __init__(
        self,
        size: tuple[int, int, int],
        device: torch.device,
        always: bool,
        local_slots: Sequence[int],
        usage: ExpertUsage | None = None,
        logits: LogitsCapture | None = None,
        monitor: PromptMonitor | None = None,
    ) -> None:
        self.usage = usage
        self.logits = logits
        self.monitor = monitor
        self._always = always
        self._local_slots = local_slots
        self._routes_on = False
        self._ids = torch.full(size, -1, dtype=torch.int32, device=device)
        self._weights = torch.zeros(size, dtype=torch.float32, device=device)
        self._id_views, self._weight_views = LayerViews(self._ids), LayerViews(self._weights)

    def follow(self, scheduler_output: Any) -> None:
        """Follow the scheduler, where all requests are counted or monitored."""
        if self.usage is not None:
            self.usage.follow(scheduler_output)
        if self.monitor is not None:
            self.monitor.follow(scheduler_output)

    @property
    def is_on(self) -> bool:
        """Whether somebody wants this step's routes or logits."""
        return self._routes_on or (self.logits is not None and self.logits.is_on)

    def stage(self, step: Step) -> bool:
        """See whether somebody wants this step's routes or logits; returns `is_on`."""
        if self.logits is not None:
            self.logits.stage(step)
        counted = self.usage is not None or (self.monitor is not None and self.monitor.is_on)
        self._routes_on = counted or any(part.resident.extras.wants_routes for part in step.parts)
        return self.is_on

    def apply(self, slot: int, num_tokens: int, by_kernel: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where the layer's routes go: int32 and float32 [num_tokens, top_k], None where nobody wants them."""
        if not (self._routes_on or (self._always and by_kernel)):
            return None, None
        return self._id_views.at(slot, num_tokens), self._weight_views.at(slot, num_tokens)

    def keep_logits(self, slot: int, router_logits: torch.Tensor) -> None:
        """The layer's logits as the model's router computed them, [num_tokens, num_experts]."""
        if self.logits is not None:
            self.logits.apply(slot, router_logits)

    def collect(self, step: Step, report: StepReport) -> None:
        """Count the routes, and hand what is wanted to the report."""
        if self.usage is not None:
            self.usage.collect(step, self._ids)
        if self.monitor is not None:
            self.monitor.collect(step, self._ids, report)
        self._collect_routes(step, report)
        if self.logits is not None:
            self.logits.collect(report)

    def _collect_routes(self, step: Step, report: StepReport) -> None:
        """One copy for all requests."""
        wanted = [part for part in step.parts if part.resident.extras.wants_routes]
        if not wanted:
            return
        progress = report.progress

        def use(name: str, values: np.ndarray) -> None:
            for part in wanted:
                rows = values[:, part.first : part.first + part.num_tokens]
                setattr(progress[part.req_id], name, rows.transpose(1, 0, 2).copy())

        def place(positions: np.ndarray) -> None:
            for part in wanted:
                progress[part.req_id].chunk_start = int(positions[part.first])

        # The host may not know yet how many drafts of the step before were rejected.
        assert step.positions is not None
        report.copies.take(step.positions[: step.num_tokens], place)
        report.copies.take(self._ids[:, : step.num_tokens], lambda values: use("route_ids", values))
        report.copies.take(self._weights[:, : step.num_tokens], lambda values: use("route_weights", values))
        if get_pp_group().world_size > 1:
            report.copies.resolve()
            _merge_pipeline(progress, get_pp_group(), self._local_slots)


def _merge_pipeline(progress: Mapping[str, StepProgress], group: Any, local_slots: Sequence[int]) -> None:
    """Collect the routes of earlier pipeline ranks: each hands on what it has, the last rank reports.

    Args:
        progress: this rank's, with its routes.
        group: vLLM's pipeline-parallel group.
        local_slots: MoE slots of this rank.

    """
    if not group.is_first_rank:
        for req_id, (slots, ids, weights) in group.recv_object(group.rank_in_group - 1).items():
            entry = progress[req_id]
            assert entry.route_ids is not None and entry.route_weights is not None
            entry.route_ids[:, slots] = ids
            entry.route_weights[:, slots] = weights
    if not group.is_last_rank:
        upto = list(range(local_slots[-1] + 1)) if local_slots else []
        hand_on = {
            req_id: (upto, entry.route_ids[:, upto], entry.route_weights[:, upto])
            for req_id, entry in progress.items()
            if entry.route_ids is not None and entry.route_weights is not None
        }
        group.send_object(hand_on, group.rank_in_group + 1)
