"""Whether every bound layer is called in every forward pass, and whether its router logits are numbers.

A bound router can be gone around: by a kernel of a later vLLM that picks experts inside itself, maybe in decode steps only. No
list of such kernels is needed to notice it. Each forward pass has a number; a call of a bound router leaves it in the layer's mark,
and a mark that lacks it afterwards is a miss. On GPUs the route kernel writes the mark, so that replays of captured graphs, which
run no Python, leave it as well. Steps in which nobody has a directive are not watched: there is nothing to go around.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from vllm_unsafe_routes.kernels.route_topk import uses_triton
from vllm_unsafe_routes.kernels.spec import RouteWatch

from ..errors import RouteError
from ..shape import ModelShape
from .bind import OFF_HELP
from .mirrored import Mirrored
from .step import NO_STEP, Step
from .sums import DeviceSums


class Watch:
    """The watch over one worker's layers.

    Args:
        sums: where misses and NaN are counted.
        shape: the model.
        local_slots: MoE slots of this pipeline rank, consecutive.

    """

    def __init__(self, sums: DeviceSums, shape: ModelShape, local_slots: Sequence[int]) -> None:
        device = sums.missed.device
        self.sums = sums
        self._local = slice(local_slots[0], local_slots[-1] + 1) if local_slots else slice(0, 0)
        self._layers = shape.moe_layers[self._local]
        self._in_kernel = uses_triton(device)
        self._num_tokens = 0
        self._marks = torch.zeros(len(sums.missed), dtype=torch.int32, device=device)
        # The number of the forward pass, which the device itself counts up, and its tokens, which seldom change in decoding.
        self._step = Mirrored((2,), 0, np.int32, device)
        self._number = self._step.tensor[:1]
        # Views and a buffer, so that a step costs as few operations as can be.
        self._local_marks, self._local_missed = self._marks[self._local], sums.missed[self._local]
        self._are_missed = torch.zeros(len(self._local_marks), dtype=torch.bool, device=device)

    def stage(self, step: Step) -> None:
        """A forward pass begins."""
        self._number.add_(1)
        if step.num_tokens != self._num_tokens:
            self._num_tokens = step.num_tokens
            self._step.write(1, self._num_tokens)
            self._step.flush()

    def apply(self, slot: int, router_logits: torch.Tensor) -> RouteWatch | None:
        """The router of MoE layer `slot` is called; returns what the route kernel notes, None where that is done here."""
        if self._in_kernel:
            return RouteWatch(self._step.tensor, self._marks[slot : slot + 1], self.sums.num_nan[slot : slot + 1])
        self._marks.numpy()[slot] = self._step.host[0]
        if math.isnan(float(router_logits.sum())):  # so is the sum of opposite infinities
            self.sums.num_nan[slot] += router_logits[: self._num_tokens].isnan().any(1).sum()
        return None

    def _missed(self) -> torch.Tensor:
        return torch.ne(self._local_marks, self._number, out=self._are_missed)

    def collect(self) -> None:
        """The forward pass has ended: count the layers that it did not call."""
        self._local_missed.add_(self._missed())
        self.sums.grew()

    def check(self, forward: Callable[[], object]) -> None:
        """Run a forward pass of dummy tokens, as the engine will run those of requests; waits for the device.

        Raises:
            RouteError: it did not call every bound router.

        """
        self.stage(NO_STEP)
        forward()
        for layer, is_missed in zip(self._layers, self._missed().tolist(), strict=True):
            if is_missed:
                raise RouteError(f"MoE layer {layer}: its router is bound, but a warm-up step did not ask it; {OFF_HELP}")
