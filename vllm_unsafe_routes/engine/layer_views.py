"""A buffer's rows by layer, cut to the tokens of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerViews:
    """Views of one buffer, made for all layers at once and only where the number of tokens changes: a layer pays a look-up.

    Args:
        buffer: [num_layers, capacity, ...].

    """

    def __init__(self, buffer: torch.Tensor) -> None:
        self._buffer = buffer
        self._num_tokens = -1
        self._views: Sequence[torch.Tensor] = ()

    def at(self, slot: int, num_tokens: int) -> torch.Tensor:
        """[num_tokens, ...] of MoE layer `slot`."""
        if num_tokens != self._num_tokens:
            self._num_tokens, self._views = num_tokens, self._buffer[:, :num_tokens].unbind()
        return self._views[slot]
