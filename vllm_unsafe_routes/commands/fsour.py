"""`unsafe-routes fsour`: search concrete unsafe routes, prompt by prompt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..study.run import run_fsour
from ..study.settings import FsourStudy
from . import show
from .options import (
    add_controls,
    add_data_options,
    add_fsour_options,
    add_judge_options,
    add_model_options,
    add_search_answered,
    fsour_settings,
    setup_of,
)


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "fsour",
        help="search a concrete unsafe route for each prompt",
        description="F-SOUR (arXiv 2602.08621): a stochastic search of expert choices, token by token and layer by layer, that "
        "raises the log-probability of an affirmative target; then greedy generation and a judge; up to five attempts. Under a "
        "policy only experts that it allows are tried, so a defended engine is attacked adaptively.",
        epilog="Example: unsafe-routes fsour --model lab --data lab:test --limit 16 --strategy adaptive --dtype float32 "
        "--out runs/fsour",
    )
    add_model_options(parser, ray=True)
    add_data_options(parser)
    add_judge_options(parser, stop=True)
    add_fsour_options(parser)
    add_search_answered(parser)
    add_controls(parser)
    parser.add_argument("--artifact", type=Path, help="also write a JailbreakBench attack artifact to this file")
    parser.set_defaults(run=run)


def settings_of(args: argparse.Namespace) -> FsourStudy:
    """The options as settings."""
    return FsourStudy(
        **setup_of(args),
        search=fsour_settings(args),
        library_prompts=args.library_prompts,
        artifact=args.artifact,
        search_answered=args.search_answered,
        controls=args.controls,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    study = settings_of(args)
    print(show.fsour(run_fsour(study), study.search.strategy))
    if study.artifact is not None:
        print(f"JailbreakBench artifact: {study.artifact}")
    return 0
