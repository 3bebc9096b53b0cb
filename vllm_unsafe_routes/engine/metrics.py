"""Prometheus metrics of route control, in vLLM's own `/metrics`; and how a front end learns of a policy that another swapped in.

Workers hang what they counted on the outputs of their steps; the engine core keeps the latest; a task of each API server asks the
engine core once a second, in a utility call, which is answered between two steps. Nothing in a step waits for a metric.
Of several API servers only the first exports what the engine counted; each exports its own requests.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from prometheus_client import Counter, Gauge
from vllm.v1.engine.exceptions import EngineDeadError

from ..errors import REASONS
from ..policy import POLICY_MODES, ActivePolicy
from .data_parallel import status_of_all, usage_of_all
from .frontend import PlanGuard, plan_guard
from .log import logger_of
from .usage import POLL

logger = logger_of(__name__)

POLL_SECONDS = 1.0
# Expert usage is many numbers.
USAGE_POLL_SECONDS = 5.0
# vLLM drops collectors with this prefix when a new engine is made in the same process, so that ours are made anew as well.
_PREFIX = "vllm:unsafe_routes_"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: as `/metrics` shows it.
        kind: `Counter` or `Gauge`.
        labels: beside `model_name`.
        help: what it means.

    """

    name: str
    kind: type[Counter] | type[Gauge]
    labels: tuple[str, ...]
    help: str

    def make(self) -> Any:
        """Register it."""
        labels = ("model_name", *self.labels)
        if self.kind is Gauge:
            return Gauge(self.name, self.help, labels, multiprocess_mode="mostrecent")
        return Counter(self.name, self.help, labels)


POLICY = Metric(_PREFIX + "policy_info", Gauge, ("digest", "mode"), "1 for the active route policy, 0 for earlier ones.")
TOKENS = Metric(_PREFIX + "tokens_total", Counter, ("mode",), "Tokens computed under a route policy.")
DISPLACED = Metric(
    _PREFIX + "displaced_total",
    Counter,
    ("mode", "layer"),
    "Experts that the model's own gating picked and the policy bans, of tokens that no plan forces.",
)
MISSED = Metric(
    _PREFIX + "router_misses_total",
    Counter,
    ("layer",),
    "Forward passes that did not ask the router of a MoE layer that is under control. Should be 0.",
)
NUM_NAN = Metric(_PREFIX + "nan_tokens_total", Counter, ("layer",), "Tokens whose router logits held a NaN. Should be 0.")
ACCEPTED = Metric(_PREFIX + "plans_accepted_total", Counter, (), "Requests with a route plan that were accepted.")
REFUSED = Metric(_PREFIX + "plans_refused_total", Counter, ("reason",), "Requests whose route plan was refused.")
SWAPS = Metric(_PREFIX + "policy_swaps_total", Counter, (), "Route policies that were put in force without a restart.")
# Part of the route table -> how much of it is in use, and how much there is.
TABLE = {
    part: (Metric(f"{_PREFIX}table_{part}_in_use", Gauge, (), used), Metric(f"{_PREFIX}table_{part}", Gauge, (), there_are))
    for part, used, there_are in (
        ("rows", "Rows of the route table that hold a directive.", "Rows that the route table has."),
        ("cells", "Row indices of the route table that plans hold.", "Row indices that the route table has."),
        ("slots", "Requests with a plan that have a place in the route table.", "Places that the route table has."),
    )
}
HELD = Metric(_PREFIX + "held_requests", Gauge, (), "Requests that wait for room in the route table.")
USED = Metric(
    _PREFIX + "expert_tokens_total",
    Counter,
    ("layer", "expert", "request_label"),
    "Tokens routed to an expert, with --route-usage.",
)
SCORED = Metric(_PREFIX + "scored_prompts_total", Counter, (), "Prompts that the route monitor scored.")
FLAGGED = Metric(
    _PREFIX + "flagged_prompts_total", Counter, (), "Prompts that the route monitor flagged; they were served as others."
)
_TABLE = itertools.chain(*TABLE.values())
METRICS = (POLICY, TOKENS, DISPLACED, MISSED, NUM_NAN, ACCEPTED, REFUSED, SWAPS, *_TABLE, HELD, USED, SCORED, FLAGGED)
# A plan that the engine accepted and ended later, because a policy that was swapped in does not permit it.
_SWAPPED_OUT = "swapped_out"


