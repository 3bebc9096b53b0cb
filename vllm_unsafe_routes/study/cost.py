"""What a run cost: counted while it runs, kept in its folder, so that a run in several parts has the cost of all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..search.backend import About, Backend, Stats
from .campaign import Campaign
from .records import Record, Work

# A kill loses no more than this of the count.
_SECONDS = 60.0


class Meter:
    """Writes what was done since it last wrote.

    Args:
        campaign: where to.
        backend: what computes.
        attack: what is run.
        defence: under which, in a matrix.

    """

    def __init__(self, campaign: Campaign, backend: Backend, attack: str, defence: str | None = None) -> None:
        self.stats = Stats()
        self.results = 0
        self._campaign, self._backend = campaign, backend
        self._attack, self._defence = attack, defence
        self._written, self._results_written = Stats(), 0
        self._since = time.monotonic()
        self._about: About | None = None
        self._number = 0

    def result(self) -> None:
        """One result more."""
        self.results += 1
        if time.monotonic() - self._since >= _SECONDS:
            self.write()

    def write(self) -> None:
        """Keep what was done; nothing where no request was answered."""
        now = time.monotonic()
        stats, before = replace(self.stats), self._written
        if stats.requests == before.requests:
            return
        if self._about is None:
            self._about = self._backend.about()
        while self._campaign.done(("work", self._number)):
            self._number += 1
        work = Work(
            attack=self._attack,
            defence=self._defence,
            results=self.results - self._results_written,
            requests=stats.requests - before.requests,
            candidates=stats.candidates - before.candidates,
            tokens=stats.tokens - before.tokens,
            computed_tokens=stats.computed_tokens - before.computed_tokens,
            seconds=round(now - self._since, 3),
            device=self._about.device,
            versions=dict(self._about.versions),
        )
        self._campaign.append(("work", self._number), work)
        self._written, self._results_written, self._since = stats, self.results, now


@dataclass(frozen=True, slots=True)
class Cost:
    """What some work of a run took.

    Attributes:
        candidates: plans scored.
        tokens: of all requests, as if each was computed alone.
        computed_tokens: prompt tokens that the engine computed.
        seconds: of the wall clock.
        device: what computed; several are joined by "; ".
        versions: of the programs that took part, likewise.

    """

    candidates: int
    tokens: int
    computed_tokens: int
    seconds: float
    device: str
    versions: Mapping[str, str]

    @property
    def candidates_per_s(self) -> float:
        """Plans scored a second."""
        return self.candidates / self.seconds if self.seconds else 0.0

    def to_dict(self, searches: int) -> dict[str, int | float | str | dict[str, str]]:
        """For a summary of so many searches: one prompt with one seed each, many of them in flight together."""
        return {
            "candidates": self.candidates,
            "tokens": self.tokens,
            "computed_tokens": self.computed_tokens,
            "seconds": round(self.seconds, 2),
            "candidates_per_s": round(self.candidates_per_s, 2),
            "seconds_per_prompt": round(self.seconds / max(searches, 1), 3),
            "device": self.device,
            "versions": dict(self.versions),
        }


def cost_of(records: Iterable[Record]) -> Cost | None:
    """The sum over a run's work; None: the run kept none, as those before 2026-11-26."""
    found = [record for record in records if isinstance(record, Work)]
    if not found:
        return None
    names = dict.fromkeys(name for work in found for name in work.versions)
    return Cost(
        candidates=sum(work.candidates for work in found),
        tokens=sum(work.tokens for work in found),
        computed_tokens=sum(work.computed_tokens for work in found),
        seconds=sum(work.seconds for work in found),
        device="; ".join(dict.fromkeys(work.device for work in found)),
        versions={name: "; ".join(dict.fromkeys(work.versions[name] for work in found if name in work.versions)) for name in names},
    )
