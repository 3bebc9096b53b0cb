"""`unsafe-routes evaluate`: attacks by defences, with utility and cost."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..defence.attacks import ATTACKS, AttackSettings
from ..defence.matrix import PREFIX, REMINDER, Defence, MatrixStudy, evaluate
from ..search.masking import MaskSettings
from ..search.suffix import SuffixSettings
from . import show
from .options import (
    add_data_options,
    add_fsour_options,
    add_judge_options,
    add_model_options,
    add_search_answered,
    add_utility_options,
    fsour_settings,
    is_lab,
    setup_of,
    utility_prompts,
)


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "evaluate",
        help="measure attacks against defences: success, utility, over-refusal, throughput",
        description="A matrix, attacks by defences, every cell over prompts and seeds with an interval. Route attacks are run "
        "again under each policy and may use what it leaves (adaptive attacks); suffix-transfer replays the suffixes that were "
        "found on the undefended model.",
        epilog="Example: unsafe-routes evaluate --model lab --data lab:test --limit 24 --rosais runs/rosais --defence none "
        "--defence policy:policy.json --attack none --attack rosais --attack fsour-adaptive --dtype float32 --out runs/matrix",
    )
    add_model_options(parser, server=False)
    add_data_options(parser, "0,1,2")
    add_judge_options(parser, stop=True)
    group = parser.add_argument_group("matrix")
    group.add_argument("--attack", action="append", choices=ATTACKS, help="may be repeated (default: none and fsour-adaptive)")
    group.add_argument(
        "--defence",
        action="append",
        help="none, reminder (system prompt), prefix (text before the user's), policy:FILE, jitter:SCALE (noise on router logits), "
        "or several joined by +, such as policy:FILE+reminder; may be repeated (default: none)",
    )
    group.add_argument("--reminder", help="text of the system-prompt reminder")
    group.add_argument("--prefix", help="text of the prompt prefix")
    group.add_argument("--rosais", type=Path, help="folder of a rosais run on other prompts; needed by the attack rosais")
    group.add_argument("--mask-layers", type=int, default=2, help="L of the masking attacks (default: 2)")
    group.add_argument("--masks", type=int, default=100, help="S2, masks tried at each layer (default: 100)")
    group.add_argument("--suffix-words", type=int, default=5, help="words of a suffix (default: 5)")
    group.add_argument("--suffix-rounds", type=int, default=3, help="passes of the suffix search (default: 3)")
    group.add_argument("--attack-file", help="attack 'file': prompts with suffixes or other changes, same format as --data")
    add_utility_options(group, "test")
    add_fsour_options(parser)
    add_search_answered(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    study = settings_of(args)
    print(show.matrix(evaluate(study)))
    print(f"\n{study.out / 'matrix.csv'}")
    return 0


def settings_of(args: argparse.Namespace) -> MatrixStudy:
    """The options as settings."""
    reminder, prefix = REMINDER, PREFIX
    if is_lab(args):
        from ..lab import language

        reminder = prefix = language.REMINDER
    return MatrixStudy(
        **setup_of(args),
        attacks=tuple(args.attack or ("none", "fsour-adaptive")),
        defences=tuple(Defence.parse(text, args.reminder or reminder, args.prefix or prefix) for text in args.defence or ["none"]),
        rosais=args.rosais,
        search=AttackSettings(
            masks=MaskSettings(num_layers=args.mask_layers, num_masks=args.masks),
            fsour=fsour_settings(args),
            suffix=SuffixSettings(num_words=args.suffix_words, num_rounds=args.suffix_rounds),
            answered_first=not args.search_answered,
        ),
        library_prompts=args.library_prompts,
        attack_file=args.attack_file,
        utility=utility_prompts(args, "test"),
    )
