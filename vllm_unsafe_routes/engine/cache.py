"""Prefix-cache keys that know about routes.

vLLM keys a KV block by the hash of its tokens, its parent block and "extra keys". The plan's directives for the block's own
positions become such a key: requests share every block before their first different directive and none after it (the chain
of parents carries a difference forward). The policy's digest goes into the first block of every request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..compiled import CompiledPlan, PlanCompiler
from ..plan import PLAN_KEY, RETURN_ROUTES_KEY
from .config import model_shape, route_config

CONTEXT_ATTRIBUTE = "unsafe_routes_context"
KEY_TAG = "unsafe_routes"
# Requests that are being built: their hashes are made in the constructor, before the context can be hung on them.
_being_built: dict[str, RouteContext] = {}


@dataclass(frozen=True, slots=True)
class RouteContext:
    """What the engine core remembers of a request.

    Attributes:
        plan: the compiled plan, None if the request has none.
        wants_routes: whether the routes used must come back.
        policy_digest: digest of the engine's policy, None without one.

    """

    plan: CompiledPlan | None
    wants_routes: bool
    policy_digest: str | None

    @property
    def tracked(self) -> bool:
        """Whether the request gets a receipt."""
        return self.plan is not None or self.wants_routes


class RequestContexts:
    """Makes the contexts of one engine core's requests.

    Args:
        vllm_config: the engine's config; must ask for route control.

    """

    def __init__(self, vllm_config: Any) -> None:
        config = route_config(vllm_config)
        assert config is not None
        self.compiler: PlanCompiler = config.compiler(model_shape(vllm_config))
        policy = self.compiler.policy
        self._plain = RouteContext(None, False, policy.digest if policy else None)

    def of(self, sampling_params: Any) -> RouteContext:
        """The context of a request with these sampling params (None for pooling)."""
        extra = sampling_params.extra_args if sampling_params is not None else None
        if not extra or not (PLAN_KEY in extra or RETURN_ROUTES_KEY in extra):
            return self._plain
        text = extra.get(PLAN_KEY)
        compiled = self.compiler.compile_text(text) if text is not None else None
        return RouteContext(compiled, bool(extra.get(RETURN_ROUTES_KEY)), self._plain.policy_digest)

    def build(self, request: Any, make: Callable[[], Any]) -> Any:
        """Run `make`, which constructs the scheduler's request, with the context in reach of the block hasher."""
        context = self.of(request.sampling_params)
        _being_built[request.request_id] = context
        try:
            made = make()
        finally:
            del _being_built[request.request_id]
        setattr(made[0], CONTEXT_ATTRIBUTE, context)
        return made


def context_of(request: Any) -> RouteContext | None:
    """The context of a scheduler's request, None for an engine without route control."""
    context: RouteContext | None = request.__dict__.get(CONTEXT_ATTRIBUTE)
    return context if context is not None else _being_built.get(request.request_id)


def route_extra_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Extra hash keys of the block that holds positions `start` to `end` (exclusive)."""
    context = context_of(request)
    if context is None:
        return ()
    keys = []
    if start == 0 and context.policy_digest is not None:
        keys.append((KEY_TAG, "policy:" + context.policy_digest))
    if context.plan is not None:
        key = context.plan.cache_key(start, end, request.num_prompt_tokens)
        if key is not None:
            keys.append((KEY_TAG, "plan:" + key.hex()))
    return tuple(keys)
