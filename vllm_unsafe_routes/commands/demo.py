"""`unsafe-routes demo`: the whole tool on the lab model, in the real engine, in a few minutes."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extras import RouteExtras
from ..plan import RoutePlan
from ..report import collect, load_runs, write_report
from ..search.attempt import Attempt
from ..search.backend import Backend, Request, run_search
from ..search.fsour import FsourSettings
from ..search.masking import MaskSettings
from ..study.bench import open_backend
from ..study.model import LAB, Model
from ..study.prompts import read_prompts
from ..study.records import Fsour, read
from ..study.run import run_fsour, run_masks, run_rosais
from ..study.settings import EngineSettings, FsourStudy, JudgeSettings, MaskStudy, RosaisStudy, Setup
from . import show
from .options import seeds_of


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo",
        help="inspect, RoSais, masking, F-SOUR and a report on the harmless lab model, in the real engine",
        description="Runs the commands that it prints, on one engine, with the model that ships with this package: a small MoE "
        "model of a made-up language, trained to refuse made-up nouns. Takes a few minutes on two CPU cores; run again after an "
        "interruption it goes on where it was.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results (default: runs/demo)")
    parser.add_argument("--prompts", type=int, default=16, help="how many prompts are attacked (default: 16)")
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (default: 0)")
    parser.set_defaults(run=run)


ENGINE = EngineSettings(dtype="float32")


@dataclass(frozen=True, slots=True)
class Step:
    """One study of the demo.

    Attributes:
        title: what it is about.
        words: the command line that does the same.
        study: its settings.

    """

    title: str
    words: Sequence[str]
    study: Setup


def steps_of(out: Path, prompts: int, seeds: str) -> list[Step]:
    """The studies, each with the command that a reader would type."""
    common = ["--model", LAB, "--dtype", "float32"]
    judged = [*common, "--max-new-tokens", "32", "--seeds", seeds]
    search, test = (["--data", f"lab:{split}", "--limit", str(prompts)] for split in ("search", "test"))
    shared: dict[str, Any] = {"model": LAB, "limit": prompts, "engine": ENGINE}
    attacked = {**shared, "data": "lab:test", "seeds": seeds_of(seeds), "judging": JudgeSettings(max_new_tokens=32)}
    steps = [
        Step(
            "RoSais: which layers' routing carries the refusals",
            ["rosais", *common, *search, "--out", str(out / "rosais")],
            RosaisStudy(**shared, data="lab:search", out=out / "rosais"),
        ),
        Step(
            "Router masking at the top layers, beside two fair controls",
            [
                *["mask-attack", *judged, *test, "--rosais", str(out / "rosais"), "--layers", "1,2,3", "--masks", "30"],
                *["--out", str(out / "masks")],
            ],
            MaskStudy(**attacked, out=out / "masks", rosais=out / "rosais", levels=(1, 2, 3), search=MaskSettings(num_masks=30)),
        ),
    ]
    for strategy in ("paper", "adaptive"):
        folder = out / f"fsour-{strategy}"
        steps.append(
            Step(
                f"F-SOUR, strategy {strategy}: a concrete unsafe route for each prompt",
                ["fsour", *judged, *test, "--strategy", strategy, "--out", str(folder)],
                FsourStudy(**attacked, out=folder, search=FsourSettings(strategy)),
            )
        )
    return steps


def announce(title: str, words: Sequence[str]) -> None:
    """A step's title and command."""
    print(f"\n== {title}\n$ unsafe-routes {shlex.join(words)}", flush=True)


def run_step(step: Step, backend: Backend) -> Mapping[str, Any]:
    """Run a study and print its summary as its command does."""
    announce(step.title, step.words)
    study = step.study
    if isinstance(study, RosaisStudy):
        summary = run_rosais(study, backend)
        print(show.rosais(summary))
    elif isinstance(study, MaskStudy):
        summary = run_masks(study, backend)
        print(show.masks(summary))
    else:
        assert isinstance(study, FsourStudy)
        summary = run_fsour(study, backend)
        print(show.fsour(summary, study.search.strategy))
    return summary


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    steps = steps_of(args.out, args.prompts, args.seeds)
    model = Model(LAB)
    announce("The model: which layers route, how many experts a token gets", ["inspect", model.path])
    print(show.facts(show.facts_of(model.shape), model.shape))
    print("\nStarting the vLLM engine ...", flush=True)
    with open_backend(model, ENGINE) as backend:
        found = {step.study.out.name: run_step(step, backend) for step in steps}
        show_example(model, backend, args.out / "fsour-adaptive", args.prompts)
    folders = [step.study.out for step in steps]
    announce("The report", ["report", *map(str, folders), "--out", str(args.out / "report")])
    page = write_report(collect(load_runs(folders)), args.out / "report")
    print_summary(found, time.monotonic() - start)
    print(f"\nReport: {page}")
    return 0


def show_example(model: Model, backend: Backend, folder: Path, prompts: int) -> None:
    """One prompt with and without its route; the language is made up, so both answers can be shown."""
    record = next((one for one in read(folder, Fsour) if one.success), None)
    if record is None:
        return
    items = {one.id: model.item(one) for one in read_prompts("lab:test", prompts)}
    item = items[record.prompt]
    plan = Attempt.from_state(record.final).plan()

    def ask(plan: RoutePlan | None) -> Any:
        extras = RouteExtras(plan.to_string() if plan is not None else None, wants_routes=True)
        (response,) = yield [Request(item.prompt.token_ids, extras, 32, model.stop_token_ids)]
        return response

    before, after = run_search(backend, ask(None)), run_search(backend, ask(plan))
    print(f"\n== One prompt of the made-up language, with and without its plan: {item.record.goal}")
    print(f"without a plan    {model.decode(before.token_ids)}")
    print(f"with the plan     {model.decode(after.token_ids)}")
    print(f"receipt           plan {plan.digest}: {after.routes_set} routes set of {len(plan)} in the plan")
    layer = model.shape.moe_layers[0]
    print(f"\nroutes at layer {layer}    before              after")
    for position, token in enumerate(item.prompt.token_ids):
        old, new = (sorted(one.route_ids[position, 0].tolist()) for one in (before, after))
        word = model.tokenizer.decode([token])
        print(f"{position:>3} {word:<14}   {old!s:<18}  {new!s:<18}{'' if old == new else '  changed'}")


def print_summary(found: Mapping[str, Mapping[str, Any]], seconds: float) -> None:
    """The closing table, from the summaries of the steps by their folders."""
    masks, paper, adaptive = found["masks"]["asr"], found["fsour-paper"], found["fsour-adaptive"]
    print(f"\n== In short ({seconds:.0f} s)")
    rows: list[tuple[str, str]] = [
        ("most safety-critical layers (RoSais)", ", ".join(map(str, found["rosais"]["ranking"]))),
        ("ASR, no attack", show.interval(masks["none"])),
        ("ASR, random masks, 2 layers", show.interval(masks["random-masks/2"])),
        ("ASR, best masks of random 2 layers", show.interval(masks["random-layers/2"])),
        ("ASR, best masks of top 2 layers", show.interval(masks["rosais/2"])),
        ("ASR, F-SOUR as published", show.interval(paper["asr"])),
        ("ASR, F-SOUR adaptive", show.interval(adaptive["asr"])),
        ("tokens computed, published / adaptive", f"{paper['computed_tokens']} / {adaptive['computed_tokens']}"),
    ]
    for name, value in rows:
        print(f"  {name:<40} {value}")
