"""Settings of the engine side: `additional_config["unsafe_routes"]` and the server's flags."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

from ..compiled import PlanCompiler
from ..errors import RouteError
from ..jitter import Jitter
from ..policy import POLICY_MODES, POLICY_VERSION, ActivePolicy, RoutePolicy
from ..shape import ModelShape
from ..wire import reject_unknown_keys

CONFIG_KEY = "unsafe_routes"
GATING_CHOICES = ("native", "fused")


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
        jitter: noise on router logits as `Jitter.to_dict`, or None.

    """

    policy: Mapping[str, Any] | None = None
    policy_mode: str = "enforce"
    allow_overrides: bool = False
    route_table_rows: int = 65536
    route_table_cells: int = 1 << 22
    route_table_slots: int = 4096
    gating: str = "native"
    jitter: Mapping[str, Any] | None = None

    @property
    def enabled(self) -> bool:
        """Whether anything is asked for at all."""
        return self.policy is not None or self.allow_overrides or self.jitter is not None

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
        if values.get("gating", "native") not in GATING_CHOICES:
            raise RouteError(f"gating {values['gating']!r} is not one of {', '.join(GATING_CHOICES)}")
        if values.get("jitter") is not None:
            values["jitter"] = Jitter.from_dict(values["jitter"]).to_dict()
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for `additional_config` (which is hashed as JSON and sent to every process)."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def load_policy(self) -> RoutePolicy | None:
        """The policy as an object."""
        return None if self.policy is None else RoutePolicy.from_json(self.policy)

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
        jitter = self.load_jitter()
        if jitter is not None:
            jitter.validate(shape)
        policy = active.enforced
        text = None if policy is None else json.dumps(policy.to_dict(), sort_keys=True)
        return _shared_compiler(shape, text, self.route_table_rows, self.route_table_cells)


@lru_cache(maxsize=4)
def _shared_compiler(shape: ModelShape, policy_text: str | None, num_rows: int, num_cells: int) -> PlanCompiler:
    """One compiler for all parts of an engine that live in one process, so that they compile a plan once."""
    policy = None if policy_text is None else RoutePolicy.from_json(policy_text)
    reserved = 0 if policy is None else sum(bool(entry.disabled) for entry in policy.layers.values())
    if reserved >= num_rows:
        raise RouteError(f"route_table_rows {num_rows} is too small: the policy alone needs {reserved}")
    return PlanCompiler(shape, policy, num_rows - reserved, num_cells)


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


# What runs through vLLM paths where a router may see other tokens than the step's own, in the order of the step.
_UNSUPPORTED = (
    ("data_parallel_size", 1, "--data-parallel-size 1 (run one server per replica)"),
    ("use_ubatching", False, "leave out --enable-dbo and --ubatch-size"),
    ("prefill_context_parallel_size", 1, "--prefill-context-parallel-size 1"),
    ("decode_context_parallel_size", 1, "--decode-context-parallel-size 1"),
)


# The wrappers of `symbols.py` sit in the methods of these; another class may never call them and would route nothing.
_WORKERS = ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.cpu_worker.CPUWorker")
_SCHEDULERS = (None, "vllm.v1.core.sched.scheduler.Scheduler", "vllm.v1.core.sched.async_scheduler.AsyncScheduler")


def check_supported(vllm_config: Any) -> None:
    """Refuse settings under which routes could not be kept exactly apart.

    Raises:
        RouteError: names the setting, its value and what helps.

    """
    parallel = vllm_config.parallel_config
    for name, wanted, help_text in _UNSUPPORTED:
        value = getattr(parallel, name, wanted)
        if value != wanted:
            raise RouteError(f"route control does not support {name}={value}; {help_text}")
    if vllm_config.speculative_config is not None:
        raise RouteError("route control does not support speculative decoding; leave out --speculative-config")
    for name, known, value in (
        ("worker_cls", _WORKERS, parallel.worker_cls),
        ("scheduler_cls", _SCHEDULERS, vllm_config.scheduler_config.scheduler_cls),
    ):
        if value not in known:
            raise RouteError(f"route control does not know {name}={value}; known are {', '.join(filter(None, known))}")
    connector = getattr(vllm_config.kv_transfer_config, "kv_connector", None)
    if connector is not None:
        # Connectors key KV by tokens or by request: they would hand one request's routes to another.
        raise RouteError(
            f"route control does not support the KV connector {connector}, which does not know routes; "
            "leave out --kv-transfer-config and --kv-offloading-size"
        )


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's flags."""
    group = parser.add_argument_group(
        title="unsafe-routes", description="Control of expert routing in MoE models (plugin vllm-unsafe-routes)."
    )
    group.add_argument(
        "--route-policy",
        metavar="PATH",
        default=None,
        help="A route-policy/1 file that holds for every request: experts that no token may be routed to, and experts that "
        "no request may exclude. The server refuses to start if the policy cannot be enforced on every MoE layer.",
    )
    group.add_argument(
        "--route-policy-mode",
        choices=POLICY_MODES,
        default=None,
        help="enforce (the default), or observe: count in /metrics what enforcing the policy would change, and change nothing.",
    )
    group.add_argument(
        "--enable-route-overrides",
        action="store_true",
        default=False,
        help="Let requests bring a route plan (vllm_xargs.route_plan). Off by default; a policy always holds.",
    )
    group.add_argument(
        "--route-jitter",
        metavar="SCALE|JSON",
        default=None,
        help="Noise of at most SCALE on router logits, so that a searched route is not repeatable; or an object with scale, "
        "seed and layers. Off by default. Tokens that a plan forces keep their routes.",
    )


def merge_cli_arguments(additional_config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`additional_config` with the server's flags added.

    Raises:
        RouteError: a flag contradicts what `--additional-config` says.

    """
    policy, overrides = getattr(args, "route_policy", None), getattr(args, "enable_route_overrides", False)
    mode, jitter = getattr(args, "route_policy_mode", None), getattr(args, "route_jitter", None)
    if policy is None and mode is None and jitter is None and not overrides:
        return additional_config
    section = additional_config.get(CONFIG_KEY) or {}
    if not isinstance(section, Mapping):
        raise RouteError(f"additional_config[{CONFIG_KEY!r}] must be an object, got {section!r}")
    section = dict(section)
    if policy is not None:
        if section.get("policy") not in (None, policy):
            raise RouteError("--route-policy and additional_config['unsafe_routes']['policy'] both name a policy; keep one")
        section["policy"] = policy
    if mode is not None:
        if section.get("policy_mode", mode) != mode:
            raise RouteError(
                f"--route-policy-mode {mode} contradicts additional_config['unsafe_routes']['policy_mode'] {section['policy_mode']}"
            )
        if section.get("policy") is None:
            raise RouteError(f"--route-policy-mode {mode} needs --route-policy PATH")
        section["policy_mode"] = mode
    if jitter is not None:
        if section.get("jitter") is not None:
            raise RouteError("--route-jitter and additional_config['unsafe_routes']['jitter'] are both given; keep one")
        try:
            value = json.loads(jitter)
        except ValueError:
            raise RouteError(f"--route-jitter must be a number or a JSON object, got {jitter!r}") from None
        section["jitter"] = value if isinstance(value, Mapping) else {"scale": value}
    if overrides:
        section["allow_overrides"] = True
    return {**additional_config, CONFIG_KEY: section}
