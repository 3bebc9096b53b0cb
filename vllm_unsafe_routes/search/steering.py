"""SteerMoE (arXiv 2509.09660): experts that one kind of prompt uses more than another, and a plan that promotes or demotes them.

Of paired prompts that show opposite behaviours, an expert's **risk difference** is the share of the first kind's tokens that are
routed to it less the share of the second kind's. Experts with the largest positive differences are promoted, those with the most
negative ones demoted; turned around, the plan steers towards the second kind. The published code (adobe-research/SteerMoE) promotes
up to top_k experts a layer and passes over what is more; here it is one fewer, because as many as top_k are a force.

    difference = run_search(backend, risk_difference(backend, refused, answered))
    plan = steering_plan(backend.shape, difference, num_promoted=10, num_demoted=10)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..plan import RoutePlan
from ..positions import Positions
from ..shape import ModelShape
from .backend import Backend, Search
from .candidates import Chosen, best_plan, under_policy
from .rosais import Prompt
from .usage import usage


def risk_difference(
    backend: Backend, first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]
) -> Search[npt.NDArray[np.float64]]:
    """How much more of the first prompts' tokens each expert gets.

    Args:
        backend: where the prompts run.
        first: token ids of the prompts of one kind.
        second: of the other.

    Returns:
        float64 [num_moe_layers, num_experts], from -1 to 1.

    """
    found = []
    for prompts in (first, second):
        found.append((yield from usage(backend, prompts)).shares())
    return found[0] - found[1]


def steering_plan(
    shape: ModelShape,
    difference: npt.NDArray[np.float64],
    num_promoted: int,
    num_demoted: int,
    positions: Positions = "all",
) -> RoutePlan:
    """A plan that steers towards the first kind.

    Args:
        shape: the model's.
        difference: of `risk_difference`; its negative steers towards the second kind.
        num_promoted: experts with the largest positive differences over all layers.
        num_demoted: experts with the most negative ones.
        positions: where.

    """
    order = np.argsort(-np.abs(difference), axis=None, kind="stable")
    ranked = [divmod(int(at), shape.num_experts) for at in order]
    plan = RoutePlan(model=shape.fingerprint)
    for sign, count, limit in ((1, num_promoted, shape.top_k - 1), (-1, num_demoted, shape.num_experts)):
        chosen: dict[int, list[int]] = {}
        for slot, expert in [at for at in ranked if sign * difference[at] > 0][:count]:
            if len(chosen.setdefault(slot, [])) < limit:
                chosen[slot].append(expert)
        for slot, experts in sorted(chosen.items()):
            if experts:
                (plan.promote if sign > 0 else plan.demote)(shape.moe_layers[slot], positions, experts)
    return plan


def steermoe(
    backend: Backend, prompts: Sequence[Prompt], difference: npt.NDArray[np.float64], num_candidates: int = 64
) -> Search[Chosen]:
    """Steer with as many promoted and demoted experts as serve the target best.

    Args:
        backend: for the model's shape.
        prompts: one, or several that share the plan.
        difference: of `risk_difference`, towards the kind that is wanted.
        num_candidates: plans tried at most, the empty one among them: numbers of both kinds on a grid.

    """
    difference = under_policy(backend, difference)
    most = [int((sign * difference > 0).sum()) for sign in (1, -1)]
    side = max(2, int(num_candidates**0.5))
    numbers = [sorted({round(share) for share in np.linspace(0, count, side)}) for count in most]
    plans = [steering_plan(backend.shape, difference, *pair) for pair in itertools.product(*numbers) if any(pair)]
    return (yield from best_plan(backend, prompts, plans))
