"""SAFEx (arXiv 2506.17368): experts that refused prompts use more, whichever of them one looks at, and a mask of these experts.

**Stable selection**: both sets of prompts are drawn again, with replacement, many times; each time the experts with the largest
difference of usage are selected. An expert's **stability** is the share of the draws in which it was; the ranking is by stability,
then by mean difference. The most stable experts are disabled. The paper gives the rule in words and its code traces usage only:
number of draws, experts selected in each, and ties (the smaller layer and expert first) are settings here. Its split into experts
that detect and experts that control takes two such rankings, of plain and of rephrased harmful prompts; it is not made here.

    first, second = run_search(backend, usage(backend, refused)), run_search(backend, usage(backend, answered))
    ranked = stable_experts(backend.shape, first, second, SafexSettings()).ranking
    chosen = run_search(backend, safex(backend, [prompt], ranked))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..policy import LayerPolicy, RoutePolicy
from ..shape import ModelShape
from .backend import Backend, Search
from .candidates import At, Chosen, best_plan, can_silence, silencing_plan
from .masks import rng_of
from .rosais import Prompt
from .usage import Usage


@dataclass(frozen=True, slots=True)
class SafexSettings:
    """Settings of stable selection.

    Attributes:
        num_resamples: draws of both sets of prompts.
        num_selected: experts selected in each, over all layers; the paper disables 12.
        seed: of the draws.

    """

    num_resamples: int = 100
    num_selected: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_resamples", "num_selected"):
            if getattr(self, name) < 1:
                raise RouteError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, eq=False)
class StableExperts:
    """What stable selection found.

    Attributes:
        stability: float64 [num_moe_layers, num_experts], share of the draws in which the expert was selected.
        difference: float64, same shape: mean difference of usage over the draws.
        ranking: (decoder layer, expert) that were selected at least once, most stable first.

    """

    stability: npt.NDArray[np.float64]
    difference: npt.NDArray[np.float64]
    ranking: tuple[At, ...]


def stable_experts(shape: ModelShape, first: Usage, second: Usage, settings: SafexSettings) -> StableExperts:
    """Experts that the first kind of prompts uses more, by how stable that is.

    Args:
        shape: the model's.
        first: usage of the prompts that are refused.
        second: of those that are answered.
        settings: settings.

    """
    stability, difference = (np.zeros((len(shape.moe_layers), shape.num_experts)) for _ in range(2))
    for number in range(settings.num_resamples):
        rng = rng_of("safex", settings.seed, number)
        one, other = (kind.shares(rng.integers(len(kind.tokens), size=len(kind.tokens))) for kind in (first, second))
        gap = one - other
        difference += gap
        chosen = np.argsort(-gap, axis=None, kind="stable")[: settings.num_selected]
        stability.flat[chosen[gap.flat[chosen] > 0]] += 1
    stability /= settings.num_resamples
    difference /= settings.num_resamples
    order = np.lexsort((-difference.ravel(), -stability.ravel()))
    ranked = (divmod(int(at), shape.num_experts) for at in order if stability.flat[at] > 0)
    return StableExperts(stability, difference, tuple((shape.moe_layers[slot], expert) for slot, expert in ranked))


def silenced(backend: Backend, ranking: Sequence[At], most: int) -> list[At]:
    """The first `most` of a ranking that can be disabled together: every layer keeps top_k, and the policy's protected ones."""
    free = can_silence(backend)
    taken: list[At] = []
    for layer, expert in ranking:
        experts, room = free[layer]
        if len(taken) < most and expert in experts and sum(other == layer for other, _ in taken) < room:
            taken.append((layer, expert))
    return taken


def silencing_policy(shape: ModelShape, experts: Sequence[At]) -> RoutePolicy:
    """A policy that disables these experts for every request."""
    layers = {layer: LayerPolicy(frozenset(expert for at, expert in experts if at == layer)) for layer, _ in experts}
    return RoutePolicy(layers, model=shape.fingerprint, provenance={"recipe": "SAFEx, arXiv 2506.17368"})


def safex(backend: Backend, prompts: Sequence[Prompt], ranking: Sequence[At], num_candidates: int = 64) -> Search[Chosen]:
    """Disable the most stable experts: as many of them as serve the target best.

    Args:
        backend: for the model's shape and policy.
        prompts: one, or several that share the mask.
        ranking: (decoder layer, expert), see `StableExperts`.
        num_candidates: masks tried at most, the empty one among them: the first expert of the ranking, the first two, ...

    """
    experts = silenced(backend, ranking, num_candidates - 1)
    plans = [silencing_plan(experts[: count + 1]) for count in range(len(experts))]
    return (yield from best_plan(backend, prompts, plans))
