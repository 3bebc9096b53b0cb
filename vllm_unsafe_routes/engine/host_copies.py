"""Results of a step on their way from the device to the host, which nobody waits for before they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class HostCopy:
    """A copy of a device tensor as it is now.

    Its memory is its own and goes with it: what vLLM's warm-up creates, in inference mode, cannot be written to later.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        # To pinned memory where the device is not the CPU, because it does not block.
        self._tensor = tensor.to("cpu", non_blocking=True, copy=True)
        self._event: Any = None
        if tensor.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def is_ready(self) -> bool:
        """Whether `wait` returns at once."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> np.ndarray:
        """The values; waits for the copy, from whatever thread."""
        if self._event is not None:
            self._event.synchronize()
        return self._tensor.numpy()


class HostCopies:
    """Copies of one step. `take` starts one, `resolve` waits for all and hands each to its user."""

    def __init__(self) -> None:
        self._pending: list[tuple[HostCopy, Callable[[np.ndarray], None]]] = []

    def __len__(self) -> int:
        """Copies on their way."""
        return len(self._pending)

    def take(self, tensor: torch.Tensor, use: Callable[[np.ndarray], None]) -> None:
        """Copy a device tensor as it is now; `use` gets the values in `resolve`."""
        self._pending.append((HostCopy(tensor), use))

    def resolve(self) -> None:
        """Wait for the copies, from whatever thread, and hand them out; a second call does nothing."""
        pending, self._pending = self._pending, []
        for copy, use in pending:
            use(copy.wait())