class Exporter:
    """Turns states into increments of Prometheus metrics.

    Args:
        model_name: label of all of them.
        layers: decoder layer index of each MoE layer.

    """

    def __init__(self, model_name: str, layers: tuple[int, ...]) -> None:
        self.model_name = model_name
        self.layers = layers
        self._made = {metric: metric.make() for metric in METRICS}
        self._last: dict[tuple[Any, ...], int] = {}
        self._policies: set[tuple[str, str]] = set()
        self._used: np.ndarray | None = None
        # A counter that has not counted yet still shows its labels.
        for reason in (*REASONS, _SWAPPED_OUT):
            self._count(REFUSED, 0, reason)
        self._count(ACCEPTED, 0)

    def _of(self, metric: Metric, *labels: object) -> Any:
        return self._made[metric].labels(self.model_name, *map(str, labels))

    def _count(self, metric: Metric, value: int, *labels: object) -> None:
        key = (metric, *labels)
        self._of(metric, *labels).inc(value - self._last.get(key, 0))
        self._last[key] = value

    def export_front_end(self, guard: PlanGuard) -> None:
        """What one API server decided."""
        self._count(ACCEPTED, guard.num_accepted)
        for reason in REASONS:
            self._count(REFUSED, guard.refused[reason], reason)

    def export_engine(self, status: Mapping[str, Any]) -> None:
        """What the engine core said of itself (`swap.route_status`)."""
        active = ActivePolicy.from_dict(status["active"])
        if active.digest is not None:
            self._policies.add((active.digest, active.mode))
        for digest, mode in self._policies:
            self._of(POLICY, digest, mode).set((digest, mode) == (active.digest, active.mode))
        self._count(REFUSED, status["refused"], _SWAPPED_OUT)
        self._count(SWAPS, status["generation"])
        self._count(SCORED, status["scored_prompts"])
        self._count(FLAGGED, status["flagged_prompts"])
        for part, metrics in TABLE.items():
            for metric, value in zip(metrics, status["table"][part], strict=True):
                self._of(metric).set(value)
        self._of(HELD).set(status["held_requests"])
        counts = status["counts"]
        if counts is None:
            return
        for metric, key in ((MISSED, "missed"), (NUM_NAN, "num_nan")):
            for layer, value in zip(self.layers, counts[key], strict=True):
                self._count(metric, value, layer)
        for mode in POLICY_MODES:
            if not counts["tokens"][mode]:
                continue
            self._count(TOKENS, counts["tokens"][mode], mode)
            for layer, value in zip(self.layers, counts["displaced"][mode], strict=True):
                self._count(DISPLACED, value, mode, layer)

    def export_usage(self, usage: Mapping[str, Any]) -> None:
        """How often experts were picked (`usage.core_usage`); only what has changed costs time."""
        if usage["counts"] is None:
            return
        counts = np.array(usage["counts"])
        changed = counts > 0 if self._used is None else counts > self._used
        for label, slot, expert in np.argwhere(changed).tolist():
            name = usage["labels"][label - 1] if label else ""
            self._count(USED, int(counts[label, slot, expert]), self.layers[slot], expert, name)
        self._used = counts


class RouteMonitor:
    """The task of one API server that keeps its metrics and its policy up to date.

    Args:
        llm: vLLM's `AsyncLLM`, in whose event loop this is called.

    """

    def __init__(self, llm: Any) -> None:
        self._llm = weakref.ref(llm)
        self._guard = plan_guard(llm.input_processor)
        self._exporter: Exporter | None = None
        self._generation = 0
        self._usage_due = 0.0
        if llm.log_stats:
            name = llm.vllm_config.model_config.served_model_name
            self._exporter = Exporter(name if isinstance(name, str) else name[0], self._guard.shape.moe_layers)
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while True:
            llm = self._llm()
            if llm is None or llm.errored:
                return
            try:
                await self.refresh()
            except EngineDeadError:
                return
            except Exception:
                logger.exception("Route metrics could not be read")
            del llm
            await asyncio.sleep(POLL_SECONDS)

    async def refresh(self) -> Mapping[str, Any]:
        """Ask the engine core now; returns `swap.route_status`."""
        llm = self._llm()
        assert llm is not None
        status: Mapping[str, Any] = await status_of_all(llm.engine_core)
        if status["generation"] != self._generation:
            self._generation = status["generation"]
            self._guard.use(ActivePolicy.from_dict(status["active"]))
        if self._exporter is not None:
            try:
                await self._export(self._exporter, llm.engine_core, status)
            except Exception:  # whoever swapped a policy must hear that it is in force
                logger.exception("Route metrics could not be exported")
        return status

    async def _export(self, exporter: Exporter, client: Any, status: Mapping[str, Any]) -> None:
        exporter.export_front_end(self._guard)
        if client.client_index != 0:
            return
        exporter.export_engine(status)
        config, now = self._guard.config, time.monotonic()
        if config is not None and config.usage is not None and now >= self._usage_due:
            self._usage_due = now + USAGE_POLL_SECONDS
            exporter.export_usage(await usage_of_all(client, POLL))
