"""Settings of the engine side: `additional_config["unsafe_routes"]`."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from ..compiler import PlanCompiler
from ..errors import RouteError
from ..jitter import Jitter
from ..policy import POLICY_MODES, POLICY_VERSION, ActivePolicy, RoutePolicy
from ..route_probe import PROBE_VERSION, RouteProbe
from ..shape import ModelShape
from ..wire import PLAN_KEY, reject_unknown_keys

CONFIG_KEY = "unsafe_routes"
GATING_CHOICES = ("native", "fused")
SEAMS = ("auto", "logits")
DEFAULT_LOGITS_MIB = 64
# Every label is as many counters again as the model has experts.
_MAX_USAGE_LABELS = 32
_USAGE_LABEL = re.compile(r"[\w.:/-]{1,64}")


@dataclass(frozen=True, slots=True)
class RouteConfig:
    """What an engine is told about routes.

    Attributes:
        policy: the policy's JSON form, or None. A path is accepted and read once, in the process that builds the config.
        policy_mode: "enforce": no token is routed to what the policy disables. "observe": that is counted, nothing is changed.
        allow_overrides: whether requests may bring plans.
        route_table_rows: distinct (layer, token) directives that can be on the device at one time.
        route_table_cells: int32 entries for the plans' blocks (MoE layers x (listed positions + 2) per request).
        route_table_slots: requests with a plan that may be in the scheduler at one time; more wait outside.
        gating: "native": the model's own gating runs first and only directed tokens are rewritten, so undirected tokens are
            bit for bit the model's own. "fused": one kernel replaces the gating of every token (Triton on GPUs).
        seam: "auto": a layer is controlled at its router; by a policy alone also at its logits, where its kernel routes inside
            itself. "logits": every layer at its logits, by policies and by plans that only mask and bias.
        jitter: noise on router logits as `Jitter.to_dict`, or None.
        usage: a list: how often experts are picked is counted, and by these labels too, which requests may bring; None: it is not.
        router_logits_mib: MiB of router logits that one request may ask for (`return_router_logits`), all of its samples together;
            None: none, and no memory is taken for them. Needs `allow_overrides`.
        monitor: a probe's JSON form (or its path, as `policy`) that scores every request's prompt, or None; it only observes.
        score_blocks: KV blocks that cells are scored in, taken from the free ones at the first such call; None: half of these.

    """

    policy: Mapping[str, Any] | None = None
    policy_mode: str = "enforce"
    allow_overrides: bool = False
    route_table_rows: int = 65536
    route_table_cells: int = 1 << 22
    route_table_slots: int = 4096
    gating: str = "native"
    seam: str = "auto"
    jitter: Mapping[str, Any] | None = None
    usage: Sequence[str] | None = None
    score_blocks: int | None = None
    router_logits_mib: int | None = None
    monitor: Mapping[str, Any] | None = None

    @property
    def enabled(self) -> bool:
        """Whether anything is asked for at all."""
        asked = (self.policy, self.jitter, self.usage, self.monitor)
        return self.allow_overrides or any(item is not None for item in asked)

    @classmethod
    def from_dict(cls, document: Any) -> RouteConfig:
        """Check and complete a user's dict. A policy path is replaced by the policy's content.

        Raises:
            RouteError: unknown keys, wrong types, an unreadable policy.

        """
        if not isinstance(document, Mapping):
            raise RouteError(f"additional_config[{CONFIG_KEY!r}] must be an object, got {document!r}")
        reject_unknown_keys(document, {item.name for item in fields(cls)}, f"additional_config[{CONFIG_KEY!r}]")
        values = dict(document)
        policy = values.get("policy")
        if isinstance(policy, Mapping):
            values["policy"] = RoutePolicy.from_json(policy).to_dict()
        elif isinstance(policy, str | os.PathLike):
            values["policy"] = RoutePolicy.load(policy).to_dict()
        elif policy is not None:
            raise RouteError(f"policy must be a path or a {POLICY_VERSION} object, got {policy!r}")
        values["monitor"] = _probe_document(values.get("monitor"))
        mode = values.get("policy_mode", "enforce")
        if mode not in POLICY_MODES:
            raise RouteError(f"policy_mode {mode!r} is not one of {', '.join(POLICY_MODES)}")
        if mode != "enforce" and policy is None:
            raise RouteError(f"policy_mode {mode!r} needs a policy (--route-policy PATH)")
        if not isinstance(values.get("allow_overrides", False), bool):
            raise RouteError(f"allow_overrides must be true or false, got {values['allow_overrides']!r}")
        for name in ("route_table_rows", "route_table_cells", "route_table_slots"):
            value = values.get(name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RouteError(f"{name} must be a positive integer, got {value!r}")
        for name, least in (("score_blocks", 3), ("router_logits_mib", 1)):
            value = values.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise RouteError(f"{name} must be an integer of at least {least}, or null, got {value!r}")
        if values.get("router_logits_mib") is not None and not values.get("allow_overrides"):
            raise RouteError("router_logits_mib needs allow_overrides (--enable-route-overrides)")
        if values.get("usage") is not None:
            values["usage"] = _usage_labels(values["usage"])
        for name, choices in (("gating", GATING_CHOICES), ("seam", SEAMS)):
            if values.get(name, choices[0]) not in choices:
                raise RouteError(f"{name} {values[name]!r} is not one of {', '.join(choices)}")
        counted = values.get("usage") is not None or values.get("monitor") is not None
        if values.get("seam") == "logits" and (values.get("gating") == "fused" or counted):
            raise RouteError("gating 'fused', usage and monitor need routers, which nobody asks with seam 'logits'")
        if values.get("jitter") is not None:
            values["jitter"] = Jitter.from_dict(values["jitter"]).to_dict()
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for `additional_config` (which is hashed as JSON and sent to every process)."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def load_policy(self) -> RoutePolicy | None:
        """The policy as an object."""
        return None if self.policy is None else RoutePolicy.from_json(self.policy)

    def load_monitor(self) -> RouteProbe | None:
        """The probe as an object."""
        return None if self.monitor is None else RouteProbe.from_json(self.monitor)

    def load_jitter(self) -> Jitter | None:
        """The noise as an object."""
        return None if self.jitter is None else Jitter.from_dict(self.jitter)

    def active_policy(self) -> ActivePolicy:
        """The policy that the engine starts with."""
        return ActivePolicy(self.load_policy(), self.policy_mode)

    def compiler(self, shape: ModelShape, active: ActivePolicy | None = None) -> PlanCompiler:
        """The plan compiler that the front end, the scheduler and the workers share the settings of.

        Args:
            shape: the model.
            active: the policy to compile under; None: the one that the engine starts with.

        Raises:
            RouteError: the policy does not fit the model, or the table cannot hold the policy's own rows.

        """
        active = self.active_policy() if active is None else active
        if active.policy is not None:
            active.policy.validate(shape)
            if self.seam == "logits" and active.policy.weights == "native":
                raise RouteError("policy weights 'native' cannot be kept with seam 'logits'")
        jitter = self.load_jitter()
        if jitter is not None:
            jitter.validate(shape)
        probe = self.load_monitor()
        if probe is not None:
            probe.validate(shape)
        policy = active.enforced
        text = None if policy is None else json.dumps(policy.to_dict(), sort_keys=True)
        return _shared_compiler(shape, text, self.route_table_rows, self.route_table_cells)


def _probe_document(probe: Any) -> dict[str, Any] | None:
    """A probe's JSON form; a path is read."""
    if probe is None:
        return None
    if isinstance(probe, str | os.PathLike):
        return RouteProbe.load(probe).to_dict()
    if isinstance(probe, Mapping):
        return RouteProbe.from_json(probe).to_dict()
    raise RouteError(f"monitor must be a path or a {PROBE_VERSION} object, got {str(probe)[:80]}")


