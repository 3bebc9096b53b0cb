"""What trains a lab model: `unsafe-routes lab train --out FOLDER`, or this module with the same arguments."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..errors import RouteError
from .english.settings import ENGLISH_PRESETS, EnglishSettings
from .settings import PRESETS, SHAPES, LabSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--preset",
        choices=[*sorted(PRESETS), *sorted(ENGLISH_PRESETS)],
        default="default",
        help="settings to start from (default: %(default)s); those that begin with smollm2 speak English and need the extra "
        "language-lab",
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="architecture of the model")
    parser.add_argument("--seed", type=int, help="seed of weights, data and route noise")
    parser.add_argument("--steps", type=int, dest="pretrain_steps", help="steps of pretraining, which teaches the answers")
    parser.add_argument("--tune-steps", type=int, help="steps of safety tuning")
    parser.add_argument(
        "--tune", help="what safety tuning changes: all, attention, or layer:<l>; in English moe, experts, routers or attention"
    )
    parser.add_argument("--tune-rate", type=float, help="learning rate of safety tuning")
    parser.add_argument("--route-noise", type=float, help="share of sequences with random routes in pretraining")
    parser.add_argument("--router-noise", type=float, help="share of sequences with random routes in safety tuning")
    parser.add_argument("--smoothing", type=float, help="label smoothing in safety tuning")
    parser.add_argument("--held-out-nouns", type=int, help="forbidden nouns that safety tuning never sees")


def settings_of(args: argparse.Namespace) -> LabSettings | EnglishSettings:
    """The preset with what the command line changes.

    Raises:
        ValueError: a bad value, or an option that the preset does not have.

    """
    names = [field.name for field in fields(LabSettings) if hasattr(args, field.name)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    presets: dict[str, LabSettings | EnglishSettings] = {**PRESETS, **ENGLISH_PRESETS}
    preset = presets[args.preset]
    unknown = sorted(set(given) - {field.name for field in fields(preset)})
    if unknown:
        raise ValueError(f"preset {args.preset} has no {', '.join(unknown)}")
    return replace(preset, **given)


def run(args: argparse.Namespace) -> int:
    """Train, save and print the metrics; returns the exit status (2: bad settings)."""

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        settings = settings_of(args)
    except ValueError as error:
        say(f"lab train: {error}")
        return 2
    record = _make(settings, args.out, say)
    print(json.dumps({"out": str(args.out), **record["metrics"]["test"]}))
    return 0


def _make(settings: LabSettings | EnglishSettings, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    if isinstance(settings, EnglishSettings):
        from .english.recipe import make_english_model

        return make_english_model(settings, out, say)
    from .recipe import make_lab_model

    return make_lab_model(settings, out, say)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_unsafe_routes.lab.train",
        description="Train a small MoE model on the lab's made-up language and teach it to refuse its forbidden nouns. "
        "Takes a few minutes on one core.",
    )
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except RouteError as error:
        print(f"lab train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
