"""The scheduler's side: a request with a plan is admitted when the route table has room for it, and leaves with a receipt.

Also the owner of the active policy in the engine core's process; `swap.py` replaces it.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.request_queue import SchedulingPolicy

from ..compiler import PlanCompiler
from ..errors import RouteError
from ..policy import ActivePolicy
from ..table import Ledger
from .cache import CONTEXT_ATTRIBUTE, RequestContexts, RouteContext, context_of
from .config import model_shape, route_config
from .progress import COUNTS_ATTRIBUTE, MONITORED_ATTRIBUTE, PROGRESS_ATTRIBUTE, RouteCounts
from .prompt_monitor import PromptScores
from .receipts import ReceiptBook


class RouteAdmission:
    """State beside one vLLM `Scheduler`.

    Args:
        scheduler: the scheduler; its config must ask for route control.

    """

    def __init__(self, scheduler: Any) -> None:
        config = route_config(scheduler.vllm_config)
        assert config is not None
        self.config = config
        self.shape = model_shape(scheduler.vllm_config)
        self.contexts = RequestContexts(scheduler.vllm_config)
        self.active = config.active_policy()
        self.generation = 0
        # Set by `swap.py` while a policy is being replaced.
        self.is_swapping = False
        self._deliver: Callable[[ActivePolicy, Any, str], None] | None = None
        self.ledger = self._new_ledger(config.compiler(self.shape))
        self.counts: RouteCounts | None = None
        # Whether steps ran since the workers last said what they counted.
        self.counts_are_stale = False
        self.num_refused = 0
        # In the order in which they enter the scheduler, which is its own.
        self._held: list[Any] = []
        self._by_priority = scheduler.policy is SchedulingPolicy.PRIORITY
        probe = config.load_monitor()
        self.receipts = ReceiptBook(None if probe is None else PromptScores(probe))

    def _new_ledger(self, compiler: PlanCompiler) -> Ledger:
        self._num_policy_rows = sum(row is not None for row in compiler.policy_rows())
        return Ledger(compiler.max_rows, self.config.route_table_cells, self.config.route_table_slots)

    @property
    def compiler(self) -> PlanCompiler:
        """Compiles plans under the active policy."""
        return self.config.compiler(self.shape, self.active)

    @property
    def is_connected(self) -> bool:
        """Whether `connect` was called."""
        return self._deliver is not None

    def connect(self, deliver: Callable[[ActivePolicy, Any, str], None]) -> None:
        """Learn how to end a request that the scheduler does not hold: the engine core reaches its client."""
        self._deliver = deliver

    def table_use(self) -> dict[str, list[int]]:
        """Part of the route table -> how much of it is in use, the policy's own rows included, and how much there is."""
        ledger, config = self.ledger, self.config
        return {
            "rows": [len(ledger.rows) + self._num_policy_rows, config.route_table_rows],
            "cells": [ledger.num_cells, ledger.max_cells],
            "slots": [len(ledger), ledger.max_slots],
        }

    @property
    def num_held(self) -> int:
        """Requests that wait outside the scheduler for room in the table."""
        return len(self._held)

    def admit(self, request: Any) -> bool:
        """Whether a new request may enter the scheduler now; if not it is held here until `release` returns it, or refused."""
        context = context_of(request)
        refusal = context.refusal if context is not None else None
        if context is not None and context.generation != self.generation:
            # It was prepared by the input thread before a swap and arrives after it.
            try:
                context, refusal = self._renew(request, context, self.active), None
            except RouteError as error:
                refusal = error
        if refusal is not None:
            self.refuse(request, refusal)
            return False
        if context is None or not context.tracked:
            return True
        if self._by_priority:
            bisect.insort(self._held, request)
        else:
            self._held.append(request)
        if self._held[0] is not request or not self._has_room(context):
            return False
        self._held.pop(0)
        self._enter(request, context)
        return True

    def _has_room(self, context: RouteContext) -> bool:
        return context.plan is None or self.ledger.admits(context.plan)

    def _enter(self, request: Any, context: RouteContext) -> None:
        if context.plan is not None:
            self.ledger.add(request.request_id, context.plan)
        self.receipts.enter(request.request_id, context)

    def refuse(self, request: Any, error: RouteError) -> None:
        """Tell the client of a request that the policy which was swapped in does not permit its plan."""
        self.num_refused += 1
        assert self._deliver is not None
        self._deliver(self.active, request, f"the route policy was replaced by {self.active.digest}: {error}")

    def free(self, request: Any) -> list[Any]:
        """A request has left the scheduler; returns held requests that fit now, already booked."""
        req_id = request.request_id
        if req_id not in self.ledger:
            return []
        self.ledger.remove(req_id)
        return self.release()

    def release(self) -> list[Any]:
        """Held requests that fit now, already booked."""
        admitted = []
        while self._held:
            context = context_of(self._held[0])
            assert context is not None
            if not self._has_room(context):
                break
            request = self._held.pop(0)
            self._enter(request, context)
            admitted.append(request)
        return admitted

    def abort(self, req_ids: Any, status: Any) -> list[Any]:
        """Forget requests that ended from outside (None: all); returns those that were held, with their final status."""
        gone = {req_ids} if isinstance(req_ids, str) else None if req_ids is None else set(req_ids)
        self.receipts.forget(gone)
        ended = [request for request in self._held if gone is None or request.request_id in gone]
        if ended:
            self._held = [request for request in self._held if gone is not None and request.request_id not in gone]
        for request in ended:
            request.status = status
        return ended

    def replace(self, active: ActivePolicy, compiler: PlanCompiler, requests: list[Any]) -> list[tuple[Any, RouteError]]:
        """Go on under another policy: plans are compiled again, KV blocks keyed again, table room booked again.

        Args:
            active: the new policy.
            compiler: for it.
            requests: all unfinished requests of the scheduler, none of which holds KV blocks.

        Returns:
            Requests that the new policy does not permit, with the reason; they must be ended. Held ones are let go here.

        """
        before, self.active = self.active, active
        self.generation += 1
        self.contexts.use(active, compiler, self.generation)
        self.ledger = self._new_ledger(compiler)
        refused: list[tuple[Any, RouteError]] = []
        for request in requests:
            old = context_of(request)
            assert old is not None
            try:
                context = self._renew(request, old, before)
                if context.plan is not None:
                    if not self.ledger.admits(context.plan):
                        raise RouteError("the route table has no room for the plan beside the new policy's rows", "table")
                    self.ledger.add(request.request_id, context.plan)
            except RouteError as error:
                refused.append((request, error))
                continue
            self.receipts.start_again(request.request_id, context)
        held, self._held = self._held, []
        for request in held:
            old = context_of(request)
            assert old is not None
            try:
                self._renew(request, old, before)
                self._held.append(request)
            except RouteError as error:
                refused.append((request, error))
        return refused

    def _renew(self, request: Any, old: RouteContext, before: ActivePolicy) -> RouteContext:
        """Give a request its context under the active policy. Raises `RouteError` if its plan is not permitted."""
        context = self.contexts.of(request.sampling_params)
        earlier = old.earlier
        if request.num_output_tokens and earlier[-1:] != (before.digest,):
            earlier = (*earlier, before.digest)
        context = dataclasses.replace(context, earlier=earlier)
        setattr(request, CONTEXT_ATTRIBUTE, context)
        request.block_hashes = []
        request.update_block_hashes()
        return context

    def absorb(self, model_runner_output: Any) -> None:
        """Take what the worker says it set in this step."""
        self.absorb_counts(getattr(model_runner_output, COUNTS_ATTRIBUTE, None))
        self.counts_are_stale = True
        self.receipts.absorb(getattr(model_runner_output, PROGRESS_ATTRIBUTE, None) or {})
        self.receipts.absorb_monitored(getattr(model_runner_output, MONITORED_ATTRIBUTE, None) or {})

    def absorb_counts(self, *said: RouteCounts | None) -> None:
        """Take what workers say they counted."""
        self.counts = RouteCounts.latest((self.counts, *said))
