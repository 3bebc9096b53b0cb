"""The server's flags, and how they become the settings of `config.py`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from ..errors import RouteError
from ..policy import POLICY_MODES
from .config import CONFIG_KEY, DEFAULT_LOGITS_MIB, RouteConfig

_MIDDLEWARE = "vllm_unsafe_routes.engine.answers.RouteAnswers"


def add_cli_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the server's flags."""
    group = parser.add_argument_group(
        title="unsafe-routes", description="Control of expert routing in MoE models (plugin vllm-unsafe-routes)."
    )
    group.add_argument(
        "--route-policy",
        metavar="PATH",
        default=None,
        help="A policy file that holds for every request: experts that no token may be routed to, experts that no request "
        "may exclude, biases on router logits. The server refuses to start if the policy cannot be enforced on every MoE layer.",
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
    group.add_argument(
        "--route-usage",
        action="store_true",
        default=False,
        help="Count how often each expert of each layer is picked: in /metrics, and in GET /unsafe-routes/usage.",
    )
    group.add_argument(
        "--route-usage-labels",
        metavar="LABEL,...",
        default=None,
        help="Count, and by these labels too, which requests bring as vllm_xargs.usage_label.",
    )
    group.add_argument(
        "--route-monitor",
        metavar="PATH",
        default=None,
        help="A route-probe/1 file (unsafe-routes routescan): every request's prompt is scored by its routes. The receipt says the "
        "score and whether it is flagged, /metrics how many were; nothing is refused.",
    )
    group.add_argument(
        "--router-logits-mib",
        metavar="MIB",
        nargs="?",
        type=int,
        const=DEFAULT_LOGITS_MIB,
        default=None,
        help="Let requests ask for router logits of all experts (vllm_xargs.return_router_logits), each for at most MIB MiB "
        f"({DEFAULT_LOGITS_MIB} where none is given). Needs --enable-route-overrides; takes a buffer for one step at start.",
    )


def fold_cli_arguments(args: argparse.Namespace) -> None:
    """Turn the server's flags into settings that every process reads the same way.

    Some servers start further API servers with the same `args`, and those read them before plugins are loaded.

    Raises:
        RouteError: a flag contradicts what `--additional-config` says, or a setting is wrong.

    """
    merged = merge_cli_arguments(getattr(args, "additional_config", None) or {}, args)
    if merged.get(CONFIG_KEY) is not None:
        # A policy's content, not its path: the file may change while the processes start.
        args.additional_config = {**merged, CONFIG_KEY: RouteConfig.from_dict(merged[CONFIG_KEY]).to_dict()}
        args.route_policy = args.route_policy_mode = args.route_jitter = None
        args.route_usage_labels = args.router_logits_mib = args.route_monitor = None
        args.enable_route_overrides = args.route_usage = False
    middleware = getattr(args, "middleware", None)
    if middleware is not None and _MIDDLEWARE not in middleware:
        args.middleware = [*middleware, _MIDDLEWARE]


def merge_cli_arguments(additional_config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """`additional_config` with the server's flags added.

    Raises:
        RouteError: a flag contradicts what `--additional-config` says.

    """
    policy, overrides = getattr(args, "route_policy", None), getattr(args, "enable_route_overrides", False)
    mode, jitter = getattr(args, "route_policy_mode", None), getattr(args, "route_jitter", None)
    labels = getattr(args, "route_usage_labels", None)
    usage = labels.split(",") if labels is not None else [] if getattr(args, "route_usage", False) else None
    logits_mib, monitor = getattr(args, "router_logits_mib", None), getattr(args, "route_monitor", None)
    if not overrides and all(value is None for value in (policy, mode, jitter, usage, logits_mib, monitor)):
        return additional_config
    section = additional_config.get(CONFIG_KEY) or {}
    if not isinstance(section, Mapping):
        raise RouteError(f"additional_config[{CONFIG_KEY!r}] must be an object, got {section!r}")
    section = dict(section)
    for name, what, path in (("policy", "policy", policy), ("monitor", "probe", monitor)):
        if path is not None:
            if section.get(name) not in (None, path):
                raise RouteError(f"--route-{name} and additional_config['unsafe_routes']['{name}'] both name a {what}; keep one")
            section[name] = path
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
    if usage is not None:
        if section.get("usage", usage) != usage:
            raise RouteError("--route-usage and additional_config['unsafe_routes']['usage'] are both given; keep one")
        section["usage"] = usage
    if logits_mib is not None:
        if section.get("router_logits_mib", logits_mib) != logits_mib:
            raise RouteError("--router-logits-mib and additional_config['unsafe_routes']['router_logits_mib'] differ; keep one")
        section["router_logits_mib"] = logits_mib
    if overrides:
        section["allow_overrides"] = True
    return {**additional_config, CONFIG_KEY: section}
