"""The seam at the logits: a layer whose kernel routes inside itself is given logits under which it selects no banned expert.

`MoERunner._maybe_dispatch` gets a layer's logits last of what is common to all kernels, on this rank, before any exchange. It is
replaced on the instance. Only masks and biases can be said there, so plans and policies are refused that want more;
`kernels/mask_logits.py` says how, `probe.py` sees whether the kernel obeys. docs/decisions/logits-seam.md compares both seams.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from vllm_unsafe_routes.kernels.mask_logits import bias_logits, groups_suffice, mask_bias, mask_logits
from vllm_unsafe_routes.kernels.spec import FLAG_SCORE_BIAS, GatingSpec, RouteRows, unpack_allowed

from ..errors import RouteError
from .probe import MOST_TOKENS, probe, probe_outputs
from .router import Gating, LayerBinding, LayerMask, RouterHooks, Routing, controllers, jittered_logits

_BIAS = "e_score_correction_bias"
# How vLLM's names of expert weights and their scales begin.
_WEIGHTS = ("w13", "w2")
_POISON = 0x55


class MaskedBias:
    """A correction bias that its owner's kernels read in the place of the model's own.

    Args:
        owner: a router, or vLLM's `RoutedExperts`; its attribute is covered, so that new weights still reach the model's own.

    Attributes:
        tensor: float [num_experts], what kernels read; at one address, for captured graphs.

    """

    def __init__(self, owner: Any) -> None:
        self._own = getattr(owner, _BIAS)
        self.tensor = self._own.data.clone()
        owner.__dict__[_BIAS] = self.tensor

    @property
    def own(self) -> torch.Tensor:
        """The model's own, float [num_experts]; read anew, because weight loading may replace it."""
        data: torch.Tensor = self._own.data
        return data

    def write(self, banned: torch.Tensor) -> None:
        """Mask these experts, bool [num_experts]."""
        self.tensor.copy_(mask_bias(self.own, banned))


