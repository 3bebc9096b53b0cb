"""`unsafe-routes derive-policy`: a route policy from what searches found, chosen by measuring."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from ..defence.derive import RULES, DeriveStudy, derive
from ..defence.paths import GreedyTrials
from ..defence.trials import Budget
from ..errors import RouteError
from .options import (
    add_data_options,
    add_fsour_options,
    add_judge_options,
    add_model_options,
    add_utility_options,
    fsour_settings,
    numbers_of,
    setup_of,
    utility_prompts,
)


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "derive-policy",
        help="derive a route policy from rosais and fsour runs, under a utility budget",
        description="Builds candidate policies by several rules and sizes, measures each on held-out prompts (F-SOUR re-run "
        "adaptively under the policy, replayed suffixes, benign answers, over-refusal), combines the best bans with the best "
        "protections, and writes the best policy that keeps the utility budget, with its provenance. Controls of equal size "
        "with random experts are written beside it.",
        epilog="Example: unsafe-routes derive-policy runs/rosais runs/fsour --model lab --data lab:tune --limit 12 "
        "--dtype float32 --out runs/policy",
    )
    parser.add_argument("runs", type=Path, nargs="+", help="folders of rosais (with --same-masks) and fsour runs")
    add_model_options(parser, policy=False)
    add_data_options(parser)
    add_judge_options(parser)
    group = parser.add_argument_group("policy")
    group.add_argument("--rule", action="append", choices=RULES, help="rules to try (default: all that the runs allow)")
    group.add_argument("--layers", type=int, default=5, help="top RoSais layers that the policy may touch (default: 5)")
    group.add_argument("--bans", default="2,4,6", help="bans a layer to try (default: 2,4,6)")
    _add_greedy_options(group)
    group.add_argument("--suffixes", type=int, default=3, help="suffixes searched for each prompt and seed (default: 3)")
    group.add_argument("--protections", default="1,2,3", help="protected experts a layer to try, below top_k (default: 1,2,3)")
    group.add_argument(
        "--budget", type=float, default=0.98, help="share of right benign answers that must stay right (default: 0.98)"
    )
    group.add_argument(
        "--confidence",
        type=float,
        default=0.5,
        help="one-sided confidence with which the harmless prompts must show that the budget holds; 0.5 (default) takes their "
        "share as it is, 0.8 leaves room for prompts that were not seen and wants more of them",
    )
    group.add_argument("--over-refusal", type=float, default=0.02, help="most that over-refusal may rise (default: 0.02)")
    add_utility_options(group, "tune")
    group.add_argument("--no-suffix", action="store_true", help="choose by F-SOUR alone, without replayed suffixes")
    group.add_argument("--keep", type=int, default=2, help="best ban and protect candidates that are combined (default: 2)")
    add_fsour_options(parser)
    parser.set_defaults(run=run)


def _add_greedy_options(group: Any) -> None:
    """Those of the rules greedy and greedy-bias."""
    group.add_argument(
        "--greedy-bans", default="8,16,24,32", help="rule greedy: bans in all to try, beside as many as help (default: 8,16,24,32)"
    )
    group.add_argument(
        "--greedy-weight",
        type=float,
        default=1.0,
        help="rule greedy: nats of attack score that a nat of harmless answers must be worth (default: 1)",
    )
    group.add_argument(
        "--greedy-harmless",
        type=int,
        default=128,
        help="rule greedy: harmless answers that each addition is weighed against, taken evenly (default: 128)",
    )
    group.add_argument(
        "--bias",
        default="",
        help="rule greedy-bias: steps by which an addition may raise or lower a router logit, such as 1,3 (default: bans only)",
    )
    group.add_argument(
        "--search-again",
        type=int,
        default=0,
        help="rules greedy and greedy-bias: how often suffixes are searched again on the way, under the additions so far; "
        "candidates then face a suffix search of their own instead of replayed suffixes (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    study = settings_of(args)
    found = derive(study, say=partial(print, flush=True))
    print(f"\nbest: {found.best.name}   {found.best}\n{study.out / 'policy.json'}")
    return 0


def settings_of(args: argparse.Namespace) -> DeriveStudy:
    """The options as settings."""
    return DeriveStudy(
        **setup_of(args),
        runs=tuple(args.runs),
        utility=utility_prompts(args, "tune"),
        rules=tuple(args.rule or ()),
        num_layers=args.layers,
        bans=tuple(numbers_of(args.bans, "--bans")),
        protections=tuple(numbers_of(args.protections, "--protections")),
        budget=Budget(args.budget, args.over_refusal, args.confidence),
        replay_suffixes=not args.no_suffix,
        suffixes=args.suffixes,
        greedy=GreedyTrials(
            tuple(numbers_of(args.greedy_bans, "--greedy-bans")),
            args.greedy_weight,
            args.greedy_harmless,
            _steps(args.bias),
            args.search_again,
        ),
        keep=args.keep,
        fsour=fsour_settings(args),
    )


def _steps(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(step) for step in text.split(",") if step.strip())
    except ValueError:
        raise RouteError(f"--bias must be numbers separated by commas, got {text!r}") from None
