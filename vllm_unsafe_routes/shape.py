"""What a plan must know of a model: which layers have experts, how many, and how many a token gets.

Read from the Hugging Face config alone, so the front end can refuse a bad plan before the engine sees it. The worker
compares it with the layers it really finds and stops the engine where they differ (`engine/router.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import MappingProxyType
from typing import Any

from .errors import RouteError

_LAYER_KEYS = ("num_hidden_layers", "n_layers", "num_layers")
_HIDDEN_KEYS = ("hidden_size", "d_model")
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
# Parts of a config that hold its MoE keys: DBRX.
_MOE_PARTS = ("ffn_config",)
# Families whose own routing function gives weights only to the experts it selects itself (sparse mixer): native weights
# for another selection do not exist.
_NO_NATIVE_WEIGHTS = frozenset({"phimoe"})


@dataclass(frozen=True, eq=True)
class ModelShape:
    """The MoE layers of one model.

    Attributes:
        model_type: the HF config's `model_type`.
        num_hidden_layers: number of decoder layers, dense ones included.
        hidden_size: width of the residual stream; only part of the fingerprint.
        moe_layers: sorted 0-based decoder layer indices that have a router.
        num_experts: routed experts of each MoE layer (shared experts are not counted).
        top_k: experts that a token gets.
        native_weights: whether the router can weigh a selection that is not its own.

    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    native_weights: bool = field(default=True, compare=False)

    def __post_init__(self) -> None:
        layers = tuple(self.moe_layers)
        object.__setattr__(self, "moe_layers", layers)
        if not layers:
            raise RouteError(f"model_type {self.model_type!r} has no MoE layer: there is nothing to route")
        if list(layers) != sorted({*layers} & {*range(self.num_hidden_layers)}):
            raise RouteError(f"moe_layers {list(layers)} must be increasing layer indices (0-{self.num_hidden_layers - 1})")
        if not 1 <= self.top_k <= self.num_experts:
            raise RouteError(f"top_k {self.top_k} is out of range for {self.num_experts} experts (1-{self.num_experts})")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that two models share exactly when their routing has the same shape."""
        facts = [
            self.model_type,
            self.num_hidden_layers,
            self.hidden_size,
            self.moe_layers,
            self.num_experts,
            self.top_k,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @cached_property
    def slot_of_layer(self) -> Mapping[int, int]:
        """Decoder layer index -> index among the MoE layers (the row of the row-index table)."""
        return MappingProxyType({layer: slot for slot, layer in enumerate(self.moe_layers)})

    def __getstate__(self) -> dict[str, Any]:
        # Without what is computed on demand: a read-only view cannot be pickled.
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def describe_layers(self) -> str:
        """The MoE layers as short text for messages: `0-15` or `1, 3, 5`."""
        layers = self.moe_layers
        if layers == tuple(range(layers[0], layers[-1] + 1)):
            return f"{layers[0]}-{layers[-1]}"
        return ", ".join(map(str, layers))

    @classmethod
    def from_hf_config(cls, config: Any) -> ModelShape:
        """Read the shape from a Hugging Face config (an object with attributes, or a mapping), of several parts from its text part.

        Raises:
            RouteError: the config names no experts, or a key has no meaning that is known here.

        """
        get = _reader(config)

        def first(names: tuple[str, ...], meaning: str) -> int:
            for name in names:
                value = get(name)
                if isinstance(value, int) and value > 0:
                    return value
            raise RouteError(
                f"model_type {get('model_type')!r} is not an MoE model known here: its config has no {meaning} ({', '.join(names)})"
            )

        num_layers = first(_LAYER_KEYS, "number of layers")
        num_experts = first(_EXPERT_KEYS, "number of experts")
        return cls(
            model_type=str(get("model_type") or ""),
            num_hidden_layers=num_layers,
            hidden_size=next((int(size) for name in _HIDDEN_KEYS if (size := get(name))), 0),
            moe_layers=tuple(layer for layer in range(num_layers) if _is_moe_layer(layer, get)),
            num_experts=num_experts,
            top_k=first(_TOP_K_KEYS, "number of experts per token"),
            native_weights=get("model_type") not in _NO_NATIVE_WEIGHTS,
        )


def _reader(config: Any) -> Callable[[str], Any]:
    """A function from a key to its value, looked up in the config and then in its MoE part; None where neither has it."""

    def look(part: Any, name: str) -> Any:
        return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)

    text = look(config, "text_config")
    if isinstance(config, Mapping) and not isinstance(text, Mapping | None):
        raise RouteError("model config part text_config is not a JSON object")
    config = config if text is None else text
    parts = [config, *(part for name in _MOE_PARTS if (part := look(config, name)) is not None)]
    return lambda name: next((value for part in parts if (value := look(part, name)) is not None), None)


def _is_moe_layer(layer: int, get: Callable[[str], Any]) -> bool:
    """Whether a decoder layer has experts, by the config keys that the families use for it."""
    listed = _listed_layers(get)
    if listed is not None:
        return layer in listed
    if layer in (get("mlp_only_layers") or ()):  # Qwen2-MoE, Qwen3-MoE
        return False
    # Llama-4; Qwen; Ernie-4.5
    step = get("interleave_moe_layer_step") or get("decoder_sparse_step") or get("moe_layer_interval") or 1
    if (layer + 1) % step:
        return False
    # DeepSeek, GLM-4-MoE; AFMoE, LFM2; Ernie-4.5
    first = get("first_k_dense_replace") or get("num_dense_layers") or get("moe_layer_start_index") or 0
    last = get("moe_layer_end_index")
    if layer < first or (last is not None and layer > last):
        return False
    period = get("expert_layer_period")
    if period is not None:  # Jamba
        return bool(layer % period == (get("expert_layer_offset") or 0))
    frequency = get("moe_layer_freq") or 1
    if isinstance(frequency, list | tuple):
        return bool(frequency[layer])
    return bool(layer % int(frequency) == 0)


def _listed_layers(get: Callable[[str], Any]) -> Collection[int] | None:
    """MoE layers of a config that says it layer by layer; None: it does not."""
    explicit = get("moe_layers")
    if explicit is not None:  # Llama-4
        return frozenset(explicit)
    enumerated = get("moe_layers_enum")
    if enumerated is not None:  # Step-3
        return frozenset(map(int, enumerated.split(",") if isinstance(enumerated, str) else enumerated))
    mlp_types = get("mlp_layer_types")
    if mlp_types is not None:  # transformers 5 writes this for Qwen and GLM families
        return frozenset(layer for layer, kind in enumerate(mlp_types) if kind != "dense")
    pattern = get("hybrid_override_pattern")
    if pattern is not None:  # Nemotron-H
        return frozenset(layer for layer, kind in enumerate(pattern) if kind == "E")
    # Nemotron-H as transformers writes it; other hybrids name their attention there, and "moe" never.
    block_types = get("layers_block_type") or ()
    return frozenset(layer for layer, kind in enumerate(block_types) if kind == "moe") or None
