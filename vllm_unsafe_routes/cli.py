"""`unsafe-routes`: look at a model's routing, measure how safe it is, and defend it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import demo, derive_policy, evaluate, fsour, inspect, mask_attack, report, rosais
from .errors import RouteError

COMMANDS = (inspect, rosais, mask_attack, fsour, evaluate, derive_policy, report, demo)
# As a shell gives it for a process that Ctrl-C ended.
INTERRUPTED_STATUS = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="unsafe-routes",
        description="Control of expert routing in MoE models inside vLLM, and how safe that routing is.",
        epilog="Start with `unsafe-routes demo`. Plans and policies: docs/plans.md; search: docs/search.md. "
        "Serving: python -m vllm.entrypoints.openai.api_server --help (group unsafe-routes).",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    args = parser.parse_args(argv)
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
