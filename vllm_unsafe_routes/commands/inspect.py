"""`unsafe-routes inspect`: a model's MoE layers, what becomes of them under vLLM, and whether a plan or a policy fits them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .. import architectures
from ..files import read_file, read_object
from ..lab import model_path
from ..plan import RoutePlan
from ..policy import RoutePolicy
from ..shape import ModelShape
from ..study.model import LAB
from . import show


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "inspect",
        help="print a model's MoE layers and fingerprint; check a plan or a policy against it",
        description="Reads the model's config.json only; needs neither weights nor vLLM. "
        "Exit status 1: the plan or policy does not fit.",
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument(
        "model", type=Path, nargs="?", help="a Hugging Face folder, a config.json, or 'lab': the model that ships with this package"
    )
    subject.add_argument(
        "--architectures", action="store_true", help="print what becomes of every MoE architecture that vLLM registers, and why"
    )
    parser.add_argument("--plan", type=Path, help="a file with a plan: route-plan/1 JSON, or the string that a request carries")
    parser.add_argument("--policy", type=Path, help="a policy file; a plan is then checked under it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..compiler import PlanCompiler

    if args.architectures:
        table = architectures.load()
        print(json.dumps(table) if args.json else architectures.text(table))
        return 0
    config = _read_config(args.model)
    shape = ModelShape.from_hf_config(config)
    facts = show.facts_of(shape)
    if names := config.get("architectures"):
        facts["architectures"] = architectures.facts(names)
    policy = RoutePolicy.load(args.policy) if args.policy else None
    compiler = PlanCompiler(shape, policy)
    if policy is not None:
        facts["policy"] = policy.digest
        facts["policy_says"] = policy.describe()
    if args.plan:
        plan = read_file(args.plan, "plan file", lambda text: RoutePlan.from_string(text.strip()))
        compiled = compiler.compile(plan)
        facts["plan"] = plan.digest
        facts["plan_directives"] = len(plan)
        facts["plan_rows"] = len(compiled.rows)
        if plan.prompt is not None:
            facts["plan_prompt_tokens"], facts["plan_prompt_digest"] = plan.prompt.tokens, plan.prompt.digest
        else:
            facts["plan_needs_prompt_tokens"] = compiled.max_position + 1
    if args.json:
        print(json.dumps(facts))
        return 0
    print(show.facts(facts, shape))
    return 0


def _read_config(model: Path) -> dict[str, Any]:
    if str(model) == LAB:
        model = model_path()
    return read_object(model / "config.json" if model.is_dir() else model, "model config")
