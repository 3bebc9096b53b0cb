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

from .directive import integers
from .errors import RouteError
from .plan import WEIGHT_MODES
from .shape import ModelShape
from .wire import read_document, reject_unknown_keys

POLICY_VERSION = "route-policy/1"
# "observe" counts what "enforce" would change, and changes nothing.
POLICY_MODES = ("enforce", "observe")


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """What a policy says of one layer.

    Attributes:
        disabled: experts that no token may be routed to.
        protected: experts that no request's plan may exclude.

    """

    disabled: frozenset[int] = frozenset()
    protected: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("disabled", "protected"):
            object.__setattr__(self, name, frozenset(integers(getattr(self, name), f"policy: {name}")))


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
        # A read-only view can be neither pickled nor copied deeply.
        return RoutePolicy, (dict(self.layers), self.weights, self.model, dict(self.provenance))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutePolicy:
        """Read a policy file. Raises `RouteError` naming the file for anything that is wrong with it."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RouteError(f"policy file {path} cannot be read: {error}") from None
        try:
            return cls.from_json(text)
        except RouteError as error:
            raise RouteError(f"policy file {path}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the policy as readable JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> RoutePolicy:
        """Read the `route-policy/1` form; unknown keys and versions are refused."""
        document = read_document(text, "policy", [POLICY_VERSION], {"version", "weights", "model", "layers", "provenance"})
        entries, provenance = document.get("layers"), document.get("provenance", {})
        if not isinstance(entries, Mapping):
            raise RouteError(f"policy layers must be an object of layer -> entry, got {entries!r}")
        if not isinstance(provenance, Mapping):
            raise RouteError(f"policy provenance must be an object, got {provenance!r}")
        layers: dict[int, LayerPolicy] = {}
        for name, entry in entries.items():
            if not str(name).isdecimal() or len(str(name)) > 9:
                raise RouteError(f"policy layer {str(name)[:80]!r} is not a layer index")
            where = f"policy layer {name}"
            if not isinstance(entry, Mapping):
                raise RouteError(f"{where} must be an object, got {entry!r}")
            reject_unknown_keys(entry, {"disabled", "protected"}, where)
            if int(name) in layers:
                raise RouteError(f"{where} is given twice")
            disabled = integers(entry.get("disabled", ()), f"{where}: disabled")
            protected = integers(entry.get("protected", ()), f"{where}: protected")
            for key, experts in (("disabled", disabled), ("protected", protected)):
                if len(set(experts)) != len(experts):
                    raise RouteError(f"{where}: an expert is repeated in {key}: {list(experts)}")
            layers[int(name)] = LayerPolicy(frozenset(disabled), frozenset(protected))
        return cls(layers, document.get("weights", "masked"), document.get("model"), provenance)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form as plain Python values."""
        document: dict[str, Any] = {
            "version": POLICY_VERSION,
            "weights": self.weights,
            "layers": {
                str(layer): {"disabled": sorted(entry.disabled), "protected": sorted(entry.protected)}
                for layer, entry in sorted(self.layers.items())
            },
        }
        if self.model is not None:
            document["model"] = self.model
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        return document

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
            for expert in sorted(entry.disabled | entry.protected):
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

    def banned(self, layer: int) -> frozenset[int]:
        """Experts that the policy disables at a decoder layer, whatever the mode."""
        entry = self.policy.layers.get(layer) if self.policy is not None else None
        return entry.disabled if entry is not None else frozenset()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {"policy": None if self.policy is None else self.policy.to_dict(), "mode": self.mode}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> ActivePolicy:
        """Read what `to_dict` wrote."""
        policy = document["policy"]
        return cls(None if policy is None else RoutePolicy.from_json(policy), document["mode"])
