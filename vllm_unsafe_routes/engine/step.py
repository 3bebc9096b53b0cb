"""One forward pass as route control sees it, and the requests that a worker knows.

Every feature of route control is a file of its own and has some of three verbs, which `worker.py` calls in this order:

    stage(step)              before the forward pass: fill device buffers for the step's tokens
    apply(slot, routing)     at MoE layer `slot`, which captured graphs repeat without Python
    collect(step, ...)       after the forward pass: what it left, for the scheduler
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..compiled import CompiledPlan
from ..extras import RouteExtras
from .progress import RoutesSet, StepProgress

# Slot 0 of the device table belongs to every request without a plan.
NO_PLAN_SLOT = 0


@dataclass(slots=True)
class Resident:
    """A request with a plan, captured routes or scores, while this worker knows it.

    Attributes:
        slot: its place among the requests of the device table.
        plan: its plan, if it has one.
        extras: what it asks for.
        prompt_len: tokens of its prompt.
        start: first position that this engine computed for it.
        end: one past the last position computed so far, rejected drafts included.
        settled: first position from which on its rows no longer change.

    """

    slot: int
    plan: CompiledPlan | None
    extras: RouteExtras
    prompt_len: int
    start: int
    end: int = 0
    settled: int = field(init=False)
    # The start that was told together with what every further token sets.
    _told: int | None = None

    def __post_init__(self) -> None:
        self.settled = self.prompt_len if self.plan is None else max(self.prompt_len, self.plan.num_listed)

    def news(self) -> StepProgress | None:
        """Where it is after a step; None if that follows from what was said, as in decoding."""
        if self._told == self.start:
            extras = self.extras
            return StepProgress() if extras.wants_routes or extras.score is not None or extras.logits is not None else None
        plan, start, prompt_len = self.plan, self.start, self.prompt_len
        is_decoding = self.end >= prompt_len
        self._told = start if is_decoding else None
        end = max(start, min(self.end, prompt_len))
        if plan is None:
            return StepProgress(RoutesSet(start, end, 0))
        upto = max(end, plan.num_listed) + 1 if is_decoding else end
        further = tuple(plan.num_routes(position, position + 1, prompt_len) for position in range(end, upto))
        return StepProgress(RoutesSet(start, end, plan.num_routes(start, end, prompt_len), further))

    def restart(self) -> None:
        """The request will be computed again from its first token."""
        self.start, self.end, self._told = sys.maxsize, 0, None


class Part(NamedTuple):
    """A resident request's share of a step.

    Attributes:
        req_id: the request.
        resident: what is known of it.
        start: first position that it computes; of drafts that may be rejected before, the furthest that it can be.
        num_tokens: positions that it computes.
        first: where its tokens begin among those of the batch.

    """

    req_id: str
    resident: Resident
    start: int
    num_tokens: int
    first: int


class Step(NamedTuple):
    """A forward pass.

    Attributes:
        parts: the resident requests in it, in batch order.
        req_ids: all requests in batch order.
        num_scheduled: tokens that each request computes.
        num_tokens: tokens of all requests, without padding.
        query_start_loc: int32 [>= num_reqs + 1], on the device; request i has tokens [i] to [i + 1] (exclusive).
        positions: int64 [num_tokens, padding included], on the device.

    """

    parts: Sequence[Part]
    req_ids: Sequence[str]
    num_scheduled: Mapping[str, int]
    num_tokens: int
    query_start_loc: torch.Tensor | None = None
    positions: torch.Tensor | None = None


NO_STEP = Step((), (), {}, 0)


def first_positions(scheduler_output: Any) -> dict[str, int]:
    """Request -> first position that the coming forward pass computes, as the scheduler has it."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed.update((new.req_id, new.num_computed_tokens) for new in scheduler_output.scheduled_new_reqs)
    return computed


def first_tokens(req_ids: Sequence[str], num_scheduled: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Each request of a batch, in its order, and where its tokens begin among those of the batch."""
    return zip(req_ids, itertools.accumulate(map(num_scheduled.__getitem__, req_ids), initial=0), strict=False)


class Requests:
    """The requests that this worker has to know, followed by the scheduler's outputs."""

    def __init__(self) -> None:
        self._resident: dict[str, Resident] = {}
        # Of the coming forward pass: first position and tokens of every request, and whether the residents have noted it.
        self._firsts: Mapping[str, int] = {}
        self._num_scheduled: Mapping[str, int] = {}
        self._is_noted = True

    def __getitem__(self, req_id: str) -> Resident:
        return self._resident[req_id]

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._resident

    def __iter__(self) -> Iterator[tuple[str, Resident]]:
        return iter(list(self._resident.items()))

    def add(self, req_id: str, resident: Resident) -> None:
        """Know a request from now on."""
        self._resident[req_id] = resident

    def pop(self, req_id: str) -> Resident | None:
        """Forget a request; unknown ids are fine."""
        return self._resident.pop(req_id, None)

    def follow(self, scheduler_output: Any, take_in: Callable[[Any], None], forget: Callable[[str], None]) -> None:
        """Forget finished requests, take in new ones, and note what the coming forward pass computes."""
        for req_id in scheduler_output.finished_req_ids:
            forget(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            take_in(new)
        self._num_scheduled = scheduler_output.num_scheduled_tokens
        self._firsts = first_positions(scheduler_output) if self._resident else {}
        self._is_noted = False

    def step(self, req_ids: Sequence[str], query_start_loc: torch.Tensor, positions: torch.Tensor) -> Step:
        """The coming forward pass; arguments as in `Step`. The host knows where tokens begin without asking the device."""
        scheduled, firsts = self._num_scheduled, self._firsts
        parts = []
        for req_id, at in first_tokens(req_ids, scheduled) if firsts else ():
            resident = self._resident.get(req_id)
            if resident is not None:
                start, num_tokens = firsts[req_id], scheduled[req_id]
                if not self._is_noted:
                    resident.start = min(resident.start, start)
                    resident.end = max(resident.end, start + num_tokens)
                parts.append(Part(req_id, resident, start, num_tokens, at))
        self._is_noted = True
        return Step(parts, req_ids, scheduled, sum(scheduled.values()), query_start_loc, positions)
