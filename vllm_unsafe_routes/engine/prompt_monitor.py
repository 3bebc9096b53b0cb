"""A served probe (`--route-monitor`): the score of each request's prompt from the experts that it is routed to. It only observes.

The score is a sum over tokens, so the worker adds up the probe's weights of the experts in the buffers of `capture.py`, step by
step, behind the last layer; a few numbers a request go to the engine core, which flags and counts. What the prefix cache had is
not computed and has no part in the score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from ..route_probe import RouteProbe
from .progress import StepReport
from .step import Step, first_positions, first_tokens


class Piece(NamedTuple):
    """Prompt tokens of one request in one step.

    Attributes:
        start: position of the first.
        num_tokens: how many.
        total: sum of the probe's weights of their experts.
        is_last: the prompt ends here.

    """

    start: int
    num_tokens: int
    total: float
    is_last: bool


class PromptMonitor:
    """The worker's side.

    Args:
        probe: for this model.
        device: where the model runs.

    """

    def __init__(self, probe: RouteProbe, device: torch.device) -> None:
        # The first column is of what is no expert: a slot of the buffer that no router has written yet.
        padded = np.pad(probe.weights, ((0, 0), (1, 0)))
        self._weights = torch.tensor(padded, dtype=torch.float32, device=device)
        self._prompt_len: dict[str, int] = {}
        # Request -> first position and number of the prompt tokens that the coming step computes.
        self._due: dict[str, tuple[int, int]] = {}

    @property
    def is_on(self) -> bool:
        """Whether this step computes tokens of a prompt."""
        return bool(self._due)

    def follow(self, scheduler_output: Any) -> None:
        """Forget finished requests, know new ones, and see which prompt tokens the coming step computes."""
        for req_id in scheduler_output.finished_req_ids:
            self._prompt_len.pop(req_id, None)
        self._prompt_len.update((new.req_id, new.prompt_len) for new in scheduler_output.scheduled_new_reqs)
        self._due = {}
        for req_id, start in first_positions(scheduler_output).items():
            left = self._prompt_len.get(req_id, 0) - start
            if left > 0:
                self._due[req_id] = (start, min(left, scheduler_output.num_scheduled_tokens[req_id]))

    def collect(self, step: Step, route_ids: torch.Tensor, report: StepReport) -> None:
        """Add up a step's weights; `route_ids` is int32 [MoE layers, capacity, top_k]. Nothing waits."""
        if not self._due:
            return
        index = route_ids[:, : step.num_tokens].long() + 1
        by_token = self._weights.gather(1, index.flatten(1)).view(index.shape).sum((0, 2))
        firsts = first_tokens(step.req_ids, step.num_scheduled)
        pieces = {req_id: (first, *self._due[req_id]) for req_id, first in firsts if req_id in self._due}
        ends = {req_id: start + count == self._prompt_len[req_id] for req_id, (_, start, count) in pieces.items()}
        monitored = report.monitored

        def use(values: np.ndarray) -> None:
            for req_id, (at, start, count) in pieces.items():
                monitored[req_id] = Piece(start, count, float(values[at : at + count].sum(dtype=np.float64)), ends[req_id])

        report.copies.take(by_token, use)


class PromptScores:
    """The engine core's side.

    Args:
        probe: as the workers have it.

    Attributes:
        num_scored: prompts scored; one that is computed again, after a preemption or a swap, counts again.
        num_flagged: of these, with a score over the threshold.

    """

    def __init__(self, probe: RouteProbe) -> None:
        self._probe = probe
        self._digest = probe.digest
        self._pieces: dict[str, list[Piece]] = {}
        self.num_scored = 0
        self.num_flagged = 0

    def add(self, pieces: Mapping[str, Piece]) -> dict[str, dict[str, Any]]:
        """Take what a worker says of a step; returns what the receipts of those requests say whose prompt is at its end."""
        said = {}
        for req_id, piece in pieces.items():
            # A preempted request computes its prompt again.
            known = [one for one in self._pieces.get(req_id, ()) if one.start < piece.start]
            self._pieces[req_id] = [*known, piece]
            if piece.is_last:
                said[req_id] = self._score(self._pieces.pop(req_id))
        return said

    def _score(self, pieces: list[Piece]) -> dict[str, Any]:
        num_tokens = sum(piece.num_tokens for piece in pieces)
        score = self._probe.score_of_sum(sum(piece.total for piece in pieces), num_tokens)
        flagged = score > self._probe.threshold
        self.num_scored += 1
        self.num_flagged += flagged
        return {"score": score, "flagged": flagged, "tokens": num_tokens, "probe": self._digest}

    def forget(self, req_ids: Any) -> None:
        """These (None: all) have ended amid their prompts, or not."""
        for req_id in list(self._pieces) if req_ids is None else req_ids:
            self._pieces.pop(req_id, None)
