"""`unsafe-routes riy`: a profile of pruned experts becomes a policy, and a policy a profile."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..files import read_object
from ..policy import POLICY_VERSION, RoutePolicy
from ..riy import load_riy, riy_of_policy
from ..study.model import Model


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "riy",
        help="a RIY profile of pruned experts as a policy, or a policy as a profile",
        description="RIY (vllm#37824) prunes experts by a JSON profile. A profile becomes a route policy that disables the same "
        "experts; a policy that does nothing but disable becomes a profile. What the other side cannot say is refused.",
        epilog="Example: unsafe-routes riy profile.json policy.json --model lab",
    )
    parser.add_argument("source", type=Path, help="a RIY profile or a route-policy/1 file")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--model", required=True, help="a Hugging Face folder, of which only the config is read, or 'lab'")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    shape = Model(args.model).shape
    if _is_policy(args.source):
        policy = RoutePolicy.load(args.source)
        policy.validate(shape)
        args.target.write_text(json.dumps(riy_of_policy(policy), indent=2) + "\n", encoding="utf-8")
    else:
        policy = load_riy(args.source, shape)
        policy.save(args.target)
    disabled = [len(entry.disabled) for entry in policy.layers.values()]
    print(f"{args.target}: {sum(disabled)} disabled experts at {sum(map(bool, disabled))} layers")
    return 0


def _is_policy(path: Path) -> bool:
    return str(read_object(path, "profile").get("version", "")).startswith(POLICY_VERSION.partition("/")[0])
