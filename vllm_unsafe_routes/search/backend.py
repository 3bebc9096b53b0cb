"""Where requests run, and how many searches share that place.

A search is a generator: it yields a list of requests (or calls) that it needs answered, and is resumed with the answers in
order. `run_tasks` keeps many of them in flight, so that the engine always has a full batch although every single search waits
for its own results. A search must depend on nothing but its arguments and the answers: then the order in which searches
interleave, and a kill in between, cannot change a result.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import concurrent.futures
import functools
import platform
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..cells import Cells, CellScores
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


@dataclass(frozen=True, slots=True)
class About:
    """What computes.

    Attributes:
        device: its name, and how many.
        versions: of the programs that take part.

    """

    device: str
    versions: Mapping[str, str] = field(default_factory=dict)


def own_versions() -> dict[str, str]:
    """Of this process: Python and this package."""
    return {"python": platform.python_version(), "vllm-unsafe-routes": version("vllm-unsafe-routes")}


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

    def score_cells(self, items: Sequence[Cells]) -> list[CellScores] | None:
        """Score candidates at once. None: not here; they have to go as requests. Raises `RouteError` if they are refused."""

    def poll(self) -> list[tuple[int, Response | RouteError]]:
        """Wait until at least one request has finished; returns those that have. Empty if none is in flight."""

    def about(self) -> About:
        """What computes."""


@dataclass(slots=True)
class Stats:
    """Running totals of a `run_tasks`.

    Attributes:
        requests: answered requests.
        candidates: plans scored among them.
        tokens: their tokens, as if each was computed alone.
        computed_tokens: prompt tokens that were really computed.

    """

    requests: int = 0
    candidates: int = 0
    tokens: int = 0
    computed_tokens: int = 0

    def add(self, other: Stats) -> None:
        """Add another's totals to these."""
        for name in ("requests", "candidates", "tokens", "computed_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True, eq=False)
class _Batch:
    """An open list of work: a search's, or the requests that stand for cells."""

    finish: Callable[[list[Any]], None]
    answers: list[Any]
    missing: int


class Runner:
    """The open searches of a `run_tasks`, and what each of them waits for.

    Args:
        backend: where requests run.
        stats: totals are added here.
        note: takes the values of `Note`s.

    """

    def __init__(self, backend: Backend, stats: Stats, note: Callable[[Any, Any], None]) -> None:
        self.backend, self.stats, self.note = backend, stats, note
        self.open_searches: set[Search[Any]] = set()
        # (key, result) of searches that have ended.
        self.finished: deque[tuple[Any, Any]] = deque()
        self.cells: list[tuple[_Batch, int, Cells]] = []
        self.queue: deque[tuple[_Batch, int, Request]] = deque()
        self._in_flight: dict[int, tuple[_Batch, int, Request]] = {}
        self._calls: dict[concurrent.futures.Future[Any], tuple[_Batch, int]] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        self._number = 0

    def start(self, key: Any, search: Search[Any]) -> None:
        """Open a search."""
        self.open_searches.add(search)
        self.advance(key, search, None)

    def advance(self, key: Any, search: Search[Any], answers: list[Any] | None) -> None:
        """Resume a search until it waits for something or ends."""
        while True:
            try:
                work = next(search) if answers is None else search.send(answers)
            except StopIteration as end:
                self.open_searches.discard(search)
                self.finished.append((key, end.value))
                return
            for item in work:
                if isinstance(item, Note):
                    self.note(key, item.value)
            answers = [None] * len(work)
            waits = [(at, item) for at, item in enumerate(work) if not isinstance(item, Note)]
            if waits:
                break
        batch = _Batch(functools.partial(self.advance, key, search), answers, len(waits))
        for at, item in waits:
            if isinstance(item, Call):
                self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(32, "unsafe-routes-call")
                self._calls[self._pool.submit(item.function)] = (batch, at)
            elif isinstance(item, Cells):
                self.cells.append((batch, at, item))
            else:
                self.queue.append((batch, at, item))

    def answer(self, batch: _Batch, at: int, value: Any) -> None:
        """Put an answer into its place; the search goes on once it has all."""
        batch.answers[at] = value
        batch.missing -= 1
        if isinstance(value, BaseException):
            raise value
        if not batch.missing:
            batch.finish(batch.answers)

    def turn(self) -> None:
        """Ask for what searches need, and take what is finished."""
        self.score_cells()
        self.submit()
        self.collect()

    def score_cells(self) -> None:
        """Have the backend score the cells of all searches together; where it cannot, they become requests."""
        if not self.cells:
            return
        waiting, self.cells = self.cells, []
        scores = self.backend.score_cells([cells for _, _, cells in waiting])
        if scores is None:
            for batch, at, cells in waiting:
                self._queue_cells(batch, at, cells)
            return
        for (batch, at, _), found in zip(waiting, scores, strict=True):
            self.stats.requests += len(found.log_probs)
            self.stats.candidates += len(found.log_probs)
            self.stats.tokens += found.tokens
            self.stats.computed_tokens += found.computed_tokens
            self.answer(batch, at, found)

    def _queue_cells(self, batch: _Batch, at: int, cells: Cells) -> None:
        token_ids = cells.token_ids.tolist()
        requests = [Request(token_ids, extras) for extras in cells.extras()]

        def finish(responses: list[Response]) -> None:
            values = np.array([response.scores for response in responses])
            computed = sum(response.computed_tokens for response in responses)
            self.answer(batch, at, CellScores(values, len(requests) * len(token_ids), computed))

        own = _Batch(finish, [None] * len(requests), len(requests))
        self.queue.extend((own, number, request) for number, request in enumerate(requests))

    def submit(self) -> None:
        """Hand requests to the backend, as many as keep it busy."""
        while self.queue and len(self._in_flight) < self.backend.capacity:
            batch, at, request = self.queue.popleft()
            self.backend.submit(self._number, request)
            self._in_flight[self._number] = (batch, at, request)
            self._number += 1

    def collect(self) -> None:
        """Take what the backend and the threads have finished; waits for one of them where nothing else is to be done."""
        # Requests (answers that are generated, mostly) wait until many searches wait for theirs: cells go first.
        if self._in_flight and not (self.cells and 2 * len(self._in_flight) < len(self.open_searches)):
            for done, response in self.backend.poll():
                batch, at, request = self._in_flight.pop(done)
                if isinstance(response, Response):
                    self.stats.requests += 1
                    self.stats.candidates += request.extras.score is not None
                    self.stats.tokens += len(request.token_ids)
                    self.stats.computed_tokens += response.computed_tokens
                self.answer(batch, at, response)
        if self._calls:
            timeout = 0 if self._in_flight or self.queue or self.cells or self.finished else None
            for future in concurrent.futures.wait(self._calls, timeout, concurrent.futures.FIRST_COMPLETED).done:
                batch, at = self._calls.pop(future)
                error = future.exception()
                self.answer(batch, at, error if error is not None else future.result())

    def close(self) -> None:
        """Close the open searches and wait for what the backend still computes."""
        for search in self.open_searches:
            search.close()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        while self._in_flight:
            try:
                answered = self.backend.poll()
            except RouteError:
                return
            if not answered:  # the backend has lost them
                return
            for done, _ in answered:
                self._in_flight.pop(done, None)


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
    runner = Runner(backend, stats if stats is not None else Stats(), note)
    source = iter(tasks)
    exhausted = False
    try:
        while not stop():
            while not exhausted and len(runner.open_searches) < concurrency and len(runner.queue) < backend.capacity:
                task = next(source, None)
                if task is None:
                    exhausted = True
                else:
                    runner.start(*task)
            runner.turn()
            while runner.finished:
                yield runner.finished.popleft()
            if exhausted and not runner.open_searches:
                return
    finally:
        runner.close()


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