class LogitsBinding(LayerBinding):
    """A MoE layer that is controlled at its logits: `direct`, `mask` and `leave` write into those of the call.

    Args:
        runner: vLLM's `MoERunner`.
        gating: how its kernel gates.
        has_plans: rows of the table are read, else only the policy's bans.

    Attributes:
        biases: what its kernels read instead of the model's correction bias; empty: it has none.

    """

    def __init__(self, runner: Any, gating: Gating, has_plans: bool) -> None:
        super().__init__(runner.router, gating, fused=False)
        self._has_plans = has_plans
        owners = (runner.router, runner.routed_experts)
        self.biases = [MaskedBias(owner) for owner in owners if getattr(owner, _BIAS, None) is not None]
        weight = next(runner.routed_experts.parameters())
        num_experts = gating.spec.num_experts if gating.spec is not None else runner.router.global_num_experts
        self._banned = torch.zeros(num_experts, dtype=torch.bool, device=weight.device)
        self._score_bias = torch.zeros(num_experts, device=weight.device)

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self._banned.device

    @property
    def scoring(self) -> str:
        """As in `GatingSpec`; a function of the model's own chooses by its logits, as softmax does."""
        return "softmax" if self.gating.spec is None else self.gating.spec.scoring

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """The model's own."""
        return self.biases[0].own if self.biases else None

    @property
    def has_mask_path(self) -> bool:
        """A mask and a bias are all there is."""
        return True

    def use_policy(self, mask: LayerMask) -> None:
        """Mask the correction bias as well; it is the same for all tokens."""
        self._banned.copy_(mask.banned[0])
        self._score_bias.zero_()
        if mask.score_bias is not None:
            self._score_bias.copy_(mask.score_bias)
        self.write_biases()

    def write_biases(self) -> None:
        """The biases, from what the model's own are now."""
        for bias in self.biases:
            bias.write(self._banned)

    def refusal(self, banned: torch.Tensor, native_weights: bool) -> str | None:
        """Only masks and biases can be said at the logits."""
        if native_weights:
            return "weights 'native' cannot be kept at the logits, where its kernel weighs what it is given"
        if self.gating.spec is not None and not groups_suffice(banned, self.gating.spec):
            return f"some of its groups are left with too few experts for top_k {self.gating.spec.top_k}"
        return None

    def direct(self, routing: Routing, row_index: torch.Tensor, rows: RouteRows) -> None:
        """Change the tokens whose `row_index`, int32 [num_tokens], is not -1 by their rows; without plans all by the policy."""
        mask = LayerMask(self._banned[None], self._score_bias)
        if self._has_plans:
            row = row_index.clamp(min=0).long()
            directed = (row_index >= 0).unsqueeze(1)
            # A forced row's words hold its own experts.
            banned = ~unpack_allowed(rows.allowed[row], len(self._banned)) & directed
            biased = directed & ((rows.flags[row] & FLAG_SCORE_BIAS) != 0).unsqueeze(1)
            mask = LayerMask(banned, None if rows.score_bias is None else rows.score_bias[row].masked_fill(~biased, 0))
        self.mask(routing, mask)

    def cover(self, routing: Routing, row_index: torch.Tensor, rows: RouteRows) -> None:
        """No different here."""
        self.direct(routing, row_index, rows)

    def mask(self, routing: Routing, mask: LayerMask) -> None:
        """Bias and mask all tokens; both parts may differ by token."""
        self.leave(routing)
        logits = routing.router_logits
        biased = logits if mask.score_bias is None else bias_logits(logits, mask.score_bias)
        logits.copy_(mask_logits(biased, mask.banned, self.scoring))

    def leave(self, routing: Routing) -> None:
        """Change nothing; only note what is wanted of the logits."""
        if routing.native_ids is not None:
            self._keep_picks(routing, routing.native_ids)
        if routing.watch is not None:
            routing.leave_mark()
            is_real = torch.arange(len(routing.router_logits), device=routing.router_logits.device) < routing.watch.step[1]
            routing.watch.num_nan.add_((routing.router_logits.isnan().any(1) & is_real).sum())

    def _keep_picks(self, routing: Routing, native_ids: torch.Tensor) -> None:
        """What its gating would pick without a mask: the kernel does not say it, so the gating is read off the router."""
        function = self.gating.function
        if function is None:
            self._select_undirected(routing.router_logits, native_ids)
            return
        logits, renormalize = routing.router_logits, self.router.renormalize
        topk = native_ids.shape[1]
        native_ids.copy_(function(hidden_states=routing.hidden_states, gating_output=logits, topk=topk, renormalize=renormalize)[1])


@torch.library.custom_op("unsafe_routes::mask_router_logits", mutates_args=("router_logits", "biases"))
def mask_router_logits(
    router_logits: torch.Tensor, hidden_states: torch.Tensor, biases: list[torch.Tensor], handle: int, slot: int
) -> None:
    """Apply the current step's masks of one layer; opaque to torch.compile, which must not bake in a step's state."""
    _mask(router_logits, hidden_states, handle, slot)


@mask_router_logits.register_fake
def _(router_logits: torch.Tensor, hidden_states: torch.Tensor, biases: list[torch.Tensor], handle: int, slot: int) -> None:
    return None


def _mask(router_logits: torch.Tensor, hidden_states: torch.Tensor, handle: int, slot: int) -> None:
    controller = controllers[handle]
    controller.bindings[slot].write_biases()
    no_picks = router_logits.new_empty(0)
    controller.direct(slot, no_picks, no_picks, router_logits, hidden_states)