def _usage_labels(labels: Any) -> list[str]:
    if not isinstance(labels, list | tuple) or not all(isinstance(item, str) and _USAGE_LABEL.fullmatch(item) for item in labels):
        raise RouteError(f"usage must be a list of labels of 1 to 64 letters, digits and _.:/- (it may be empty), got {labels!r}")
    if len(labels) > _MAX_USAGE_LABELS or len(set(labels)) < len(labels):
        raise RouteError(f"usage must list at most {_MAX_USAGE_LABELS} labels, each once, got {list(labels)}")
    return list(labels)


@lru_cache(maxsize=4)
def _shared_compiler(shape: ModelShape, policy_text: str | None, num_rows: int, num_cells: int) -> PlanCompiler:
    """One compiler for all parts of an engine that live in one process, so that they compile a plan once."""
    policy = None if policy_text is None else RoutePolicy.from_json(policy_text)
    reserved = 0 if policy is None else sum(entry.routes for entry in policy.layers.values())
    if reserved >= num_rows:
        raise RouteError(f"route_table_rows {num_rows} is too small: the policy alone needs {reserved}")
    return PlanCompiler(shape, policy, num_rows - reserved, num_cells)


def refuse_misspelled(additional_config: Mapping[str, Any]) -> None:
    """Raise `RouteError` for a key of `additional_config` that was probably meant for us: vLLM would ignore it.

    Keys of others are left alone, so only what resembles our key, our settings or our flags is refused.
    """
    names = [
        CONFIG_KEY,
        "vllm_unsafe_routes",
        "route_policy",
        "route_policy_mode",
        "enable_route_overrides",
        "route_jitter",
        "route_usage",
        "route_monitor",
        PLAN_KEY,
    ]
    names += [item.name for item in fields(RouteConfig) if "_" in item.name]
    ours = {_plain(name): name for name in names}
    for key in additional_config:
        close = difflib.get_close_matches(_plain(str(key)), ours, 1, 0.85) if key != CONFIG_KEY else ()
        if close:
            raise RouteError(
                f"additional_config has {key!r}, which resembles {ours[close[0]]!r}; settings of routes stand under {CONFIG_KEY!r}"
            )


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def route_config(vllm_config: Any) -> RouteConfig | None:
    """The settings in a `VllmConfig`; None where nothing is asked for."""
    additional = vllm_config.additional_config
    document = additional.get(CONFIG_KEY) if isinstance(additional, Mapping) else None
    if document is None:
        return None
    config = RouteConfig.from_dict(document)
    return config if config.enabled else None


def model_shape(vllm_config: Any) -> ModelShape:
    """The MoE shape of the model that a `VllmConfig` serves."""
    return ModelShape.from_hf_config(vllm_config.model_config.hf_text_config)
