"""Controls of a found route: what of its effect is the choice of experts, and what the rescaling of their weights.

Masked weights of a forced token are those of a softmax over the forced experts alone. Where a model does not renormalise, that
makes the layer's output louder whichever experts are forced, so a search with masked weights (the paper's, arXiv 2602.08621)
finds routes and loudness together. The controls ask for the target's log-probability

- `found`: under the found route, as the search had it;
- `native`: under the same experts with native weights, those that the router's own scores give them: the route alone;
- `own`: under the model's own experts, forced with masked weights at the same cells: the loudness without the route;
- `own_everywhere`: the same at every cell of the prompt;
- `random`: under random experts with masked weights at the same cells: they have the same mass, and no search chose them.

A model that renormalises has `own` equal to `clean`, and `native` to `found`. The search itself with native weights is
`FsourSettings.weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..cells import CellScores
from ..evaluation.statistics import Outcomes, mean_interval
from ..extras import RouteExtras
from ..plan import RoutePlan
from ..search.attempt import Attempt
from ..search.backend import Backend, Request, Search
from ..search.masks import Experts, rng_of
from .model import Item
from .records import Controls, Fsour

NAMES = ("clean", "found", "native", "own", "own_everywhere", "random", "best_random")


def controls_record(backend: Backend, item: Item, found: Fsour, num_random: int, weights: str = "masked") -> Search[Controls]:
    """The controls of one prompt's route.

    Args:
        backend: where requests run.
        item: the prompt.
        found: what the search found; it has a route.
        num_random: random routes.
        weights: those of the search.

    """
    shape, attempt = backend.shape, Attempt.from_state(found.final)
    asked = Request(item.prompt.token_ids, RouteExtras(wants_routes=True))
    (response,) = yield [asked]
    own = np.asarray(response.route_ids)[: len(item.prompt.token_ids)]
    places = [(route.layer, route.position) for route in attempt.routes]
    experts = Experts(shape, backend.policy)
    plans = [
        RoutePlan(),
        attempt.plan(weights),
        attempt.plan("native"),
        forced((layer, at, own[at, shape.slot_of_layer[layer]].tolist()) for layer, at in places),
        RoutePlan.from_routes(own, layers=shape.moe_layers),
    ]
    for number in range(num_random):
        rng = rng_of("controls", found.seed, item.prompt.id, number)
        plans.append(forced((layer, at, experts.draw(rng, layer)) for layer, at in places))
    scores: Sequence[CellScores] = yield [item.prompt.cells(plan.to_string(), [[]]) for plan in plans]
    values = [round(float(one.values[0]), 4) for one in scores]
    clean, of_route, native, of_own, everywhere, *random = values
    return Controls(
        attack=found.attack,
        prompt=found.prompt,
        category=found.category,
        seed=found.seed,
        weights=weights,
        cells=len(places),
        clean=clean,
        found=of_route,
        native=native,
        own=of_own,
        own_everywhere=everywhere,
        randoms=tuple(random),
    )


def forced(cells: Iterable[tuple[int, int, Sequence[int]]]) -> RoutePlan:
    """A plan with masked weights that forces (layer, position, experts)."""
    plan = RoutePlan()
    for layer, position, chosen in cells:
        plan.force(layer, [position], chosen)
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
