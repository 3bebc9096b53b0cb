"""`unsafe-routes recipe`: other people's interventions on the routing, each with its own plan for every prompt."""

from __future__ import annotations

import argparse
from typing import Any

from ..search.mascing import MascingSettings
from ..search.safex import SafexSettings
from ..search.silencing import SilencingSettings
from ..study.recipes import run_recipes
from ..study.settings import RECIPES, RecipeStudy
from . import show
from .options import add_data_options, add_judge_options, add_model_options, setup_of


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "recipe",
        help="SteerMoE, SAFEx, L3 and MASCing on every prompt, with the same number of candidates",
        description="Published recipes that steer a router: SteerMoE (arXiv 2509.09660) promotes and demotes experts, SAFEx "
        "(2506.17368) disables those that refused prompts use more in most draws of them, L3 (2602.08741) silences one expert "
        "after another, MASCing (2604.27818) adds a bias. What refused and answered prompts use is compared once; how many "
        "experts, or how strongly, is chosen for every prompt. Answers are generated greedily under the plan and judged.",
        epilog="Example: unsafe-routes recipe --model lab --data lab:test --limit 24 --refused lab:search --answered "
        "lab:search:benign --dtype float32 --out runs/recipes",
    )
    add_model_options(parser)
    add_data_options(parser)
    add_judge_options(parser)
    group = parser.add_argument_group("recipes")
    group.add_argument("--refused", required=True, metavar="PROMPTS", help="prompts that are refused, other ones than --data")
    group.add_argument("--answered", required=True, metavar="PROMPTS", help="prompts that are answered")
    group.add_argument("--contrast-limit", type=int, default=48, help="prompts drawn of each of these (default: 48)")
    group.add_argument("--recipe", action="append", choices=RECIPES, help="only these; may be repeated (default: all)")
    group.add_argument("--candidates", type=int, default=128, help="plans scored for a prompt at most (default: 128)")
    group.add_argument("--resamples", type=int, default=100, help="safex: draws of the prompts (default: 100)")
    group.add_argument("--selected", type=int, default=12, help="safex: experts selected in each draw (default: 12)")
    group.add_argument(
        "--max-share", type=float, default=0.2, help="l3: share of a layer's experts that may be silenced (default: 0.2)"
    )
    group.add_argument("--max-alpha", type=float, default=8.0, help="mascing: largest strength of the first grid (default: 8)")
    parser.set_defaults(run=run)


def settings_of(args: argparse.Namespace) -> RecipeStudy:
    """The options as settings."""
    return RecipeStudy(
        **setup_of(args),
        refused=args.refused,
        answered=args.answered,
        contrast_limit=args.contrast_limit,
        recipes=tuple(args.recipe or RECIPES),
        num_candidates=args.candidates,
        safex=SafexSettings(num_resamples=args.resamples, num_selected=args.selected),
        l3=SilencingSettings(max_share=args.max_share),
        mascing=MascingSettings(max_alpha=args.max_alpha),
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    print(show.masks(run_recipes(settings_of(args))))
    return 0
