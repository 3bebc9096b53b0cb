"""Binding: every MoE layer of a model at one of two seams, or none.

A layer is controlled at its router (`router.py`), or where its kernel routes inside itself, at its logits (`logits_seam.py`).
Whatever cannot be controlled stops the engine here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from ..errors import RouteError
from ..shape import ModelShape
from .backends import modular_backends
from .logits_seam import LogitsBinding, check_probe, refuse_plans, wrap_dispatch
from .router import Gating, LayerBinding, RouterHooks, gating_of, wrap_compute_routing

OFF_HELP = "serve the model without a policy and without overrides, or set VLLM_UNSAFE_ROUTES_DISABLE=1"
# MoE layers whose every path to the experts was read: it asks the router. The classes are named, because two of their modules
# import what only some platforms have.
_RUNNERS = (
    "vllm.model_executor.layers.fused_moe.runner.moe_runner.MoERunner",
    "vllm.model_executor.models.transformers.moe.TransformersMoERunner",
    "vllm.models.kimi_k3.nvidia.latent_moe_runner.LatentMoERunner",
)


def bind_routers(model: torch.nn.Module, shape: ModelShape, hooks: RouterHooks, layers: range) -> Mapping[int, LayerBinding]:
    """Take control of every MoE layer of a loaded model.

    Args:
        model: the loaded model.
        shape: what the front end believes the model to be.
        hooks: what the routers need of their controller.
        layers: decoder layers that this pipeline rank holds.

    Returns:
        MoE slot -> binding.

    Raises:
        RouteError: a layer cannot be controlled, or the model has other MoE layers than `shape` says.

    """
    bindings: dict[int, LayerBinding] = {}
    probed: set[Any] = set()
    for name, runner in moe_runners(model):
        layer = int(runner.layer_id)
        try:
            seam = check_layer(runner, shape, hooks)
            slot = shape.slot_of_layer[layer]
            if slot in bindings:
                raise RouteError("the layer has a second router")
            bindings[slot] = _bind(runner, seam, slot, hooks, probed)
        except RouteError as error:
            raise RouteError(f"MoE layer {layer} ({name}): {error}; {OFF_HELP}") from None
    missing = [layer for layer in shape.moe_layers if layer in layers and shape.slot_of_layer[layer] not in bindings]
    if missing:
        raise RouteError(f"MoE layer {missing[0]} has no router that could be found in {type(model).__name__}; {OFF_HELP}")
    return bindings


def moe_runners(model: torch.nn.Module) -> Iterator[tuple[str, MoERunner]]:
    """Name and module of each MoE layer."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoERunner))


def _bind(runner: Any, seam: Seam, slot: int, hooks: RouterHooks, probed: set[Any]) -> LayerBinding:
    """Bind a layer; `probed` holds what kernels were asked, because layers of one model share them."""
    if not seam.at_logits:
        binding = LayerBinding(runner.router, seam.gating, hooks.fused)
        wrap_compute_routing(runner.router, binding, slot, hooks)
        return binding
    masked = LogitsBinding(runner, seam.gating, hooks.has_plans)
    kernel = (experts_of(runner), type(runner.router), seam.gating, bool(masked.biases))
    # Without weights (`doctor`) there is nothing to ask.
    if kernel not in probed and masked.device.type != "meta":
        try:
            check_probe(runner, masked)
        except RouteError as error:
            raise RouteError(f"{error}; choose another kernel with {_advice(runner)}") from None
        probed.add(kernel)
    wrap_dispatch(runner, masked, slot, hooks)
    return masked


class Seam(NamedTuple):
    """Where a layer is controlled.

    Attributes:
        gating: how it gates.
        at_logits: at its logits; else at its router.

    """

    gating: Gating
    at_logits: bool


def experts_of(runner: Any) -> str:
    """Class of a MoE layer's expert kernels, or of its quantisation method where that has no other."""
    method = runner.routed_experts.quant_method
    return (getattr(method, "experts_cls", None) or type(method)).__name__


def _advice(runner: Any) -> str:
    return f"--moe-backend {' or '.join(modular_backends(runner.routed_experts.quant_method))}"


def check_layer(runner: Any, shape: ModelShape, hooks: RouterHooks) -> Seam:
    """Where a MoE layer can be controlled; changes nothing.

    Raises:
        RouteError: it cannot be controlled.

    """
    if int(runner.layer_id) not in shape.slot_of_layer:
        raise RouteError(f"the model's config does not announce it; MoE layers by config are {shape.describe_layers()}")
    kind = type(runner)
    if f"{kind.__module__}.{kind.__qualname__}" not in _RUNNERS:
        raise RouteError(f"MoE runner {kind.__name__} is not a class known here: it may reach its experts without the router")
    is_monolithic = runner.routed_experts.quant_method.is_monolithic
    if is_monolithic and (hooks.has_plans or hooks.has_usage) and not hooks.at_logits:
        method = type(runner.routed_experts.quant_method).__name__
        raise RouteError(
            f"the monolithic expert kernel of {method} routes inside itself; for plans and usage choose a modular one with "
            f"{_advice(runner)}, or for plans that only mask and bias 'seam': 'logits'"
        )
    if runner.do_naive_dispatch_combine:
        method = type(runner.routed_experts.quant_method).__name__
        raise RouteError(f"{method} gathers the tokens of all data-parallel ranks before routing, which nobody has tried")
    router = runner.router
    if not isinstance(router, BaseRouter):
        raise RouteError(f"router {type(router).__name__} is not a BaseRouter")
    try:
        gating = gating_of(router, shape.num_experts)
    except RouteError as error:
        raise RouteError(f"router {type(router).__name__} {error}") from None
    # Expert-parallel load balancing adds physical copies; the router still scores logical experts.
    if router.top_k != shape.top_k or router.global_num_experts < shape.num_experts:
        raise RouteError(
            f"the router picks {router.top_k} of {router.global_num_experts} experts, the model's config says "
            f"{shape.top_k} of {shape.num_experts}"
        )
    if gating.spec is None and shape.native_weights:
        raise RouteError(f"its routing function has no native weights, which model_type {shape.model_type!r} should have")
    seam = Seam(gating, is_monolithic or hooks.at_logits)
    if seam.at_logits:
        if kind is not MoERunner:
            raise RouteError(f"MoE runner {kind.__name__} is not known to hand on its logits as MoERunner does")
        if hooks.has_plans:
            refuse_plans(gating, getattr(router, "e_score_correction_bias", None))
    return seam
