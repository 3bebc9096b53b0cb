"""Where requests run, and how many searches share that place.

A search is a generator: it yields a list of requests (or calls) that it needs answered, and is resumed with the answers in
order. `run_tasks` keeps many of them in flight, so that the engine always has a full batch although every single search waits
for its own results. A search must depend on nothing but its arguments and the answers: then the order in which searches
interleave, and a kill in between, cannot change a result.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..extras import RouteExtras
from ..policy import RoutePolicy
from ..shape import ModelShape

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt for the engine.

    Attributes:
        token_ids: prompt token ids; for a score, the target without its last token follows the prompt.
        extras: plan, delta, score.
        max_tokens: tokens to generate greedily.
        stop_token_ids: generation ends after one of these.

    """

    token_ids: Sequence[int]
    extras: RouteExtras = RouteExtras()  # noqa: RUF009 - immutable
    max_tokens: int = 1
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """What came back.

    Attributes:
        token_ids: generated token ids.
        computed_tokens: prompt tokens that the engine computed for this request, prefix-cache hits left out.
        scores: float32 [num_rows, width] where a score was asked for.
        route_ids: int32 [num_tokens, num_moe_layers, top_k] where routes were asked for.
        route_weights: float32, same shape.
        routes_set: (layer, token) routes that the request's plan set, by its receipt.

    """

    token_ids: tuple[int, ...]
    computed_tokens: int
    scores: npt.NDArray[np.float32] | None = None
    route_ids: npt.NDArray[np.int32] | None = None
    route_weights: npt.NDArray[np.float32] | None = None
    routes_set: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """Something slow that is no engine request (a judge's answer); runs in a thread, so that no other search waits for it.

    Attributes:
        function: called without arguments; its result, or the exception it raises, comes back to the search.

    """

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True, eq=False)
class Note:
    """Something to keep at once, such as how far a long search has come; the answer is None.

    Attributes:
        value: handed to the `note` function of `run_tasks` with the search's key.

    """

    value: Any


Search = Generator[list[Any], list[Any], T]


class Backend(Protocol):
    """An engine or a set of servers.

    Attributes:
        shape: the MoE shape of the model.
        policy: the policy that the engine enforces, None if there is none; candidates must not use what it disables.
        max_model_len: longest request in tokens, generated ones included.
        capacity: requests in flight that keep it busy.

    """

    shape: ModelShape
    policy: RoutePolicy | None
    max_model_len: int
    capacity: int

    def submit(self, number: int, request: Request) -> None:
        """Start a request. Raises `RouteError` if it is refused."""

    def poll(self) -> list[tuple[int, Response | RouteError]]:
        """Wait until at least one request has finished; returns those that have. Empty if none is in flight."""


@dataclass(slots=True)
class Stats:
    """Running totals of a `run_tasks`.

    Attributes:
        requests: answered requests.
        tokens: their tokens, as if each was computed alone.
        computed_tokens: prompt tokens that were really computed.

    """

    requests: int = 0
    tokens: int = 0
    computed_tokens: int = 0


@dataclass(slots=True, eq=False)
class _Batch:
    """A search's open list of work."""

    key: Any
    search: Search[Any]
    answers: list[Any]
    missing: int


