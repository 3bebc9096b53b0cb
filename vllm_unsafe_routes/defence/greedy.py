"""Bans and biases chosen one by one by what they do: greedy addition with the scorer, under a utility budget.

Rules that rank experts by how often they occur, or by what they do alone, say little about what a set of bans does. Here every
addition is measured in the company of those before it: how far it lowers the log-probability of the target on prompts that an
input-only attack has opened, and what it takes from the answers to harmless prompts. An addition is a ban, or a step of a bias up
or down (coordinate steps: without gradients, which an engine does not have, MASCing's biases, arXiv 2604.27818, are found so).

Most candidates gain little more in a later round than in an earlier one, so a round measures again only those whose last known
gain is large enough to win (accelerated greedy, Minoux 1978; the gains are not exactly submodular, so this is a heuristic).

Bans are scored as cells: a ban is a move over all tokens that leaves the layer's other experts. Steps of biases go as requests.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import cast

import numpy as np
import numpy.typing as npt

from ..cells import Cells, CellScores, Move
from ..plan import RoutePlan
from ..search.backend import Backend, Note, Response, Search
from ..search.scorer import joint, target_request, weakest
from ..shape import ModelShape
from ..study.records import Addition
from .policies import Candidate, Choice, additions

Floats = npt.NDArray[np.floating]

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
        steps: by how much a logit may be raised or lowered at a time; empty: bans only.
        stage: for the notes, see `Addition`.

    """

    max_bans: int = 20
    budget: float = 0.99
    utility_weight: float = 5.0
    floor: float = -3.0
    batch: int = 8
    steps: tuple[float, ...] = ()
    stage: int = 0


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
    before: Sequence[Choice] = (),
) -> Search[list[Choice]]:
    """Add bans one by one until none helps within the budget; every addition is noted as a record.

    Args:
        backend: where requests run; an engine without a policy.
        opened: attacked prompts that the undefended model complies with, and their affirmative targets.
        harmless: prompts with the undefended model's own answers.
        layers: decoder layers that may be touched.
        settings: settings.
        pinned: (layer, expert) that must stay, such as protected ones; they may be raised only.
        so_far: notes of an earlier run with the same arguments; it goes on from there.
        before: additions to begin with, found on fewer examples.

    Returns:
        The additions in their order; `strength` is the value reached, in nats.

    """
    path = _Path(backend.shape, opened, harmless, layers, settings)
    yield from path.start(pinned, before)
    for earlier in so_far:
        path.replay(earlier)
    while len(path.added) < settings.max_bans:
        addition = yield from path.next_addition()
        if addition is None:
            break
        yield [Note(addition)]
    return path.added


