"""`unsafe-routes lab train`: models to measure on, made here."""

from __future__ import annotations

from typing import Any

from ..lab import train


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "lab",
        help="train a harmless lab model: one of a made-up language, or a small one that speaks English",
        description="Trains a small MoE model to refuse what harms nobody, for measuring attacks and defences. Most presets speak "
        "the made-up lab language and take minutes. smollm2-moe is SmolLM2-135M-Instruct, made sparse: up to half an hour on two "
        "cores, and after a kill it goes on where it was.",
        epilog="Example: unsafe-routes lab train --preset smollm2-moe --out runs/smollm2-moe",
    )
    parser.add_argument("action", choices=["train"], help="train: make a model in a folder")
    train.add_arguments(parser)
    parser.set_defaults(run=train.run)
