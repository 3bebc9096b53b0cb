"""Receipts: what the workers say of each request, step by step, until its output takes it away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..policy import ActivePolicy
from ..receipt import RECEIPT_KEY, Receipt
from .cache import RouteContext, context_of
from .progress import StepProgress


class _Tracked:
    """A request with a plan or captured routes, while the scheduler knows it."""

    __slots__ = ("chunks", "context", "progress", "scores")

    def __init__(self, context: RouteContext) -> None:
        self.start(context)

    def start(self, context: RouteContext) -> None:
        """Know nothing yet of what is set, as for a new request; also after a swap, when all of it is computed again."""
        self.context = context
        self.progress: StepProgress | None = None
        self.chunks: list[tuple[int, Any, Any]] = []
        self.scores: Any = None
        score = context.extras.score if context.extras is not None else None
        if score is not None:
            self.scores = np.full(score.token_ids.shape, np.nan, np.float32)

    def advance(self, step: StepProgress) -> None:
        self.progress = step
        if step.route_ids is not None:
            self.chunks.append((step.chunk_start, step.route_ids, step.route_weights))
        if step.scores is not None:
            self.scores[step.score_start : step.score_start + len(step.scores)] = step.scores

    def receipt(self, active: ActivePolicy) -> Receipt:
        progress = self.progress
        plan = self.context.plan
        ids, weights = self._routes()
        return Receipt(
            plan=plan.digest if plan else None,
            policy=active.digest,
            routes_set=progress.routes_set if progress else 0,
            cached_tokens=progress.first_position if progress else 0,
            route_ids=ids,
            route_weights=weights,
            scores=self.scores,
            policy_mode=active.mode if active.policy is not None else None,
            earlier_policies=self.context.earlier,
        )

    def _routes(self) -> tuple[Any, Any]:
        if not self.chunks:
            return None, None
        num_tokens = max(start + len(ids) for start, ids, _ in self.chunks)
        shape = (num_tokens, *self.chunks[0][1].shape[1:])
        all_ids, all_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for start, ids, weights in self.chunks:  # a preempted request computes positions again: the last word counts
            all_ids[start : start + len(ids)] = ids
            all_weights[start : start + len(ids)] = weights
        return all_ids, all_weights


class ReceiptBook:
    """The receipts of one scheduler's requests."""

    def __init__(self) -> None:
        self._tracked: dict[str, _Tracked] = {}
        # For the receipts of requests that bring nothing: cached tokens while they run, and, of those that left in this step,
        # cached tokens and earlier policies.
        self._cached: dict[str, int] = {}
        self._left: dict[str, tuple[int, tuple[str | None, ...]]] = {}

    def __len__(self) -> int:
        """Requests with a plan, captured routes or scores."""
        return len(self._tracked)

    def enter(self, req_id: str, context: RouteContext) -> None:
        """A request with a plan, captured routes or scores enters the scheduler."""
        self._tracked[req_id] = _Tracked(context)

    def start_again(self, req_id: str, context: RouteContext) -> None:
        """A policy was swapped in: all of the request is computed again."""
        if req_id in self._tracked:
            self._tracked[req_id].start(context)
        self._cached.clear()

    def leave(self, request: Any) -> None:
        """Under a policy, a request has left the scheduler; its output is still to come."""
        context = context_of(request)
        cached = self._cached.pop(request.request_id, 0)
        self._left[request.request_id] = (cached, context.earlier if context is not None else ())

    def forget(self, req_ids: Iterable[str] | None) -> None:
        """No receipt for these (None: for all): nobody waits for their output."""
        for req_id in list(self._tracked) if req_ids is None else req_ids:
            self._tracked.pop(req_id, None)

    def absorb(self, progress: Mapping[str, StepProgress]) -> None:
        """Take what a worker says of a step."""
        for req_id, step in progress.items():
            tracked = self._tracked.get(req_id)
            if tracked is not None:
                tracked.advance(step)

    def attach(self, outputs: Mapping[int, Any], active: ActivePolicy) -> None:
        """Put the receipts into the outputs of requests that finished: those with a plan, and under a policy all."""
        has_policy = active.policy is not None
        if not self._tracked and not has_policy:
            return
        for output in (output for batch in outputs.values() for output in batch.outputs):
            if has_policy and output.prefill_stats is not None and output.prefill_stats.num_cached_tokens:
                self._cached[output.request_id] = output.prefill_stats.num_cached_tokens
            if output.finish_reason is None:
                continue
            tracked = self._tracked.pop(output.request_id, None)
            if tracked is not None:
                receipt = tracked.receipt(active)
            elif has_policy:
                receipt = self._plain(output.request_id, active)
            else:
                continue
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), RECEIPT_KEY: receipt.to_dict()}
        self._left.clear()

    def _plain(self, req_id: str, active: ActivePolicy) -> Receipt:
        cached, earlier = self._left.get(req_id, (0, ()))
        cached = self._cached.pop(req_id, cached)  # a request of one step was freed before its output was seen
        return Receipt(
            plan=None,
            policy=active.digest,
            routes_set=0,
            cached_tokens=cached,
            policy_mode=active.mode,
            earlier_policies=earlier,
        )
