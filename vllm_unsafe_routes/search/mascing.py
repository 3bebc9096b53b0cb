"""MASCing (arXiv 2604.27818): a bias on the router's logits that moves behaviour, and the strength that serves best.

The paper learns a steering matrix through a surrogate of the routing and adds it to the gates. Here its direction is the log-ratio
of the usage that two kinds of prompts make of each expert (heretic#322 adds `-alpha * log-ratio`), and alpha is searched without
gradients: first one for all layers, on a grid that narrows around the best, because the optimum is sharp; then each layer's own in
turn. The result is a plan of `bias` directives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..plan import RoutePlan
from ..shape import ModelShape
from .backend import Backend, Search
from .candidates import Chosen, check_prompts, plan_values, under_policy
from .rosais import Prompt
from .usage import Usage


@dataclass(frozen=True, slots=True)
class MascingSettings:
    """Settings of the search of a bias.

    Attributes:
        max_alpha: largest strength of the first grid.
        num_tries: strengths in a round.
        num_rounds: rounds of one strength for all layers; each spans the neighbours of the best so far.
        num_candidates: plans scored at most, the empty one among them; what the first rounds leave goes to the layers.
        min_gain: nats that a change must gain.
        weights: "masked": a bias moves the experts' weights too; "native": the selection only.

    """

    max_alpha: float = 8.0
    num_tries: int = 8
    num_rounds: int = 2
    num_candidates: int = 64
    min_gain: float = 1e-4
    weights: str = "masked"

    def __post_init__(self) -> None:
        if self.max_alpha <= 0:
            raise RouteError(f"max_alpha must be above 0, got {self.max_alpha}")
        for name, least in (("num_tries", 2), ("num_rounds", 1), ("num_candidates", 2)):
            if getattr(self, name) < least:
                raise RouteError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, eq=False)
class Biased(Chosen):
    """What the search found.

    Attributes:
        alphas: strength at each MoE layer.

    """

    alphas: tuple[float, ...] = ()


def log_ratio(first: Usage, second: Usage) -> npt.NDArray[np.float64]:
    """How much more the first kind of prompts uses each expert, float64 [num_moe_layers, num_experts], in nats.

    Half a token is added to every count, so that an expert that nobody used has a ratio too.
    """
    one, other = (np.log((kind.counts.sum(0) + 0.5) / (kind.tokens.sum() + 1)) for kind in (first, second))
    ratio: npt.NDArray[np.float64] = one - other
    return ratio


def bias_plan(shape: ModelShape, direction: npt.NDArray[np.float64], alphas: Sequence[float], weights: str = "masked") -> RoutePlan:
    """A plan that adds `-alpha * direction` to the logits of each MoE layer, for all tokens.

    Args:
        shape: the model's.
        direction: float [num_moe_layers, num_experts], of `log_ratio`: away from the first kind of prompts.
        alphas: strength at each MoE layer.
        weights: of the plan.

    """
    plan = RoutePlan(weights)
    for layer, row, alpha in zip(shape.moe_layers, direction, alphas, strict=True):
        values = {expert: float(-alpha * value) for expert, value in enumerate(row) if alpha * value}
        if values:
            plan.bias(layer, "all", values)
    return plan


def mascing(
    backend: Backend, prompts: Sequence[Prompt], direction: npt.NDArray[np.float64], settings: MascingSettings
) -> Search[Biased]:
    """Search the strengths of a bias.

    Args:
        backend: for the model's shape.
        prompts: one, or several that share the bias; then the mean of the targets' log-probabilities counts.
        direction: float [num_moe_layers, num_experts], see `bias_plan`.
        settings: settings.

    """
    check_prompts(backend, prompts)
    direction = under_policy(backend, direction)
    (clean,) = yield from plan_values(prompts, [RoutePlan()])
    best, alphas, left = float(clean), [0.0] * len(direction), settings.num_candidates - 1
    for slot, step in _rounds(settings, len(direction)):
        tried = [_with(alphas, slot, alpha) for alpha in _grid(alphas, slot, step, settings.num_tries)][:left]
        if not tried:
            break
        plans = [bias_plan(backend.shape, direction, one, settings.weights) for one in tried]
        values = yield from plan_values(prompts, plans)
        left -= len(tried)
        at = int(values.argmax())
        if values[at] > best + settings.min_gain:
            best, alphas = float(values[at]), tried[at]
    plan = bias_plan(backend.shape, direction, alphas, settings.weights)
    return Biased(float(clean), best, plan, settings.num_candidates - left, tuple(alphas))


def _rounds(settings: MascingSettings, num_layers: int) -> Iterator[tuple[int | None, float]]:
    """Which layer's strength is searched (None: all together), and how far from where it is; without end."""
    for number in range(settings.num_rounds):
        yield None, settings.max_alpha / settings.num_tries**number
    for number in itertools.count(1):
        yield from ((slot, settings.max_alpha / 2**number) for slot in range(num_layers))


def _grid(alphas: Sequence[float], slot: int | None, step: float, num: int) -> list[float]:
    """New strengths around the present one; only a single layer may be biased the other way."""
    centre = alphas[slot or 0]
    low = centre - step if slot is not None else max(0.0, centre - step)
    return [float(alpha) for alpha in np.linspace(low, centre + step, num + 1) if alpha != centre]


def _with(alphas: Sequence[float], slot: int | None, alpha: float) -> list[float]:
    """The strengths with one layer's changed; None: all layers'."""
    return [alpha if slot is None or at == slot else value for at, value in enumerate(alphas)]
