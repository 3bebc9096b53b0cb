"""Prefix-cache keys that know about routes.

vLLM keys a KV block by the hash of its tokens, its parent block and "extra keys". The plan's directives for the block's own
positions become such a key: requests share every block before their first different directive and none after it (the chain
of parents carries a difference forward). The policy's digest goes into the first block of every request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..compiled import CompiledPlan
from ..compiler import PlanCompiler
from ..errors import RouteError
from ..extras import RouteExtras
from ..policy import ActivePolicy
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
        extras: what the request carries for us; None: nothing.
        policy_digest: digest of the policy that the engine enforces, None without one.
        generation: how many policies the engine had before the one that this was made under.
        earlier: digests of the policies under which the request's first output tokens were sampled, before a swap.
        refusal: why the policy does not permit the plan; None: it does. Only after a swap that the front end had not heard of.

    """

    plan: CompiledPlan | None
    extras: RouteExtras | None
    policy_digest: str | None
    generation: int = 0
    earlier: tuple[str | None, ...] = ()
    refusal: RouteError | None = None

    @property
    def tracked(self) -> bool:
        """Whether the workers report what they set for this request."""
        return self.extras is not None


class RequestContexts:
    """Makes the contexts of one engine core's requests.

    Args:
        vllm_config: the engine's config; must ask for route control.

    """

    def __init__(self, vllm_config: Any) -> None:
        config = route_config(vllm_config)
        assert config is not None
        self.use(config.active_policy(), config.compiler(model_shape(vllm_config)), 0)

    def use(self, active: ActivePolicy, compiler: PlanCompiler, generation: int) -> None:
        """Make later contexts under this policy. Another thread may be making one: it sees all of the old or all of the new."""
        self._current = (compiler, RouteContext(None, None, active.cache_digest, generation))

    def of(self, sampling_params: Any) -> RouteContext:
        """The context of a request with these sampling params (None for pooling)."""
        extras = RouteExtras.parse(sampling_params.extra_args if sampling_params is not None else None)
        compiler, plain = self._current
        if extras is None:
            return plain
        compiled = compiler.compile_text(extras.plan, extras.delta) if extras.has_plan else None
        return RouteContext(compiled, extras, plain.policy_digest, plain.generation)

    def build(self, request: Any, make: Callable[[], Any]) -> Any:
        """Run `make`, which constructs the scheduler's request, with the context in reach of the block hasher."""
        try:
            context = self.of(request.sampling_params)
        except RouteError as error:
            # The scheduler's thread tells the client (`RouteAdmission.admit`); from here it would be an internal error.
            plain = self._current[1]
            context = RouteContext(None, None, plain.policy_digest, plain.generation, refusal=error)
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
    extras = context.extras
    if extras is not None and context.plan is not None:
        key = context.plan.cache_key(start, end, extras.prompt_len(request.num_prompt_tokens))
        if key is not None:
            keys.append((KEY_TAG, "plan:" + key.hex()))
    if extras is not None and extras.score is not None and end > extras.score.first_row:
        # A scored row must be computed by the request that asks for it: nobody else finds these blocks.
        keys.append((KEY_TAG, "score:" + request.request_id))
    return tuple(keys)
