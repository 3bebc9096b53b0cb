"""The active policy in the route table: one row a layer that it bans or biases something at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_unsafe_routes.kernels.route_topk import uses_triton

from ..compiled import NO_ROW
from ..compiler import PlanCompiler
from ..errors import RouteError
from ..policy import ActivePolicy
from ..shape import ModelShape
from .config import RouteConfig
from .device_table import DeviceTable
from .router import LayerBinding, LayerMask, RouterState
from .row_index import RowIndex
from .step_masks import step_masks


class PolicyRows:
    """What the active policy asks of each layer.

    Args:
        config: the engine's route settings.
        shape: the model.
        bindings: its bound layers, by MoE slot.
        table: the route table.
        index: the row index, which holds the policy's rows for tokens without a plan.

    Attributes:
        compiler: compiles plans under the policy.
        row_of: int32 [MoE layers], the policy's row of each layer, -1 for none.
        maskable: MoE slots whose gating is done here on the CPU as soon as it is directed for all tokens.
        masks: MoE slot -> what it bans and biases there, where a CPU step without plans is routed by the policy alone.

    """

    def __init__(
        self,
        config: RouteConfig,
        shape: ModelShape,
        bindings: Mapping[int, LayerBinding],
        table: DeviceTable,
        index: RowIndex,
    ) -> None:
        self._config = config
        self._shape = shape
        self._bindings = bindings
        self._table = table
        self._index = index
        self._contents: list[bytes] = []
        self.compiler: PlanCompiler
        self.row_of = np.full(len(shape.moe_layers), NO_ROW, np.int32)
        on_cpu = not uses_triton(index.rows.device)
        self.maskable = frozenset(slot for slot, binding in bindings.items() if on_cpu and binding.has_mask_path)
        self.masks: dict[int, LayerMask] = {}

    def __bool__(self) -> bool:
        """Whether the policy changes any route."""
        return bool(self._contents)

    def refusal(self, active: ActivePolicy) -> str | None:
        """Why a policy cannot be kept at a layer of this worker; None: it can."""
        for slot, binding in self._bindings.items():
            mask = layer_mask(self._shape, active, slot)
            routes = active.at(self._shape.moe_layers[slot]).routes
            reason = binding.refusal(mask.banned[0], mask.native_weights) if routes else None
            if reason is not None:
                return f"policy layer {self._shape.moe_layers[slot]}: {reason}"
        return None

    def start(self, active: ActivePolicy) -> None:
        """Put another policy's rows in the place of the present ones. Raises `RouteError` if it cannot be kept."""
        reason = self.refusal(active)
        if reason is not None:
            raise RouteError(reason)
        self._table.release(self._contents)
        self.compiler = self._config.compiler(self._shape, active)
        contents = self.compiler.policy_rows()
        self._contents = [content for content in contents if content is not None]
        self.row_of = np.full(len(contents), NO_ROW, np.int32)
        for slot, content in enumerate(contents):
            if content is not None:
                self.row_of[slot] = self._table.acquire([content])[0]
        self._index.start_policy(self.row_of)
        enforced = ActivePolicy(active.enforced)
        for slot, binding in self._bindings.items():
            binding.use_policy(layer_mask(self._shape, enforced, slot))
        self.masks = {slot: layer_mask(self._shape, active, slot) for slot in self.maskable if self.row_of[slot] != NO_ROW}

    def cover(self, state: RouterState, num_tokens: int) -> None:
        """Say to the bound routers at which layers every token of the coming forward pass is directed, and by which masks."""
        index = self._index
        state.covered = index.covered & self.maskable
        if index.is_idle:
            state.masks = self.masks
        elif not index.lasts:
            state.masks = step_masks(index.rows, num_tokens, state.covered, self._table.rows, self._shape)


def banned_experts(shape: ModelShape, active: ActivePolicy, slots: Sequence[int]) -> torch.Tensor:
    """bool [len(slots), num_experts], on the CPU: the policy's bans at these MoE slots, whatever its mode."""
    banned = torch.zeros((len(slots), shape.num_experts), dtype=torch.bool)
    for at, slot in enumerate(slots):
        banned[at, list(active.at(shape.moe_layers[slot]).disabled)] = True
    return banned


def layer_mask(shape: ModelShape, active: ActivePolicy, slot: int) -> LayerMask:
    """What the policy, whatever its mode, asks of all tokens at a MoE slot; on the CPU."""
    entry, bias = active.at(shape.moe_layers[slot]).bias, None
    if entry:
        bias = torch.zeros(shape.num_experts)
        bias[list(entry)] = torch.tensor(list(entry.values()))
    native_weights = active.policy is not None and active.policy.weights == "native"
    return LayerMask(banned_experts(shape, active, [slot]), bias, native_weights)
