"""A campaign's jobs on a Ray cluster: engines are actors, and whole jobs (one prompt with one seed) go to them.

An actor runs its jobs as `run_tasks` does, and hands back notes and results every fifth of a second; the driver alone writes the
run folder. Ray places the actors and starts a lost one again where there is room; its jobs go to the others at once, from their
last notes on. A job travels as a closure; its bench does not: in an actor that is the actor's own (`Bench.__reduce__`).

This module imports Ray where an engine is opened.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import EngineEnded, RouteError
from ..search.backend import About, Runner, Search, Stats
from . import bench as benches
from .bench import Bench

# How long an actor works before it hands back what it has: what a kill costs.
_SECONDS = 0.2
# Between two looks at whether a stop was asked for.
_WAIT_SECONDS = 0.5
# Of one actor, by Ray.
_RESTARTS = 20
# Of one job without a note in between: what ends its actor each time must not end them all for ever.
_LOSSES = 3

logger = logging.getLogger(__name__)

OpenBench = Callable[[], AbstractContextManager[Bench]]


@dataclass(slots=True, eq=False)
class RemoteJob:
    """A job on its way.

    Attributes:
        key: of its result.
        make: takes its notes and makes its search.
        notes: all that are kept of it.
        losses: actors that ended with it since its last note.

    """

    key: tuple[Any, ...]
    make: Callable[[list[Any]], Search[Any]]
    notes: list[Any] = field(default_factory=list)
    losses: int = 0


class RouteEngine:
    """The actor: an engine with the searches that are open on it.

    Args:
        open_bench: opens the engine.
        environment: variables that the driver has for its own engine.

    """

    def __init__(self, open_bench: OpenBench, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self._stack = ExitStack()
        self._bench = self._stack.enter_context(open_bench())
        benches.here = self._bench
        self._runner = self._new_runner()

    def _new_runner(self) -> Runner:
        self._notes: list[tuple[Any, Any]] = []
        return Runner(self._bench.backend, Stats(), lambda key, value: self._notes.append((key, value)))

    def start(self) -> About:
        """Forget what is open. Answers once the engine is ready."""
        self._runner.close()
        self._runner = self._new_runner()
        return self._bench.backend.about()

    def work(self, jobs: Iterable[RemoteJob]) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]], Stats]:
        """Take these jobs too, and go on for a while.

        Returns:
            (key, note) and (key, result) since the last call, and what it took.

        """
        runner = self._runner
        try:
            for job in jobs:
                runner.start(job.key, job.make(job.notes))
            until = time.monotonic() + _SECONDS
            while runner.open_searches and time.monotonic() < until:
                runner.turn()
        except EngineEnded:
            # Ray starts an actor again that crashed, not one that reports an error.
            os._exit(1)
        results = list(runner.finished)
        runner.finished.clear()
        notes, self._notes[:] = list(self._notes), []
        stats, runner.stats = runner.stats, Stats()
        return notes, results, stats


@dataclass(slots=True, eq=False)
class _Engine:
    """The driver's side of an actor.

    Attributes:
        number: for messages.
        actor: Ray's handle.
        call: what it is doing; None: nothing.
        state: starting, ready or lost.
        jobs: what it has, by key.

    """

    number: int
    actor: Any
    call: Any
    state: str = "starting"
    jobs: dict[tuple[Any, ...], RemoteJob] = field(default_factory=dict)


class RayEngines:
    """Engines on a cluster.

    Args:
        actors: Ray's handles of `RouteEngine`s.

    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._engines = [_Engine(number, actor, actor.start.remote()) for number, actor in enumerate(actors)]
        self._about = About("no Ray actor")

    def about(self) -> About:
        """The device of the engine that was ready last, and how many engines there are."""
        return About(f"{len(self._engines)} Ray actors: {self._about.device}", self._about.versions)

    def run(
        self,
        jobs: Iterable[RemoteJob],
        *,
        concurrency: int,
        stats: Stats,
        stop: Callable[[], bool],
        note: Callable[[Any, Any], None],
    ) -> Iterator[tuple[Any, Any]]:
        """As `run_tasks`; `concurrency` is that of each engine."""
        waiting = deque(jobs)
        while (waiting or any(engine.jobs for engine in self._engines)) and not stop():
            self._hand_out(waiting, concurrency)
            for engine in self._finished_calls():
                answer = self._answer(engine, waiting)
                if answer is None:
                    continue
                notes, results, spent = answer
                stats.add(spent)
                for key, kept in notes:
                    note(key, kept)
                    engine.jobs[key].notes.append(kept.record)
                    engine.jobs[key].losses = 0
                for key, record in results:
                    del engine.jobs[key]
                    yield key, record

    def _hand_out(self, waiting: deque[RemoteJob], concurrency: int) -> None:
        """Give idle engines their share of the jobs, so that one that starts late finds some, and let them work."""
        remaining = len(waiting) + sum(len(engine.jobs) for engine in self._engines)
        living = sum(engine.state != "lost" for engine in self._engines) or 1
        share = min(concurrency, -(-remaining // living))
        for engine in self._engines:
            if engine.state != "ready" or engine.call is not None:
                continue
            jobs = [waiting.popleft() for _ in range(min(len(waiting), share - len(engine.jobs)))]
            engine.jobs |= {job.key: job for job in jobs}
            if engine.jobs:
                engine.call = engine.actor.work.remote(jobs)

    def _finished_calls(self) -> list[_Engine]:
        import ray

        calls = {engine.call: engine for engine in self._engines if engine.call is not None}
        done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not done:
            done, _ = ray.wait(list(calls), timeout=_WAIT_SECONDS)
        return [calls[call] for call in done]

    def _answer(self, engine: _Engine, waiting: deque[RemoteJob]) -> Any:
        """What a call brought: None if it brought no records, because the engine has started or is lost."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        call, engine.call = engine.call, None
        try:
            answer = ray.get(call)
        except RayTaskError as error:
            raise RouteError(f"Ray actor {engine.number}: {error.cause}") from error
        except RayError as error:
            if engine.state == "ready":
                self._lose(engine, waiting)
            else:
                self._give_up(engine, error)
            return None
        if engine.state == "ready":
            return answer
        logger.warning("Ray actor %d is ready%s", engine.number, " again" if engine.state == "lost" else "")
        engine.state, self._about = "ready", answer
        return None

    def _lose(self, engine: _Engine, waiting: deque[RemoteJob]) -> None:
        logger.warning("Ray actor %d is lost; its %d jobs go to others, from their last notes on", engine.number, len(engine.jobs))
        for job in engine.jobs.values():
            job.losses += 1
            if job.losses == _LOSSES:
                raise RouteError(f"{_LOSSES} Ray actors ended, one after another, while they ran {job.key}")
        waiting.extendleft(reversed(engine.jobs.values()))
        engine.jobs.clear()
        engine.state = "lost"
        engine.call = engine.actor.start.remote()

    def _give_up(self, engine: _Engine, error: Exception) -> None:
        self._engines.remove(engine)
        cause = str(error).strip().splitlines()[-1]
        if not self._engines:
            raise RouteError(f"no Ray actor is left; the last one did not start: {cause}") from error
        logger.warning("Ray actor %d did not start, the others go on: %s", engine.number, cause)


@contextmanager
def ray_engines(address: str, open_bench: OpenBench, *, size: int, most: int) -> Iterator[RayEngines]:
    """Engines on a Ray cluster, one on every `size` GPUs of a node, or cores where the cluster has no GPU; ended with the context.

    Args:
        address: `host:port` of the cluster, or `auto` for that of `ray start` on this machine; empty: what `RAY_ADDRESS` says, else
            a new cluster of this machine alone.
        open_bench: opens an engine where the actor is.
        size: GPUs or cores of one engine.
        most: engines that there is work for.

    Raises:
        RouteError: no `ray` library, no cluster there, or one without room for an engine.

    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise RouteError("--ray needs the 'ray' library; install vllm-unsafe-routes[ray]") from None
    was_open = ray.is_initialized()
    try:
        if not was_open:
            ray.init(address=address or os.environ.get("RAY_ADDRESS") or "local", logging_level=logging.WARNING)
    except Exception as error:
        raise RouteError(f"--ray {address}: no Ray cluster: {type(error).__name__}: {error}") from error
    try:
        yield RayEngines(engine_actors(open_bench, size, most))
    finally:
        if not was_open:
            ray.shutdown()


def engine_actors(open_bench: OpenBench, size: int, most: int) -> list[Any]:
    """Ray's handles of up to `most` actors, on the cluster that this process is connected to; as `ray_engines`."""
    import ray

    nodes_of: Any = ray.nodes
    nodes = [node["Resources"] for node in nodes_of() if node["Alive"]]
    unit = "GPU" if any(node.get("GPU") for node in nodes) else "CPU"
    room = sum(int(node.get(unit, 0)) // size for node in nodes)
    if not room:
        raise RouteError(f"no node of the Ray cluster has the {size} {unit}s of one engine")
    # `start` waits for an actor that is being started again; `work` must not be run twice.
    method: Any = ray.method
    start = method(max_task_retries=-1)(RouteEngine.start)
    actor_class: Any = type(RouteEngine.__name__, (RouteEngine,), {"start": start})
    asked: dict[str, Any] = {"num_cpus": 1, "num_gpus": size} if unit == "GPU" else {"num_cpus": size}
    remote = ray.remote(**asked, max_restarts=_RESTARTS)(actor_class)
    # No keys: vLLM has them in variables of such names.
    environment = {name: value for name, value in os.environ.items() if name.startswith("VLLM_") and "KEY" not in name}
    return [remote.remote(open_bench, environment) for _ in range(min(room, max(most, 1)))]
