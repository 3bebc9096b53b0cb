"""The adaptive strategy: F-SOUR's goal with far fewer computed tokens.

F-SOUR walks cell by cell, (position, layer), and pays for every cell whether it matters or not. This strategy

1. starts from routes that worked on other prompts (`Library`), if one of them helps;
2. then changes a whole span of positions at once, wide spans first, because a mask on many tokens gains most for one
   candidate; the span halves when a round brings nothing;
3. draws the layers in proportion to what changing them has gained so far on this prompt, and experts by how candidates with
   them have done;
4. tries the round's improving changes together, since changes of different layers often add up;
5. evaluates a growing number of candidates a round while nothing improves, and gives up on a prompt after `patience` rounds
   at the narrowest span.

Directives still act on prompt positions only, and every candidate is a route that the policy allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from ..cells import CellScores
from ..errors import RouteError
from ..plan import RoutePlan
from .attempt import Attempt, Route
from .backend import Search
from .masks import Experts
from .rosais import Prompt


@dataclass(frozen=True, slots=True)
class AdaptiveSettings:
    """Settings of the adaptive strategy.

    Attributes:
        first_batch: candidates in a round after a gain.
        growth: factor on the number of candidates after a round without gain.
        max_batch: most candidates in a round.
        patience: rounds without gain at the narrowest span before the attempt ends.
        max_candidates: candidates of one attempt.
        sharpness: weight of an expert's record, in nats of mean gain, when experts are drawn; 0 draws evenly.
        library_tries: library entries tried at the start.

    """

    first_batch: int = 8
    growth: float = 1.5
    max_batch: int = 32
    patience: int = 3
    max_candidates: int = 600
    sharpness: float = 1.0
    library_tries: int = 4

    def __post_init__(self) -> None:
        for name in ("first_batch", "max_batch", "patience", "max_candidates"):
            if getattr(self, name) < 1:
                raise RouteError(f"adaptive {name} must be at least 1, got {getattr(self, name)}")
        if self.growth < 1:
            raise RouteError(f"adaptive growth must be at least 1, got {self.growth}")


@dataclass(frozen=True, slots=True)
class Move:
    """One change: these experts, at this layer, for a span of the prompt.

    Attributes:
        layer: decoder layer.
        start: first position as a fraction of the prompt's length.
        end: end of the span (exclusive), as a fraction.
        experts: the experts.

    """

    layer: int
    start: float
    end: float
    experts: tuple[int, ...]

    def positions(self, num_tokens: int) -> range:
        """The positions of the span in a prompt of `num_tokens`; at least one."""
        first = min(round(self.start * num_tokens), num_tokens - 1)
        return range(first, max(first + 1, round(self.end * num_tokens)))


@dataclass(frozen=True, slots=True)
class Library:
    """Moves that worked on other prompts, most useful entry first.

    Attributes:
        entries: each the moves of one successful attempt, in order.

    """

    entries: tuple[tuple[Move, ...], ...] = ()

    @classmethod
    def from_routes(cls, attempts: Sequence[tuple[int, Sequence[Route]]], limit: int = 16) -> Library:
        """Collect (prompt length, accepted routes) of successful attempts; the shortest lists of moves come first."""
        entries = {moves_of(length, routes) for length, routes in attempts if routes}
        return cls(tuple(sorted(entries, key=lambda moves: (len(moves), repr(moves)))[:limit]))


def moves_of(num_tokens: int, routes: Sequence[Route]) -> tuple[Move, ...]:
    """Accepted routes as moves: neighbouring positions with the same experts at a layer become one span."""
    final = {(route.layer, route.position): route.experts for route in routes}
    moves = []
    for layer in sorted({layer for layer, _ in final}):
        start = None
        for position in range(num_tokens + 1):
            here, before = final.get((layer, position)), final.get((layer, position - 1))
            if here == before:
                continue
            if before is not None and start is not None:
                moves.append(Move(layer, start / num_tokens, position / num_tokens, before))
            start = position
    return tuple(moves)


class _State:
    """Directives by (layer, position)."""

    def __init__(self, num_tokens: int, weights: str, cells: dict[tuple[int, int], tuple[int, ...]] | None = None) -> None:
        self.num_tokens, self.weights = num_tokens, weights
        self.cells = dict(cells or {})

    def with_moves(self, moves: Sequence[Move]) -> _State:
        made = _State(self.num_tokens, self.weights, self.cells)
        for move in moves:
            for position in move.positions(self.num_tokens):
                made.cells[move.layer, position] = move.experts
        return made

    def text(self) -> str:
        grouped: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for (layer, position), experts in sorted(self.cells.items()):
            grouped.setdefault((layer, experts), []).append(position)
        plan = RoutePlan(weights=self.weights)
        for (layer, experts), positions in grouped.items():
            plan.force(layer, positions, experts)
        return plan.to_string()


class _Preferences:
    """What has been learnt about layers and experts on this prompt."""

    def __init__(self, experts: Experts, sharpness: float) -> None:
        self.experts, self.sharpness = experts, sharpness
        self.layers = list(experts.searchable)
        self._gain = dict.fromkeys(self.layers, 0.0)
        self._tries = dict.fromkeys(self.layers, 0)
        num_experts = experts.shape.num_experts
        self._total = {layer: np.zeros(num_experts) for layer in self.layers}
        self._count = {layer: np.zeros(num_experts) for layer in self.layers}

    def draw_layer(self, rng: np.random.Generator) -> int:
        """Layers in proportion to one plus their mean positive gain; each is tried before any is tried often."""
        weight = np.array([1.0 + 4.0 * self._gain[layer] / max(self._tries[layer], 1) for layer in self.layers])
        return self.layers[int(rng.choice(len(self.layers), p=weight / weight.sum()))]

    def draw_experts(self, rng: np.random.Generator, layer: int) -> tuple[int, ...]:
        """Gumbel top-k over the experts' mean gains."""
        kept, free = self.experts.protected[layer], np.array(self.experts.free[layer])
        mean = self._total[layer][free] / np.maximum(self._count[layer][free], 1)
        noisy = self.sharpness * mean + rng.gumbel(size=len(free))
        chosen = free[np.argsort(-noisy, kind="stable")[: self.experts.shape.top_k - len(kept)]].tolist()
        return tuple(sorted([*kept, *chosen]))

    def learn(self, moves: Sequence[Move], gain: float) -> None:
        for move in moves:
            self._tries[move.layer] += 1
            self._gain[move.layer] += max(gain, 0.0)
            ids = list(move.experts)
            self._total[move.layer][ids] += gain
            self._count[move.layer][ids] += 1


