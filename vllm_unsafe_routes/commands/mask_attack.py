"""`unsafe-routes mask-attack`: router masking with its controls."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..evaluation.datasets import prompts_digest
from ..evaluation.statistics import Outcomes, attack_success_rate
from ..search.masking import ATTACKS, MaskSettings
from ..study.campaign import Campaign
from ..study.jobs import VOLATILE, dataset_mask_record, mask_record, plain_record, run_jobs
from ..study.prompts import read_prompts
from ..study.records import Answer, DatasetMask, Mask, Record, Rosais, read
from .options import Workspace, add_data_options, add_judge_options, add_model_options, numbers_of
from .rosais import finished_run
from .rosais import summarise as summarise_rosais


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "mask-attack",
        help="mask the most safety-critical routers, beside two fair controls",
        description="Router masking (arXiv 2602.08621): for the top L layers by RoSais, one after another, the best of some random "
        "masks. Controls: random-layers (as many masks at random layers) and random-masks (single tries at random layers). Answers "
        "are generated greedily under the masks and judged.",
        epilog="Example: unsafe-routes mask-attack --model lab --data lab:test --limit 24 --rosais runs/rosais --layers 1,2 "
        "--dtype float32 --out runs/masks",
    )
    add_model_options(parser)
    add_data_options(parser)
    add_judge_options(parser)
    group = parser.add_argument_group("router masking")
    group.add_argument(
        "--rosais", type=Path, required=True, help="folder of a rosais run on other prompts, for the ranking of layers"
    )
    group.add_argument("--layers", default="1,2,5", help="numbers of masked layers L (default: 1,2,5)")
    group.add_argument("--masks", type=int, default=100, help="S2, masks tried at each layer (default: 100)")
    group.add_argument(
        "--chosen-on",
        metavar="PROMPTS",
        help="dataset level: one set of masks for all prompts, chosen on these (same format as --data, other prompts)",
    )
    group.add_argument("--chosen-limit", type=int, default=24, help="prompts that --chosen-on draws (default: 24)")
    group.add_argument("--attack", action="append", choices=ATTACKS, help="only these; may be repeated (default: all)")
    group.add_argument("--alone", action="store_true", help="search each layer without the masks chosen before it")
    group.add_argument("--prompt-only", action="store_true", help="masks hold for prompt tokens only, not while decoding")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    workspace = Workspace(args)
    levels = numbers_of(args.layers, "--layers")
    scored = finished_run(args.rosais, workspace.model.shape.fingerprint)
    ranking = summarise_rosais(read(args.rosais, Rosais))["ranking"]
    attacks = args.attack or list(ATTACKS)
    searchable = len(ranking)
    levels = sorted({min(level, searchable) for level in levels})
    settings = [
        MaskSettings(
            num_layers=max(levels),
            num_masks=args.masks,
            seed=seed,
            score=scored["score"],
            keep_earlier=not args.alone,
            while_decoding=not args.prompt_only,
        )
        for seed in workspace.seeds
    ]
    own = {name: value for name, value in asdict(settings[0]).items() if name not in ("seed", "num_layers")}
    chosen_on = read_prompts(args.chosen_on, args.chosen_limit) if args.chosen_on else []
    # Other prompts may have the same ids.
    search_items = workspace.render([replace(record, id=f"chosen-on:{record.id}") for record in chosen_on])
    own |= {"chosen_on": prompts_digest(chosen_on) if chosen_on else None}
    own |= {"levels": levels, "attacks": attacks, "ranking": ranking, "max_new_tokens": args.max_new_tokens}
    with Campaign(args.out, workspace.settings("mask-attack", **own), volatile=VOLATILE) as campaign:
        with workspace.bench() as bench:
            jobs: list[Any] = [
                (("none", item.prompt.id), lambda _, item=item: plain_record(bench, item)) for item in workspace.items
            ]
            if search_items:
                jobs += [
                    (
                        (f"{attack}-dataset", one.seed, level),
                        lambda _, one=one, level=level, attack=attack: dataset_mask_record(
                            bench, search_items, workspace.items, attack, ranking, replace(one, num_layers=level)
                        ),
                    )
                    for attack in attacks
                    for one in settings
                    for level in levels
                ]
            else:
                jobs += [
                    (
                        (attack, one.seed, item.prompt.id),
                        lambda _, item=item, one=one, attack=attack: mask_record(bench, item, attack, ranking, one, levels),
                    )
                    for attack in attacks
                    for one in settings
                    for item in workspace.items
                ]
            run_jobs(campaign, bench.backend, jobs, label="router masking", concurrency=args.concurrency)
        summary = summarise(read(args.out, Record))
        campaign.finish(summary)
    print_table(summary)
    return 0


def summarise(records: Iterable[Record]) -> dict[str, Any]:
    """ASR of each attack and number of layers, with intervals."""
    rows: dict[str, list[tuple[Any, Any, Any]]] = {}
    for record in records:
        if isinstance(record, Answer):
            rows.setdefault("none", []).append((record.prompt, 0, record.success))
        elif isinstance(record, Mask):
            for level, judged in record.answers.items():
                rows.setdefault(f"{record.attack}/{level}", []).append((record.prompt, record.seed, judged.success))
        elif isinstance(record, DatasetMask):
            for prompt, judged in record.answers.items():
                rows.setdefault(f"{record.attack}/{record.level}", []).append((prompt, record.seed, judged.success))
    return {"asr": {name: interval_record(rows[name]) for name in rows}}


def interval_record(rows: list[tuple[Any, Any, Any]]) -> dict[str, Any]:
    """ASR with its interval as JSON values; where no answer could be judged only the number of errors."""
    outcomes = Outcomes.from_rows(rows)
    if outcomes.n_errors == outcomes.values.size:
        return {"value": None, "low": None, "high": None, "prompts": len(outcomes.prompts), "errors": outcomes.n_errors}
    interval = attack_success_rate(outcomes)
    return {
        "value": round(interval.value, 4),
        "low": round(interval.low, 4),
        "high": round(interval.high, 4),
        "prompts": interval.n_prompts,
        "seeds": interval.n_seeds,
        "errors": interval.n_errors,
    }


def show_interval(entry: Mapping[str, Any]) -> str:
    """An ASR entry as text."""
    if entry["value"] is None:
        return f"no verdict ({entry['errors']} errors)"
    errors = f"  {entry['errors']} without verdict" if entry["errors"] else ""
    return f"{entry['value']:.2f}  [{entry['low']:.2f}, {entry['high']:.2f}]{errors}"


def print_table(summary: Mapping[str, Any]) -> None:
    """The summary as text."""
    print("ASR with 95% interval")
    for name, entry in summary["asr"].items():
        attack, _, level = name.partition("/")
        label = f"{attack}, {level} layer{'s' if level != '1' else ''}" if level else "no attack"
        print(f"  {label:<28} {show_interval(entry)}")
