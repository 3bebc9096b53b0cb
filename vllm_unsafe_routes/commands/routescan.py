"""`unsafe-routes routescan`: a probe that tells two kinds of prompts apart by the experts that they are routed to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.datasets import Columns
from ..route_probe import RouteProbe
from ..search.backend import Backend, run_search
from ..search.routescan import ProbeSettings, expert_load, fit_probe
from ..study.bench import open_backend
from ..study.model import Model
from ..study.prompts import read_prompts
from .options import add_model_options, attribute_sentences, engine_of


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "routescan",
        help="fit a probe that tells two kinds of prompts apart by their expert load",
        description="RouteScan (arXiv 2605.24817): a logistic regression over the share of a prompt's tokens that each expert "
        "gets. "
        "Prints the AUROC on held-out prompts (cross-validation) with its interval, and writes a route-probe/1 file.",
        epilog="Example: unsafe-routes routescan --model lab --harmful lab:search --harmless lab:search:benign --dtype float32 "
        "--out probe.json",
    )
    add_model_options(parser)
    group = parser.add_argument_group("prompts and results")
    for name, what in (("harmful", "prompts to be flagged"), ("harmless", "the others")):
        group.add_argument(f"--{name}", required=True, metavar="DATA", help=f"{what}: a file or name as --data of other commands")
    group.add_argument("--goal-column", metavar="NAME", help="column with what is asked, in files of no known form")
    group.add_argument("--limit", type=int, help="draw so many prompts of each")
    group.add_argument("--system", default="", help="system message put before every prompt")
    group.add_argument("--out", type=Path, required=True, help="the probe file")
    group = parser.add_argument_group("probe")
    sentences, defaults = attribute_sentences(ProbeSettings), ProbeSettings()
    for name in ("penalty", "folds", "false_positives", "seed"):
        default = getattr(defaults, name)
        option, text = "--" + name.replace("_", "-"), f"{sentences[name]} (default: {default})"
        group.add_argument(option, type=type(default), default=default, help=text)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    settings = ProbeSettings(args.penalty, args.folds, args.false_positives, args.seed)
    model = Model(args.model)
    kinds = [tokens_of(model, source, args) for source in (args.harmful, args.harmless)]
    with open_backend(model, engine_of(args)) as backend:
        probe = fit(backend, kinds[0], kinds[1], settings)
    probe.save(args.out)
    value, low, high = probe.measured["auroc"]
    found, false = probe.measured["flagged"]
    print(f"AUROC      {value:.3f} [{low:.3f}, {high:.3f}], {len(kinds[0])} harmful and {len(kinds[1])} harmless prompts, held out")
    print(f"threshold  {probe.threshold:.4f}: flags {found:.0%} of the harmful and {false:.0%} of the harmless ones")
    print(f"probe      {args.out}, digest {probe.digest}")
    return 0


def tokens_of(model: Model, source: str, args: argparse.Namespace) -> list[tuple[int, ...]]:
    """The rendered prompts of a source."""
    records = read_prompts(source, args.limit, args.seed, columns=Columns(args.goal_column, None))
    return [model.encode_chat(record.request, args.system) for record in records]


def fit(
    backend: Backend, first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], settings: ProbeSettings | None = None
) -> RouteProbe:
    """A probe that scores the first prompts higher than the second."""
    loads = [run_search(backend, expert_load(backend, prompts)) for prompts in (first, second)]
    return fit_probe(backend.shape, loads[0], loads[1], settings)
