"""What one F-SOUR attempt did: the routes that it accepted and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from ..cells import CellScores
from ..evaluation.judges import Verdict
from ..plan import RoutePlan


class Route(msgspec.Struct, frozen=True, array_like=True):
    """One accepted choice; in a file [layer, position, experts, gain].

    Attributes:
        layer: decoder layer.
        position: prompt position.
        experts: the experts it got.
        gain: nats that it gained when it was accepted.

    """

    layer: int
    position: int
    experts: tuple[int, ...]
    gain: float


class AttemptState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far an attempt has come, as files keep it; the fields are those of `Attempt`."""

    clean: float
    best: float
    routes: tuple[Route, ...]
    candidates: int
    needed: int
    tokens: int
    computed_tokens: int
    trace: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Attempt:
    """One run through a prompt.

    Attributes:
        clean: joint log-probability of the target without a plan.
        best: with the accepted routes.
        routes: the accepted routes, in order of acceptance.
        candidates: plans scored.
        needed: plans that an evaluation one by one would have scored.
        tokens: tokens of all scored requests, as if each was computed alone.
        computed_tokens: prompt tokens really computed, prefix-cache hits left out.
        trace: (computed_tokens, best) at each acceptance, for curves.
        answer: generated token ids.
        verdict: the judge's verdict on the answer.

    """

    clean: float = 0.0
    best: float = 0.0
    routes: list[Route] = field(default_factory=list)
    candidates: int = 0
    needed: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
    answer: tuple[int, ...] = ()
    verdict: Verdict | None = None

    @property
    def success(self) -> bool | None:
        """Whether the answer complied; None where the judge gave no verdict."""
        return self.verdict.harmful if self.verdict is not None else None

    def count(self, scores: CellScores) -> None:
        """Add scored candidates to the totals."""
        self.candidates += len(scores.log_probs)
        self.tokens += scores.tokens
        self.computed_tokens += scores.computed_tokens

    def accept(self, routes: Sequence[Route], best: float) -> None:
        """Keep routes and note where that stands on the curve."""
        self.routes.extend(routes)
        self.best = best
        self.trace.append((self.computed_tokens, best))

    def plan(self, weights: str = "masked") -> RoutePlan:
        """The accepted routes as a plan."""
        plan = RoutePlan(weights=weights)
        for route in self.routes:
            plan.force(route.layer, [route.position], route.experts)
        return plan

    def state(self, digits: int = 3) -> AttemptState:
        """What a file keeps.

        Args:
            digits: of log-probabilities; a thousandth of a nat is what they are good for, but a search that goes on needs 17.

        """
        return AttemptState(
            clean=round(self.clean, digits),
            best=round(self.best, digits),
            routes=tuple(msgspec.structs.replace(route, gain=round(route.gain, digits)) for route in self.routes),
            candidates=self.candidates,
            needed=self.needed,
            tokens=self.tokens,
            computed_tokens=self.computed_tokens,
            trace=tuple((tokens, round(best, digits)) for tokens, best in self.trace),
        )

    @classmethod
    def from_state(cls, state: AttemptState) -> Attempt:
        """Go on from what a file kept."""
        fields = msgspec.structs.asdict(state)
        return cls(**fields | {"routes": list(state.routes), "trace": list(state.trace)})
