"""A gate that cannot gate, found when the model is loaded: all zero, so that every token gets the first experts, or not finite."""

from __future__ import annotations

import torch
from vllm.model_executor.layers.linear import LinearBase

from ..shape import ModelShape
from .bind import moe_runners
from .log import logger_of

logger = logger_of(__name__)

_NUM_TOKENS = 4


@torch.inference_mode()
def warn_of_gates(model: torch.nn.Module, shape: ModelShape, device: torch.device) -> None:
    """Name each broken gate in a warning. A gate is asked for logits, because on CPU vLLM packs its weights.

    Args:
        model: the loaded model; nothing is said of one on the meta device, nor of gates that are no linear layers of vLLM.
        shape: what it is believed to be.
        device: where it runs.

    """
    modules = dict(model.named_modules())
    for name, runner in moe_runners(model):
        block = name.rpartition(".")[0]
        for gate_name, gate in modules[block].named_modules(prefix=block):
            if not isinstance(gate, LinearBase) or gate.output_size != shape.num_experts:
                continue
            if any(weight.is_meta for weight in gate.parameters()):
                continue
            said = gate(torch.randn(_NUM_TOKENS, gate.input_size, dtype=gate.params_dtype, device=device))
            fault = _fault(said[0] if isinstance(said, tuple) else said)
            if fault is not None:
                logger.warning("MoE layer %d: the gate %s %s", int(runner.layer_id), gate_name, fault)


def _fault(router_logits: torch.Tensor) -> str | None:
    if not router_logits.isfinite().all():
        return "is not finite: its routes mean nothing"
    is_flat = bool((router_logits == router_logits[:, :1]).all())
    return "says the same of all experts: every token gets the first ones" if is_flat else None
