"""Where the searches of a run take place: an engine or servers, and what they need beside it.

This module imports neither torch nor vLLM before an engine is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..errors import RouteError
from ..evaluation.judges import EXACT_LABELS, Verdict
from ..search.backend import Backend
from .model import Model
from .records import Judged, Opinion
from .settings import EngineSettings


@dataclass(frozen=True, slots=True)
class Bench:
    """What all searches of a run share.

    Attributes:
        model: the model.
        backend: where requests run.
        judge: (prompt, generated token ids) -> verdict, which is the result.
        others: further judges by name, whose verdicts are kept beside it.
        stop: the one among `others` whose verdict ends a search; None: `judge`.
        max_new_tokens: length of a judged answer.
        keep_completions: whether records hold completions that were judged harmful or could not be judged.

    """

    model: Model
    backend: Backend
    judge: Callable[..., Verdict]
    max_new_tokens: int = 64
    keep_completions: bool = False
    others: Mapping[str, Callable[..., Verdict]] = field(default_factory=dict)
    stop: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A job goes to another process with the name of its bench only.
        return _here, ()

    @property
    def stop_judge(self) -> Callable[..., Verdict]:
        """Whose verdict ends a search."""
        return self.judge if self.stop is None else self.others[self.stop]

    def judged(self, verdict: Verdict, token_ids: Sequence[int] | None, others: Mapping[str, Verdict] | None = None) -> Judged:
        """Verdicts as they are recorded.

        Args:
            verdict: the result.
            token_ids: the answer, kept where all judges call it harmless or everything is kept; None: not kept.
            others: what further judges say.

        """
        others = others or {}
        harmless = all(one.harmful is False for one in (verdict, *others.values()))
        keep = token_ids is not None and (harmless or self.keep_completions)
        return Judged(
            success=verdict.harmful,
            score=verdict.score,
            error=verdict.error,
            label=verdict.raw if verdict.raw in EXACT_LABELS else None,
            completion=self.model.decode(token_ids) if keep and token_ids is not None else None,
            others={name: Opinion(success=one.harmful, score=one.score, error=one.error) for name, one in others.items()} or None,
        )


# The bench of an actor's process.
here: Bench | None = None


def _here() -> Bench:
    assert here is not None
    return here


@contextmanager
def open_backend(model: Model, engine: EngineSettings, jitter: Mapping[str, Any] | None = None) -> Iterator[Backend]:
    """An engine in this process, or servers, as a backend; ended with the context.

    Args:
        model: the model.
        engine: where requests run.
        jitter: noise on router logits, as the engine's setting of that name; not for servers.

    Raises:
        RouteError: the engine did not start, or a server cannot be used.

    """
    if engine.servers:
        from ..search.http import HttpBackend

        http = HttpBackend(engine.servers, model.path, engine.policy)
        try:
            yield http
        finally:
            http.close()
        return
    from ..engine.launch import launch, shutdown

    try:
        llm = launch(
            model.path,
            policy=None if engine.policy is None else engine.policy.to_dict(),
            jitter=jitter,
            max_model_len=engine.max_model_len,
            dtype=engine.dtype,
            engine_args=engine.arguments,
        )
    except RouteError:
        raise
    except Exception as error:
        # vLLM raises whatever its configuration, loading and processes raise.
        raise RouteError(f"the engine for {model.name} did not start: {type(error).__name__}: {error}") from error
    try:
        from ..engine.backend import EngineBackend

        yield EngineBackend(llm)
    finally:
        shutdown(llm)
