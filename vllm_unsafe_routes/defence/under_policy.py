"""A policy tried out without restarting the engine: its bans and biases are added to every request's plan.

They mean the same to a router there, so a policy can be measured before it is enforced. Only the engine's
own enforcement binds other clients; what is reported of a finished policy is measured under that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from ..cells import Cells, CellScores
from ..errors import RouteError
from ..plan import RoutePlan
from ..policy import RoutePolicy
from ..search.backend import About, Backend, Request, Response
from .attacks import Arena


def under(arena: Arena, policy: RoutePolicy) -> Arena:
    """The same place under a policy."""
    return replace(arena, bench=replace(arena.bench, backend=PolicyBackend(arena.bench.backend, policy)))


class PolicyBackend:
    """A backend that treats its requests as an engine with `policy` would.

    Args:
        backend: an engine without a policy.
        policy: what to try.

    Raises:
        RouteError: the engine has a policy of its own, or this one does not fit the model.

    """

    def __init__(self, backend: Backend, policy: RoutePolicy) -> None:
        if backend.policy is not None:
            raise RouteError("a policy can be tried on an engine without one only")
        policy.validate(backend.shape)
        self._backend = backend
        self.policy: RoutePolicy | None = policy
        self.shape, self.max_model_len, self.capacity = backend.shape, backend.max_model_len, backend.capacity
        self._layers = {layer: entry for layer, entry in policy.layers.items() if entry.routes}
        self._under_policy = lru_cache(maxsize=256)(self._add_policy)

    def _add_policy(self, text: str | None) -> str:
        assert self.policy is not None
        plan = RoutePlan(weights=self.policy.weights) if text is None else RoutePlan.from_string(text)
        if plan.weights != self.policy.weights:
            # One plan has one weight mode, and an engine would weigh the policy's layers by the policy's.
            raise RouteError(f"a policy with {self.policy.weights} weights cannot be tried under a plan with {plan.weights} ones")
        for layer, entry in self._layers.items():
            if entry.disabled:
                plan.disable(layer, "all", sorted(entry.disabled))
            if entry.bias:
                plan.bias(layer, "all", entry.bias)
        return plan.to_string()

    def submit(self, number: int, request: Request) -> None:
        """Start a request under the policy."""
        if self._layers:
            request = replace(request, extras=replace(request.extras, plan=self._under_policy(request.extras.plan)))
        self._backend.submit(number, request)

    def score_cells(self, items: Sequence[Cells]) -> list[CellScores] | None:
        """Score candidates under the policy."""
        if self._layers:
            items = [replace(item, plan=self._under_policy(item.plan)) for item in items]
        return self._backend.score_cells(items)

    def poll(self) -> list[tuple[int, Response | RouteError]]:
        """As the engine's."""
        return self._backend.poll()

    def about(self) -> About:
        """As the engine's."""
        return self._backend.about()
