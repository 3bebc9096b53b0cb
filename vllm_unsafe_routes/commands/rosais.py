"""`unsafe-routes rosais`: which layers' routing carries safety."""

from __future__ import annotations

import argparse
from typing import Any

from ..search.rosais import LATER_LAYERS, SCORES, RosaisSettings
from ..study.run import run_rosais
from ..study.settings import RosaisStudy
from . import show
from .options import add_data_options, add_model_options, setup_of


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "rosais",
        help="score how safety-critical each layer's router is",
        description="RoSais of every MoE layer (arXiv 2602.08621): how far the best of some random masks of one layer raises the "
        "log-probability of an affirmative first token. Prints a table by layer; records every gain of every mask.",
        epilog="Example: unsafe-routes rosais --model lab --data lab:search --limit 16 --dtype float32 --out runs/rosais",
    )
    add_model_options(parser, ray=True)
    add_data_options(parser)
    group = parser.add_argument_group("RoSais")
    group.add_argument("--masks", type=int, default=20, help="S1, random masks a layer (default: 20)")
    group.add_argument(
        "--score",
        choices=SCORES,
        default="next",
        help="next: best affirmative first token, as published; target: mean over the target",
    )
    group.add_argument(
        "--later-layers",
        choices=LATER_LAYERS,
        default="free",
        help="free: layers behind the masked one reroute, as published; clean: they keep the routes of the run without a mask, so "
        "that the score is the layer's own effect",
    )
    group.add_argument(
        "--same-masks",
        action="store_true",
        help="the same masks for every prompt: adds the dataset-level score (mean gain of a mask)",
    )
    parser.set_defaults(run=run)


def settings_of(args: argparse.Namespace) -> RosaisStudy:
    """The options as settings."""
    search = RosaisSettings(args.masks, score=args.score, later_layers=args.later_layers)
    return RosaisStudy(**setup_of(args), search=search, same_masks=args.same_masks)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    print(show.rosais(run_rosais(settings_of(args))))
    return 0
