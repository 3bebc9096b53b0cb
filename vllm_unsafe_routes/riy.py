"""RIY's profiles of pruned experts (vllm#37824) as policies, and back.

A profile names, for each decoder layer, the experts whose router logits are -inf before the top_k are picked: what `disabled` of a
policy with masked weights does. It is JSON:

    {"version": 1, "model": "...", "pruned_experts": [[layer, expert], ...]}
    {"version": 2, "routing_mode": "pre_topk_mask", ...}            the same, said explicitly
    {"layers": {"0": [3, 11]}}                                      the other spelling that its loader takes

Version 2's `post_topk_drop` leaves a token with fewer experts than top_k; no policy says that, and it is refused. So are policies
with anything but disabled experts and masked weights on the way back. RIY frees the pruned experts' memory; a policy does not.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from .errors import RouteError
from .files import read_file
from .policy import LayerPolicy, RoutePolicy
from .shape import ModelShape

VERSIONS = (1, 2)
MASK, DROP = "pre_topk_mask", "post_topk_drop"
_READ = ("version", "routing_mode", "pruned_experts", "layers")


def policy_of_riy(profile: str | bytes | Mapping[str, Any], shape: ModelShape) -> RoutePolicy:
    """A profile as a policy for this model; what else it says is kept in the policy's provenance.

    Raises:
        RouteError: no profile, one that prunes behind the top_k, or one that does not fit the model.

    """
    document = _object(profile)
    version = document.get("version", 1)
    if version not in VERSIONS or isinstance(version, bool):
        raise RouteError(f"RIY profile: version {version!r} is not one of {', '.join(map(str, VERSIONS))}")
    mode = document.get("routing_mode", MASK if version == 1 else None)
    if mode == DROP:
        raise RouteError(f"RIY profile: routing_mode {DROP!r} drops experts behind the top_k; a policy masks before it ({MASK!r})")
    if mode != MASK:
        raise RouteError(f"RIY profile: routing_mode {mode!r} is not one of {MASK}, {DROP}")
    layers: dict[int, set[int]] = {}
    for layer, expert in _pairs(document):
        if expert in layers.setdefault(layer, set()):
            raise RouteError(f"RIY profile: layer {layer}: expert {expert} is pruned twice")
        layers[layer].add(expert)
    said = {name: value for name, value in document.items() if name not in _READ}
    policy = RoutePolicy(
        {layer: LayerPolicy(frozenset(experts)) for layer, experts in sorted(layers.items())},
        model=shape.fingerprint,
        provenance={"riy": said},
    )
    try:
        policy.validate(shape)
    except RouteError as error:
        raise RouteError(f"RIY profile: {error}") from None
    return policy


def riy_of_policy(policy: RoutePolicy) -> dict[str, Any]:
    """A policy as a profile of version 1, JSON values.

    Raises:
        RouteError: native weights, or a layer with more than disabled experts.

    """
    if policy.weights != "masked":
        raise RouteError(f"a RIY profile cannot say weights {policy.weights!r}: its mask is put before the scores")
    pairs = []
    for layer, entry in sorted(policy.layers.items()):
        for field in dataclasses.fields(entry):
            if field.name != "disabled" and getattr(entry, field.name):
                raise RouteError(f"policy layer {layer}: a RIY profile cannot say {field.name!r}, only disabled experts")
        pairs += [[layer, expert] for expert in sorted(entry.disabled)]
    said = policy.provenance.get("riy")
    return {"version": 1, **(said if isinstance(said, Mapping) else {}), "pruned_experts": pairs}


def load_riy(path: str | os.PathLike[str], shape: ModelShape) -> RoutePolicy:
    """Read a profile's file; see `policy_of_riy`, whose errors name the file."""
    return read_file(path, "RIY profile", lambda text: policy_of_riy(text, shape))


def _object(profile: str | bytes | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(profile, Mapping):
        try:
            profile = json.loads(profile)
        except ValueError as error:
            raise RouteError(f"RIY profile: not JSON: {error}") from None
    if not isinstance(profile, Mapping):
        raise RouteError(f"RIY profile: expected an object, got {type(profile).__name__}")
    return profile


def _pairs(document: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(layer, expert) of either spelling."""
    if ("pruned_experts" in document) == ("layers" in document):
        raise RouteError("RIY profile: one of 'pruned_experts' and 'layers' is needed, and only one")
    found = document.get("pruned_experts")
    if found is None:
        entries = document["layers"]
        if not isinstance(entries, Mapping) or not all(isinstance(experts, list) for experts in entries.values()):
            raise RouteError("RIY profile: layers must be an object of layer -> list of experts")
        found = [[int(name) if name.isdecimal() else name, expert] for name, experts in entries.items() for expert in experts]
    if not isinstance(found, list):
        raise RouteError(f"RIY profile: pruned_experts must be a list of [layer, expert], got {type(found).__name__}")
    for at, pair in enumerate(found):
        if not isinstance(pair, list) or len(pair) != 2 or any(type(value) is not int or value < 0 for value in pair):
            raise RouteError(f"RIY profile: pruned_experts[{at}] must be [layer, expert], got {pair!r}")
    return [(layer, expert) for layer, expert in found]
