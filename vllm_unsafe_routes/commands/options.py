"""Options that commands share, and the settings that they stand for."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..defence.utility import KINDS, UtilityPrompts
from ..errors import RouteError
from ..evaluation.datasets import Columns
from ..plan import WEIGHT_MODES
from ..policy import RoutePolicy
from ..search.adaptive import AdaptiveSettings
from ..search.fsour import STRATEGIES, FsourSettings
from ..study.model import LAB
from ..study.settings import EngineSettings, JudgeSettings

# F-SOUR's published code, and JailbreakBench.
ANSWER_LENGTHS = {"published": 512, "jailbreakbench": 150}


def attribute_sentences(settings: type) -> dict[str, str]:
    """What a settings class's docstring says of each attribute, for the help of the options that set them."""
    _, _, attributes = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in found}


def add_model_options(parser: argparse.ArgumentParser, *, server: bool = True, ray: bool = False, policy: bool = True) -> None:
    """Where the model runs; without `server` and `ray` in this process only, without `policy` on an engine that has none."""
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model", required=True, help="a Hugging Face folder, or 'lab': the harmless model that ships with this package"
    )
    parser.set_defaults(server=[], ray=None, policy=None)
    if server:
        group.add_argument(
            "--server",
            action="append",
            metavar="URL",
            help="run on this server instead of an engine in this process (vLLM's, started with --enable-route-overrides); "
            "repeat it for replicas of the same model",
        )
    if ray:
        group.add_argument(
            "--ray",
            nargs="?",
            const="",
            metavar="ADDRESS",
            help="run on a Ray cluster: one engine on every GPU (or tensor-parallel group of them), on every core where there is "
            "no GPU. host:port, or auto for a cluster that runs on this machine; without ADDRESS that of RAY_ADDRESS, else one "
            "that starts and ends with the command",
        )
    if policy:
        which = "the engine enforces (or that the servers enforce)" if server else "the engine enforces"
        group.add_argument("--policy", type=Path, help=f"a policy file that {which}")
    group.add_argument("--max-model-len", type=int, help="longest request in tokens; default: the model's own")
    group.add_argument("--dtype", default="auto", help="dtype of the weights; float32 makes scores repeatable to 1e-6")
    group.add_argument(
        "--engine-arg",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a further argument of vllm.LLM, such as tensor_parallel_size=2",
    )
    group.add_argument("--concurrency", type=int, default=64, help="prompts in flight at one time (default: 64)")


def add_data_options(parser: argparse.ArgumentParser, default_seeds: str = "0") -> None:
    """Which prompts, and where results go."""
    group = parser.add_argument_group("prompts and results")
    group.add_argument(
        "--data",
        required=True,
        help="prompts: a .csv or .jsonl file of AdvBench, StrongREJECT, HarmBench, XSTest or OR-Bench, or with their columns; "
        "a local copy of JailbreakBench's behaviors or its hub id; or lab:SPLIT[:KIND] for the lab model (search, tune, test; "
        "forbidden, benign, category)",
    )
    group.add_argument("--goal-column", metavar="NAME", help="column of --data with what is asked, in a file of no known form")
    group.add_argument(
        "--target",
        metavar="TEXT",
        help="how an answer that complies begins, for every prompt; {goal} and other columns in braces are filled in",
    )
    group.add_argument("--limit", type=int, help="draw so many prompts")
    group.add_argument("--category", action="append", help="keep prompts of this category only; may be repeated")
    group.add_argument("--system", default="", help="system message put before every prompt")
    group.add_argument("--seeds", default=default_seeds, help=f"seeds, separated by commas (default: {default_seeds})")
    group.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an interrupted run goes on with the same command"
    )


def answer_length(text: str) -> int:
    """The value of `--max-new-tokens`."""
    try:
        return ANSWER_LENGTHS.get(text) or int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number or one of {', '.join(ANSWER_LENGTHS)}") from None


def add_judge_options(parser: argparse.ArgumentParser, *, stop: bool = False) -> None:
    """How answers are judged; with `stop`, another judge may end a search."""
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--judge",
        action="append",
        metavar="NAME[,KEY=VALUE...]",
        help="lab (exact, for the lab language; its default), topic (exact, for the English lab), refusal (refusal phrases; "
        "the default elsewhere), llama-guard, or a "
        "template file for a judge model, with what is its own behind it: threshold (a number or 'published'), system (a file of a "
        "system prompt), parser, harmful_answer, format, max_tokens, name, url, model, key_env; the first one's verdict is the "
        "result, further ones are reported beside it",
    )
    if stop:
        group.add_argument(
            "--stop-judge",
            metavar="NAME[,KEY=VALUE...]",
            help="the judge that ends a search, as the published code has one (default: the first --judge)",
        )
    group.add_argument("--judge-url", help="OpenAI-compatible endpoint of the judge model, up to and including /v1")
    group.add_argument("--judge-model", help="the judge model's name there")
    group.add_argument("--judge-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    group.add_argument(
        "--judge-timeout", type=float, default=60.0, help="seconds for one try at the endpoint; five are made (default: 60)"
    )
    group.add_argument(
        "--max-new-tokens",
        type=answer_length,
        default=64,
        help="length of a judged answer; published: 512, jailbreakbench: 150 (default: 64)",
    )
    group.add_argument(
        "--keep-completions",
        action="store_true",
        help="also record completions that were judged harmful; they are left out by default",
    )