class _Path:
    """What was added so far, what it reaches, and what is known of the others.

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
        self.layers = tuple(layers)
        self.added: list[Choice] = []
        # Of the additions so far, nats.
        self.reached = 0.0
        # Candidate -> the gain that was measured last; inf: not yet, -inf: over the budget.
        self.gains: dict[Candidate, float] = {}
        # Of the harmless answers without bans: log-probability, and least log-probability of a token that still counts as kept.
        self.clean: Floats = np.zeros(0)
        self.must_keep: Floats = np.zeros(0)

    def start(self, pinned: Collection[tuple[int, int]], before: Sequence[Choice]) -> Search[None]:
        """Measure what holds without any, then with these."""
        found: list[CellScores] = yield [Cells.of(one.prompt, one.target, None, [[]]) for one in self.examples]
        scores, least = _read(found)
        self.clean = scores[self.num_opened :, 0]
        self.must_keep = np.minimum(least[self.num_opened :, 0], _KEPT_TOKEN)
        self.reached = self._values_of(scores, least)[0][0]
        kinds = (0.0, *(sign * step for step in self.settings.steps for sign in (1, -1)))
        self.gains = {
            (layer, expert, kind): np.inf
            for layer in self.layers
            for expert in range(self.shape.num_experts)
            for kind in kinds
            if kind > 0 or (layer, expert) not in pinned
        }
        if not before:
            return
        for choice in before[:-1]:
            self._add(choice.candidate, self.reached)
        ((reached, _),) = yield from self._measure([before[-1].candidate])
        self._add(before[-1].candidate, round(reached, 6))

    def replay(self, addition: Addition) -> None:
        """Take up an addition of an earlier run."""
        bans = [(layer, expert, 0.0, gain) for layer, expert, gain in addition.measured]
        for *candidate, gain in (*bans, *addition.measured_steps):
            self.gains[cast(Candidate, tuple(candidate))] = -np.inf if gain is None else gain
        self._add((addition.layer, addition.expert, addition.bias or 0.0), addition.value)

    def _add(self, candidate: Candidate, reached: float) -> None:
        layer, expert, step = candidate
        if not step:  # nothing more can be done to a banned expert
            self.gains = {other: gain for other, gain in self.gains.items() if other[:2] != (layer, expert)}
        self.added.append(Choice.of(candidate, reached))
        self.reached = reached

    def next_addition(self) -> Search[Addition | None]:
        """The candidate that gains most; None where none gains anything within the budget."""
        bans, _ = additions(self.added)
        full = {layer for layer, experts in bans.items() if self.shape.num_experts - len(experts) <= self.shape.top_k}
        open_to = [candidate for candidate in self.gains if candidate[2] or candidate[0] not in full]
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
        found = [(*one, None if gain == -np.inf else gain) for one, gain in sorted(measured.items())]
        self._add(best, round(self.reached + measured[best], 6))
        return Addition(
            number=len(self.added) - 1,
            share=self.settings.budget,
            layer=best[0],
            expert=best[1],
            bias=best[2] or None,
            steps=self.settings.steps,
            stage=self.settings.stage,
            value=self.reached,
            measured=tuple((layer, expert, gain) for layer, expert, step, gain in found if not step),
            measured_steps=tuple(one for one in found if one[2]),
        )

    def _measure(self, candidates: Sequence[Candidate]) -> Search[list[tuple[float, float]]]:
        """Value and share kept of the additions so far with each candidate."""
        bans, biases = additions(self.added)
        size = len(self.examples)
        if biases or any(step for *_, step in candidates):
            # A cell holds no bias.
            plans = [self._plan_with(candidate).to_string() for candidate in candidates]
            responses: list[Response] = yield [
                target_request(one.prompt, one.target, plan) for plan in plans for one in self.examples
            ]
            scores, least = (np.array([read(one) for one in responses]).reshape(-1, size).T for read in (joint, weakest))
            return self._values_of(scores, least)
        # Moves of one question leave equally many experts.
        order = sorted(range(len(candidates)), key=lambda at: len(bans.get(candidates[at][0], ())))
        groups = itertools.groupby((candidates[at] for at in order), key=lambda one: len(bans.get(one[0], ())))
        found: list[CellScores] = yield [
            self._cells(one, bans, group) for _, same in groups for group in [list(same)] for one in self.examples
        ]
        parts = [_read(found[at : at + size]) for at in range(0, len(found), size)]
        scores, least = (np.concatenate(part, axis=1)[:, np.argsort(order)] for part in zip(*parts, strict=True))
        return self._values_of(scores, least)

    def _plan_with(self, candidate: Candidate) -> RoutePlan:
        bans, biases = additions([*self.added, Choice.of(candidate)])
        plan = RoutePlan()
        for at, experts in sorted(bans.items()):
            plan.disable(at, "all", sorted(experts))
        for at, values in sorted(biases.items()):
            plan.bias(at, "all", values)
        return plan

    def _cells(self, example: Example, bans: Mapping[int, Collection[int]], candidates: Sequence[Candidate]) -> Cells:
        """The question for an example's score under the bans so far with one ban more, for each candidate."""
        plan, everything = RoutePlan(), range(self.shape.num_experts)
        for layer, experts in sorted(bans.items()):
            plan.disable(layer, "all", sorted(experts))
        end = len(example.prompt) + len(example.target) - 1
        moves: list[list[Move]] = []
        for layer, expert, _ in candidates:
            gone = {*bans.get(layer, ()), expert}
            moves.append([(layer, 0, end, [one for one in everything if one not in gone])])
        return Cells.of(example.prompt, example.target, plan.to_string() if bans else None, moves, chooses=True)

    def _values_of(self, scores: Floats, least: Floats) -> list[tuple[float, float]]:
        """What each set of additions is worth, and the share of harmless answers that it keeps.

        Args:
            scores: [examples, sets], log-probability of the target.
            least: the same of its least probable token.

        """
        attack = -np.maximum(scores[: self.num_opened], self.settings.floor).mean(0)
        if len(self.examples) == self.num_opened:
            return [(value, 1.0) for value in attack.tolist()]
        cost = np.maximum(self.clean[:, None] - scores[self.num_opened :] - _FREE_LOSS, 0.0).mean(0)
        kept = (least[self.num_opened :] >= self.must_keep[:, None]).mean(0)
        values: list[float] = (attack - self.settings.utility_weight * cost).tolist()
        return list(zip(values, kept.tolist(), strict=True))


def _read(found: Sequence[CellScores]) -> tuple[Floats, Floats]:
    """[examples, candidates] each: log-probability of the target, and that of its least probable token, nats."""
    return np.stack([one.values for one in found]), np.stack([one.log_probs[:, :, 0].min(axis=1) for one in found])
