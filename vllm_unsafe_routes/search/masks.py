"""Random routes: which experts a candidate may use, and draws that depend on what they are for and on nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ..errors import RouteError
from ..plan import RoutePlan
from ..policy import RoutePolicy
from ..shape import ModelShape


def rng_of(*parts: str | int) -> np.random.Generator:
    """A generator whose draws depend on `parts` only, so that neither a kill nor the order of other searches changes them."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class Experts:
    """The experts that candidates may use at each layer, under the engine's policy.

    Args:
        shape: the model.
        policy: what the engine enforces; its disabled experts are never drawn, its protected ones are in every draw.

    Raises:
        RouteError: the policy's protected experts fill every route, so that there is nothing to search.

    """

    def __init__(self, shape: ModelShape, policy: RoutePolicy | None) -> None:
        self.shape = shape
        entries = policy.layers if policy is not None else {}
        self.protected = {layer: sorted(entries[layer].protected) if layer in entries else [] for layer in shape.moe_layers}
        self.free = {
            layer: [
                expert
                for expert in range(shape.num_experts)
                if layer not in entries or expert not in entries[layer].disabled | entries[layer].protected
            ]
            for layer in shape.moe_layers
        }
        # A layer whose protected experts fill every route has nothing to search.
        self.searchable = tuple(layer for layer in shape.moe_layers if len(self.protected[layer]) < shape.top_k)
        if not self.searchable:
            raise RouteError("the policy's protected experts fill every route: there is nothing to search")

    def draw(self, rng: np.random.Generator, layer: int) -> tuple[int, ...]:
        """A random set of top_k experts for a layer, sorted."""
        kept = self.protected[layer]
        free = self.free[layer]
        chosen = rng.choice(len(free), self.shape.top_k - len(kept), replace=False).tolist()
        return tuple(sorted([*kept, *(free[at] for at in chosen)]))

    def draw_many(self, count: int, layer: int, *parts: str | int) -> list[tuple[int, ...]]:
        """`count` draws for a layer from `rng_of(*parts, layer)`."""
        rng = rng_of(*parts, layer)
        return [self.draw(rng, layer) for _ in range(count)]


def mask_plan(masks: Sequence[tuple[int, tuple[int, ...]]], positions: str, weights: str = "masked") -> RoutePlan:
    """A plan that leaves exactly the given experts at each (layer, experts), for every token in `positions`."""
    plan = RoutePlan(weights)
    for layer, experts in masks:
        plan.force(layer, positions, experts)
    return plan
