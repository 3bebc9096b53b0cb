"""The worker's side: calls the features of route control in order, one file each (`step.py` says how they are called).

All device buffers are allocated at load, so CUDA graphs replay with the current step's directives. What nobody asked for is not
called: an engine without noise, overrides or a policy has no such feature, and a step without plans launches nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import RouteError
from ..extras import RouteExtras
from ..policy import ActivePolicy
from ..shape import ModelShape
from .attributes import CONTROLLER
from .bind import bind_routers
from .capture import RouteCapture
from .config import RouteConfig, model_shape
from .counts import PolicyCounts
from .cpu_shared_rows import SharedRows, can_share_rows
from .device_table import DeviceTable
from .gates import warn_of_gates
from .jitter import LogitJitter
from .log import logger_of
from .logits_capture import LogitsCapture
from .policy_rows import PolicyRows
from .progress import RouteCounts, StepReport
from .prompt_monitor import PromptMonitor
from .router import RouterHooks, RouterState, Routing, controllers
from .row_index import RowIndex
from .scoring import Scoring
from .step import NO_PLAN_SLOT, NO_STEP, Requests, Resident
from .sums import DeviceSums
from .supported import check_supported
from .usage import ExpertUsage
from .watch import Watch

logger = logger_of(__name__)

_handles = itertools.count()


class RouteController:
    """Route control of one worker's model.

    Args:
        vllm_config: the engine's config.
        config: its route settings.
        model: the loaded model; all its MoE routers are bound here.
        device: where the model runs.

    Attributes:
        shape: the model's MoE layers.
        state: what bound routers read on every call.
        bindings: the bound layers, by MoE slot.
        capture: the routes of each step, where somebody may want them.
        policy: the active policy's rows and compiler.
        shared: tokens that stand for others, where this engine can have them.
        step: the forward pass in hand.

    Raises:
        RouteError: the model or the settings cannot be controlled; the engine must not start.

    """

    def __init__(self, vllm_config: Any, config: RouteConfig, model: torch.nn.Module, device: torch.device) -> None:
        check_supported(vllm_config, config)
        self.shape = shape = model_shape(vllm_config)
        can_capture = device.type != "cpu"
        self.state = state = RouterState(always=can_capture, rehearses=can_capture)
        num_layers = len(shape.moe_layers)
        self._table = DeviceTable(config, config.compiler(shape).layout, num_layers, device)
        self._index = RowIndex(self._table, num_layers, _capacity(vllm_config), _num_drafts(vllm_config))
        jitter = config.load_jitter()
        self._jitter = None if jitter is None else LogitJitter(jitter, shape, self._index, state.always)

        layers = _pipeline_layers(vllm_config)
        hooks = _hooks(config, state, self._jitter)
        controllers[hooks.handle] = self
        self.bindings = bind_routers(model, shape, hooks, layers)
        warn_of_gates(model, shape, device)
        self.policy = PolicyRows(config, shape, self.bindings, self._table, self._index)
        local_slots = [slot for slot, layer in enumerate(shape.moe_layers) if layer in layers]
        self.watch = Watch(DeviceSums(num_layers, device), shape, local_slots)
        # With fused gating keeping the picks costs a launch a layer, so an engine that starts without a policy never does.
        kept = () if hooks.fused and config.policy is None else local_slots
        self._counts = PolicyCounts(shape, self.watch.sums, self._index, local_slots, kept if state.always else None)
        self._scoring = self.shared = None
        self.capture = _capture(config, shape, self.capacity, local_slots, device, state.always)
        if config.allow_overrides:
            self._scoring = Scoring(vllm_config.model_config.get_vocab_size())
            if can_share_rows(vllm_config, device):
                self.shared = SharedRows(model, shape.slot_of_layer, self._index.rows)
        self._requests, self.step, self._report = Requests(), NO_STEP, StepReport()
        active = config.active_policy()
        self._use_policy(active)
        _log_start(shape, len(self.bindings), active, config)

    @property
    def capacity(self) -> int:
        """Most tokens that one forward pass can have, padding included."""
        return self._index.rows.shape[1]

    def _use_policy(self, active: ActivePolicy) -> None:
        self.policy.start(active)
        self._counts.start(active)
        self._index.stage(NO_STEP)
        self._start_routers(capturing=False)

    def replace_policy(self, active: ActivePolicy, planned: Collection[str]) -> None:
        """Go on under another policy; no step is on its way, and all requests will be computed again from their first token.

        Args:
            active: the new policy; the scheduler has checked it.
            planned: requests with a plan that go on. Others here have ended, or the policy does not permit them.

        """
        resident = [(req_id, item) for req_id, item in self._requests if item.plan is not None]
        for req_id, _ in resident:
            self._forget(req_id)
        self._use_policy(active)
        for req_id, item in resident:
            if req_id in planned:
                self._take_in(req_id, item.extras, item.prompt_len, 0)
        for _, item in self._requests:
            item.restart()

    def update(self, scheduler_output: Any) -> None:
        """Follow the scheduler: forget finished requests, take in new ones, note what this step computes."""
        self.step = NO_STEP
        self._requests.follow(scheduler_output, self._take_in_new, self._forget)
        if self.capture is not None:
            self.capture.follow(scheduler_output)

    def _take_in_new(self, new: Any) -> None:
        extras = RouteExtras.parse(new.sampling_params.extra_args if new.sampling_params is not None else None)
        if extras is None or new.req_id in self._requests:
            return
        self._take_in(new.req_id, extras, extras.prompt_len(new.prompt_len), new.num_computed_tokens)
        if self.shared is not None and extras.score is not None and new.prompt_token_ids is not None:
            self.shared.add(new.req_id, new.prompt_token_ids)

    def _take_in(self, req_id: str, extras: RouteExtras, prompt_len: int, start: int) -> None:
        slot, plan = NO_PLAN_SLOT, None
        if extras.has_plan:
            plan = self.policy.compiler.compile_text(extras.plan, extras.delta)
            slot = self._table.place(req_id, plan, prompt_len, self.policy.row_of)
        self._requests.add(req_id, Resident(slot, plan, extras, prompt_len, start))

    def _forget(self, req_id: str) -> None:
        resident = self._requests.pop(req_id)
        if self.shared is not None:
            self.shared.remove(req_id)
        if resident is not None and resident.plan is not None:
            self._table.remove(req_id, resident.plan)

    def begin_forward(self, req_ids: Sequence[str], query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        """Stage the coming forward pass; arguments as in `Step`."""
        self.step = step = self._requests.step(req_ids, query_start_loc, positions)
        if self._jitter is not None:
            self._jitter.stage(step)
        self._index.stage(step)
        capturing = self.capture is not None and self.capture.stage(step)
        if self.shared is not None:
            self.shared.stage(NO_STEP if capturing or self._counts.is_on else step)
        self._start_routers(capturing)
        if self.state.active:
            self.watch.stage(step)

    def _start_routers(self, capturing: bool) -> None:
        self.state.active = not self._index.is_idle or bool(self.policy) or self._counts.is_on or capturing
        self.policy.cover(self.state, self.step.num_tokens)

    def jitter(self, slot: int, router_logits: torch.Tensor) -> torch.Tensor:
        """The logits of MoE layer `slot` with this step's noise; called by its bound router."""
        assert self._jitter is not None
        if self.capture is not None:
            self.capture.keep_logits(slot, router_logits)
        return self._jitter.apply(slot, router_logits)

    def direct(
        self,
        slot: int,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> None:
        """Called by the bound router of MoE layer `slot`, through the custom op; rewrites directed tokens in place."""
        binding, index = self.bindings[slot], self._index
        always = self.state.is_captured or binding.fused
        if not (always or self.state.active):
            return
        num_tokens = router_logits.shape[0]
        assert num_tokens <= self.capacity, f"{num_tokens} tokens in a forward pass, buffers hold {self.capacity}"
        by_kernel = always or slot not in index.bare
        native_ids = self._counts.apply(slot, num_tokens, by_kernel)
        routes = (None, None) if self.capture is None else self.capture.apply(slot, num_tokens, by_kernel)
        if self.capture is not None and (self._jitter is None or slot not in self._jitter.slots):
            self.capture.keep_logits(slot, router_logits)
        watch = self.watch.apply(slot, router_logits)
        routing = Routing(topk_weights, topk_ids, router_logits, hidden_states, native_ids, *routes, watch)
        covered = slot in self.state.covered
        mask = self.state.masks.get(slot) if covered else None
        some_rows = None if self.shared is None else self.shared.row_index
        if mask is not None and len(mask.banned) in (1, num_tokens) and some_rows is None:  # tokens that pad the batch have no row
            binding.mask(routing, mask)
        elif not by_kernel:
            binding.leave(routing)
        else:
            row_index = index.views.at(slot, num_tokens) if some_rows is None else some_rows
            (binding.cover if covered else binding.direct)(routing, row_index, self._table.rows)

    def end_forward(self, model: Any, hidden_states: torch.Tensor | None) -> None:
        """Collect what the forward pass left, for `report`.

        Args:
            model: for `compute_logits`, where something is scored.
            hidden_states: [num_tokens, hidden_size] of the last pipeline rank, None on others.

        """
        step, report = self.step, self._report
        if step.num_tokens and self.state.active:
            self.watch.collect()
        if self._counts.is_on:
            self._counts.collect(step)
        report.progress = {part.req_id: news for part in step.parts if (news := part.resident.news()) is not None}
        if step.num_tokens and self.capture is not None and self.capture.is_on:
            self.capture.collect(step, report)
        if self._scoring is not None and step.parts and hidden_states is not None:
            self._scoring.collect(step, report, model, hidden_states)

    def report(self, output: Any) -> Any:
        """Hang this step's report on the model runner's output, where there is one."""
        if output is not None:
            self._report.hang_on(output, self.watch.sums.due())
        return output

    def counts(self) -> RouteCounts:
        """What was counted so far; waits for the device."""
        return self.watch.sums.read()


def _log_start(shape: ModelShape, num_bound: int, active: ActivePolicy, config: RouteConfig) -> None:
    logger.info(
        "Route control: %d MoE layers bound (%d here), %d experts, top %d, policy %s, overrides %s",
        len(shape.moe_layers),
        num_bound,
        shape.num_experts,
        shape.top_k,
        f"{active.digest} ({active.mode})" if active.policy else "none",
        "on" if config.allow_overrides else "off",
    )


def end_warm_up(controller: RouteController, *forwards: Callable[[], object]) -> None:
    """See that forward passes of dummy tokens call every bound router. Raises `RouteError`: the engine must not start."""
    state = controller.state
    before, state.active = state.active, True
    for forward in forwards:
        controller.watch.check(forward)
    state.active, state.rehearses = before, False


def replace_worker_policy(worker: Any, document: dict[str, Any], planned: list[str]) -> None:
    """`RouteController.replace_policy` of a vLLM worker; called over `collective_rpc`."""
    controller_of(worker).replace_policy(ActivePolicy.from_dict(document), frozenset(planned))


def check_worker_policy(worker: Any, document: dict[str, Any]) -> str | None:
    """`PolicyRows.refusal` of a vLLM worker; called over `collective_rpc`."""
    return controller_of(worker).policy.refusal(ActivePolicy.from_dict(document))


def worker_counts(worker: Any) -> RouteCounts:
    """`RouteController.counts` of a vLLM worker; called over `collective_rpc`."""
    return controller_of(worker).counts()


def worker_usage(worker: Any, wait: bool) -> np.ndarray | None:
    """`ExpertUsage.read` of a vLLM worker; called over `collective_rpc`."""
    capture = controller_of(worker).capture
    return None if capture is None or capture.usage is None else capture.usage.read(wait)


def controller_of(worker: Any) -> RouteController:
    """The route controller of a vLLM worker."""
    controller: RouteController | None = worker.model_runner.__dict__.get(CONTROLLER)
    if controller is None:
        raise RouteError("this worker has no route control")
    return controller


def _capture(
    config: RouteConfig, shape: ModelShape, capacity: int, local_slots: Sequence[int], device: torch.device, always: bool
) -> RouteCapture | None:
    """What is captured of the routes, None where nobody may want any."""
    usage = None if config.usage is None else ExpertUsage(config.usage, shape, capacity, local_slots, device)
    probe = config.load_monitor()
    monitor = None if probe is None else PromptMonitor(probe, device)
    logits = None
    if config.router_logits_mib is not None:
        logits = LogitsCapture(shape, capacity, local_slots, device, always)
    if not config.allow_overrides and usage is None and monitor is None:
        return None
    size = (len(shape.moe_layers), capacity, shape.top_k)
    return RouteCapture(size, device, always, local_slots, usage, logits, monitor)


def _hooks(config: RouteConfig, state: RouterState, jitter: LogitJitter | None) -> RouterHooks:
    return RouterHooks(
        handle=next(_handles),
        state=state,
        fused=config.gating == "fused",
        jittered_slots=frozenset() if jitter is None else jitter.slots,
        at_logits=config.seam == "logits",
        has_plans=config.allow_overrides,
        has_usage=config.usage is not None or config.monitor is not None,
    )


def _capacity(vllm_config: Any) -> int:
    """Most tokens that one forward pass can have, padding included.

    A multiple of 16: a layer's slice of a buffer is then as aligned as the whole, and Triton compiles one variant.
    """
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    captured: int = max(compilation.cudagraph_capture_sizes or [0])
    most = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, captured)
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    padded: int = -(-most // tensor_parallel) * tensor_parallel
    return -(-padded // 16) * 16


def _num_drafts(vllm_config: Any) -> int:
    """Most drafts of a request in a step, 0 without speculative decoding."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens)


def _pipeline_layers(vllm_config: Any) -> range:
    """Decoder layers that this pipeline rank holds."""
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    return range(start, end)
