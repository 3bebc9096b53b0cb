"""How often each expert is picked: counted on the device, step by step, for all requests and for those that bring a label.

The routes of a step lie in the buffers of `capture.py`, written by the route kernel, also in replays of captured graphs. After the
last layer one scatter adds them to the counts; tokens that only pad the batch lie behind the counted ones. Counts only grow: a
reset is a subtraction in the engine core, so that workers never disagree about when it was.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..extras import USAGE_LABEL_KEY
from ..shape import ModelShape
from .attributes import USAGE
from .host_copies import HostCopy
from .mirrored import Mirrored
from .step import Step
from .swap import CONFLICT, checked

USAGE_METHOD = "unsafe_routes_usage"
WORKER_USAGE_METHOD = "unsafe_routes_read_usage"
# What a caller wants of `USAGE_METHOD`: all since the start as it was a while ago, without waiting for the device; what was counted
# since the last reset; the same, and count from 0 again.
POLL, READ, RESET = "poll", "read", "reset"


class ExpertUsage:
    """The counts of one worker.

    Args:
        labels: what requests may count under, beside no label at all.
        shape: the model.
        capacity: most tokens of a forward pass.
        local_slots: MoE slots of this pipeline rank, consecutive.
        device: where the model runs.

    """

    def __init__(
        self, labels: Sequence[str], shape: ModelShape, capacity: int, local_slots: Sequence[int], device: torch.device
    ) -> None:
        num_layers = len(shape.moe_layers)
        self._number_of = {label: number for number, label in enumerate(labels, 1)}
        # The first bin of a layer takes what is no expert: a slot of the buffer that no router has written yet.
        self._counts = torch.zeros((len(labels) + 1, num_layers, shape.num_experts + 1), dtype=torch.int64, device=device)
        self._local = slice(local_slots[0], local_slots[-1] + 1) if local_slots else slice(0, 0)
        self._bins = (torch.arange(num_layers, device=device) * self._counts.shape[2] + 1)[self._local, None, None]
        self._one = torch.ones(1, dtype=torch.int64, device=device)
        # Requests with a label, and each token's number of the step in hand.
        self._labelled: dict[str, int] = {}
        self._numbers = Mirrored((capacity,), 0, np.int64, device)
        self._copy: HostCopy | None = None

    def follow(self, scheduler_output: Any) -> None:
        """Forget finished requests and read the labels of new ones."""
        for req_id in scheduler_output.finished_req_ids:
            self._labelled.pop(req_id, None)
        if self._number_of:
            for new in scheduler_output.scheduled_new_reqs:
                label = ((new.sampling_params and new.sampling_params.extra_args) or {}).get(USAGE_LABEL_KEY)
                if label is not None:
                    self._labelled[new.req_id] = self._number_of[label]

    def collect(self, step: Step, route_ids: torch.Tensor) -> None:
        """Count a step's routes, int32 [MoE layers, capacity, top_k]; nothing waits."""
        num_tokens = step.num_tokens
        if not num_tokens:
            return
        index = route_ids[self._local, :num_tokens] + self._bins
        numbers = [self._labelled.get(req_id, 0) for req_id in step.req_ids] if self._labelled else []
        if any(numbers):
            self._numbers.write(slice(0, num_tokens), np.repeat(numbers, [step.num_scheduled[req_id] for req_id in step.req_ids]))
            self._numbers.flush()
            index += self._numbers.tensor[:num_tokens, None] * self._counts[0].numel()
        self._counts.view(-1).scatter_add_(0, index.view(-1), self._one.expand(index.numel()))

    def read(self, wait: bool) -> np.ndarray | None:
        """int64 [labels + 1, MoE layers, num_experts], labels in order behind no label.

        Args:
            wait: for the device; else the counts are those of an earlier call, or None where they are not known yet.

        """
        if wait:
            return HostCopy(self._counts).wait()[:, :, 1:]
        self._copy = self._copy or HostCopy(self._counts)
        if not self._copy.is_ready:
            return None
        copy, self._copy = self._copy, None
        return copy.wait()[:, :, 1:]


def core_usage(core: Any, admission: Any, ask: str) -> dict[str, Any]:
    """The expert usage of an engine; a method of vLLM's `EngineCore`, called between two steps.

    Args:
        core: vLLM's `EngineCore`.
        admission: its `RouteAdmission`, or None.
        ask: `POLL`, `READ` or `RESET`.

    Returns:
        `labels`; `layers`, decoder layer indices; `since`, seconds since 1970 when it began to count; `counts` [labels + 1][layers]
        [num_experts], None where they are not known yet. Or `error` and `kind`.

    """
    labels = None if admission is None else admission.config.usage
    if labels is None:
        return {"error": "expert usage is not counted by this engine; start it with --route-usage", "kind": CONFLICT}
    since, before = core.__dict__.setdefault(USAGE, (time.time(), 0))
    read = [counts for counts in core.model_executor.collective_rpc(WORKER_USAGE_METHOD, args=(ask != POLL,)) if counts is not None]
    # Tensor-parallel ranks count alike, pipeline ranks count layers of their own.
    counts = np.maximum.reduce(read) if read else None
    if ask == RESET:
        core.__dict__[USAGE] = (time.time(), counts)
    if counts is not None and ask != POLL:
        counts = counts - before
    return {
        "labels": list(labels),
        "layers": list(admission.shape.moe_layers),
        "since": since,
        "counts": None if counts is None else counts.tolist(),
    }


def usage_document(said: Mapping[str, Any]) -> dict[str, Any]:
    """What `core_usage` said, for readers: `counts` [layers][num_experts] of all requests, `by_label` of those with a label.

    Raises:
        SwapError: usage is not counted.

    """
    said = checked(said)
    counts = np.array(said["counts"], np.int64)
    by_label = dict(zip(said["labels"], counts[1:].tolist(), strict=True))
    return {"layers": said["layers"], "since": said["since"], "counts": counts.sum(0).tolist(), "by_label": by_label}


def expert_usage(llm: Any, reset: bool = False) -> dict[str, Any]:
    """The expert usage of an offline `vllm.LLM` (or `LLMEngine`), as `usage_document` gives it.

    Args:
        llm: the engine; made with `usage`.
        reset: count from 0 again.

    Raises:
        SwapError: usage is not counted.

    """
    client, ask = getattr(llm, "llm_engine", llm).engine_core, RESET if reset else READ
    if hasattr(client, "call_utility"):
        return usage_document(client.call_utility(USAGE_METHOD, ask))
    return usage_document(getattr(client.engine_core, USAGE_METHOD)(ask))
