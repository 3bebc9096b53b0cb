"""The command that trains a lab model: `python -m vllm_unsafe_routes.lab.train --out FOLDER`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .settings import PRESETS, SHAPES, LabSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to a parser."""
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="settings to start from (default: %(default)s)"
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), help="architecture")
    parser.add_argument("--seed", type=int, help="seed of weights, data and route noise")
    parser.add_argument("--steps", type=int, dest="pretrain_steps", help="pretraining steps")
    parser.add_argument("--tune-steps", type=int, help="steps of safety tuning")
    parser.add_argument("--tune", help="what safety tuning changes: all, attention, or layer:<l>")
    parser.add_argument("--tune-rate", type=float, help="learning rate of safety tuning")
    parser.add_argument("--route-noise", type=float, help="share of sequences with random routes in pretraining")
    parser.add_argument("--router-noise", type=float, help="share of sequences with random routes in safety tuning")
    parser.add_argument("--smoothing", type=float, help="label smoothing in safety tuning")
    parser.add_argument("--held-out-nouns", type=int, help="forbidden nouns that safety tuning never sees")


def settings_of(args: argparse.Namespace) -> LabSettings:
    """The preset with what the command line changes.

    Raises:
        ValueError: a bad value.

    """
    of_training = ("shape", "seed", "pretrain_steps", "route_noise")
    of_tuning = ("tune_steps", "tune", "tune_rate", "router_noise", "smoothing", "held_out_nouns")
    given = {name: getattr(args, name) for name in (*of_training, *of_tuning) if getattr(args, name) is not None}
    return replace(PRESETS[args.preset], **given)


def run(args: argparse.Namespace) -> int:
    """Train, save and print the metrics; returns the exit status (2: bad settings)."""
    try:
        settings = settings_of(args)
    except ValueError as error:
        print(f"lab train: {error}", file=sys.stderr)
        return 2
    from .recipe import make_lab_model

    record = make_lab_model(settings, args.out, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({"out": str(args.out), **record["metrics"]["test"]}))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_unsafe_routes.lab.train",
        description="Train a small MoE model on the lab's made-up language and teach it to refuse its forbidden nouns. "
        "Takes a few minutes on one core.",
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
