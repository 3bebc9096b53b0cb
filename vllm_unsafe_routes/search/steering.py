"""SteerMoE (arXiv 2509.09660): experts that one kind of prompt uses more than another, and a plan that promotes or demotes them.

Of paired prompts that show opposite behaviours, an expert's **risk difference** is the share of the first kind's tokens that are
routed to it less the share of the second kind's. Experts with the largest positive differences are promoted, those with the most
negative ones demoted; turned around, the plan steers towards the second kind. The published code (adobe-research/SteerMoE) promotes
up to top_k experts a layer and passes over what is more; here it is one fewer, because as many as top_k are a force.

    difference = run_search(backend, risk_difference(backend, refused, answered))
    plan = steering_plan(backend.shape, difference, num_promoted=10, num_demoted=10)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..extras import RouteExtras
from ..plan import RoutePlan
from ..positions import Positions
from ..shape import ModelShape
from .backend import Backend, Request, Search


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
    shares = []
    for prompts in (first, second):
        responses = yield [Request(prompt, RouteExtras(wants_routes=True)) for prompt in prompts]
        routes = [np.asarray(one.route_ids)[: len(prompt)] for one, prompt in zip(responses, prompts, strict=True)]
        shares.append(expert_shares(np.concatenate(routes), backend.shape.num_experts))
    return shares[0] - shares[1]


def expert_shares(routes: npt.NDArray[np.int32], num_experts: int) -> npt.NDArray[np.float64]:
    """Share of the tokens that each expert gets, float64 [layers, num_experts], of routes [tokens, layers, top_k]."""
    shares: npt.NDArray[np.float64] = np.stack([(routes == expert).any(-1).mean(0) for expert in range(num_experts)], 1)
    return shares


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
