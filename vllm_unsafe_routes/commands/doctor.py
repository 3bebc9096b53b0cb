"""`unsafe-routes doctor`: would route control work here, and for a model."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..lab import model_path
from ..study.model import LAB


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "doctor",
        help="say whether route control would work here; a page for a bug report",
        description="Prints versions, which vLLM symbols fit, whether the plugin is loaded, the device, and with --model which MoE "
        "layers would be bound or refused and why. Loads no weights. Exit status 1: route control would not work.",
        epilog="Example: unsafe-routes doctor --model lab",
    )
    parser.add_argument(
        "--model", help="a Hugging Face folder, or 'lab': the model that ships with this package; only its config is read"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    # vLLM reads these as it is imported; its own messages would be in the way of the page.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from ..engine.doctor import examine

    report = examine(str(model_path()) if args.model == LAB else args.model)
    print(report.text())
    return 1 if report.problems else 0
