"""Results of a step on their way from the device to the host, which nobody waits for before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class HostCopies:
    """Copies of one step. `take` starts one, `resolve` waits for all and hands each to its user."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, Callable[[np.ndarray], None]]] = []
        self._event: Any = None

    def take(self, tensor: torch.Tensor, use: Callable[[np.ndarray], None]) -> None:
        """Copy a device tensor as it is now; `use` gets the values in `resolve`."""
        # To pinned memory where the device is not the CPU, because it does not block.
        self._pending.append((tensor.to("cpu", non_blocking=True, copy=True), use))
        if tensor.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def resolve(self) -> None:
        """Wait for the copies, from whatever thread, and hand them out; a second call does nothing."""
        if self._event is not None:
            self._event.synchronize()
        pending, self._pending, self._event = self._pending, [], None
        for tensor, use in pending:
            use(tensor.numpy())
