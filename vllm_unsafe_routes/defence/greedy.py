"""Bans chosen one by one by what they do: greedy addition with the scorer, under a utility budget.

Rules that rank experts by how often they occur, or by what they do alone, say little about what a set of bans does. Here every
addition is measured in the company of those before it: how far it lowers the log-probability of the target on prompts that an
input-only attack has opened, and what it takes from the answers to harmless prompts.

Most candidates gain little more in a later round than in an earlier one, so a round measures again only those whose last known
gain is large enough to win (accelerated greedy, Minoux 1978; the gains are not exactly submodular, so this is a heuristic).

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from ..plan import RoutePlan
from ..search.backend import Backend, Note, Response, Search
from ..search.scorer import joint, target_request, weakest
from ..shape import ModelShape
from ..study.records import Addition
from .policies import Choice

# (layer, expert)
Candidate = tuple[int, int]

# While each token of an answer has at least this probability, greedy decoding gives that answer.
_KEPT_TOKEN = log(0.5)
# Losses below this cost nothing: an answer at 0.9 of its probability is as good as before.
_FREE_LOSS = -log(0.9)


@dataclass(frozen=True, slots=True)
class GreedySettings:
    """Settings of the greedy addition.

    Attributes:
        max_bans: additions at most, all layers together.
        budget: share of harmless answers that must be kept: each token as probable as one half, or as it was without bans.
        utility_weight: nats of attack score that a nat of mean loss on harmless answers must be worth.
        floor: log-probability of a target below which an attacked prompt is closed and gains no more, nats.
        batch: candidates measured at a time.

    """

    max_bans: int = 20
    budget: float = 0.99
    utility_weight: float = 5.0
    floor: float = -3.0
    batch: int = 8


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt whose continuation is scored.

    Attributes:
        prompt: token ids.
        target: token ids of the attack's target, or of the model's own answer.

    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]


def greedy_bans(
    backend: Backend,
    opened: Sequence[Example],
    harmless: Sequence[Example],
    layers: Sequence[int],
    settings: GreedySettings,
    pinned: Collection[tuple[int, int]] = (),
    so_far: Iterable[Addition] = (),
) -> Search[list[Choice]]:
    """Add bans one by one until none helps within the budget; every addition is noted as a record.

    Args:
        backend: where requests run; an engine without a policy.
        opened: attacked prompts that the undefended model complies with, and their affirmative targets.
        harmless: prompts with the undefended model's own answers.
        layers: decoder layers that may be touched.
        settings: settings.
        pinned: (layer, expert) that must stay, such as protected ones.
        so_far: notes of an earlier run with the same arguments; it goes on from there.

    Returns:
        The bans in the order in which they were added; `strength` is the value reached, in nats.

    """
    path = _Path(backend.shape, opened, harmless, layers, settings)
    yield from path.start(pinned)
    for earlier in so_far:
        path.replay(earlier)
    while len(path.added) < settings.max_bans:
        addition = yield from path.next_addition()
        if addition is None:
            break
        yield [Note(addition)]
    return path.added


class _Path:
    """The bans added so far, what they reach, and what is known of the others.

    Args:
        shape: the model.
        opened: see `greedy_bans`, as for the others.
        harmless: see there.
        layers: see there.
        settings: see there.

    """

    def __init__(
        self,
        shape: ModelShape,
        opened: Sequence[Example],
        harmless: Sequence[Example],
        layers: Sequence[int],
        settings: GreedySettings,
    ) -> None:
        self.shape, self.settings = shape, settings
        self.examples, self.num_opened = [*opened, *harmless], len(opened)
        self.bans: dict[int, list[int]] = {layer: [] for layer in layers}
        self.added: list[Choice] = []
        # Of the bans so far, nats.
        self.reached = 0.0
        # Candidate -> the gain that was measured last; inf: not yet, -inf: over the budget.
        self.gains: dict[Candidate, float] = {}
        # Of the harmless answers without bans: log-probability, and least log-probability of a token that still counts as kept.
        self.clean = self.must_keep = np.zeros(0)

    def start(self, pinned: Collection[Candidate]) -> Search[None]:
        """Measure what holds without bans."""
        first: list[Response] = yield [target_request(one.prompt, one.target) for one in self.examples]
        answers = first[self.num_opened :]
        self.clean = np.array([joint(response) for response in answers])
        self.must_keep = np.minimum([weakest(response) for response in answers], _KEPT_TOKEN)
        self.reached = self._value_of(first)[0]
        everything = [(layer, expert) for layer in self.bans for expert in range(self.shape.num_experts)]
        self.gains = {candidate: np.inf for candidate in everything if candidate not in pinned}

    def replay(self, addition: Addition) -> None:
        """Take up an addition of an earlier run."""
        self.gains |= {(layer, expert): -np.inf if gain is None else gain for layer, expert, gain in addition.measured}
        self._add((addition.layer, addition.expert), addition.value)

    def _add(self, candidate: Candidate, reached: float) -> None:
        layer, expert = candidate
        self.gains.pop(candidate)
        self.bans[layer].append(expert)
        self.added.append(Choice(layer, expert, reached))
        self.reached = reached

    def next_addition(self) -> Search[Addition | None]:
        """The candidate that gains most; None where none gains anything within the budget."""
        room = {layer for layer, experts in self.bans.items() if self.shape.num_experts - len(experts) > self.shape.top_k}
        open_to = [candidate for candidate in self.gains if candidate[0] in room]
        measured: dict[Candidate, float] = {}
        while True:
            # Stale gains compete with measured ones; ties by layer and expert.
            order = sorted(open_to, key=lambda one: (-measured.get(one, self.gains[one]), one))
            if not order or order[0] in measured:
                break
            chunk = [one for one in order if one not in measured][: self.settings.batch]
            for candidate, (value, kept) in zip(chunk, (yield from self._measure(chunk)), strict=True):
                measured[candidate] = round(value - self.reached, 6) if kept >= self.settings.budget else -np.inf
        self.gains |= measured
        if not order or not measured[order[0]] > 0:
            return None
        best = order[0]
        self._add(best, round(self.reached + measured[best], 6))
        return Addition(
            number=len(self.added) - 1,
            share=self.settings.budget,
            layer=best[0],
            expert=best[1],
            value=self.reached,
            measured=tuple((*one, None if gain == -np.inf else gain) for one, gain in sorted(measured.items())),
        )

    def _measure(self, candidates: Sequence[Candidate]) -> Search[list[tuple[float, float]]]:
        """Value and share kept of the bans so far with each candidate."""
        plans = [self._plan_with(*candidate).to_string() for candidate in candidates]
        requests = [target_request(one.prompt, one.target, plan) for plan in plans for one in self.examples]
        responses: list[Response] = yield requests
        size = len(self.examples)
        return [self._value_of(responses[at : at + size]) for at in range(0, len(responses), size)]

    def _plan_with(self, layer: int, expert: int) -> RoutePlan:
        plan = RoutePlan()
        for other, experts in self.bans.items():
            wanted = [*experts, expert] if other == layer else experts
            if wanted:
                plan.disable(other, "all", sorted(wanted))
        return plan

    def _value_of(self, responses: Sequence[Response]) -> tuple[float, float]:
        """What a set of bans is worth, and the share of harmless answers that it keeps; a response for each example."""
        scores = np.array([joint(response) for response in responses])
        attack = -np.maximum(scores[: self.num_opened], self.settings.floor).mean()
        answers = responses[self.num_opened :]
        if not answers:
            return float(attack), 1.0
        cost = np.maximum(self.clean - scores[self.num_opened :] - _FREE_LOSS, 0.0).mean()
        kept = ([weakest(response) for response in answers] >= self.must_keep).mean()
        return float(attack - self.settings.utility_weight * cost), float(kept)
