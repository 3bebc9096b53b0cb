"""L3, "Large Language Lobotomy" (arXiv 2602.08741): silence the expert that matters most, rank the others again, silence the next.

Goes on until the target's probability reaches tau, nothing gains, a layer's share of experts or the budget is used up. The paper
learns which experts matter from a surrogate of the routing and its gradients, and takes the model's answer as its sign to stop;
here an expert matters by what the target gains without it, measured, so that no surrogate is needed and a policy is respected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np

from ..errors import RouteError
from ..plan import RoutePlan
from .backend import Backend, Search
from .candidates import At, Chosen, can_silence, check_prompts, plan_values, silencing_plan
from .rosais import Prompt


@dataclass(frozen=True, slots=True)
class SilencingSettings:
    """Settings of adaptive silencing.

    Attributes:
        max_share: of a layer's experts that may be silenced; at least one. The paper needs less than a fifth.
        num_candidates: plans scored at most, the empty one among them.
        num_ranked: experts ranked again after one was silenced: those that gained most before. None: all.
        tau: probability of the target at which to stop.
        min_gain: nats that silencing an expert must gain.

    """

    max_share: float = 0.2
    num_candidates: int = 256
    num_ranked: int | None = 16
    tau: float = 0.8
    min_gain: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 < self.max_share <= 1:
            raise RouteError(f"max_share must be in (0, 1], got {self.max_share}")
        if not 0 < self.tau <= 1:
            raise RouteError(f"tau must be in (0, 1], got {self.tau}")
        if self.num_candidates < 2:
            raise RouteError(f"num_candidates must be at least 2, got {self.num_candidates}")
        if self.num_ranked is not None and self.num_ranked < 1:
            raise RouteError(f"num_ranked must be at least 1, got {self.num_ranked}")


@dataclass(frozen=True, slots=True, eq=False)
class Silenced(Chosen):
    """What was silenced.

    Attributes:
        experts: (decoder layer, expert), in the order in which they were silenced.

    """

    experts: tuple[At, ...] = ()


def silence(backend: Backend, prompts: Sequence[Prompt], settings: SilencingSettings) -> Search[Silenced]:
    """Silence experts one after another.

    Args:
        backend: for the model's shape and policy.
        prompts: one, or several that share the silenced experts; then the mean of the targets' log-probabilities counts.
        settings: settings.

    """
    check_prompts(backend, prompts)
    free = can_silence(backend, max(1, int(settings.max_share * backend.shape.num_experts)))
    (clean,) = yield from plan_values(prompts, [RoutePlan()])
    best, candidates = float(clean), 1
    taken: list[At] = []
    # What each expert gained when it was last tried; all are tried before any is tried again.
    ranked: list[At] = [(layer, expert) for layer, (experts, _) in free.items() for expert in experts]
    while best < log(settings.tau):
        room = [at for at in ranked if at not in taken and sum(layer == at[0] for layer, _ in taken) < free[at[0]][1]]
        tries = room[: settings.num_candidates - candidates]
        if taken and settings.num_ranked is not None:
            tries = tries[: settings.num_ranked]
        if not tries:
            break
        values = yield from plan_values(prompts, [silencing_plan([*taken, at]) for at in tries])
        candidates += len(tries)
        order = np.argsort(-values, kind="stable")
        ranked = [tries[at] for at in order] + [at for at in room if at not in tries]
        if values[order[0]] <= best + settings.min_gain:
            break
        best = float(values[order[0]])
        taken.append(ranked[0])
    return Silenced(float(clean), best, silencing_plan(taken), candidates, tuple(taken))
