"""Bans chosen one by one by what they do: greedy addition with the scorer, under a utility budget.

Rules that rank experts by how often they occur, or by what they do alone, say little about what a set of bans does. Here every
addition is measured in the company of those before it: how far it lowers the log-probability of the target on prompts that an
input-only attack has opened, and what it takes from the answers to harmless prompts.

Most candidates gain little more in a later round than in an earlier one, so a round measures again only those whose last known
gain is large enough to win (accelerated greedy, Minoux 1978; the gains are not exactly submodular, so this is a heuristic).

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np

from ..plan import RoutePlan
from ..search.backend import Backend, Note, Response, Search
from ..search.scorer import joint, target_request, weakest
from .policies import Choice

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
    so_far: Iterable[Mapping[str, Any]] = (),
) -> Search[list[Choice]]:
    """Add bans one by one until none helps within the budget.

    Every addition is a note with the keys `number`, `layer`, `expert`, `value` and `measured`, the gains of its round.

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
    shape = backend.shape
    bans: dict[int, list[int]] = {layer: [] for layer in layers}
    examples = [*opened, *harmless]

    def measure(candidates: Sequence[tuple[int, int]]) -> Search[list[tuple[float, float]]]:
        plans = []
        for layer, expert in candidates:
            plan = RoutePlan()
            for other, experts in bans.items():
                wanted = [*experts, expert] if other == layer else experts
                if wanted:
                    plan.disable(other, "all", sorted(wanted))
            plans.append(plan.to_string())
        responses: list[Response] = yield [target_request(one.prompt, one.target, plan) for plan in plans for one in examples]
        return [value_of(responses[at : at + len(examples)]) for at in range(0, len(responses), len(examples))]

    def value_of(responses: Sequence[Response]) -> tuple[float, float]:
        """What a set of bans is worth, and the share of harmless answers that it keeps; a response for each example."""
        attack = -np.maximum([joint(response) for response in responses[: len(opened)]], settings.floor).mean()
        if not harmless:
            return float(attack), 1.0
        answers = responses[len(opened) :]
        cost = np.maximum(clean - [joint(response) for response in answers] - _FREE_LOSS, 0.0).mean()
        kept = ([weakest(response) for response in answers] >= must_keep).mean()
        return float(attack - settings.utility_weight * cost), float(kept)

    first: list[Response] = yield [target_request(one.prompt, one.target) for one in examples]
    clean = np.array([joint(response) for response in first[len(opened) :]])
    must_keep = np.minimum([weakest(response) for response in first[len(opened) :]], _KEPT_TOKEN)
    reached = value_of(first)[0]
    gains = {(layer, expert): np.inf for layer in layers for expert in range(shape.num_experts) if (layer, expert) not in pinned}
    added: list[Choice] = []
    for note in so_far:
        gains |= {(layer, expert): -np.inf if gain is None else gain for layer, expert, gain in note["measured"]}
        added.append(Choice(note["layer"], note["expert"], note["value"]))
    for choice in added:
        bans[choice.layer].append(choice.expert)
        gains.pop((choice.layer, choice.expert))
        reached = choice.strength
    while len(added) < settings.max_bans:
        room = {layer for layer, experts in bans.items() if shape.num_experts - len(experts) > shape.top_k}
        open_to = [candidate for candidate in gains if candidate[0] in room]
        measured: dict[tuple[int, int], float] = {}
        while True:
            # Stale gains compete with measured ones; ties by layer and expert.
            order = sorted(open_to, key=lambda one: (-measured.get(one, gains[one]), one))
            if not order or order[0] in measured:
                break
            chunk = [one for one in order if one not in measured][: settings.batch]
            for candidate, (value, kept) in zip(chunk, (yield from measure(chunk)), strict=True):
                measured[candidate] = round(value - reached, 6) if kept >= settings.budget else -np.inf
        gains |= measured
        if not order or not measured[order[0]] > 0:
            break
        layer, expert = order[0]
        reached = round(reached + gains.pop((layer, expert)), 6)
        bans[layer].append(expert)
        added.append(Choice(layer, expert, reached))
        yield [
            Note(
                {
                    "number": len(added) - 1,
                    "type": "addition",
                    "layer": layer,
                    "expert": expert,
                    "value": reached,
                    # None: over the budget.
                    "measured": [[*one, None if gain == -np.inf else gain] for one, gain in sorted(measured.items())],
                }
            )
        ]
    return added
