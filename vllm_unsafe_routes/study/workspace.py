"""What a study's settings stand for: model, prompts, judge, and the place where its searches run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

from ..errors import RouteError
from ..evaluation.datasets import PromptRecord, prompts_digest
from ..policy import RoutePolicy
from ..search.backend import Backend
from .bench import Bench, open_backend
from .campaign import Campaign
from .cluster import ray_engines
from .jobs import VOLATILE
from .judges import Panel
from .model import LAB, NO_WRAPPER, Item, Model, Wrapper
from .prompts import read_prompts
from .settings import EngineSettings, Setup

# Settings that came after there were runs, with what runs that do not name them were made with.
LATER_SETTINGS = {
    "controls": 0,
    "weights": "masked",
    "masks.weights": "masked",
    "bias": [],
    "greedy_again": 0,
    "answered_first": False,
    "plain_answer_first": False,
}


class Workspace:
    """A study's model, prompts and judge. Everything that can be wrong with its settings is found here, before an engine starts.

    Args:
        setup: the settings.
        backend: where requests run, already open and never closed here; None: opened as the settings say.

    Raises:
        RouteError: whatever does not exist, does not fit the model, or is too long for it.

    """

    def __init__(self, setup: Setup, backend: Backend | None = None) -> None:
        self.setup = setup
        self.model = Model(setup.model)
        if setup.engine.policy is not None:
            setup.engine.policy.validate(self.model.shape)
        self.wrapper = Wrapper("system", setup.system) if setup.system else NO_WRAPPER
        self.records: list[PromptRecord] = read_prompts(setup.data, setup.limit, categories=setup.categories, columns=setup.columns)
        self.items = self.render(self.records)
        self.judges = self._panel()
        self._backend = backend

    def __getstate__(self) -> dict[str, Any]:
        # Judges hold connections and keys: they are made anew in an actor.
        return {name: value for name, value in vars(self).items() if name != "judges"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self.judges = self._panel()

    def _panel(self) -> Panel:
        return Panel.of(self.setup.judging, LAB if self.setup.data.startswith("lab:") else "refusal")

    def render(self, records: Sequence[PromptRecord], wrapper: Wrapper | None = None) -> list[Item]:
        """Prompts as items; none may be longer than the model's context."""
        items = [self.model.item(record, wrapper or self.wrapper) for record in records]
        limit = self.setup.engine.max_model_len or self.model.config.get("max_position_embeddings")
        for item in items:
            needed = len(item.prompt.token_ids) + max(len(item.prompt.target), 1)
            if limit is not None and needed > limit:
                raise RouteError(
                    f"prompt {item.prompt.id}: {len(item.prompt.token_ids)} tokens and a target of {len(item.prompt.target)} "
                    f"do not fit the context of {limit}"
                )
        return items

    def campaign(self, command: str, own: Mapping[str, Any]) -> Campaign:
        """The run folder; `own` is what decides the results beside what all studies share."""
        setup = self.setup
        settings: dict[str, Any] = {
            "command": command,
            "model": setup.model,
            "model_identity": self.model.identity,
            "fingerprint": self.model.shape.fingerprint,
            "data": setup.data,
            "prompts": prompts_digest(self.records),
            "num_prompts": len(self.records),
            "policy": setup.engine.policy.digest if setup.engine.policy else None,
            "system": self.wrapper.system,
            **self.judges.settings(),
            "dtype": setup.engine.dtype,
            "seeds": list(setup.seeds),
        }
        return Campaign(setup.out, {**settings, **own}, later=LATER_SETTINGS, volatile=VOLATILE)

    @contextmanager
    def bench(self, policy: RoutePolicy | None = None, jitter: Mapping[str, Any] | None = None) -> Iterator[Bench]:
        """An engine (or the servers) with what the searches need beside it.

        Args:
            policy: instead of the settings'.
            jitter: noise on router logits.

        """
        if self._backend is not None:
            yield self._bench(self._backend)
            return
        engine = replace(self.setup.engine, policy=policy or self.setup.engine.policy)
        if engine.ray is None:
            with self._opened(engine, jitter) as bench:
                yield bench
            return
        own = partial(self._opened, replace(engine, ray=None), jitter)
        most = len(self.items) * len(self.setup.seeds)
        with ray_engines(engine.ray, own, size=engine.world_size, most=most) as engines:
            # No search meets it: a job that goes to an actor has the actor's engine.
            yield self._bench(cast(Backend, engines))

    @contextmanager
    def _opened(self, engine: EngineSettings, jitter: Mapping[str, Any] | None) -> Iterator[Bench]:
        with open_backend(self.model, engine, jitter) as backend:
            yield self._bench(backend)

    def _bench(self, backend: Backend) -> Bench:
        items = {item.prompt.id: item for item in self.items}
        judging = self.setup.judging
        judges = self.judges.on(self.model, items)
        return Bench(
            self.model, backend, max_new_tokens=judging.max_new_tokens, keep_completions=judging.keep_completions, **judges
        )
