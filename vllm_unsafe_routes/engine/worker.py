"""The worker's side: the route table on the device, filled before each forward pass, and what was set, read afterwards.

All device buffers are allocated once, so CUDA graphs replay with the current step's directives. The row index is
[MoE layer, token]: -1 is "no directive". Nothing is launched for batches without plans; a policy alone is written once.

Under a policy the picks of the model's own gating are kept while the layers run, and after the last one it is counted, in one go
for all layers, how many of them the policy bans. The sums stay on the device and are read at most twice a second, without waiting.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.logger import init_logger

from vllm_unsafe_routes.kernels.jitter import jitter_logits
from vllm_unsafe_routes.kernels.route_topk import uses_triton
from vllm_unsafe_routes.kernels.row_index import fill_row_index
from vllm_unsafe_routes.kernels.spec import FLAG_FORCED, RouteRows

from ..compiled import NO_ROW, CompiledPlan
from ..errors import RouteError
from ..extras import RouteExtras, ScoreSpec
from ..policy import POLICY_MODES, ActivePolicy
from ..table import Arena, RowStore
from .config import RouteConfig, check_supported, model_shape
from .plugin import CONTROLLER
from .progress import COUNTS_ATTRIBUTE, PROGRESS_ATTRIBUTE, RouteCounts, StepProgress
from .router import bind_routers, controllers
from .shared_rows import SharedRows, can_share_rows

logger = init_logger(__name__)

_handles = itertools.count()
# Slot 0 belongs to every request without a plan.
_NO_PLAN_SLOT = 0
# The counts are reported at most this often.
_SECONDS_BETWEEN_COUNTS = 0.5


@dataclass(slots=True)
class RouterState:
    """The two facts that a router reads on every call.

    Attributes:
        active: some token of this step may have a row.
        always: calls are captured in graphs and must not be skipped.

    """

    active: bool = False
    always: bool = False


@dataclass(slots=True)
class _Resident:
    """A request with a plan or captured routes, while this worker knows it."""

    slot: int
    plan: CompiledPlan | None
    extras: RouteExtras
    prompt_len: int
    start: int
    end: int = 0

    def num_set(self) -> int:
        return 0 if self.plan is None else self.plan.num_routes(self.start, max(self.start, self.end), self.prompt_len)


class RouteController:
    """Route control of one worker's model.

    Args:
        vllm_config: the engine's config.
        config: its route settings.
        model: the loaded model; all its MoE routers are bound here.
        device: where the model runs.

    Raises:
        RouteError: the model or the settings cannot be controlled; the engine must not start.

    """

    def __init__(self, vllm_config: Any, config: RouteConfig, model: torch.nn.Module, device: torch.device) -> None:
        check_supported(vllm_config)
        self.config = config
        self.shape = model_shape(vllm_config)
        self.active = config.active_policy()
        self.compiler = config.compiler(self.shape)
        self.device = device
        self.state = RouterState(always=device.type != "cpu")
        self.fused = config.gating == "fused"
        self.handle = next(_handles)
        self._jitter = config.load_jitter()
        # Forward passes so far: the noise's counter, on the device so that captured graphs read the present one.
        self._jitter_step = torch.zeros(1, dtype=torch.int64, device=device)
        self.jittered_slots = frozenset(
            slot
            for slot, layer in enumerate(self.shape.moe_layers)
            if self._jitter is not None and (self._jitter.layers is None or layer in self._jitter.layers)
        )
        controllers[self.handle] = self

        num_layers, layout = len(self.shape.moe_layers), self.compiler.layout
        num_rows = config.route_table_rows
        # A multiple of 16: a layer's slice of the row index is then as aligned as the whole, and Triton compiles one variant.
        self.capacity = -(-_max_padded_tokens(vllm_config) // 16) * 16
        self._rows = RowStore(num_rows)
        words, top_k = layout.num_words, layout.top_k
        self.rows = RouteRows(
            flags=torch.zeros(num_rows, dtype=torch.int32, device=device),
            allowed=torch.zeros((num_rows, words), dtype=torch.int32, device=device),
            forced_ids=torch.zeros((num_rows, top_k), dtype=torch.int32, device=device),
            forced_weights=torch.zeros((num_rows, top_k), dtype=torch.float32, device=device),
        )
        self.row_index = torch.full((num_layers, self.capacity), NO_ROW, dtype=torch.int32, device=device)
        num_slots = config.route_table_slots + 1 if config.allow_overrides else 1
        num_cells = config.route_table_cells if config.allow_overrides else 1
        self._arena = Arena(num_cells)
        self._cells = torch.full((num_cells,), NO_ROW, dtype=torch.int32, device=device)
        self._slot_base = torch.full((num_slots,), -1, dtype=torch.int64, device=device)
        self._slot_listed = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._slot_prompt_len = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._free_slots = list(range(num_slots - 1, _NO_PLAN_SLOT, -1))
        self._blocks: dict[str, np.ndarray] = {}
        self._resident: dict[str, _Resident] = {}

        pp_layers = _pipeline_layers(vllm_config)
        self._bindings = bind_routers(model, self.shape, self, pp_layers)
        self._local_slots = [slot for slot, layer in enumerate(self.shape.moe_layers) if layer in pp_layers]

        self.policy_rows = torch.full((num_layers,), NO_ROW, dtype=torch.int32, device=device)
        self._policy_contents: list[bytes] = []
        self._idle = False
        self._native_ids = torch.zeros((num_layers, self.capacity, top_k), dtype=torch.int32, device=device)
        self._counts = _Counts(num_layers, device)
        self._write_policy()

        self._shared: SharedRows | None = None
        if config.allow_overrides and can_share_rows(vllm_config, device):
            self._shared = SharedRows(model, self.shape.slot_of_layer, self.row_index)
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        self._capturing = False
        if config.allow_overrides and self.state.always:
            self._allocate_capture()
        self._step: list[tuple[str, _Resident, int, int, int]] = []
        self._num_scheduled: dict[str, int] = {}
        self._progress: dict[str, StepProgress] = {}
        self._fill_idle()
        logger.info(
            "Route control: %d MoE layers bound (%d here), %d experts, top %d, policy %s, overrides %s",
            num_layers,
            len(self._bindings),
            self.shape.num_experts,
            self.shape.top_k,
            f"{self.active.digest} ({self.active.mode})" if self.active.policy else "none",
            "on" if config.allow_overrides else "off",
        )

    def _write_policy(self) -> None:
        """Put the active policy's rows into the table, and what is counted under it into the buffers for that."""
        self._rows.release(self._policy_contents)
        contents = self.compiler.policy_rows()
        self._policy_contents = [content for content in contents if content is not None]
        self._policy_row_of = np.full(len(contents), NO_ROW, np.int32)
        for slot, content in enumerate(contents):
            if content is not None:
                self._policy_row_of[slot] = self._acquire([content])[0]
        self.policy_rows.copy_(torch.from_numpy(self._policy_row_of))
        self._has_policy = bool(self._policy_contents)
        layers = self.shape.moe_layers
        # The policy's bans at the slots where the CPU can route a step without plans by them alone.
        self._policy_masks = {
            slot: self._banned([slot])
            for slot, binding in self._bindings.items()
            if self._policy_row_of[slot] != NO_ROW and binding.has_mask_path and not uses_triton(self.device)
        }
        self._native_policy = self.active.policy is not None and self.active.policy.weights == "native"
        counted = [slot for slot in self._local_slots if self.active.banned(layers[slot])]
        if self.state.always:
            # Captured graphs keep the picks of all layers, whatever a later policy bans. With fused gating that costs a launch
            # a layer, so an engine that starts without a policy has none, and counts tokens only.
            keeps_all = not self.fused or self.config.policy is not None
            self._is_kept = [keeps_all and slot in self._local_slots for slot in range(len(layers))]
            counted = counted if keeps_all else []
        else:
            self._is_kept = [slot in counted for slot in range(len(layers))]
        self._counts.start(self.active, counted, self._banned(counted))

    def _banned(self, slots: Sequence[int]) -> torch.Tensor:
        """bool [len(slots), num_experts], on the CPU: the active policy's bans, whatever its mode."""
        banned = torch.zeros((len(slots), self.shape.num_experts), dtype=torch.bool)
        for at, slot in enumerate(slots):
            banned[at, list(self.active.banned(self.shape.moe_layers[slot]))] = True
        return banned

    def replace_policy(self, active: ActivePolicy, planned: Collection[str]) -> None:
        """Go on under another policy; no step is on its way, and all requests will be computed again from their first token.

        Args:
            active: the new policy; the scheduler has checked it.
            planned: requests with a plan that go on. Others here have ended, or the policy does not permit them.

        """
        resident = [(req_id, item) for req_id, item in self._resident.items() if item.plan is not None]
        for req_id, _ in resident:
            self._forget(req_id)
        self.active = active
        self.compiler = self.config.compiler(self.shape, active)
        self._write_policy()
        for req_id, item in resident:
            if req_id in planned:
                self._take_in(req_id, item.extras, item.prompt_len, 0)
        for item in self._resident.values():
            item.start, item.end = sys.maxsize, 0
        self._idle = False
        self._fill_idle()

    def _allocate_capture(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._captured is None:
            size = (len(self.shape.moe_layers), self.capacity, self.shape.top_k)
            self._captured = (
                torch.full(size, -1, dtype=torch.int32, device=self.device),
                torch.zeros(size, dtype=torch.float32, device=self.device),
            )
        return self._captured

    def _upload(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        """A device copy of host values that does not stall the stream (the pinned buffer lives until the copy is done)."""
        tensor = torch.from_numpy(np.array(values)).to(dtype)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _acquire(self, contents: Sequence[bytes]) -> list[int]:
        ids, new = self._rows.acquire(contents)
        if new:
            contents = [contents[at] for at in new]
            ints = np.frombuffer(b"".join(contents), "<i4").reshape(len(new), -1)
            where = self._upload(np.array([ids[at] for at in new]), torch.int64)
            words, top_k = self.compiler.layout.num_words, self.shape.top_k
            for table, values in zip(
                self.rows[:4],
                (
                    ints[:, 0],
                    ints[:, 1 : 1 + words],
                    ints[:, 1 + words : 1 + words + top_k],
                    ints[:, 1 + words + top_k :].view("<f4"),
                ),
                strict=True,
            ):
                table[where] = self._upload(values, table.dtype)
        return ids

    def update(self, scheduler_output: Any) -> None:
        """Follow the scheduler: forget finished requests, take in new ones, note what this step computes."""
        for req_id in scheduler_output.finished_req_ids:
            self._forget(req_id)
        for new in scheduler_output.scheduled_new_reqs:
            params = new.sampling_params
            extras = RouteExtras.parse(params.extra_args if params is not None else None)
            if extras is not None and new.req_id not in self._resident:
                self._take_in(new.req_id, extras, extras.prompt_len(new.prompt_len), new.num_computed_tokens)
                if self._shared is not None and extras.score is not None and new.prompt_token_ids is not None:
                    self._shared.add(new.req_id, new.prompt_token_ids)
        self._step = []
        self._num_scheduled = scheduler_output.num_scheduled_tokens
        if not self._resident:
            return
        computed = dict(
            zip(
                scheduler_output.scheduled_cached_reqs.req_ids,
                scheduler_output.scheduled_cached_reqs.num_computed_tokens,
                strict=True,
            )
        )
        for new in scheduler_output.scheduled_new_reqs:
            computed[new.req_id] = new.num_computed_tokens
        for req_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            resident = self._resident.get(req_id)
            if resident is not None:
                start = computed[req_id]
                resident.start = min(resident.start, start)
                resident.end = max(resident.end, start + num_tokens)
                self._step.append((req_id, resident, start, num_tokens, 0))

    def _take_in(self, req_id: str, extras: RouteExtras, prompt_len: int, start: int) -> None:
        plan = self.compiler.compile_text(extras.plan, extras.delta) if extras.has_plan else None
        slot = _NO_PLAN_SLOT
        if plan is not None:
            slot = self._free_slots.pop()
            row_of = np.array([*self._acquire(plan.rows), NO_ROW], np.int32)  # index NO_ROW is the last entry
            block = np.where(plan.block == NO_ROW, self._policy_row_of[:, None], row_of[plan.block])
            base, moved = self._arena.place(req_id, block.size)
            self._blocks[req_id] = block
            for other, new_base, _ in moved:
                self._write_block(self._resident[other].slot, new_base, self._blocks[other])
            self._write_block(slot, base, block)
            self._slot_listed[slot] = plan.num_listed
            self._slot_prompt_len[slot] = prompt_len
        self._resident[req_id] = _Resident(slot, plan, extras, prompt_len, start)

    def _write_block(self, slot: int, base: int, block: np.ndarray) -> None:
        self._cells[base : base + block.size] = self._upload(block.reshape(-1), torch.int32)
        self._slot_base[slot] = base

    def _forget(self, req_id: str) -> None:
        resident = self._resident.pop(req_id, None)
        if self._shared is not None:
            self._shared.remove(req_id)
        if resident is not None and resident.plan is not None:
            self._rows.release(resident.plan.rows)
            self._arena.free(req_id)
            del self._blocks[req_id]
            self._slot_base[resident.slot] = -1
            self._free_slots.append(resident.slot)

    def begin_forward(self, req_ids: Sequence[str], query_start_loc: torch.Tensor, positions: torch.Tensor) -> None:
        """Write the row of every token of the coming forward pass.

        Args:
            req_ids: requests in batch order.
            query_start_loc: int32 [>= num_reqs + 1], on the device; request i has tokens [i] to [i + 1] (exclusive).
            positions: int64 [num_tokens, padding included], on the device.

        """
        resident = self._resident
        self._capturing = False
        if self._jitter is not None:
            self._jitter_step.add_(1)
        if self._shared is not None:
            self._shared.end()
        if not self._step:
            self._fill_idle()
            return
        slots = np.fromiter(
            (resident[req_id].slot if req_id in resident else _NO_PLAN_SLOT for req_id in req_ids),
            np.int32,
            len(req_ids),
        )
        if slots.any():
            fill_row_index(
                self.row_index,
                self._upload(slots, torch.int32),
                query_start_loc[: len(req_ids) + 1],
                positions,
                self._slot_base,
                self._slot_listed,
                self._slot_prompt_len,
                self._cells,
                self.policy_rows,
            )
            self._idle = False
            self.state.active = True
        else:
            self._fill_idle()
        if any(entry[1].extras.wants_routes for entry in self._step):
            self._capturing = self.state.active = True
            self._allocate_capture()
        # The same numbers as in query_start_loc, without asking the device.
        lengths = [self._num_scheduled[req_id] for req_id in req_ids]
        first = dict(zip(req_ids, itertools.accumulate(lengths, initial=0), strict=False))
        self._step = [(name, item, start, num, first[name]) for name, item, start, num, _ in self._step]
        if self._shared is not None and not self._capturing and not self._counts.is_on:
            self._shared.begin(req_ids, {name: start for name, _, start, _, _ in self._step}, self._num_scheduled)

    def _fill_idle(self) -> None:
        """No plan in this step: the policy's rows for all tokens, written only if something else stands there."""
        if not self._idle:
            self.row_index.copy_(self.policy_rows[:, None].expand_as(self.row_index))
            self._idle = True
        self.state.active = self._has_policy or self._counts.is_on

    def direct(
        self,
        slot: int,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> None:
        """Called by the bound router of MoE layer `slot` through the custom op; rewrites directed tokens in place."""
        num_tokens = router_logits.shape[0]
        assert num_tokens <= self.capacity, f"{num_tokens} tokens in a forward pass, buffers hold {self.capacity}"
        if self._is_kept[slot]:
            self._keep_native(slot, topk_ids, router_logits)
        if self._idle and slot in self._policy_masks:
            self._bindings[slot].mask(topk_weights, topk_ids, router_logits, self._policy_masks[slot], self._native_policy)
        elif self.fused or self.state.always or not self._idle or self._policy_row_of[slot] != NO_ROW:
            binding = self._bindings[slot]
            some_rows = self._shared.row_index if self._shared is not None else None
            binding.direct(
                topk_weights,
                topk_ids,
                router_logits,
                hidden_states,
                self.row_index[slot, :num_tokens] if some_rows is None else some_rows,
                self.rows,
                only_directed=not (self.fused and binding.gating.spec is not None),
            )
        if self._captured is not None and (self._capturing or self.state.always):
            self._captured[0][slot, :num_tokens] = topk_ids
            self._captured[1][slot, :num_tokens] = topk_weights

    def jitter(self, slot: int, router_logits: torch.Tensor) -> torch.Tensor:
        """The logits of MoE layer `slot` with this step's noise; tokens that a plan forces keep theirs."""
        assert self._jitter is not None
        forced = None
        if self.state.always or not self._idle:
            forced = self._is_forced(self.row_index[slot, : router_logits.shape[0]])
        return jitter_logits(router_logits, self._jitter_step, forced, layer=slot, seed=self._jitter.seed, scale=self._jitter.scale)

    def _is_forced(self, row_index: torch.Tensor) -> torch.Tensor:
        """bool, the shape of `row_index`: tokens whose experts a plan forces."""
        return (row_index >= 0) & ((self.rows.flags[row_index.clamp(min=0).long()] & FLAG_FORCED) != 0)

    def _keep_native(self, slot: int, topk_ids: torch.Tensor, router_logits: torch.Tensor) -> None:
        """Remember what the model's own gating picks, for `end_forward` to count."""
        kept = self._native_ids[slot, : topk_ids.shape[0]]
        binding = self._bindings[slot]
        if self.fused and binding.gating.spec is not None:
            # One kernel will gate and direct in one go; what it would pick undirected, another launch says.
            binding.select_undirected(router_logits, kept)
        else:
            kept.copy_(topk_ids)

    def end_forward(self, model: Any, hidden_states: torch.Tensor | None) -> None:
        """Note what the forward pass set, for `report`. Captured routes are copied to the host here.

        Args:
            model: for `compute_logits`, where something is scored.
            hidden_states: [num_tokens, hidden_size] of the last pipeline rank, None on others.

        """
        num_tokens = sum(self._num_scheduled.values())
        if self._counts.is_on and num_tokens:
            self._count(num_tokens)
        progress: dict[str, StepProgress] = {}
        for req_id, resident, start, num_tokens, first in self._step:
            entry = progress[req_id] = StepProgress(resident.num_set(), resident.start)
            if resident.extras.wants_routes and self._capturing:
                ids, weights = self._allocate_capture()
                entry.chunk_start = start
                entry.route_ids = ids[:, first : first + num_tokens].transpose(0, 1).cpu().numpy().copy()
                entry.route_weights = weights[:, first : first + num_tokens].transpose(0, 1).cpu().numpy().copy()
        if self._capturing:
            self._merge_pipeline(progress)
        if hidden_states is not None:
            self._score(progress, model, hidden_states)
        self._progress = progress

    def _count(self, num_tokens: int) -> None:
        slots = self._counts.slots
        if not len(slots):
            self._counts.add(num_tokens, None)
            return
        banned = self._counts.banned.unsqueeze(1).expand(-1, num_tokens, -1)
        hits = banned.gather(2, self._native_ids[slots, :num_tokens].long())
        if not self._idle:
            hits = hits & ~self._is_forced(self.row_index[slots, :num_tokens]).unsqueeze(2)
        self._counts.add(num_tokens, hits.sum((1, 2)))

    def counts(self) -> RouteCounts:
        """What was counted so far; waits for the device."""
        return self._counts.read()

    def _score(self, progress: dict[str, StepProgress], model: Any, hidden_states: torch.Tensor) -> None:
        """Log-probabilities of the asked tokens at this step's scored rows, one call of the output layer for all requests."""
        pieces: list[tuple[StepProgress, ScoreSpec, int]] = []
        rows: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        width = 0
        for req_id, resident, start, num_tokens, first in self._step:
            score = resident.extras.score
            if score is None:
                continue
            begin, end = max(start, score.first_row), min(start + num_tokens, score.end_row)
            if begin >= end:
                continue
            entry = progress[req_id]
            entry.score_start = begin - score.first_row
            rows.append(np.arange(first + begin - start, first + end - start))
            ids.append(score.token_ids[entry.score_start : end - score.first_row])
            pieces.append((entry, score, end - begin))
            width = max(width, score.token_ids.shape[1])
        if not pieces:
            return
        padded = np.zeros((sum(map(len, rows)), width), np.int64)
        at = 0
        for block in ids:
            padded[at : at + len(block), : block.shape[1]] = block
            at += len(block)
        logits = model.compute_logits(hidden_states[self._upload(np.concatenate(rows), torch.int64)])
        if logits is None:  # a tensor-parallel rank that does not gather them
            return
        logits = logits.float()
        asked = logits.gather(1, self._upload(padded, torch.int64)) - logits.logsumexp(-1, keepdim=True)
        values = asked.cpu().numpy()
        at = 0
        for entry, score, length in pieces:
            entry.scores = values[at : at + length, : score.token_ids.shape[1]].copy()
            at += length

    def _merge_pipeline(self, progress: dict[str, StepProgress]) -> None:
        """Collect the routes of earlier pipeline ranks: each hands on what it has, the last rank reports."""
        group = get_pp_group()
        if group.world_size == 1:
            return
        if not group.is_first_rank:
            for req_id, (slots, ids, weights) in group.recv_object(group.rank_in_group - 1).items():
                entry = progress[req_id]
                assert entry.route_ids is not None and entry.route_weights is not None
                entry.route_ids[:, slots] = ids
                entry.route_weights[:, slots] = weights
        if not group.is_last_rank:
            upto = list(range(self._local_slots[-1] + 1)) if self._local_slots else []
            hand_on = {
                req_id: (upto, entry.route_ids[:, upto], entry.route_weights[:, upto])
                for req_id, entry in progress.items()
                if entry.route_ids is not None and entry.route_weights is not None
            }
            group.send_object(hand_on, group.rank_in_group + 1)

    def report(self, output: Any) -> Any:
        """Hang this step's progress on the model runner's output, at once or when an asynchronous output is ready."""
        if output is None:
            return output
        report: dict[str, Any] = {}
        if self._progress:
            report[PROGRESS_ATTRIBUTE], self._progress = self._progress, {}
        counts = self._counts.due()
        if counts is not None:
            report[COUNTS_ATTRIBUTE] = counts
        if not report:
            return output
        if hasattr(output, "get_output"):
            get_output = output.get_output

            def get_output_with_report() -> Any:
                ready = get_output()
                for name, value in report.items():
                    setattr(ready, name, value)
                return ready

            output.get_output = get_output_with_report
        else:
            for name, value in report.items():
                setattr(output, name, value)
        return output


class _Counts:
    """What is counted under a policy: sums on the device, read without waiting for it.

    Args:
        num_layers: MoE layers of the model.
        device: where the sums are.

    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        self._tokens = dict.fromkeys(POLICY_MODES, 0)
        self._displaced = torch.zeros((len(POLICY_MODES), num_layers), dtype=torch.int64, device=device)
        self._mode = 0
        # A copy on its way to the host: pinned memory, the event after it, and the token numbers that belong to it.
        self._host: torch.Tensor | None = None
        self._event: Any = None
        self._tokens_then = dict(self._tokens)
        self._read_at = 0.0
        self._is_new = False
        self.is_on = False

    def start(self, active: ActivePolicy, slots: Sequence[int], banned: torch.Tensor) -> None:
        """Count under this policy from now on; nothing without one.

        Args:
            active: the policy.
            slots: MoE slots of this worker at which it bans something.
            banned: bool [len(slots), num_experts].

        """
        self.is_on = active.policy is not None
        self._mode = POLICY_MODES.index(active.mode)
        self.slots = torch.tensor(list(slots), dtype=torch.int64, device=self._displaced.device)
        self.banned = banned.to(self._displaced.device)

    def add(self, num_tokens: int, displaced: torch.Tensor | None) -> None:
        """Add a step's numbers; `displaced` is int64 [len(slots)], on the device."""
        self._tokens[POLICY_MODES[self._mode]] += num_tokens
        if displaced is not None:
            self._displaced[self._mode].index_add_(0, self.slots, displaced)
        self._is_new = True

    def read(self) -> RouteCounts:
        """The numbers now."""
        return self._made(self._tokens, self._displaced.cpu())

    def due(self) -> RouteCounts | None:
        """The numbers as of some steps ago if they changed and were not said lately, else None; never waits."""
        if self._event is not None and self._host is not None:
            if not self._event.query():
                return None
            self._event = None
            return self._made(self._tokens_then, self._host)
        now = time.monotonic()
        if not self._is_new or now - self._read_at < _SECONDS_BETWEEN_COUNTS:
            return None
        self._read_at, self._is_new = now, False
        if self._displaced.device.type == "cpu":
            return self.read()
        if self._host is None:
            self._host = torch.empty_like(self._displaced, device="cpu", pin_memory=True)
        self._host.copy_(self._displaced, non_blocking=True)
        self._tokens_then = dict(self._tokens)
        self._event = torch.cuda.Event()
        self._event.record()
        return None

    @staticmethod
    def _made(tokens: dict[str, int], displaced: torch.Tensor) -> RouteCounts:
        return RouteCounts(dict(tokens), {mode: displaced[at].tolist() for at, mode in enumerate(POLICY_MODES)})


def replace_worker_policy(worker: Any, document: dict[str, Any], planned: list[str]) -> None:
    """`RouteController.replace_policy` of a vLLM worker; called over `collective_rpc`."""
    controller_of(worker).replace_policy(ActivePolicy.from_dict(document), frozenset(planned))


def worker_counts(worker: Any) -> RouteCounts:
    """`RouteController.counts` of a vLLM worker; called over `collective_rpc`."""
    return controller_of(worker).counts()


def controller_of(worker: Any) -> RouteController:
    """The route controller of a vLLM worker."""
    controller = worker.model_runner.__dict__.get(CONTROLLER)
    if controller is None:
        raise RouteError("this worker has no route control")
    return controller


def _max_padded_tokens(vllm_config: Any) -> int:
    """Most tokens that one forward pass can have, padding included."""
    scheduler, compilation = vllm_config.scheduler_config, vllm_config.compilation_config
    captured = max(compilation.cudagraph_capture_sizes or [0])
    most = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs, captured)
    tensor_parallel = vllm_config.parallel_config.tensor_parallel_size
    return -(-most // tensor_parallel) * tensor_parallel


def _pipeline_layers(vllm_config: Any) -> range:
    """Decoder layers that this pipeline rank holds."""
    start, end = vllm_config.model_config.get_layers_start_end_indices(vllm_config.parallel_config)
    return range(start, end)