def run_tasks(
    backend: Backend,
    tasks: Iterable[tuple[K, Search[T]]],
    *,
    concurrency: int = 64,
    stats: Stats | None = None,
    stop: Callable[[], bool] = lambda: False,
    note: Callable[[K, Any], None] = lambda key, value: None,
) -> Iterator[tuple[K, T]]:
    """Run searches on one backend, many at a time; yields (key, result) in the order in which they end.

    Args:
        backend: where requests run.
        tasks: (key, search), taken one by one as others end.
        concurrency: searches that are open at one time.
        stats: totals are added here.
        note: takes the values of `Note`s.
        stop: asked between answers; once true no further result is yielded and open searches are closed.

    Raises:
        RouteError: a request was refused or failed. What a call raises comes through as it is.

    """
    stats = stats if stats is not None else Stats()
    source = iter(tasks)
    queue: deque[tuple[_Batch, int, Request]] = deque()
    in_flight: dict[int, tuple[_Batch, int, Request]] = {}
    calls: dict[concurrent.futures.Future[Any], tuple[_Batch, int]] = {}
    open_searches: set[Search[Any]] = set()
    finished: deque[tuple[K, T]] = deque()
    number = 0
    exhausted = False
    pool: concurrent.futures.ThreadPoolExecutor | None = None

    def advance(key: Any, search: Search[Any], answers: list[Any] | None) -> None:
        """Resume a search until it waits for something or ends."""
        nonlocal pool
        while True:
            try:
                work = next(search) if answers is None else search.send(answers)
            except StopIteration as end:
                open_searches.discard(search)
                finished.append((key, end.value))
                return
            for item in work:
                if isinstance(item, Note):
                    note(key, item.value)
            answers = [None] * len(work)
            if any(not isinstance(item, Note) for item in work):
                break
        batch = _Batch(key, search, answers, sum(not isinstance(item, Note) for item in work))
        for at, item in enumerate(work):
            if isinstance(item, Note):
                continue
            if isinstance(item, Call):
                pool = pool or concurrent.futures.ThreadPoolExecutor(32, "unsafe-routes-call")
                calls[pool.submit(item.function)] = (batch, at)
            else:
                queue.append((batch, at, item))

    def answer(batch: _Batch, at: int, value: Any) -> None:
        batch.answers[at] = value
        batch.missing -= 1
        if isinstance(value, BaseException):
            raise value
        if not batch.missing:
            advance(batch.key, batch.search, batch.answers)

    try:
        while not stop():
            while not exhausted and len(open_searches) < concurrency and len(queue) < backend.capacity:
                try:
                    key, search = next(source)
                except StopIteration:
                    exhausted = True
                    break
                open_searches.add(search)
                advance(key, search, None)
            while queue and len(in_flight) < backend.capacity:
                batch, at, request = queue.popleft()
                backend.submit(number, request)
                in_flight[number] = (batch, at, request)
                number += 1
            if in_flight:
                for done, response in backend.poll():
                    batch, at, request = in_flight.pop(done)
                    if isinstance(response, Response):
                        stats.requests += 1
                        stats.tokens += len(request.token_ids)
                        stats.computed_tokens += response.computed_tokens
                    answer(batch, at, response)
            if calls:
                timeout = 0 if in_flight or queue or finished else None
                ready = concurrent.futures.wait(calls, timeout, concurrent.futures.FIRST_COMPLETED).done
                for future in ready:
                    batch, at = calls.pop(future)
                    error = future.exception()
                    answer(batch, at, error if error is not None else future.result())
            while finished:
                yield finished.popleft()
            if exhausted and not open_searches:
                return
    finally:
        for search in open_searches:
            search.close()
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
        while in_flight:
            try:
                answered = backend.poll()
            except RouteError:
                break
            if not answered:  # the backend has lost them
                break
            for done, _ in answered:
                in_flight.pop(done, None)


def with_notes(search: Search[T], change: Callable[[Any], Any | None]) -> Search[T]:
    """Pass a search through with its notes changed.

    Args:
        search: the search.
        change: takes a note's value and returns the value that is kept instead; None: the note is dropped.

    """
    answers: list[Any] | None = None
    while True:
        try:
            work = next(search) if answers is None else search.send(answers)
        except StopIteration as end:
            result: T = end.value
            return result
        values = {at: change(item.value) for at, item in enumerate(work) if isinstance(item, Note)}
        passed = [Note(values[at]) if at in values else item for at, item in enumerate(work) if values.get(at, item) is not None]
        got = iter((yield passed) if passed else [])
        answers = [next(got) if values.get(at, item) is not None else None for at, item in enumerate(work)]


def run_search(backend: Backend, search: Search[T], stats: Stats | None = None) -> T:
    """Run one search to its end."""
    for _, result in run_tasks(backend, [(0, search)], stats=stats):
        return result
    raise AssertionError("a search ended without a result")
