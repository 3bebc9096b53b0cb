"""`unsafe-routes mask-attack`: router masking with its controls."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..plan import WEIGHT_MODES
from ..search.masking import ATTACKS, MaskSettings
from ..study.run import run_masks
from ..study.settings import MaskStudy
from . import show
from .options import add_controls, add_data_options, add_judge_options, add_model_options, numbers_of, setup_of


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "mask-attack",
        help="mask the most safety-critical routers, beside two fair controls",
        description="Router masking (arXiv 2602.08621): for the top L layers by RoSais, one after another, the best of some random "
        "masks. Controls: random-layers (as many masks at random layers) and random-masks (single tries at random layers). Answers "
        "are generated greedily under the masks and judged.",
        epilog="Example: unsafe-routes mask-attack --model lab --data lab:test --limit 24 --rosais runs/rosais --layers 1,2 "
        "--dtype float32 --out runs/masks",
    )
    add_model_options(parser, ray=True)
    add_data_options(parser)
    add_judge_options(parser)
    group = parser.add_argument_group("router masking")
    group.add_argument(
        "--rosais", type=Path, required=True, help="folder of a rosais run on other prompts, for the ranking of layers"
    )
    group.add_argument("--layers", default="1,2,5", help="numbers of masked layers L (default: 1,2,5)")
    group.add_argument("--masks", type=int, default=100, help="S2, masks tried at each layer (default: 100)")
    group.add_argument(
        "--chosen-on",
        metavar="PROMPTS",
        help="dataset level: one set of masks for all prompts, chosen on these (same format as --data, other prompts)",
    )
    group.add_argument("--chosen-limit", type=int, default=24, help="prompts that --chosen-on draws (default: 24)")
    group.add_argument("--attack", action="append", choices=ATTACKS, help="only these; may be repeated (default: all)")
    group.add_argument("--alone", action="store_true", help="search each layer without the masks chosen before it")
    group.add_argument(
        "--weights",
        choices=WEIGHT_MODES,
        default="masked",
        help="weights of the experts that a mask leaves: masked (the paper's), or native, which leaves out what rescaling does",
    )
    add_controls(parser)
    group.add_argument("--prompt-only", action="store_true", help="masks hold for prompt tokens only, not while decoding")
    parser.set_defaults(run=run)


def settings_of(args: argparse.Namespace) -> MaskStudy:
    """The options as settings."""
    return MaskStudy(
        **setup_of(args),
        rosais=args.rosais,
        levels=tuple(numbers_of(args.layers, "--layers")),
        attacks=tuple(args.attack or ATTACKS),
        chosen_on=args.chosen_on,
        chosen_limit=args.chosen_limit,
        search=MaskSettings(
            num_masks=args.masks, keep_earlier=not args.alone, while_decoding=not args.prompt_only, weights=args.weights
        ),
        controls=args.controls,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    print(show.masks(run_masks(settings_of(args))))
    return 0
