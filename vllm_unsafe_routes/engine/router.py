"""The router binding: every MoE layer of a model, or none.

Each bound router's `_compute_routing` lets the model's own gating run and then has the route kernel rewrite the tokens that
have a row. It works on logical expert ids, before vLLM's capture and before expert-parallel load balancing. Whatever cannot
be controlled stops the engine here.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from vllm_unsafe_routes.kernels.route_topk import route_topk
from vllm_unsafe_routes.kernels.route_topk_cpu import mask_topk_cpu
from vllm_unsafe_routes.kernels.spec import FLAG_EXPLICIT_WEIGHTS, GatingSpec, RouteRows, unpack_allowed

from ..errors import RouteError
from ..shape import ModelShape

_OFF_HELP = "serve the model without a policy and without overrides, or set VLLM_UNSAFE_ROUTES_DISABLE=1"
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
        bias: the correction bias parameter's owner attribute, read at call time because weight loading may replace it.

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


class LayerBinding:
    """One bound MoE layer: what the custom op needs when it is called with this layer's number.

    Args:
        router: the vLLM router.
        gating: its meaning.
        slot: index among the model's MoE layers.

    """

    def __init__(self, router: Any, gating: Gating, slot: int) -> None:
        self.router = weakref.proxy(router)
        self.gating = gating
        self.slot = slot

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """The router's correction bias, float [num_experts]; read anew, because weight loading may replace it."""
        bias = getattr(self.router, "e_score_correction_bias", None)
        return None if bias is None else bias.data

    def direct(
        self,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor,
        row_index: torch.Tensor,
        rows: RouteRows,
        only_directed: bool = True,
    ) -> None:
        """Rewrite, in place, the routes of tokens whose `row_index` is not -1.

        Args:
            topk_weights: float32 [num_tokens, top_k], as the model's gating left them.
            topk_ids: int [num_tokens, top_k], logical expert ids.
            router_logits: [num_tokens, num_experts].
            hidden_states: [num_tokens, hidden_size], for the generic path.
            row_index: int32 [num_tokens].
            rows: the route table.
            only_directed: False gates all tokens here; the model's own gating has not run.

        """
        spec = self.gating.spec
        if spec is None:
            self._direct_generic(topk_weights, topk_ids, router_logits, hidden_states, row_index, rows)
            return
        route_topk(
            router_logits,
            row_index,
            rows,
            spec,
            correction_bias=self.correction_bias,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            indices_dtype=topk_ids.dtype,
            only_directed=only_directed,
        )

    def mask(
        self,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        banned: torch.Tensor,
        native_weights: bool,
    ) -> None:
        """Route all tokens by one mask, on CPU; `banned` is bool [1, num_experts]. Only where `has_mask_path`."""
        assert self.gating.spec is not None
        mask_topk_cpu(
            router_logits,
            banned,
            self.gating.spec,
            self.correction_bias,
            native_weights,
            topk_weights,
            topk_ids,
        )

    @property
    def has_mask_path(self) -> bool:
        """Whether `mask` knows this gating."""
        return self.gating.spec is not None and not self.gating.spec.grouped

    def select_undirected(self, router_logits: torch.Tensor, topk_ids: torch.Tensor) -> None:
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

    def _direct_generic(
        self,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor,
        row_index: torch.Tensor,
        rows: RouteRows,
    ) -> None:
        function = self.gating.function
        assert function is not None
        directed = (row_index >= 0).unsqueeze(1)
        row = row_index.clamp(min=0).long()
        allowed = unpack_allowed(rows.allowed[row], router_logits.shape[1])  # a forced row's words hold its own experts
        masked = router_logits.masked_fill(directed & ~allowed, float("-inf"))
        weights, ids = function(
            hidden_states=hidden_states,
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
    return controllers[handle].jitter(slot, router_logits)


@jitter_router_logits.register_fake
def _(router_logits: torch.Tensor, handle: int, slot: int) -> torch.Tensor:
    return torch.empty_like(router_logits, memory_format=torch.contiguous_format)


def bind_routers(model: torch.nn.Module, shape: ModelShape, controller: Any, layers: range) -> Mapping[int, LayerBinding]:
    """Take control of every MoE layer of a loaded model.

    Args:
        model: the loaded model.
        shape: what the front end believes the model to be.
        controller: owner of the step's state, with `handle`, `state`, `fused` and `jittered_slots`.
        layers: decoder layers that this pipeline rank holds.

    Returns:
        MoE slot -> binding.

    Raises:
        RouteError: a layer cannot be controlled, or the model has other MoE layers than `shape` says.

    """
    bindings: dict[int, LayerBinding] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MoERunner):
            continue
        layer = int(module.layer_id)
        place = f"MoE layer {layer} ({name})"
        slot = shape.slot_of_layer.get(layer)
        if slot is None:
            raise RouteError(
                f"{place}: the model's config does not announce it; MoE layers by config are {shape.describe_layers()}; {_OFF_HELP}"
            )
        if slot in bindings:
            raise RouteError(f"{place}: the layer has a second router; {_OFF_HELP}")
        if module.routed_experts.quant_method.is_monolithic:
            experts = type(module.routed_experts.quant_method).__name__
            raise RouteError(
                f"{place}: the monolithic expert kernel of {experts} routes inside itself and cannot be controlled; "
                f"choose a modular one with --moe-backend triton, or {_OFF_HELP}"
            )
        router = module.router
        if not isinstance(router, BaseRouter):
            raise RouteError(f"{place}: router {type(router).__name__} is not a BaseRouter; {_OFF_HELP}")
        try:
            gating = gating_of(router, shape.num_experts)
        except RouteError as error:
            raise RouteError(f"{place}: router {type(router).__name__} {error}; {_OFF_HELP}") from None
        # Expert-parallel load balancing adds physical copies; the router still scores logical experts.
        if router.top_k != shape.top_k or router.global_num_experts < shape.num_experts:
            raise RouteError(
                f"{place}: the router picks {router.top_k} of {router.global_num_experts} experts, the model's config says "
                f"{shape.top_k} of {shape.num_experts}; {_OFF_HELP}"
            )
        if gating.spec is None and shape.native_weights:
            raise RouteError(
                f"{place}: its routing function has no native weights, which model_type {shape.model_type!r} should have"
            )
        bindings[slot] = LayerBinding(router, gating, slot)
        # A model's own routing function has no fused form.
        _wrap_compute_routing(
            router, controller, slot, controller.fused and gating.spec is not None, slot in controller.jittered_slots
        )
    missing = [layer for layer in shape.moe_layers if layer in layers and shape.slot_of_layer[layer] not in bindings]
    if missing:
        raise RouteError(f"MoE layer {missing[0]} has no router that could be found in {type(model).__name__}; {_OFF_HELP}")
    return bindings


