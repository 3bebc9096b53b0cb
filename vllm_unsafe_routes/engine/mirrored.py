"""Device tensors that follow host arrays: written on the host, brought over once a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class Mirrored:
    """A tensor on the device, and the host array that it follows.

    Many small writes of a step become one copy, which does not stall the stream. On CPU both are the same memory.

    Args:
        shape: of both; entries along the first dimension are written and copied.
        fill: first value of all.
        dtype: of both.
        device: where the tensor is.

    Attributes:
        host: the array; `write` says what changes in it.
        tensor: what `flush` made of it.

    """

    def __init__(self, shape: tuple[int, ...], fill: float, dtype: Any, device: torch.device) -> None:
        # Zeros take memory once they are written over.
        self.host: np.ndarray = np.full(shape, fill, dtype) if fill else np.zeros(shape, dtype)
        self.tensor = torch.from_numpy(self.host).to(device)
        self._is_shared = device.type == "cpu"
        self._changed = slice(0, 0)

    def write(self, at: Any, values: Any) -> None:
        """Set entries on the host; `at` is a number, a slice with both ends, or a list of numbers."""
        self.host[at] = values
        if self._is_shared:
            return
        if isinstance(at, slice):
            first, end = at.start, at.stop
        else:
            first, end = (at, at + 1) if isinstance(at, int) else (min(at), max(at) + 1)
        changed = self._changed
        self._changed = slice(min(first, changed.start), max(end, changed.stop)) if changed.stop else slice(first, end)

    def flush(self) -> None:
        """Bring what was written to the device, in stream order."""
        if self._changed.stop:
            # The pinned copy lives until the device has read it.
            values = torch.from_numpy(self.host[self._changed]).pin_memory()
            self.tensor[self._changed].copy_(values, non_blocking=True)
            self._changed = slice(0, 0)
