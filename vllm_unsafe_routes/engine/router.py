"""The seam at the router: how routers gate, and how a bound one is called.

Each bound router's `_compute_routing` lets the model's own gating run and then has the route kernel rewrite the tokens that
have a row. It works on logical expert ids, before vLLM's capture and before expert-parallel load balancing.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import vllm.envs as envs
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from vllm_unsafe_routes.kernels.reference import finite, soft_wishes, steer
from vllm_unsafe_routes.kernels.route_topk import route_topk
from vllm_unsafe_routes.kernels.route_topk_cpu import mask_topk_cpu, route_topk_cpu
from vllm_unsafe_routes.kernels.spec import FLAG_EXPLICIT_WEIGHTS, GatingSpec, RouteRows, RouteWatch, unpack_allowed

from ..errors import RouteError

# Classes whose own gating leaves padded tokens out (ids -1) if vLLM says which these are.
_SKIP_PADDING = (FusedTopKRouter, FusedTopKBiasRouter)
# Custom routing functions whose meaning is a plain gating: elementwise sigmoid of the selected logits.
_SIGMOID_FUNCTIONS = {
    "Llama4MoE.custom_routing_function": False,  # never renormalises
    "token_choice_with_bias": None,  # renormalises as the layer says
}
# Functions that work on the logits alone and choose within masked logits, but weigh in their own way.
_GENERIC_FUNCTIONS = frozenset({"phimoe_routing_function"})


@dataclass(frozen=True, slots=True)
class Gating:
    """How one router gates.

    Attributes:
        spec: what the route kernel needs; None: the generic path calls `function` on masked logits.
        function: the model's own routing function, for the generic path.

    """

    spec: GatingSpec | None
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


def gating_of(router: Any, num_experts: int) -> Gating:
    """Read a router's meaning off its attributes.

    Raises:
        RouteError: a class or an option that cannot be controlled; the message says which.

    """
    if getattr(router, "_hash_indices_table", None) is not None:
        raise RouteError("routes by a table of token ids, not by scores")
    if getattr(router, "bias_vl", None) is not None:
        raise RouteError("has a second routing bias for image tokens")
    if getattr(router, "num_fused_shared_experts", 0):
        raise RouteError("appends fused shared experts to the routed ones")

    def spec(scoring: str, renormalize: bool, scale: float = 1.0, **groups: Any) -> Gating:
        return Gating(
            GatingSpec(
                num_experts=num_experts,
                top_k=router.top_k,
                scoring=scoring,
                renormalize=renormalize,
                routed_scaling_factor=scale,
                **groups,
            )
        )

    def grouped() -> Gating:
        return spec(
            router.scoring_func,
            router.renormalize,
            router.routed_scaling_factor,
            num_expert_group=router.num_expert_group,
            topk_group=router.topk_group,
            group_score="max" if router.e_score_correction_bias is None else "top2",
        )

    kind = type(router)
    if kind is CPURouter:
        if router.use_grouped_topk:
            return grouped()
        if router.scoring_func == "sqrtsoftplus":
            return spec("sqrtsoftplus", True, router.routed_scaling_factor)
        if router.custom_routing_function is not None:
            return _custom(router, spec)
        if router.scoring_func != "softmax":
            raise RouteError(f"has no {router.scoring_func} gating without groups on CPU")
        return spec("softmax", router.renormalize)
    if kind is FusedTopKRouter:
        return spec(router.scoring_func, router.renormalize)
    if kind is FusedTopKBiasRouter:
        return spec(router.scoring_func, router.renormalize, router.routed_scaling_factor)
    if kind is GroupedTopKRouter:
        return grouped()
    if kind is CustomRoutingRouter:
        return _custom(router, spec)
    raise RouteError("is not a router class known here")


def _custom(router: Any, spec: Callable[..., Gating]) -> Gating:
    function = router.custom_routing_function
    name = getattr(function, "__qualname__", type(function).__qualname__).removeprefix("staticmethod.")
    if name in _SIGMOID_FUNCTIONS:
        renormalize = _SIGMOID_FUNCTIONS[name]
        return spec("sigmoid", router.renormalize if renormalize is None else renormalize)
    if name in _GENERIC_FUNCTIONS:
        return Gating(None, function)
    raise RouteError(f"calls a custom routing function {name!r} that is not known to respect masked logits")


@dataclass(slots=True)
class RouterState:
    """What a router reads on every call.

    Attributes:
        active: some token of this step may have a row.
        always: calls may be captured in graphs.
        rehearses: the engine warms up: what graphs will hold must have run once before they are captured.
        covered: MoE slots at which every token of this step is directed: what the model's own gating says is not needed.
        masks: what these ask, where that is masks and a bias for all.

    """

    active: bool = False
    always: bool = False
    rehearses: bool = False
    covered: Collection[int] = ()
    masks: Mapping[int, LayerMask] = field(default_factory=dict)

    @property
    def is_captured(self) -> bool:
        """Whether this call goes into a graph, which repeats it in later steps, whatever these ask; or is such a rehearsal."""
        return self.rehearses or (self.always and torch.cuda.is_current_stream_capturing())


class RouterHooks(NamedTuple):
    """What a bound router needs of its controller.

    Attributes:
        handle: the controller's key in `controllers`.
        state: what it reads on every call.
        fused: one kernel replaces the gating, where the gating is known.
        jittered_slots: MoE slots with noise on their logits.
        at_logits: every layer is controlled at its logits.
        has_plans: requests may bring plans.
        has_usage: picks are counted.

    """

    handle: int
    state: RouterState
    fused: bool
    jittered_slots: frozenset[int]
    at_logits: bool = False
    has_plans: bool = False
    has_usage: bool = False


class Routing(NamedTuple):
    """One call of a bound router: what gating reads and writes.

    Attributes:
        topk_weights: float32 [num_tokens, top_k], as the model's gating left them; rewritten in place.
        topk_ids: int [num_tokens, top_k], logical expert ids; likewise.
        router_logits: [num_tokens, num_experts].
        hidden_states: [num_tokens, hidden_size], for routing functions that read them.
        native_ids: int32 [num_tokens, top_k] or None: gets the picks of the model's own gating.
        route_ids: int32 [num_tokens, top_k] or None: gets the routes as they are afterwards.
        route_weights: float32 [num_tokens, top_k] or None, with `route_ids`.
        watch: what the route kernel notes of its run, None on the CPU.

    """

    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    router_logits: torch.Tensor
    hidden_states: torch.Tensor
    native_ids: torch.Tensor | None = None
    route_ids: torch.Tensor | None = None
    route_weights: torch.Tensor | None = None
    watch: RouteWatch | None = None

    def keep_native(self) -> None:
        """Write `native_ids`, before anything is directed."""
        if self.native_ids is not None:
            self.native_ids.copy_(self.topk_ids)

    def keep_routes(self) -> None:
        """Write the routes, after everything is directed."""
        if self.route_ids is not None and self.route_weights is not None:
            self.route_ids.copy_(self.topk_ids)
            self.route_weights.copy_(self.topk_weights)

    def leave_mark(self) -> None:
        """Do as the route kernel does where it is not launched."""
        if self.watch is not None:
            self.watch.mark.copy_(self.watch.step[:1])


class LayerMask(NamedTuple):
    """What all tokens of a step are asked at one layer.

    Attributes:
        banned: bool [1, num_experts], or a row for each token.
        score_bias: float32 [num_experts], added to the logits; None: nothing is.
        native_weights: the weights are those of the router's own scores.

    """

    banned: torch.Tensor
    score_bias: torch.Tensor | None = None
    native_weights: bool = False


class LayerBinding:
    """One bound MoE layer: what the custom op needs when it is called with this layer's number.

    Args:
        router: the vLLM router.
        gating: its meaning.
        fused: one kernel gates all tokens; only for a gating that the kernel knows.

    """

    def __init__(self, router: Any, gating: Gating, fused: bool) -> None:
        self.router = weakref.proxy(router)
        self.gating = gating
        self.fused = fused and gating.spec is not None
        self._skips_padding = type(router) in _SKIP_PADDING

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """The router's correction bias, float [num_experts]; read anew, because weight loading may replace it."""
        bias = getattr(self.router, "e_score_correction_bias", None)
        return None if bias is None else bias.data

    def padding(self, num_tokens: int) -> torch.Tensor | None:
        """bool [num_tokens], tokens that the model's own gating gives no expert because they only pad the batch; None: none."""
        if not (self._skips_padding and envs.VLLM_MOE_SKIP_PADDING and is_forward_context_available()):
            return None
        is_padding = get_forward_context().is_padding
        return None if is_padding is None else is_padding[:num_tokens]

    def direct(self, routing: Routing, row_index: torch.Tensor, rows: RouteRows) -> None:
        """Route the tokens whose `row_index`, int32 [num_tokens], is not -1 by their rows; with fused gating all tokens."""
        spec = self.gating.spec
        if spec is None:
            routing.keep_native()
            self._direct_generic(routing, row_index, rows)
            routing.leave_mark()
            routing.keep_routes()
            return
        if self.fused and routing.native_ids is not None:
            self._select_undirected(routing.router_logits, routing.native_ids)
        route_topk(
            routing.router_logits,
            row_index,
            rows,
            spec,
            correction_bias=self.correction_bias,
            is_padding=self.padding(len(row_index)),
            topk_weights=routing.topk_weights,
            topk_ids=routing.topk_ids,
            only_directed=not self.fused,
            native_ids=None if self.fused else routing.native_ids,
            routes_ids=routing.route_ids,
            routes_weights=routing.route_weights,
            watch=routing.watch,
        )

    def cover(self, routing: Routing, row_index: torch.Tensor, rows: RouteRows) -> None:
        """As `direct` where all tokens have a row, on CPU, where the model's own gating need not have run; see `has_mask_path`."""
        assert self.gating.spec is not None
        route_topk_cpu(
            routing.router_logits,
            row_index,
            rows,
            self.gating.spec,
            self.correction_bias,
            None,
            routing.topk_weights,
            routing.topk_ids,
            False,
            routing.native_ids,
        )
        routing.keep_routes()

    def mask(self, routing: Routing, mask: LayerMask) -> None:
        """As `cover`, by a mask."""
        assert self.gating.spec is not None
        mask_topk_cpu(
            routing.router_logits,
            mask.banned,
            self.gating.spec,
            self.correction_bias,
            mask.native_weights,
            routing.topk_weights,
            routing.topk_ids,
            mask.score_bias,
            routing.native_ids,
        )
        routing.keep_routes()

    def leave(self, routing: Routing) -> None:
        """Direct nothing; only keep what is wanted."""
        routing.keep_native()
        routing.keep_routes()
        routing.leave_mark()

    def use_policy(self, mask: LayerMask) -> None:
        """Another policy holds here from now on; the rows of the table say so as well."""

    def refusal(self, banned: torch.Tensor, native_weights: bool) -> str | None:
        """Why a policy with these bans, bool [num_experts], cannot be kept here."""
        return None

    @property
    def has_mask_path(self) -> bool:
        """Whether `cover` and `mask` know this gating."""
        return self.gating.spec is not None and not self.gating.spec.grouped

    def _select_undirected(self, router_logits: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """Write what the model's gating picks without any directive; `topk_ids` is int32 [num_tokens, top_k]."""
        assert self.gating.spec is not None
        route_topk(
            router_logits,
            None,
            None,
            self.gating.spec,
            correction_bias=self.correction_bias,
            topk_weights=torch.empty(topk_ids.shape, dtype=torch.float32, device=topk_ids.device),
            topk_ids=topk_ids,
        )

    def _direct_generic(self, routing: Routing, row_index: torch.Tensor, rows: RouteRows) -> None:
        function = self.gating.function
        assert function is not None
        topk_weights, topk_ids, router_logits = routing.topk_weights, routing.topk_ids, routing.router_logits
        directed = (row_index >= 0).unsqueeze(1)
        row = row_index.clamp(min=0).long()
        allowed = unpack_allowed(rows.allowed[row], router_logits.shape[1])  # a forced row's words hold its own experts
        # float32: a promoted expert must not tie with the largest.
        biased, promoted, demoted = soft_wishes(finite(router_logits.float()), allowed, rows.flags[row], row, rows)
        steered = biased if promoted is None or demoted is None else steer(biased, allowed, promoted, demoted)
        masked = torch.where(directed, steered.masked_fill(~allowed, float("-inf")), router_logits)
        weights, ids = function(
            hidden_states=routing.hidden_states,
            gating_output=masked,
            topk=topk_ids.shape[1],
            renormalize=self.router.renormalize,
        )
        explicit = ((rows.flags[row] & FLAG_EXPLICIT_WEIGHTS) != 0).unsqueeze(1)
        weights = torch.where(explicit, rows.forced_weights[row], weights.float())
        ids = torch.where(explicit, rows.forced_ids[row].to(ids.dtype), ids)
        topk_weights.copy_(torch.where(directed, weights, topk_weights))
        topk_ids.copy_(torch.where(directed, ids.to(topk_ids.dtype), topk_ids))


# Controllers by handle: a custom op takes integers, not objects.
controllers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


@torch.library.custom_op("unsafe_routes::direct_routes", mutates_args=("topk_weights", "topk_ids"))
def direct_routes(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    router_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    handle: int,
    slot: int,
) -> None:
    """Apply the current step's directives of one layer; opaque to torch.compile, which must not bake in a step's state."""
    controllers[handle].direct(slot, topk_weights, topk_ids, router_logits, hidden_states)


@direct_routes.register_fake
def _(
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    router_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    handle: int,
    slot: int,
) -> None:
    return None


@torch.library.custom_op("unsafe_routes::jitter_router_logits", mutates_args=())
def jitter_router_logits(router_logits: torch.Tensor, handle: int, slot: int) -> torch.Tensor:
    """The step's noise on one layer's logits; opaque to torch.compile for the same reason."""
    jittered: torch.Tensor = controllers[handle].jitter(slot, router_logits)
    return jittered


@jitter_router_logits.register_fake
def _(router_logits: torch.Tensor, handle: int, slot: int) -> torch.Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def jittered_logits(router_logits: torch.Tensor, handle: int, slot: int) -> torch.Tensor:
    """A layer's logits with this step's noise, in traced code and else."""
    if torch.compiler.is_compiling():
        jittered: torch.Tensor = torch.ops.unsafe_routes.jitter_router_logits(router_logits, handle, slot)
    else:
        jittered = controllers[handle].jitter(slot, router_logits)
    return jittered


def wrap_compute_routing(router: Any, binding: LayerBinding, slot: int, hooks: RouterHooks) -> None:
    """Have a router ask its controller, MoE layer `slot`, for every batch."""
    own = router._compute_routing
    handle, state = hooks.handle, hooks.state
    fused, jittered, top_k = binding.fused, slot in hooks.jittered_slots, router.top_k

    def _compute_routing(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if jittered:
            router_logits = jittered_logits(router_logits, handle, slot)
        # Traced or captured code runs for all later steps, so it always asks; eager code can see that nobody is there.
        traced = torch.compiler.is_compiling()
        if fused or (not traced and slot in state.covered):
            shape = (router_logits.shape[0], top_k)
            topk_weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
            topk_ids = torch.empty(shape, dtype=indices_type or torch.int32, device=router_logits.device)
        else:
            topk_weights, topk_ids = own(hidden_states, router_logits, indices_type, input_ids=input_ids)
        if traced:
            torch.ops.unsafe_routes.direct_routes(topk_weights, topk_ids, router_logits, hidden_states, handle, slot)
        elif fused or state.always or state.active:
            controllers[handle].direct(slot, topk_weights, topk_ids, router_logits, hidden_states)
        return topk_weights, topk_ids

    router._compute_routing = types.MethodType(_compute_routing, router)