def _wrap_compute_routing(router: Any, controller: Any, slot: int, fused: bool, jittered: bool) -> None:
    own = router._compute_routing
    handle = controller.handle
    state = controller.state
    # The controller holds the routers through its model; no cycle back.
    controller = weakref.ref(controller)
    top_k = router.top_k

    def _compute_routing(
        self: Any,
        hidden_states: torch.Tensor,
        router_logits: torch.Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if jittered:
            if torch.compiler.is_compiling():
                router_logits = torch.ops.unsafe_routes.jitter_router_logits(router_logits, handle, slot)
            else:
                router_logits = controller().jitter(slot, router_logits)
        if fused:
            shape = (router_logits.shape[0], top_k)
            topk_weights = torch.empty(shape, dtype=torch.float32, device=router_logits.device)
            topk_ids = torch.empty(shape, dtype=indices_type or torch.int32, device=router_logits.device)
        else:
            topk_weights, topk_ids = own(hidden_states, router_logits, indices_type, input_ids=input_ids)
        # Traced or captured code runs for all later steps, so it always asks; eager code can see that nobody is there.
        if torch.compiler.is_compiling():
            torch.ops.unsafe_routes.direct_routes(topk_weights, topk_ids, router_logits, hidden_states, handle, slot)
        elif fused or state.always or state.active:
            controller().direct(slot, topk_weights, topk_ids, router_logits, hidden_states)
        return topk_weights, topk_ids

    router._compute_routing = types.MethodType(_compute_routing, router)
