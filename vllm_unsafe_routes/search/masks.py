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
        return self._draw(rng, layer, 1)[0]

    def draw_many(self, count: int, layer: int, *parts: str | int) -> list[tuple[int, ...]]:
        """`count` draws for a layer from `rng_of(*parts, layer)`."""
        return self._draw(rng_of(*parts, layer), layer, count)

    def _draw(self, rng: np.random.Generator, layer: int, count: int) -> list[tuple[int, ...]]:
        kept, free = self.protected[layer], self.free[layer]
        chosen = subsets(rng, len(free), self.shape.top_k - len(kept), count)
        return [tuple(sorted([*kept, *map(free.__getitem__, one)])) for one in chosen]


def subsets(rng: np.random.Generator, population: int, size: int, count: int) -> list[set[int]]:
    """Random subsets of `range(population)`, what `rng.choice(population, size, replace=False)` would draw one after the other.

    Floyd's sampling (Bentley and Floyd, "A sample of brilliance", CACM 30(9), 1987), with the numbers for all sets drawn in one
    call. The generator would shuffle each set; the numbers for that are drawn and left unused: draws stay those of old runs.
    """
    tops = range(population - size, population)
    bounds = np.array([*tops, *range(size - 1, 0, -1)], np.int64)
    found = []
    for numbers in rng.integers(0, bounds, (count, len(bounds)), endpoint=True).tolist():
        chosen: set[int] = set()
        for top, number in zip(tops, numbers, strict=False):
            chosen.add(top if number in chosen else number)
        found.append(chosen)
    return found


def mask_plan(masks: Sequence[tuple[int, tuple[int, ...]]], positions: str, weights: str = "masked") -> RoutePlan:
    """A plan that leaves exactly the given experts at each (layer, experts), for every token in `positions`."""
    plan = RoutePlan(weights)
    for layer, experts in masks:
        plan.force(layer, positions, experts)
    return plan
