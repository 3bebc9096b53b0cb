"""`unsafe-routes demo`: the whole tool on the lab model, in the real engine, in a few minutes."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..extras import RouteExtras
from ..plan import RoutePlan
from ..search.attempt import Attempt
from ..search.backend import Request, run_search
from ..study.bench import open_backend
from ..study.model import LAB, Model
from ..study.prompts import read_prompts
from ..study.records import Fsour, read
from . import fsour, inspect, mask_attack, report, rosais
from .mask_attack import show_interval


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


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    out, seeds = args.out, args.seeds
    common = ["--model", LAB, "--dtype", "float32"]
    judged = [*common, "--max-new-tokens", "32", "--seeds", seeds]
    parser = argparse.ArgumentParser(prog="unsafe-routes")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (inspect, rosais, mask_attack, fsour, report):
        command.add(commands)

    def step(what: str, *words: str, backend: Any = None) -> None:
        print(f"\n== {what}\n$ unsafe-routes {shlex.join(words)}", flush=True)
        options = parser.parse_args(words)
        options.backend = backend
        status = options.run(options)
        if status:
            raise RouteError(f"unsafe-routes {words[0]} ended with status {status}")

    model = Model(LAB)
    step("The model: which layers route, how many experts a token gets", "inspect", model.path)
    print("\nStarting the vLLM engine ...", flush=True)
    with open_backend(model, dtype="float32") as backend:
        step(
            "RoSais: which layers' routing carries the refusals",
            *["rosais", *common, "--data", "lab:search", "--limit", str(args.prompts), "--out", str(out / "rosais")],
            backend=backend,
        )
        step(
            "Router masking at the top layers, beside two fair controls",
            *["mask-attack", *judged, "--data", "lab:test", "--limit", str(args.prompts), "--rosais", str(out / "rosais")],
            *["--layers", "1,2,3", "--masks", "30", "--out", str(out / "masks")],
            backend=backend,
        )
        for strategy in ("paper", "adaptive"):
            step(
                f"F-SOUR, strategy {strategy}: a concrete unsafe route for each prompt",
                *["fsour", *judged, "--data", "lab:test", "--limit", str(args.prompts), "--strategy", strategy],
                *["--out", str(out / f"fsour-{strategy}")],
                backend=backend,
            )
        show_example(model, backend, out / "fsour-adaptive")
    folders = [str(out / name) for name in ("rosais", "masks", "fsour-paper", "fsour-adaptive")]
    step("The report", "report", *folders, "--out", str(out / "report"))
    print_summary(out, time.monotonic() - start)
    return 0


def show_example(model: Model, backend: Any, folder: Path) -> None:
    """One prompt with and without its route; the language is made up, so both answers can be shown."""
    record = next((one for one in read(folder, Fsour) if one.success), None)
    if record is None:
        return
    items = {one.id: model.item(one) for one in read_prompts("lab:test", len(set_of_prompts(folder)))}
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


def set_of_prompts(folder: Path) -> set[str]:
    """Prompts that a campaign has results of."""
    return {record.prompt for record in read(folder, Fsour)}


def print_summary(out: Path, seconds: float) -> None:
    """The closing table."""

    def summary(name: str) -> Any:
        return json.loads((out / name / "summary.json").read_text(encoding="utf-8"))

    layers = summary("rosais")
    masks, paper, adaptive = summary("masks")["asr"], summary("fsour-paper"), summary("fsour-adaptive")
    print(f"\n== In short ({seconds:.0f} s)")
    rows: list[tuple[str, str]] = [
        ("most safety-critical layers (RoSais)", ", ".join(map(str, layers["ranking"]))),
        ("ASR, no attack", show_interval(masks["none"])),
        ("ASR, random masks, 2 layers", show_interval(masks["random-masks/2"])),
        ("ASR, best masks of random 2 layers", show_interval(masks["random-layers/2"])),
        ("ASR, best masks of top 2 layers", show_interval(masks["rosais/2"])),
        ("ASR, F-SOUR as published", show_interval(paper["asr"])),
        ("ASR, F-SOUR adaptive", show_interval(adaptive["asr"])),
        ("tokens computed, published / adaptive", f"{paper['computed_tokens']} / {adaptive['computed_tokens']}"),
    ]
    for name, value in rows:
        print(f"  {name:<40} {value}")
    print(f"\nReport: {out / 'report' / 'report.html'}")
