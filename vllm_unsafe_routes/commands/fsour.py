"""`unsafe-routes fsour`: search concrete unsafe routes, prompt by prompt."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..evaluation.artifacts import ArtifactParameters, write_artifact
from ..evaluation.artifacts import Attempt as ArtifactAttempt
from ..search.adaptive import AdaptiveSettings, Library
from ..search.fsour import STRATEGIES, FsourSettings
from ..study.campaign import Campaign
from ..study.jobs import VOLATILE, fsour_record, run_jobs
from ..study.records import Fsour, Matrix, read
from .mask_attack import interval_record, show_interval
from .options import Workspace, add_data_options, add_judge_options, add_model_options, attribute_sentences


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "fsour",
        help="search a concrete unsafe route for each prompt",
        description="F-SOUR (arXiv 2602.08621): a stochastic search of expert choices, token by token and layer by layer, that "
        "raises the log-probability of an affirmative target; then greedy generation and a judge; up to five attempts. Under a "
        "policy only experts that it allows are tried, so a defended engine is attacked adaptively.",
        epilog="Example: unsafe-routes fsour --model lab --data lab:test --limit 16 --strategy adaptive --dtype float32 "
        "--out runs/fsour",
    )
    add_model_options(parser)
    add_data_options(parser)
    add_judge_options(parser)
    add_fsour_options(parser)
    parser.add_argument("--artifact", type=Path, help="also write a JailbreakBench attack artifact to this file")
    parser.set_defaults(run=run)


def add_fsour_options(parser: argparse.ArgumentParser) -> None:
    """Options of the search itself."""
    group = parser.add_argument_group("F-SOUR")
    group.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="paper",
        help="paper: keep the first draw that improves; code: the published code's, keep the best of all draws; adaptive: this "
        "project's own, the same goal with far fewer tokens",
    )
    group.add_argument(
        "--draws", type=int, default=10, help="S3, draws at each (token, layer) (default: 10, as the paper and its code)"
    )
    group.add_argument("--attempts", type=int, default=5, help="S4, attempts with new draws (default: 5)")
    group.add_argument("--tau", type=float, default=0.8, help="stop searching at this probability of the target (default: 0.8)")
    group.add_argument("--min-gain", type=float, default=1e-4, help="nats that a draw must gain (default: 1e-4; bfloat16: 2e-2)")
    group.add_argument(
        "--library-prompts",
        type=int,
        default=4,
        help="adaptive: this many prompts are attacked first, and the routes found there are where the others start; 0: none "
        "(default: 4)",
    )
    sentences = attribute_sentences(AdaptiveSettings)
    for field in fields(AdaptiveSettings):
        option = f"--adaptive-{field.name.replace('_', '-')}"
        text = f"adaptive: {sentences[field.name]} (default: {field.default})"
        group.add_argument(option, type=type(field.default), default=field.default, help=text)


def fsour_settings(args: argparse.Namespace, seed: int) -> FsourSettings:
    """The options as settings."""
    adaptive = AdaptiveSettings(**{field.name: getattr(args, f"adaptive_{field.name}") for field in fields(AdaptiveSettings)})
    return FsourSettings(
        strategy=args.strategy,
        num_draws=args.draws,
        num_attempts=args.attempts,
        tau=args.tau,
        seed=seed,
        min_gain=args.min_gain,
        max_new_tokens=args.max_new_tokens,
        adaptive=adaptive,
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    workspace = Workspace(args)
    settings = [fsour_settings(args, seed) for seed in workspace.seeds]
    own = {name: value for name, value in asdict(settings[0]).items() if name != "seed"}
    num_first = args.library_prompts if args.strategy == "adaptive" else 0
    own |= {"library_prompts": num_first}
    with Campaign(args.out, workspace.settings("fsour", **own), volatile=VOLATILE) as campaign:
        with workspace.bench() as bench:
            first, rest = workspace.items[:num_first], workspace.items[num_first:]

            def jobs(items: list[Any], libraries: Mapping[int, Library]) -> list[Any]:
                return [
                    (
                        (one.seed, item.prompt.id),
                        lambda so_far, item=item, one=one: fsour_record(bench, item, one, libraries.get(one.seed), so_far),
                    )
                    for one in settings
                    for item in items
                ]

            label = f"F-SOUR ({args.strategy})"
            if first:
                run_jobs(campaign, bench.backend, jobs(first, {}), label=f"{label}, library", concurrency=args.concurrency)
            names = {item.prompt.id for item in first}
            libraries = {seed: library_of(read(args.out, Fsour), seed, names) for seed in workspace.seeds}
            run_jobs(campaign, bench.backend, jobs(rest, libraries), label=label, concurrency=args.concurrency)
        summary = summarise(read(args.out, Fsour))
        campaign.finish(summary)
    print_table(summary, args.strategy)
    if args.artifact:
        write_jailbreakbench(args, workspace, campaign)
    return 0


def library_of(records: Iterable[Fsour | Matrix], seed: int, prompts: set[str]) -> Library:
    """Routes of the successful attempts on these prompts."""
    return Library.from_routes(
        [
            (record.prompt_tokens, record.final.routes)
            for record in records
            if record.seed == seed and record.prompt in prompts and record.success and record.final and record.prompt_tokens
        ]
    )


def summarise(records: Iterable[Fsour]) -> dict[str, Any]:
    """ASR with its interval, and what it cost."""
    found = list(records)
    names = ("attempts", "candidates", "needed", "tokens", "computed_tokens")
    totals = {name: sum(getattr(record, name) for record in found) for name in names}
    return {"asr": interval_record([(record.prompt, record.seed, record.success) for record in found]), **totals}


def print_table(summary: Mapping[str, Any], strategy: str) -> None:
    """The summary as text."""
    print(f"F-SOUR ({strategy})   ASR {show_interval(summary['asr'])}")
    print(
        f"  {summary['attempts']} attempts, {summary['candidates']} candidates ({summary['needed']} one by one), "
        f"{summary['computed_tokens']} of {summary['tokens']} tokens computed"
    )


def write_jailbreakbench(args: argparse.Namespace, workspace: Workspace, campaign: Campaign) -> None:
    """The first seed's results as a JailbreakBench attack artifact."""
    by_id = {item.prompt.id: (at, item) for at, item in enumerate(workspace.items)}
    attempts = []
    for record in read(campaign.folder, Fsour):
        if record.seed != workspace.seeds[0]:
            continue
        at, item = by_id[record.prompt]
        attempts.append(
            ArtifactAttempt(
                index=at,
                goal=item.record.goal,
                behavior=str(item.record.extra.get("behavior", item.record.id)),
                category=item.record.category,
                prompt=item.record.goal,
                response=record.completion,
                jailbroken=record.success,
                judge_error=record.error,
                number_of_queries=record.candidates,
                queries_to_jailbreak=record.candidates if record.success else None,
                prompt_tokens=record.tokens,
            )
        )
    parameters = ArtifactParameters(
        method=f"F-SOUR ({args.strategy})",
        model=args.model,
        attack_type="white_box",
        judge=workspace.judge.name,
        defense="route-policy" if workspace.policy else None,
    )
    write_artifact(
        args.artifact, parameters, sorted(attempts, key=lambda attempt: attempt.index), keep_completions=args.keep_completions
    )
    print(f"JailbreakBench artifact: {args.artifact}")
