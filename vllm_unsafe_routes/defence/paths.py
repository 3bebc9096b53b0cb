"""Greedy paths of bans and biases, which a derivation cuts into candidates.

A path is found against suffixes that opened the undefended model. An attacker searches under the policy, so a path may meet that on
the way: between its stages suffixes are searched again under the additions so far, and those that open a prompt join the examples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import RouteError
from ..extras import RouteExtras
from ..search.backend import Request, Search, run_tasks
from ..study.model import Item
from ..study.records import Addition, OwnAnswers, Suffixes, read
from . import policies
from .attacks import Arena, attack
from .greedy import Example, GreedySettings, greedy_bans
from .trials import Trials, kept
from .under_policy import under

# Between the seeds of one prompt's suffixes.
SEED_STEP = 1000


@dataclass(frozen=True, slots=True)
class GreedyTrials:
    """What the rules greedy and greedy-bias try.

    Attributes:
        bans: numbers of additions in all, beside as many as help.
        weight: nats of attack score that a nat of harmless answers must be worth.
        harmless: harmless answers that each addition is weighed against, taken evenly.
        steps: by how much greedy-bias may raise or lower a logit at a time; empty: that rule is not tried.
        again: how often suffixes are searched again on the way, under the additions so far.

    """

    bans: tuple[int, ...] = (8, 16, 24, 32)
    weight: float = 1.0
    harmless: int = 128
    steps: tuple[float, ...] = ()
    again: int = 0

    def __post_init__(self) -> None:
        if not all(0 < step < float("inf") for step in self.steps):
            raise RouteError(f"steps of biases must be positive numbers, got {list(self.steps)}")
        if self.harmless < 1:
            raise RouteError(f"greedy harmless must be at least 1, got {self.harmless}")
        if self.again < 0:
            raise RouteError(f"greedy again must be at least 0, got {self.again}")


def find_suffixes(arena: Arena, items: Sequence[Item], seeds: Sequence[int]) -> Suffixes:
    """A suffix for each prompt and seed, by the attack of that name."""
    tasks = [((seed, item.prompt.id), attack("suffix", arena, item, seed)) for seed in seeds for item in items]
    found = dict(run_tasks(arena.bench.backend, tasks))
    return Suffixes(found=tuple((*key, found[key].suffix or (), bool(found[key].success)) for key in sorted(found)))


def opened_by(arena: Arena, items: Sequence[Item], suffixes: Suffixes) -> list[Item]:
    """The prompts with those suffixes that opened them."""
    of = {item.prompt.id: item for item in items}
    return [arena.with_suffix(of[prompt], words) for _, prompt, words, success in suffixes.found if success]


@dataclass(frozen=True, slots=True)
class Paths:
    """Finds paths; every addition is a record, so that an interrupted path goes on.

    Attributes:
        trials: where candidates are measured, with their budget.
        settings: what is tried.
        layers: decoder layers that may be touched.
        opened: prompts with a suffix that the undefended model complies with.
        seeds: of suffixes that are searched again.

    """

    trials: Trials
    settings: GreedyTrials
    layers: Sequence[int]
    opened: Sequence[Item]
    seeds: Sequence[int]

    def of_rule(self, rule: str, pinned: Collection[tuple[int, int]]) -> Iterator[tuple[float, list[policies.Choice]]]:
        """Share of harmless answers that a path keeps, and the path. Pinned experts are not pushed out."""
        harmless = self._harmless()
        # Once with half of what the budget lets go, once with all of it: which is better is measured like everything else.
        budget = self.trials.budget.share
        # Shares that let equally many answers go are one path.
        shares = {int((1 - share) * len(harmless) + 1e-9): share for share in (budget, (1 + budget) / 2)}
        for share in sorted(shares.values(), reverse=True):
            yield share, self._path(rule, share, harmless, pinned)

    def _path(
        self, rule: str, share: float, harmless: Sequence[Example], pinned: Collection[tuple[int, int]]
    ) -> list[policies.Choice]:
        settings, campaign, most = self.settings, self.trials.campaign, max(self.settings.bans)
        steps = settings.steps if rule == "greedy-bias" else ()
        opened, added = list(self.opened), list[policies.Choice]()
        earlier = [one for one in read(campaign.folder, Addition) if (one.share, one.steps) == (share, steps)]

        def note(_: Any, addition: Addition) -> None:
            campaign.append((rule, share, addition.number), addition)

        for stage in range(settings.again + 1):
            if stage:
                opened += self._opened_again((rule, share), stage, added)
            greedy = GreedySettings(
                -(-most * (stage + 1) // (settings.again + 1)), share, settings.weight, steps=steps, stage=stage
            )
            search = greedy_bans(
                self.trials.arena.bench.backend,
                [Example(item.prompt.token_ids, item.prompt.target) for item in opened],
                harmless,
                self.layers,
                greedy,
                pinned,
                [one for one in earlier if one.stage == stage],
                added,
            )
            ((_, added),) = run_tasks(self.trials.arena.bench.backend, [(0, search)], note=note)
        return added

    def _opened_again(self, path: tuple[str, float], stage: int, added: Sequence[policies.Choice]) -> list[Item]:
        """Prompts with suffixes that open them under these additions, by seeds of their own."""
        trials = self.trials
        bans, biases = policies.additions(added)
        arena = under(trials.arena, policies.combine(trials.shape, bans, {}, {}, biases))
        seeds = [seed + SEED_STEP * stage for seed in self.seeds]
        found = kept(trials.campaign, ("suffixes", *path, stage), lambda: find_suffixes(arena, trials.items, seeds))
        opened = opened_by(arena, trials.items, found)
        trials.say(f"{path[0]}-{path[1]:.3g}/{len(added)}: suffixes searched again open {len(opened)} of {len(found.found)}")
        return opened

    def _harmless(self) -> list[Example]:
        """Harmless prompts with the undefended model's own answers."""
        items = [item for found in self.trials.harmless.values() for item in found]
        answers = kept(self.trials.campaign, "answers", lambda: self._own_answers(items)).answers
        examples = [Example(item.prompt.token_ids, answers[item.prompt.id]) for item in items if answers[item.prompt.id]]
        # Every additional one costs a score for each ban that is tried; the budget is measured on all of them afterwards.
        return examples[:: -(-len(examples) // self.settings.harmless)] if examples else []

    def _own_answers(self, items: Sequence[Item]) -> OwnAnswers:
        bench = self.trials.arena.bench

        def one(item: Item) -> Search[tuple[int, ...]]:
            (response,) = yield [Request(item.prompt.token_ids, RouteExtras(), bench.max_new_tokens, bench.model.stop_token_ids)]
            return tuple(response.token_ids)

        return OwnAnswers(answers=dict(run_tasks(bench.backend, [(item.prompt.id, one(item)) for item in items])))
