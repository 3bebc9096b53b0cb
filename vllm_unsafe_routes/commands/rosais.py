"""`unsafe-routes rosais`: which layers' routing carries safety."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RouteError
from ..evaluation.statistics import Outcomes, mean_interval
from ..search.rosais import LATER_LAYERS, SCORES, RosaisSettings
from ..search.rules import share_masks
from ..study.campaign import SUMMARY_FILE, Campaign, read_settings
from ..study.jobs import VOLATILE, rosais_record, run_jobs
from ..study.records import Rosais, read
from .options import Workspace, add_data_options, add_model_options


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "rosais",
        help="score how safety-critical each layer's router is",
        description="RoSais of every MoE layer (arXiv 2602.08621): how far the best of some random masks of one layer raises the "
        "log-probability of an affirmative first token. Prints a table by layer; records every gain of every mask.",
        epilog="Example: unsafe-routes rosais --model lab --data lab:search --limit 16 --dtype float32 --out runs/rosais",
    )
    add_model_options(parser)
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


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    workspace = Workspace(args)
    settings = [RosaisSettings(args.masks, seed, args.score, args.later_layers) for seed in workspace.seeds]
    draws_for = "dataset" if args.same_masks else None
    own = {name: value for name, value in asdict(settings[0]).items() if name != "seed"}
    with Campaign(args.out, workspace.settings("rosais", **own, draws_for=draws_for), volatile=VOLATILE) as campaign:
        if not all(campaign.done((one.seed, item.prompt.id)) for one in settings for item in workspace.items):
            with workspace.bench() as bench:
                jobs = [
                    (
                        (one.seed, item.prompt.id),
                        lambda _, item=item, one=one: rosais_record(bench, item, one, draws_for),
                    )
                    for one in settings
                    for item in workspace.items
                ]
                run_jobs(campaign, bench.backend, jobs, label="RoSais", concurrency=args.concurrency)
        summary = summarise(read(args.out, Rosais))
        campaign.finish(summary)
    print_table(summary)
    return 0


def finished_run(folder: Path, fingerprint: str) -> dict[str, Any]:
    """The settings of a rosais run that another command builds on.

    Raises:
        RouteError: another command's folder, a run that has not ended, or one of another model.

    """
    settings = read_settings(folder)
    if settings.get("command") != "rosais":
        raise RouteError(f"{folder} is a run of {settings.get('command')}, not of rosais")
    if settings.get("fingerprint") != fingerprint:
        raise RouteError(f"{folder} scored model {settings.get('fingerprint')}, this is {fingerprint}")
    if not (folder / SUMMARY_FILE).exists():
        raise RouteError(f"{folder} has not ended; run its command again to go on")
    return settings


def summarise(records: Iterable[Rosais]) -> dict[str, Any]:
    """Mean score of each layer with its interval over prompts and seeds, and the dataset-level score where masks were shared."""
    found = list(records)
    layers = {}
    for layer in found[0].scores:
        outcomes = Outcomes.from_rows((record.prompt, record.seed, record.scores[layer]) for record in found)
        interval = mean_interval(outcomes)
        entry: dict[str, Any] = {
            "mean": round(interval.value, 3),
            "low": round(interval.low, 3),
            "high": round(interval.high, 3),
        }
        by_seed: dict[int, list[Rosais]] = {}
        for record in found:
            by_seed.setdefault(record.seed, []).append(record)
        if all(len(same) > 1 and share_masks(same) for same in by_seed.values()):
            best = [np.mean([one.gains[layer] for one in same], axis=0).max() for same in by_seed.values()]
            entry["dataset"] = round(float(np.mean(best)), 3)
        layers[str(layer)] = entry
    ranking = sorted(layers, key=lambda layer: (-layers[layer]["mean"], int(layer)))
    return {
        "prompts": len({record.prompt for record in found}),
        "seeds": sorted({record.seed for record in found}),
        "layers": layers,
        "ranking": [int(layer) for layer in ranking],
    }


def print_table(summary: Mapping[str, Any]) -> None:
    """The summary as text."""
    print(f"RoSais over {summary['prompts']} prompts, seeds {summary['seeds']} (nats, mean with 95% interval)")
    for layer in summary["ranking"]:
        entry = summary["layers"][str(layer)]
        dataset = f"   dataset level {entry['dataset']:+.2f}" if "dataset" in entry else ""
        print(f"  layer {layer:>3}   {entry['mean']:+.2f}  [{entry['low']:+.2f}, {entry['high']:+.2f}]{dataset}")
