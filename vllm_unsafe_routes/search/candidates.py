"""Whole plans as candidates: what recipes share that choose among plans instead of routes.

A recipe's statistic says which experts; how many of them, or how strongly, is chosen here by the target's log-probability, on one
prompt (its own plan) or on several (one plan for all). All plans of a round go to the scorer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..cells import CellScores
from ..plan import RoutePlan
from .backend import Backend, Search
from .masks import Experts
from .rosais import Prompt
from .scorer import check_length

# A layer and one of its experts.
At = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What a recipe chose.

    Attributes:
        clean: log-probability of the target without a plan, nats; mean over the prompts.
        value: the same under the plan.
        plan: the plan; without directives where none was better than no plan.
        candidates: plans scored, each on every prompt; the empty one counts.

    """

    clean: float
    value: float
    plan: RoutePlan
    candidates: int


def plan_values(prompts: Sequence[Prompt], plans: Sequence[RoutePlan]) -> Search[npt.NDArray[np.float64]]:
    """Log-probability of the target under each plan, in nats, mean over the prompts; float64 [num_plans]."""
    texts = [plan.to_string() if len(plan) else None for plan in plans]
    found: list[CellScores] = yield [prompt.cells(text, [[]]) for text in texts for prompt in prompts]
    values: npt.NDArray[np.float64] = np.array([one.values[0] for one in found]).reshape(len(plans), len(prompts)).mean(1)
    return values


def best_plan(backend: Backend, prompts: Sequence[Prompt], plans: Sequence[RoutePlan]) -> Search[Chosen]:
    """The best of these plans and none; of equal ones the first."""
    check_prompts(backend, prompts)
    tried = [RoutePlan(), *plans]
    values = yield from plan_values(prompts, tried)
    best = int(values.argmax())
    return Chosen(float(values[0]), float(values[best]), tried[best], len(tried))


def check_prompts(backend: Backend, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that do not fit the model's context with their targets."""
    for prompt in prompts:
        check_length(backend, len(prompt.token_ids) + len(prompt.target) - 1, f"prompt {prompt.id}")


def can_silence(backend: Backend, most: int | None = None) -> dict[int, tuple[list[int], int]]:
    """MoE layer -> the experts that a plan may disable under the engine's policy, and how many of them at once.

    Args:
        backend: for the model's shape and policy.
        most: a further limit for each layer.

    """
    experts = Experts(backend.shape, backend.policy)
    found = {}
    for layer, free in experts.free.items():
        room = len(free) + len(experts.protected[layer]) - backend.shape.top_k
        found[layer] = (free, min(len(free), room, room if most is None else most))
    return found


def under_policy(backend: Backend, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Values of experts, float64 [num_moe_layers, num_experts], with zeros for those that the policy disables or protects."""
    kept = np.zeros_like(values)
    for row, (layer, free) in zip(kept, Experts(backend.shape, backend.policy).free.items(), strict=True):
        row[free] = values[backend.shape.slot_of_layer[layer], free]
    return kept


def silencing_plan(silenced: Sequence[At]) -> RoutePlan:
    """A plan that disables these (layer, expert) for all tokens."""
    by_layer: dict[int, list[int]] = {}
    for layer, expert in silenced:
        by_layer.setdefault(layer, []).append(expert)
    plan = RoutePlan()
    for layer, experts in sorted(by_layer.items()):
        plan.disable(layer, "all", sorted(experts))
    return plan
