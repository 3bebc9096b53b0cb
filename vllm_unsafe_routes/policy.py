"""Route policies: what holds for every request of an engine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .directive import integers, numbers
from .errors import RouteError
from .files import read_file, write_atomically
from .plan import WEIGHT_MODES
from .shape import ModelShape
from .wire import read_bias, read_document, reject_unknown_keys

POLICY_VERSION = "route-policy/1"
# Of a policy with a bias; others are written as they were before there was one.
BIASED_VERSION = "route-policy/2"
# "observe" counts what "enforce" would change, and changes nothing.
POLICY_MODES = ("enforce", "observe")


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """What a policy says of one layer.

    Attributes:
        disabled: experts that no token may be routed to.
        protected: experts that no request's plan may exclude.
        bias: expert -> what is added to its logit before scoring, of every token that no plan forces. Kept as a read-only copy by
            expert, without zeros.

    """

    disabled: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()
    bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("disabled", "protected"):
            object.__setattr__(self, name, frozenset(integers(getattr(self, name), f"policy: {name}")))
        if not isinstance(self.bias, Mapping):
            raise RouteError(f"policy: bias must be a mapping of expert -> value, got {self.bias!r}")
        experts = integers(self.bias, "policy: bias")
        values = numbers(self.bias.values(), len(experts), "policy: bias")
        both = sorted(self.disabled & {*experts})
        if both:
            raise RouteError(f"policy: expert {both[0]} is both disabled and biased")
        kept = sorted((expert, value) for expert, value in zip(experts, values, strict=True) if value)
        object.__setattr__(self, "bias", MappingProxyType(dict(kept)))

    def __reduce__(self) -> tuple[Any, ...]:
        # A read-only view can be neither pickled nor copied deeply.
        return LayerPolicy, (self.disabled, self.protected, dict(self.bias))

    @property
    def routes(self) -> bool:
        """Whether it changes routes of requests without a plan."""
        return bool(self.disabled or self.bias)

    @property
    def experts(self) -> set[int]:
        """All that it speaks of."""
        return {*self.disabled, *self.protected, *self.bias}


_NOTHING = LayerPolicy()


@dataclass(frozen=True)
class RoutePolicy:
    """An engine-wide policy. It keeps copies of what it is made of, so that its digest always tells what it does.

    Attributes:
        layers: decoder layer index -> what holds there.
        weights: `"masked"` or `"native"`, as in `RoutePlan`.
        model: fingerprint of the model it was made for; None: any model of a fitting shape.
        provenance: where it came from (runs, rule, seeds, figures); free-form, not part of the digest.

    """

    layers: Mapping[int, LayerPolicy]
    weights: str = "masked"
    model: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_MODES:
            raise RouteError(f"policy weights {self.weights!r} is not one of {', '.join(WEIGHT_MODES)}")
        if self.model is not None and not isinstance(self.model, str):
            raise RouteError(f"policy model must be a fingerprint string or null, got {self.model!r}")
        layers = dict(zip(integers(self.layers, "policy layers"), self.layers.values(), strict=True))
        for layer, entry in layers.items():
            if not isinstance(entry, LayerPolicy):
                raise RouteError(f"policy layer {layer} must be a LayerPolicy, got {entry!r}")
            both = sorted(entry.disabled & entry.protected)
            if both:
                raise RouteError(f"policy layer {layer}: expert {both[0]} is both disabled and protected")
        object.__setattr__(self, "layers", MappingProxyType(layers))
        object.__setattr__(self, "provenance", MappingProxyType(dict(self.provenance)))

    def __reduce__(self) -> tuple[Any, ...]:
        # As for `LayerPolicy`.
        return RoutePolicy, (dict(self.layers), self.weights, self.model, dict(self.provenance))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutePolicy:
        """Read a policy file. Raises `RouteError` naming the file for anything that is wrong with it."""
        return read_file(path, "policy file", cls.from_json)

    def save(self, path: str | Path) -> None:
        """Write the policy as readable JSON, whole or not at all."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> RoutePolicy:
        """Read the `route-policy/1` form, or `/2`, which has biases; unknown keys and versions are refused."""
        known = {"version", "weights", "model", "layers", "provenance"}
        document = read_document(text, "policy", [POLICY_VERSION, BIASED_VERSION], known)
        entries, provenance = document.get("layers"), document.get("provenance", {})
        if not isinstance(entries, Mapping):
            raise RouteError(f"policy layers must be an object of layer -> entry, got {entries!r}")
        if not isinstance(provenance, Mapping):
            raise RouteError(f"policy provenance must be an object, got {provenance!r}")
        known = {"disabled", "protected"} | ({"bias"} if document["version"] == BIASED_VERSION else set())
        layers: dict[int, LayerPolicy] = {}
        for name, entry in entries.items():
            if not (str(name).isascii() and str(name).isdecimal() and len(str(name)) <= 9):
                raise RouteError(f"policy layer {str(name)[:80]!r} is not a layer index")
            layer = int(name)
            if layer in layers:
                raise RouteError(f"policy layer {name} is given twice")
            layers[layer] = _read_layer(entry, known, f"policy layer {name}")
        return cls(layers, document.get("weights", "masked"), document.get("model"), provenance)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form as plain Python values."""
        layers: dict[str, dict[str, Any]] = {}
        for layer, entry in sorted(self.layers.items()):
            layers[str(layer)] = {"disabled": sorted(entry.disabled), "protected": sorted(entry.protected)}
            if entry.bias:
                layers[str(layer)]["bias"] = {str(expert): value for expert, value in entry.bias.items()}
        version = BIASED_VERSION if self.has_bias else POLICY_VERSION
        document: dict[str, Any] = {"version": version, "weights": self.weights, "layers": layers}
        if self.model is not None:
            document["model"] = self.model
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        return document

    def describe(self) -> str:
        """What it does, in a line."""
        parts = [
            f"{sum(len(getattr(entry, name)) for entry in self.layers.values())} {word}"
            for name, word in (("disabled", "disabled"), ("protected", "protected"), ("bias", "biased"))
        ]
        return f"{', '.join(parts)} in {len(self.layers)} layers, weights {self.weights}"

    @property
    def has_bias(self) -> bool:
        """Whether it biases any expert."""
        return any(entry.bias for entry in self.layers.values())

    @property
    def digest(self) -> str:
        """32 hex digits over what the policy does; provenance does not count."""
        document = self.to_dict()
        document.pop("provenance", None)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]

    def validate(self, shape: ModelShape) -> None:
        """Check the policy against a model.

        Raises:
            RouteError: another model's policy, a layer without experts, an expert out of range, fewer than top_k experts
                left, more protected experts than top_k.

        """
        if self.model is not None and self.model != shape.fingerprint:
            raise RouteError(f"the policy is for model {self.model}, this engine serves {shape.fingerprint} ({shape.model_type})")
        if self.weights == "native" and not shape.native_weights:
            raise RouteError(f"policy weights 'native' do not exist for model_type {shape.model_type!r}")
        for layer, entry in self.layers.items():
            if layer not in shape.slot_of_layer:
                raise RouteError(f"policy layer {layer} has no experts; MoE layers are {shape.describe_layers()}")
            for expert in sorted(entry.experts):
                if expert >= shape.num_experts:
                    raise RouteError(
                        f"policy layer {layer}: expert {expert} is out of range for {shape.num_experts} experts "
                        f"(0-{shape.num_experts - 1})"
                    )
            left = shape.num_experts - len(entry.disabled)
            if left < shape.top_k:
                raise RouteError(f"policy layer {layer}: {left} experts left, top_k {shape.top_k} are needed")
            if len(entry.protected) > shape.top_k:
                raise RouteError(
                    f"policy layer {layer}: {len(entry.protected)} protected experts, at most top_k {shape.top_k} can be selected"
                )


def _read_layer(entry: Any, known: set[str], where: str) -> LayerPolicy:
    """One entry of the JSON form."""
    if not isinstance(entry, Mapping):
        raise RouteError(f"{where} must be an object, got {entry!r}")
    reject_unknown_keys(entry, known, where)
    disabled = integers(entry.get("disabled", ()), f"{where}: disabled")
    protected = integers(entry.get("protected", ()), f"{where}: protected")
    for key, experts in (("disabled", disabled), ("protected", protected)):
        if len(set(experts)) != len(experts):
            raise RouteError(f"{where}: an expert is repeated in {key}: {list(experts)}")
    biased, values = read_bias(entry.get("bias", {}), where)
    if len(set(biased)) != len(biased):
        raise RouteError(f"{where}: an expert is repeated in bias: {biased}")
    bias = dict(zip(biased, numbers(values, len(biased), f"{where}: bias"), strict=True))
    return LayerPolicy(frozenset(disabled), frozenset(protected), bias)


@dataclass(frozen=True)
class ActivePolicy:
    """The policy that an engine holds at one time, and what it does with it.

    Attributes:
        policy: the policy; None: the engine has none.
        mode: `"enforce"` or `"observe"`.

    """

    policy: RoutePolicy | None = None
    mode: str = "enforce"

    def __post_init__(self) -> None:
        if self.mode not in POLICY_MODES:
            raise RouteError(f"policy_mode {self.mode!r} is not one of {', '.join(POLICY_MODES)}")
        if self.mode == "observe" and self.policy is not None and self.policy.has_bias:
            raise RouteError("policy_mode 'observe' counts picks that are disabled; what a bias moves it cannot count")

    @property
    def enforced(self) -> RoutePolicy | None:
        """The policy that requests must obey; None under `observe`."""
        return self.policy if self.mode == "enforce" else None

    @cached_property
    def digest(self) -> str | None:
        """The policy's digest, whatever the mode."""
        return None if self.policy is None else self.policy.digest

    @property
    def cache_digest(self) -> str | None:
        """What tells KV computed under this policy from other KV: an observed policy computes what no policy computes."""
        return self.digest if self.mode == "enforce" else None

    def at(self, layer: int) -> LayerPolicy:
        """What the policy says of a decoder layer, whatever the mode."""
        return _NOTHING if self.policy is None else self.policy.layers.get(layer, _NOTHING)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {"policy": None if self.policy is None else self.policy.to_dict(), "mode": self.mode}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ActivePolicy:
        """Read what `to_dict` wrote."""
        policy = document["policy"]
        return cls(None if policy is None else RoutePolicy.from_json(policy), document["mode"])
