"""RouteScorer: joint log-probability of a target under many plans, for many prompts, kept in flight together.

The target follows the prompt as if the model had said it; the engine returns the log-probabilities of its tokens only
(`score_tokens` in `extras.py`). Candidates of one prompt share every KV block before their first different directive, so they
are submitted side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..extras import RouteExtras, ScoreSpec
from ..plan import RoutePlan
from .backend import Backend, Request, Response, Search, Stats, run_tasks

Plan = RoutePlan | str | None


def target_request(
    prompt_token_ids: Sequence[int], target_token_ids: Sequence[int], plan: str | None = None, delta: tuple[int, ...] = ()
) -> Request:
    """The request that scores a target: all its tokens but the last follow the prompt.

    Raises:
        RouteError: an empty prompt or target.

    """
    if not len(prompt_token_ids) or not len(target_token_ids):
        raise RouteError("a score needs at least one prompt token and one target token")
    spec = ScoreSpec(len(prompt_token_ids) - 1, np.array(target_token_ids, np.int32)[:, None])
    return Request([*prompt_token_ids, *target_token_ids[:-1]], RouteExtras(plan, delta, score=spec))


def next_token_request(prompt_token_ids: Sequence[int], token_ids: Sequence[int], plan: str | None = None) -> Request:
    """The request that scores several candidates for the first token after the prompt."""
    if not len(prompt_token_ids) or not len(token_ids):
        raise RouteError("a score needs at least one prompt token and one candidate token")
    spec = ScoreSpec(len(prompt_token_ids) - 1, np.array([token_ids], np.int32))
    return Request(list(prompt_token_ids), RouteExtras(plan, score=spec))


def joint(response: Response) -> float:
    """Joint log-probability of a scored target, in nats."""
    assert response.scores is not None
    return float(response.scores[:, 0].sum(dtype=np.float64))


def weakest(response: Response) -> float:
    """Log-probability of a scored target's least probable token, in nats."""
    assert response.scores is not None
    return float(response.scores[:, 0].min())


def check_length(backend: Backend, num_tokens: int, what: str) -> None:
    """Refuse a request that is longer than the model's context."""
    if num_tokens + 1 > backend.max_model_len:
        raise RouteError(f"{what}: {num_tokens} tokens and one to sample do not fit the context of {backend.max_model_len}")


class RouteScorer:
    """Scores plans on an engine.

    Args:
        engine: a `vllm.LLM` made with `additional_config={"unsafe_routes": {"allow_overrides": True}}`, or a list of base URLs of
            servers started with `--enable-route-overrides` (give `model` too), or any `Backend`.
        model: for servers: the folder with the model's config.json.
        batch: plans of one prompt that are handed over at a time.

    Attributes:
        backend: where the requests run.
        stats: totals of everything scored here: requests, tokens, tokens really computed.

    Example:
        >>> scorer = RouteScorer(llm)                                                      # doctest: +SKIP
        >>> scorer.score(prompt_token_ids, target_token_ids, plans).argmax()                # doctest: +SKIP

    """

    def __init__(self, engine: Any, model: str | None = None, batch: int = 256) -> None:
        self.backend = make_backend(engine, model)
        self.stats = Stats()
        self._batch = batch

    def score(
        self, prompt_token_ids: Sequence[int], target_token_ids: Sequence[int], plans: Iterable[Plan]
    ) -> npt.NDArray[np.float64]:
        """Joint log-probability of the target for each plan, float64 [len(plans)], in nats; None is "no plan".

        `plans` may be a generator: a million plans need no more memory than the result and one batch.

        Raises:
            RouteError: a plan is refused, or prompt and target do not fit the model's context.

        """
        return np.fromiter(self.score_many((prompt_token_ids, target_token_ids, plan) for plan in plans), np.float64)

    def score_many(self, items: Iterable[tuple[Sequence[int], Sequence[int], Plan]]) -> Iterator[float]:
        """Scores of (prompt, target, plan) triples, in order, while later ones are still being computed."""
        source = iter(items)
        chunks = enumerate(iter(lambda: list(itertools.islice(source, self._batch)), []))
        waiting: dict[int, list[float]] = {}
        wanted = 0
        tasks = ((at, self._chunk(chunk)) for at, chunk in chunks)
        concurrency = max(2, -(-2 * self.backend.capacity // self._batch))
        for at, scores in run_tasks(self.backend, tasks, concurrency=concurrency, stats=self.stats):
            waiting[at] = scores
            while wanted in waiting:
                yield from waiting.pop(wanted)
                wanted += 1

    def _chunk(self, items: list[tuple[Sequence[int], Sequence[int], Plan]]) -> Search[list[float]]:
        requests = []
        for prompt, target, plan in items:
            check_length(self.backend, len(prompt) + len(target) - 1, "prompt and target")
            requests.append(target_request(prompt, target, plan.to_string() if isinstance(plan, RoutePlan) else plan))
        responses: list[Response] = yield requests
        return [joint(response) for response in responses]


def make_backend(engine: Any, model: str | None = None) -> Backend:
    """The backend of an engine object; see `RouteScorer`."""
    if hasattr(engine, "submit") and hasattr(engine, "poll"):
        backend: Backend = engine
        return backend
    if isinstance(engine, str) or (isinstance(engine, list | tuple) and all(isinstance(url, str) for url in engine)):
        from .http import HttpBackend

        if model is None:
            raise RouteError("a backend of servers needs model: the folder with the model's config.json")
        return HttpBackend([engine] if isinstance(engine, str) else list(engine), model)
    from ..engine.backend import EngineBackend

    return EngineBackend(engine)