def add_utility_options(group: Any, split: str) -> None:
    """Harmless prompts that utility is measured on; for the lab language those of `split`."""
    group.add_argument(
        "--benign",
        action="append",
        help=f"harmless prompts for utility, same format as --data; may be repeated (lab: lab:{split}:benign)",
    )
    group.add_argument(
        "--benign-like",
        action="append",
        help=f"harmless prompts that look forbidden, for over-refusal; may be repeated (lab: lab:{split}:category)",
    )
    group.add_argument("--utility-limit", type=int, default=48, help="prompts of each of these sources (default: 48)")


def is_lab(args: argparse.Namespace) -> bool:
    """Whether a command is about the lab language."""
    return args.model == LAB or str(args.data).startswith("lab:")


def utility_prompts(args: argparse.Namespace, split: str) -> UtilityPrompts:
    """The options of `add_utility_options`; for the lab language its own prompts of `split` where no source is given."""
    benign, category = ([f"lab:{split}:{kind}"] if is_lab(args) else [] for kind in KINDS)
    return UtilityPrompts(tuple(args.benign or benign), tuple(args.benign_like or category), args.utility_limit)


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of `--seeds`."""
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise RouteError(f"--seeds {text!r} is not a list of integers separated by commas") from None
    if len(set(seeds)) != len(seeds):
        raise RouteError(f"--seeds {text!r} repeats a seed")
    return seeds


def numbers_of(text: str, option: str) -> list[int]:
    """Distinct positive integers separated by commas, sorted."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise RouteError(f"{option} {text!r} is not a list of integers separated by commas") from None
    if numbers[0] < 1:
        raise RouteError(f"{option} must be 1 or more, got {numbers[0]}")
    return numbers


def setup_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of the three first groups as the fields of `study.settings.Setup`."""
    judging = {name: getattr(args, option) for name, option in _JUDGING.items() if hasattr(args, option)}
    first, *more = judging.pop("names", None) or [None]
    judging |= {"name": first, "more": tuple(more)}
    return {
        "model": args.model,
        "data": args.data,
        "out": args.out,
        "limit": args.limit,
        "categories": tuple(args.category) if args.category else None,
        "columns": Columns(args.goal_column, args.target),
        "system": args.system,
        "seeds": seeds_of(args.seeds),
        "engine": engine_of(args),
        "judging": JudgeSettings(**judging),
    }


def engine_of(args: argparse.Namespace) -> EngineSettings:
    """The options of `add_model_options`, but the model."""
    return EngineSettings(
        servers=tuple(args.server),
        ray=args.ray,
        policy=RoutePolicy.load(args.policy) if args.policy else None,
        max_model_len=args.max_model_len,
        dtype=args.dtype,
        arguments=dict(map(_engine_argument, args.engine_arg)),
        concurrency=args.concurrency,
    )


# Field of `JudgeSettings` -> option.
_JUDGING = {
    "names": "judge",
    "stop": "stop_judge",
    "url": "judge_url",
    "model": "judge_model",
    "key_env": "judge_key_env",
    "timeout": "judge_timeout",
    "max_new_tokens": "max_new_tokens",
    "keep_completions": "keep_completions",
}


def _engine_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if equals:
            return name, json.loads(value)
    except ValueError:
        pass
    raise RouteError(f"--engine-arg {text!r} is not NAME=JSON")


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
    group.add_argument(
        "--weights",
        choices=WEIGHT_MODES,
        default="masked",
        help="weights of forced experts: masked (the paper's), or native, which leaves out what rescaling does",
    )
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


def add_search_answered(parser: argparse.ArgumentParser) -> None:
    """Whether F-SOUR searches prompts that need no search."""
    parser.add_argument(
        "--search-answered",
        action="store_true",
        help="F-SOUR also on prompts that the model answers anyway; by default their plain answer is a success without a search, "
        "as published",
    )


def add_controls(parser: argparse.ArgumentParser) -> None:
    """What is measured beside a found route."""
    parser.add_argument(
        "--controls",
        type=int,
        metavar="N",
        default=0,
        help="beside each found route: its experts with native weights, the model's own experts with masked ones, and N random "
        "routes at the same cells (default: 0, no controls)",
    )


def fsour_settings(args: argparse.Namespace) -> FsourSettings:
    """The options of `add_fsour_options` as settings."""
    adaptive = AdaptiveSettings(**{field.name: getattr(args, f"adaptive_{field.name}") for field in fields(AdaptiveSettings)})
    return FsourSettings(
        strategy=args.strategy,
        num_draws=args.draws,
        num_attempts=args.attempts,
        tau=args.tau,
        min_gain=args.min_gain,
        weights=args.weights,
        adaptive=adaptive,
    )
