"""`unsafe-routes`: look at a model's routing, measure how safe it is, and defend it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version

from .commands import (
    demo,
    derive_policy,
    doctor,
    evaluate,
    fsour,
    inspect,
    lab,
    mask_attack,
    recipe,
    replay,
    report,
    riy,
    rosais,
    routescan,
)
from .commands.usage import Parser
from .errors import RouteError

COMMANDS = (inspect, doctor, rosais, mask_attack, fsour, recipe, evaluate, derive_policy, routescan, report, replay, riy, lab, demo)
# As a shell gives it for a process that Ctrl-C ended.
INTERRUPTED_STATUS = 130


_WHERE_TO_START = """\
where to start:
  unsafe-routes demo             all of this on a harmless lab model, on CPU, in minutes
  unsafe-routes doctor           whether route control would work on this machine
  unsafe-routes inspect MODEL    which layers of a model route, and to how many experts

in order:
  a red team    rosais, mask-attack, fsour, then report (docs/search.md)
  a defence     derive-policy, then evaluate (docs/defence.md)
  watching      routescan (docs/serving.md)
  serving it    vLLM's server with --route-policy (docs/serving.md)
  training      replay: where a rollout and its replay part (docs/rl.md)

Most commands have an example at the end of their --help. An interrupted run goes on with the same command.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = Parser(
        prog="unsafe-routes",
        usage="%(prog)s COMMAND [options]",
        description="Look at the expert routing of a MoE model, measure how safe it is, attack it and defend it, inside vLLM.",
        epilog=_WHERE_TO_START,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('vllm-unsafe-routes')}")
    commands = parser.add_subparsers(dest="command", required=True, prog="unsafe-routes", title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = make_parser().parse_args(argv)
    from .study.jobs import Interrupted

    try:
        return int(args.run(args))
    except Interrupted as error:
        print(f"unsafe-routes: {error}", file=sys.stderr)
        return INTERRUPTED_STATUS
    except KeyboardInterrupt:
        print("unsafe-routes: interrupted; the same command goes on from where it was", file=sys.stderr)
        return INTERRUPTED_STATUS
    except RouteError as error:
        print(f"unsafe-routes: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