class _AttemptSearch:
    """One attempt: the directives so far, what has been learnt, and the moves that are tried next.

    Args: as `adaptive_search`.

    """

    def __init__(self, experts: Experts, prompt: Prompt, settings: Any, attempt: Attempt, rng: np.random.Generator) -> None:
        self.experts, self.prompt, self.attempt, self.rng = experts, prompt, attempt, rng
        self.own: AdaptiveSettings = settings.adaptive
        self.tau, self.min_gain = log(settings.tau), settings.min_gain
        self.preferences = _Preferences(experts, self.own.sharpness)
        self.state = _State(len(prompt.token_ids), settings.weights)

    def score(self, candidates: Sequence[Sequence[Move]]) -> Search[list[float]]:
        """Log-probability of the target with each candidate's moves on top of the state."""
        num_tokens = len(self.prompt.token_ids)
        moves = [
            [(move.layer, span.start, span.stop, move.experts) for move in one for span in [move.positions(num_tokens)]]
            for one in candidates
        ]
        scores: CellScores
        (scores,) = yield [self.prompt.cells(self.state.text(), moves)]
        self.attempt.count(scores)
        self.attempt.needed += len(candidates)
        return [float(value) for value in scores.values]

    def keep(self, moves: Sequence[Move], value: float) -> None:
        """Make moves part of the state."""
        gain = value - self.attempt.best
        self.state = self.state.with_moves(moves)
        # The last word on a cell counts; the gain belongs to the change as a whole.
        routes = [Route(layer, position, chosen, gain) for (layer, position), chosen in sorted(self.state.cells.items())]
        self.attempt.routes.clear()
        self.attempt.accept(routes, value)

    def start_from(self, library: Library) -> Search[None]:
        """Try what worked on other prompts."""
        entries = [usable for entry in library.entries if (usable := _allowed(entry, self.experts))][: self.own.library_tries]
        if not entries:
            return
        values = yield from self.score(entries)
        for entry, value in zip(entries, values, strict=True):
            self.preferences.learn(entry, (value - self.attempt.best) / len(entry))
        best = int(np.argmax(values))
        if values[best] > self.attempt.best + self.min_gain:
            self.keep(entries[best], values[best])

    def narrow_down(self) -> Search[None]:
        """Rounds of single moves, on ever narrower spans while none helps, until tau or patience is reached."""
        own, attempt = self.own, self.attempt
        width, batch, idle = 1.0, float(own.first_batch), 0
        narrowest = 1.0 / len(self.prompt.token_ids)
        while attempt.best < self.tau and attempt.candidates < own.max_candidates:
            moves = [self.draw(width) for _ in range(min(int(batch), own.max_batch))]
            if (yield from self.improve(moves)):
                idle, batch = 0, float(own.first_batch)
                continue
            idle += 1
            batch *= own.growth
            if width <= narrowest and idle >= own.patience:
                return
            width = max(narrowest, width / 2)

    def draw(self, width: float) -> Move:
        """A random move on a span of this width."""
        layer = self.preferences.draw_layer(self.rng)
        start = 0.0 if width >= 1 else float(self.rng.uniform(0, 1 - width))
        end = min(1.0, start + width)
        if layer == self.experts.shape.num_hidden_layers - 1:
            num_tokens = len(self.prompt.token_ids)
            start, end = (num_tokens - 1) / num_tokens, 1.0  # elsewhere it cannot change the answer
        return Move(layer, start, end, self.preferences.draw_experts(self.rng, layer))

    def improve(self, moves: Sequence[Move]) -> Search[bool]:
        """Score moves one by one, and the improving ones together; keep the best. Whether there was a gain."""
        values = yield from self.score([[move] for move in moves])
        gains = [value - self.attempt.best for value in values]
        for move, gain in zip(moves, gains, strict=True):
            self.preferences.learn([move], gain)
        order = sorted(range(len(gains)), key=lambda at: (-gains[at], at))
        improving = [at for at in order if gains[at] > self.min_gain]
        if not improving:
            return False
        chosen, value = [moves[improving[0]]], values[improving[0]]
        # The best change of each layer, added one by one: 2, 3, ... of them together.
        best_of_layer = list({moves[at].layer: moves[at] for at in reversed(improving)}.values())[::-1]
        if value < self.tau and len(best_of_layer) > 1:
            together = [best_of_layer[:count] for count in range(2, len(best_of_layer) + 1)]
            together_values = yield from self.score(together)
            best = int(np.argmax(together_values))
            if together_values[best] > value:
                chosen, value = together[best], together_values[best]
        self.keep(chosen, value)
        return True


def adaptive_search(
    experts: Experts, prompt: Prompt, settings: Any, attempt: Attempt, rng: np.random.Generator, library: Library | None
) -> Search[None]:
    """Search one attempt; results go into `attempt`.

    Args:
        experts: what candidates may use.
        prompt: the prompt.
        settings: `FsourSettings`.
        attempt: its `clean` and `best` are set.
        rng: the attempt's own draws.
        library: where to start from, or None.

    """
    search = _AttemptSearch(experts, prompt, settings, attempt, rng)
    if library is not None:
        yield from search.start_from(library)
    yield from search.narrow_down()


def _allowed(entry: Sequence[Move], experts: Experts) -> tuple[Move, ...]:
    """The moves of a library entry that the policy lets a request make."""
    usable = []
    for move in entry:
        if move.layer not in experts.searchable:
            continue
        kept = experts.protected[move.layer]
        if set(kept) <= set(move.experts) and set(move.experts) <= set(experts.free[move.layer]) | set(kept):
            usable.append(move)
    return tuple(usable)
