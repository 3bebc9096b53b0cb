"""Controls of a found route: what of its effect is the choice of experts, and what the rescaling of their weights.

Masked weights of a forced token are those of a softmax over the forced experts alone. Where a model does not renormalise, that
makes the layer's output louder whichever experts are forced, so a search with masked weights (the paper's, arXiv 2602.08621)
finds routes and loudness together. The controls ask for the target's log-probability

- `found`: under the found route, as the search had it;
- `native`: under the same experts with native weights, those that the router's own scores give them: the route alone;
- `own`: under the model's own experts, forced with masked weights at the same cells: the loudness without the route;
- `own_everywhere`: the same at every cell that the attack may change;
- `random`: under random experts with masked weights at the same cells: they have the same mass, and no search chose them.

A model that renormalises has `own` equal to `clean`, and `native` to `found`. The search itself with native weights is
`FsourSettings.weights` and `MaskSettings.weights`.

F-SOUR and router masking have the same controls: a route of F-SOUR is a choice of experts at one token, a mask one at all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cells import CellScores
from ..evaluation.statistics import Outcomes, mean_interval
from ..extras import RouteExtras
from ..plan import RoutePlan
from ..search.backend import Backend, Request, Search
from ..search.masks import Experts, rng_of
from .model import Item
from .records import Controls, Fsour, Masks

NAMES = ("clean", "found", "native", "own", "own_everywhere", "random", "best_random")
# A choice of experts: layer, positions, experts.
Choice = tuple[int, Sequence[int], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Found:
    """What an attack found on one prompt.

    Attributes:
        attack: as records name it.
        seed: of its search.
        choices: the experts that it chose.
        weights: those of its search.
        num_tokens: leading tokens that the attack may change.

    """

    attack: str
    seed: int
    choices: tuple[Choice, ...]
    weights: str
    num_tokens: int

    @classmethod
    def by_fsour(cls, record: Fsour, item: Item, weights: str) -> Found:
        """A route of F-SOUR: a choice for each cell, of prompt tokens only."""
        choices = tuple((route.layer, (route.position,), route.experts) for route in record.final.routes)
        return cls(record.attack, record.seed, choices, weights, len(item.prompt.token_ids))

    @classmethod
    def by_masks(cls, attack: str, seed: int, masks: Masks, item: Item, weights: str) -> Found:
        """Masks: a choice for each layer, of all tokens that are read while the target is scored."""
        num_tokens = len(item.prompt.token_ids) + len(item.prompt.target) - 1
        choices = tuple((layer, range(num_tokens), experts) for layer, experts in masks)
        return cls(attack, seed, choices, weights, num_tokens)

    def plan(self, weights: str) -> RoutePlan:
        """The choices as a plan."""
        return forced(self.choices, weights)


def controls_record(backend: Backend, item: Item, found: Found, num_random: int) -> Search[Controls]:
    """The controls of one prompt's route.

    Args:
        backend: where requests run.
        item: the prompt.
        found: what an attack found; it has a choice.
        num_random: random routes.

    """
    shape, prompt = backend.shape, item.prompt
    tokens = [*prompt.token_ids, *prompt.target[:-1]][: found.num_tokens]
    (response,) = yield [Request(tokens, RouteExtras(wants_routes=True))]
    own = np.asarray(response.route_ids)[: len(tokens)]
    experts = Experts(shape, backend.policy)
    plans = [
        RoutePlan(),
        found.plan(found.weights),
        found.plan("native"),
        forced(
            (layer, [at], own[at, shape.slot_of_layer[layer]].tolist()) for layer, positions, _ in found.choices for at in positions
        ),
        RoutePlan.from_routes(own, layers=shape.moe_layers),
    ]
    for number in range(num_random):
        rng = rng_of("controls", found.seed, prompt.id, number)
        plans.append(forced((layer, positions, experts.draw(rng, layer)) for layer, positions, _ in found.choices))
    scores: Sequence[CellScores] = yield [prompt.cells(plan.to_string(), [[]]) for plan in plans]
    values = [round(float(one.values[0]), 4) for one in scores]
    clean, of_route, native, of_own, everywhere, *random = values
    return Controls(
        attack=found.attack,
        prompt=prompt.id,
        category=item.record.category,
        seed=found.seed,
        weights=found.weights,
        cells=len(found.choices),
        clean=clean,
        found=of_route,
        native=native,
        own=of_own,
        own_everywhere=everywhere,
        randoms=tuple(random),
    )


def forced(choices: Iterable[Choice], weights: str = "masked") -> RoutePlan:
    """A plan that forces (layer, positions, experts)."""
    plan = RoutePlan(weights)
    for layer, positions, chosen in choices:
        plan.force(layer, list(positions), chosen)
    return plan


def controls_summary(records: Iterable[Controls]) -> dict[str, Any]:
    """Mean log-probability of the target under each control with its interval, in nats; empty without controls."""
    found = list(records)
    if not found:
        return {}

    def entry(name: str) -> dict[str, Any]:
        mean = mean_interval(Outcomes.from_rows([(one.prompt, one.seed, one.value(name)) for one in found]))
        ends = zip(("value", "low", "high"), (mean.value, mean.low, mean.high), strict=True)
        return {end: round(value, 3) for end, value in ends}

    return {"prompts": len({one.prompt for one in found}), **{name: entry(name) for name in NAMES}}


def controls_by_attack(records: Iterable[Controls]) -> dict[str, dict[str, Any]]:
    """The summary of each attack, in the order in which they first come."""
    by_attack: dict[str, list[Controls]] = {}
    for record in records:
        by_attack.setdefault(record.attack, []).append(record)
    return {attack: controls_summary(found) for attack, found in by_attack.items()}
