"""Receipts in the engine core: what the workers say of each request goes to the front end with the request's outputs, bit by bit.

The front end may end a request without asking the core (stop strings, aborts), so it puts the receipt together (`assembly.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..policy import ActivePolicy
from ..receipt import RECEIPT_KEY
from .cache import RouteContext
from .progress import RoutesSet, StepProgress
from .prompt_monitor import Piece, PromptScores


class _Open:
    """What the front end has not heard yet of a request that is under way.

    Args:
        context: of a request with a plan, captured routes or scores; None for others, whose receipt speaks of the policy only.

    Attributes:
        has_news: `news` would say something; in decoding it seldom does.
        cached: tokens that came from the prefix cache.

    """

    __slots__ = (
        "cached",
        "chunks",
        "context",
        "earlier",
        "has_news",
        "is_new",
        "logits",
        "monitor",
        "routes",
        "scores",
        "scores_are_new",
    )

    def __init__(self, context: RouteContext | None) -> None:
        self.monitor: dict[str, Any] | None = None
        self.start(context, ())

    def start(self, context: RouteContext | None, earlier: tuple[str | None, ...]) -> None:
        """Know nothing yet of what is set, as for a new request; also after a swap, when all of it is computed again."""
        self.context = context
        self.earlier = earlier
        self.is_new = self.has_news = True
        self.cached = 0
        self.routes: RoutesSet | None = None
        self.chunks: list[tuple[int, Any, Any]] = []
        self.logits: list[tuple[int, Any]] = []
        self.scores: Any = None
        self.scores_are_new = False
        extras = context.extras if context is not None else None
        if extras is not None and extras.score is not None:
            self.scores = np.full(extras.score.token_ids.shape, np.nan, np.float32)
            self.scores_are_new = True

    def monitored(self, said: dict[str, Any]) -> None:
        """Take the score of its prompt."""
        self.monitor, self.has_news = said, True

    def advance(self, step: StepProgress) -> None:
        """Take what a worker says of a step."""
        self.has_news = True
        self.routes = step.routes or self.routes
        if step.route_ids is not None and step.route_weights is not None:
            known = max(0, self._routes_start() - step.chunk_start)
            if known < len(step.route_ids):
                self.chunks.append((step.chunk_start + known, step.route_ids[known:], step.route_weights[known:]))
        if step.router_logits is not None:
            self.logits.append((step.logits_start, step.router_logits))
        if step.scores is not None:
            self.scores[step.score_start : step.score_start + len(step.scores)] = step.scores
            self.scores_are_new = True

    def _routes_start(self) -> int:
        extras = self.context.extras if self.context is not None else None
        return 0 if extras is None else extras.routes_start

    def news(self, active: ActivePolicy) -> dict[str, Any]:
        """Fields of the receipt that changed since the last call, as `assembly.py` reads them."""
        self.has_news = False
        news: dict[str, Any] = {}
        if self.is_new:
            self.is_new = False
            plan = self.context.plan if self.context is not None else None
            news = {"plan": plan.digest if plan else None, "policy": active.digest, "cached_tokens": self.cached}
            news |= {"policy_mode": active.mode if active.policy is not None else None, "earlier_policies": self.earlier}
            news["routes_start"] = self._routes_start()
            extras = self.context.extras if self.context is not None else None
            if extras is not None and extras.logits is not None:
                news["logits_of"] = (extras.logits.layers, extras.logits.start)
        if self.routes is not None:
            news |= {"routes": tuple(self.routes), "cached_tokens": self.routes.start}
            self.routes = None
        if self.chunks:
            news["chunks"] = [(start, *ids.shape, ids.tobytes(), weights.tobytes()) for start, ids, weights in self.chunks]
            self.chunks = []
        if self.monitor is not None:
            news["monitor"], self.monitor = self.monitor, None
        if self.logits:
            news["logits"] = [(start, *values.shape, values.tobytes()) for start, values in self.logits]
            self.logits = []
        if self.scores_are_new:
            self.scores_are_new = False
            news["scores"] = self.scores.tolist()
        return news


class ReceiptBook:
    """The receipts of one scheduler's requests.

    Args:
        scores: of all requests' prompts, where a probe is served.

    """

    def __init__(self, scores: PromptScores | None = None) -> None:
        self._open: dict[str, _Open] = {}
        self.scores = scores

    def __len__(self) -> int:
        """Requests whose receipt is under way."""
        return len(self._open)

    def enter(self, req_id: str, context: RouteContext) -> None:
        """A request with a plan, captured routes or scores enters the scheduler."""
        self._open[req_id] = _Open(context)

    def start_again(self, req_id: str, context: RouteContext) -> None:
        """A policy was swapped in: all of the request is computed again."""
        entry = self._open.setdefault(req_id, _Open(None))
        entry.start(context if context.tracked else None, context.earlier)

    def forget(self, req_ids: Iterable[str] | None) -> None:
        """These (None: all) have ended, and nobody waits for more of their outputs."""
        for req_id in list(self._open) if req_ids is None else req_ids:
            self._open.pop(req_id, None)
        if self.scores is not None:
            self.scores.forget(req_ids)

    def absorb_monitored(self, pieces: Mapping[str, Piece]) -> None:
        """Take what a worker says of the prompts in a step."""
        if self.scores is not None:
            for req_id, said in self.scores.add(pieces).items():
                self._open.setdefault(req_id, _Open(None)).monitored(said)

    def absorb(self, progress: Mapping[str, StepProgress]) -> None:
        """Take what a worker says of a step."""
        for req_id, step in progress.items():
            entry = self._open.get(req_id)
            if entry is not None:
                entry.advance(step)

    def attach(self, outputs: Mapping[int, Any], active: ActivePolicy) -> None:
        """Put what is new into the outputs of requests with a receipt: those with a plan, and under a policy all."""
        has_policy = active.policy is not None
        if not self._open and not has_policy:
            return
        for output in (output for batch in outputs.values() for output in batch.outputs):
            entry = self._open.get(output.request_id)
            if entry is None:
                if not has_policy:
                    continue
                entry = self._open[output.request_id] = _Open(None)
            if output.prefill_stats is not None:
                entry.cached = output.prefill_stats.num_cached_tokens
            if entry.has_news and (news := entry.news(active)):
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), RECEIPT_KEY: news}
            if output.finish_reason is not None:
                del self._open[output.request_id]
