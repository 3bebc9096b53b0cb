"""Noise on router logits, as settings name it.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import RouteError
from .shape import ModelShape
from .wire import reject_unknown_keys

# Router logits are of the order of 10; noise far above it is a random router.
_MAX_SCALE = 1000.0


@dataclass(frozen=True, slots=True)
class Jitter:
    """Noise on router logits; `kernels/jitter.py` is the formula.

    Attributes:
        scale: largest change of a logit.
        seed: of the generator; drawn anew where the user gives none, so that nobody can foresee the noise.
        layers: decoder layers that have it; None: all MoE layers.

    """

    scale: float
    seed: int
    layers: tuple[int, ...] | None = None

    @classmethod
    def from_dict(cls, document: Any) -> Jitter:
        """Read the form that the settings have. Raises `RouteError` for anything that is wrong with it."""
        if not isinstance(document, Mapping):
            raise RouteError(f"jitter must be an object with a scale, got {document!r}")
        reject_unknown_keys(document, {"scale", "seed", "layers"}, "jitter")
        scale, seed, layers = document.get("scale"), document.get("seed"), document.get("layers")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale <= _MAX_SCALE:
            raise RouteError(f"jitter scale must be a number above 0 and at most {_MAX_SCALE:g}, got {scale!r}")
        if seed is None:
            seed = secrets.randbelow(1 << 63)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
            raise RouteError(f"jitter seed must be an integer from 0 to {(1 << 63) - 1}, got {seed!r}")
        if layers is not None:
            is_list = isinstance(layers, list | tuple) and layers
            if not is_list or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
                raise RouteError(f"jitter layers must be a list of layer indices or null, got {layers!r}")
            layers = tuple(layers)
        return cls(float(scale), seed, layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"scale": self.scale, "seed": self.seed, "layers": None if self.layers is None else list(self.layers)}

    def validate(self, shape: ModelShape) -> None:
        """Raise `RouteError` for a layer without experts."""
        for layer in self.layers or ():
            if layer not in shape.slot_of_layer:
                raise RouteError(f"jitter layer {layer} has no experts; MoE layers are {shape.describe_layers()}")
