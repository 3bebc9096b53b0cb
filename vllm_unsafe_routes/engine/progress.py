"""What a worker tells the scheduler after a step, and how it travels: hung on the model runner's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from .host_copies import HostCopies

PROGRESS_ATTRIBUTE = "unsafe_routes_progress"
COUNTS_ATTRIBUTE = "unsafe_routes_counts"
MONITORED_ATTRIBUTE = "unsafe_routes_monitored"


@dataclass(frozen=True, slots=True)
class RouteCounts:
    """What a worker has counted since it started.

    Attributes:
        tokens: by policy mode, tokens computed under a policy.
        displaced: by policy mode and MoE layer, picks of the model's own gating that the policy bans; forced tokens left out.
        missed: by MoE layer, forward passes in which its router was not called.
        num_nan: by MoE layer, tokens whose router logits held a NaN.

    """

    tokens: dict[str, int]
    displaced: dict[str, list[int]]
    missed: list[int]
    num_nan: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the front end."""
        return asdict(self)

    @classmethod
    def latest(cls, said: Iterable[RouteCounts | None]) -> RouteCounts | None:
        """The largest of each number, None if nobody said any.

        Args:
            said: by one worker, in any order: counts only grow, and an output that waits while the worker is asked knows less
                than the answer. Or by several: tensor-parallel ranks count alike, pipeline ranks layers of their own.

        """
        known = [item for item in said if item is not None]
        if len(known) < 2:  # as in most steps: nothing was said
            return known[0] if known else None
        return cls(
            {mode: max(item.tokens[mode] for item in known) for mode in known[0].tokens},
            {mode: _largest(item.displaced[mode] for item in known) for mode in known[0].displaced},
            _largest(item.missed for item in known),
            _largest(item.num_nan for item in known),
        )


def _largest(said: Iterable[list[int]]) -> list[int]:
    return [max(values) for values in zip(*said, strict=True)]


class RoutesSet(NamedTuple):
    """How many (layer, token) routes a request sets, of however many tokens will count.

    Attributes:
        start: first position that this engine computed for it.
        end: one past the last position that `number` counts; the front end knows how many tokens behind it count: drafts that
            are rejected, and what follows a stop string, do not.
        number: routes of positions `start` to `end`.
        further: routes of each position from `end` on; all behind the last have as many as the last. Empty while the prompt is
            under way.

    """

    start: int
    end: int
    number: int
    further: tuple[int, ...] = ()

    def upto(self, end: int) -> int:
        """Routes of positions `start` to `end` (exclusive)."""
        num_more = max(0, end - self.end) if self.further else 0
        listed = self.further[:num_more]
        return self.number + sum(listed) + (num_more - len(listed)) * (self.further or (0,))[-1]


@dataclass(slots=True)
class StepProgress:
    """What a worker reports of one request after one step.

    Attributes:
        routes: how many are set, where that does not follow from what was said before.
        chunk_start: position of the first row of `route_ids`.
        route_ids: int32 [num_tokens, num_moe_layers, top_k] of this step, or None.
        route_weights: float32, same shape, or None.
        score_start: index of the first row of `scores` among the request's scored rows.
        scores: float32 [num_rows, width], log-probabilities scored in this step, or None.
        logits_start: position of the first row of `router_logits`.
        router_logits: float32 [num_tokens, chosen layers, num_experts] of this step, or None.

    """

    routes: RoutesSet | None = None
    chunk_start: int = 0
    route_ids: np.ndarray | None = None
    route_weights: np.ndarray | None = None
    score_start: int = 0
    scores: np.ndarray | None = None
    logits_start: int = 0
    router_logits: np.ndarray | None = None


class StepReport:
    """What the next output of the model runner carries.

    Attributes:
        progress: of each resident request of the step.
        monitored: of each request with prompt tokens in the step, a `prompt_monitor.Piece`, with `--route-monitor`.
        copies: values of `progress` that are still on their way from the device.

    """

    def __init__(self) -> None:
        self.progress: dict[str, StepProgress] = {}
        self.monitored: dict[str, Any] = {}
        self.copies = HostCopies()

    def hang_on(self, output: Any, counts: RouteCounts | None) -> None:
        """Hang the report and counts on an output, at once or when an asynchronous output is ready; starts an empty report."""
        values = {PROGRESS_ATTRIBUTE: self.progress, COUNTS_ATTRIBUTE: counts, MONITORED_ATTRIBUTE: self.monitored}
        # What is monitored stands on the host only when the copies are there.
        values = {name: value for name, value in values.items() if value or (name == MONITORED_ATTRIBUTE and self.copies)}
        if not values:
            return
        copies, self.progress, self.monitored, self.copies = self.copies, {}, {}, HostCopies()

        def hang(ready: Any) -> Any:
            copies.resolve()
            for name, value in values.items():
                setattr(ready, name, value)
            return ready

        if hasattr(output, "get_output"):
            get_output = output.get_output
            output.get_output = lambda: hang(get_output())
        else:
            hang(output)
