"""A linear probe over the experts that a prompt's tokens are routed to: the versioned file that `unsafe-routes routescan` writes.

A prompt's features are, per MoE layer and expert, the share of its tokens that are routed there. The score is linear in them, so it
is a sum over tokens, and says nothing of their order.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RouteError
from .files import read_file, write_atomically
from .shape import ModelShape
from .wire import read_document

PROBE_VERSION = "route-probe/1"
_KEYS = {"version", "model", "layers", "weights", "bias", "threshold", "measured"}


@dataclass(frozen=True, slots=True, eq=False)
class RouteProbe:
    """A linear score of a prompt's routes.

    Attributes:
        model: fingerprint of the model's shape.
        layers: decoder layer indices of the MoE layers.
        weights: float64 [num_moe_layers, num_experts], of the share of tokens that are routed to each expert.
        bias: added to the score.
        threshold: a prompt is flagged if its score is greater.
        measured: what its maker measured, for readers; plain JSON values.

    """

    model: str
    layers: tuple[int, ...]
    weights: npt.NDArray[np.float64]
    bias: float
    threshold: float
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """32 hex digits over what the score depends on."""
        scored = {key: value for key, value in self.to_dict().items() if key != "measured"}
        return hashlib.sha256(json.dumps(scored, sort_keys=True).encode()).hexdigest()[:32]

    def score(self, counts: npt.NDArray[Any], num_tokens: int) -> float:
        """The score of a prompt of `num_tokens` tokens; `counts` is [num_moe_layers, num_experts], tokens routed to each expert."""
        return self.score_of_sum(float((self.weights * counts).sum()), num_tokens)

    def score_of_sum(self, total: float, num_tokens: int) -> float:
        """The score of a prompt of `num_tokens` tokens, from the sum of the weights of their experts."""
        return self.bias + total / num_tokens

    def validate(self, shape: ModelShape) -> None:
        """Raise `RouteError` if it is for another model."""
        if self.model != shape.fingerprint:
            raise RouteError(f"the probe is for model {self.model}, this is {shape.fingerprint} ({shape.model_type})")
        size = (len(shape.moe_layers), shape.num_experts)
        if self.layers != tuple(shape.moe_layers) or self.weights.shape != size:
            raise RouteError(f"the probe has weights {self.weights.shape} of layers {self.layers}, the model's are {size}")

    def to_dict(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "version": PROBE_VERSION,
            "model": self.model,
            "layers": list(self.layers),
            "weights": self.weights.tolist(),
            "bias": self.bias,
            "threshold": self.threshold,
            "measured": dict(self.measured),
        }

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_atomically(path, json.dumps(self.to_dict()) + "\n")

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> RouteProbe:
        """Read what `to_dict` says. Raises `RouteError` for unknown keys or versions and for what is no finite number."""
        document = read_document(text, "probe", (PROBE_VERSION,), _KEYS)
        missing = _KEYS - {"measured"} - set(document)
        if missing:
            raise RouteError(f"the probe lacks {', '.join(sorted(missing))}")
        measured = document.get("measured", {})
        if not isinstance(document["model"], str) or not isinstance(measured, Mapping):
            raise RouteError("the probe's model must be a string, measured an object")
        rows = document["weights"]
        if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
            raise RouteError("the probe's weights must be a list of lists of equal length")
        weights = np.array([[_number(value, "weights") for value in row] for row in rows])
        layers = document["layers"]
        if not isinstance(layers, list) or len(layers) != len(rows) or not all(type(layer) is int for layer in layers):
            raise RouteError(f"the probe's layers must be integers, as many as weights has rows, got {str(layers)[:80]}")
        bias, threshold = (_number(document[key], key) for key in ("bias", "threshold"))
        return cls(document["model"], tuple(layers), weights, bias, threshold, measured)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouteProbe:
        """Read a probe file. Raises `RouteError`, naming the path."""
        return read_file(path, "probe", cls.from_json)


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e30 or math.isnan(value):
        raise RouteError(f"the probe's {key} has {str(value)[:80]}, which is no finite number")
    return float(value)