def wrap_dispatch(runner: Any, binding: LogitsBinding, slot: int, hooks: RouterHooks) -> None:
    """Have a layer ask its controller, MoE layer `slot`, before it hands its logits on."""
    own = runner._maybe_dispatch
    handle, state, jittered = hooks.handle, hooks.state, slot in hooks.jittered_slots
    biases = [bias.tensor for bias in binding.biases]

    def _maybe_dispatch(self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if jittered:
            router_logits = jittered_logits(router_logits, handle, slot)
        if torch.compiler.is_compiling():
            router_logits = router_logits.clone()
            torch.ops.unsafe_routes.mask_router_logits(router_logits, hidden_states, biases, handle, slot)
        elif state.always or state.active or biases:
            router_logits = router_logits.clone()
            _mask(router_logits, hidden_states, handle, slot)
        dispatched: tuple[torch.Tensor, torch.Tensor] = own(hidden_states, router_logits)
        return dispatched

    runner._maybe_dispatch = types.MethodType(_maybe_dispatch, runner)


def refuse_plans(gating: Gating, correction_bias: torch.Tensor | None) -> None:
    """Raise `RouteError` for a gating in which masks of single tokens cannot be said by logits."""
    why = "route plans cannot be kept at its logits:"
    if correction_bias is not None:
        raise RouteError(f"{why} its correction bias lifts experts, and is the same for all tokens")
    if gating.spec is not None and gating.spec.grouped:
        raise RouteError(f"{why} it chooses among groups, and a plan may leave too little of them")


def check_probe(runner: Any, binding: LogitsBinding) -> None:
    """Ask a layer's kernel with hostile logits; waits for the device.

    Raises:
        RouteError: a banned expert has part in what comes out.

    """
    router, experts, device = runner.router, runner.routed_experts, binding.device
    spec = binding.gating.spec or GatingSpec(router.global_num_experts, router.top_k)
    config = runner.moe_config
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(MOST_TOKENS, config.hidden_dim, generator=generator).to(device, config.in_dtype)

    def use(bias: torch.Tensor | None) -> None:
        for own in binding.biases if bias is not None else ():
            own.tensor.copy_(bias)

    def native(router_logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        use(bias)
        picks: tuple[torch.Tensor, torch.Tensor] = router._compute_routing(hidden_states[: len(router_logits)], router_logits, None)
        return picks

    def forward(router_logits: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        use(bias)
        output: torch.Tensor = experts.forward_monolithic(
            x=hidden_states[: len(router_logits)].clone(), router_logits=router_logits
        )
        return output

    try:
        with torch.inference_mode():
            has_bias, dtype = bool(binding.biases), config.router_logits_dtype
            if not runner.is_monolithic:
                fault = probe(native, spec, has_bias, device, dtype)
            else:
                experts._ensure_moe_quant_config_init()
                fault = probe_outputs(forward, Poison(experts), spec, has_bias, device, dtype)
    finally:
        binding.write_biases()
    if fault is not None:
        raise RouteError(f"its kernel does not obey masked logits ({fault})")


class Poison:
    """Changes what given experts compute, and changes it back when it is called again.

    Args:
        experts: vLLM's `RoutedExperts`; weights that its quantisation method holds are found as well.

    """

    def __init__(self, experts: Any) -> None:
        self._experts = experts
        held = [*experts.named_parameters(recurse=False), *vars(experts).items(), *vars(experts.quant_method).items()]
        tensors = [_tensor(value) for name, value in held if name.startswith(_WEIGHTS)]
        self._tensors = {
            tensor.data_ptr(): tensor
            for tensor in tensors
            if tensor is not None and tensor.ndim and len(tensor) == experts.local_num_experts
        }

    def __call__(self, banned: torch.Tensor) -> bool:
        """Flip bits of all weights of these experts, bool [num_experts]; returns whether this rank holds one of them."""
        places = self._experts.expert_map_manager.expert_map
        chosen = banned.nonzero()[:, 0]
        here = [place for place in (chosen if places is None else places[chosen]).tolist() if place >= 0]
        for tensor in self._tensors.values():
            for place in here:
                row = tensor[place : place + 1]
                flipped = row.contiguous().view(torch.uint8) ^ _POISON
                row.copy_(flipped.view(row.dtype).view_as(row))
        return bool(here)


def _tensor(value: Any) -> torch.Tensor | None:
    """A parameter's tensor, or that of a Triton kernel's own wrapping."""
    value = getattr(getattr(value, "storage", None), "data", value)
    return value.data if isinstance(value, torch.Tensor) else None
