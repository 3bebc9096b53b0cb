"""Options that the commands share, and what they stand for."""

from __future__ import annotations

import argparse
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..evaluation.datasets import PromptRecord, prompts_digest
from ..evaluation.judges import Judge
from ..policy import RoutePolicy
from ..search.backend import Backend
from ..study.bench import Bench, open_backend
from ..study.judges import judge_of, make_judge
from ..study.model import LAB, NO_WRAPPER, Item, Model, Wrapper
from ..study.prompts import read_prompts


def attribute_sentences(settings: type) -> dict[str, str]:
    """What a settings class's docstring says of each attribute, for the help of the options that set them."""
    _, _, attributes = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in found}


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Where the model runs."""
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model", required=True, help="a Hugging Face folder, or 'lab': the harmless model that ships with this package"
    )
    group.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="URL",
        help="run on this server instead of an engine in this process (vLLM's, started with --enable-route-overrides); "
        "repeat it for replicas of the same model",
    )
    group.add_argument("--policy", type=Path, help="a route-policy/1 file that the engine enforces (or that the servers enforce)")
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
        help="prompts: a .csv or .jsonl file with goal and target, a local copy of JailbreakBench's behaviors or its hub id, or "
        "lab:SPLIT[:KIND] for the lab model (search, tune, test; forbidden, benign, category)",
    )
    group.add_argument("--limit", type=int, help="draw so many prompts")
    group.add_argument("--category", action="append", help="keep prompts of this category only; may be repeated")
    group.add_argument("--system", default="", help="system message put before every prompt")
    group.add_argument("--seeds", default=default_seeds, help=f"seeds, separated by commas (default: {default_seeds})")
    group.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an interrupted run goes on with the same command"
    )


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """How answers are judged."""
    group = parser.add_argument_group("judging")
    group.add_argument(
        "--judge",
        help="lab (exact, for the lab language; its default), refusal (refusal phrases; the default elsewhere), or a template file "
        "for a judge model",
    )
    group.add_argument("--judge-url", help="OpenAI-compatible endpoint of the judge model, up to and including /v1")
    group.add_argument("--judge-model", help="the judge model's name there")
    group.add_argument("--judge-key-env", metavar="NAME", help="environment variable that holds the endpoint's key")
    group.add_argument(
        "--judge-timeout", type=float, default=60.0, help="seconds for one try at the endpoint; five are made (default: 60)"
    )
    group.add_argument("--max-new-tokens", type=int, default=64, help="length of a judged answer (default: 64)")
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


def utility_prompts(args: argparse.Namespace, split: str) -> dict[str, list[PromptRecord]]:
    """`benign` and `category` prompts; none where no source is given. Their ids differ from those of other prompts."""
    found: dict[str, list[PromptRecord]] = {}
    for kind, given in (("benign", args.benign), ("category", args.benign_like)):
        sources = given or ([f"lab:{split}:{kind}"] if is_lab(args) else [])
        found[kind] = [
            replace(record, id=f"{kind}:{record.id}" if len(sources) == 1 else f"{kind}:{number}:{record.id}")
            for number, source in enumerate(sources)
            for record in read_prompts(source, args.utility_limit)
        ]
    return found


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The seeds of `--seeds`."""
    try:
        seeds = [int(part) for part in str(args.seeds).split(",")]
    except ValueError:
        raise RouteError(f"--seeds {args.seeds!r} is not a list of integers separated by commas") from None
    if len(set(seeds)) != len(seeds):
        raise RouteError(f"--seeds {args.seeds!r} repeats a seed")
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


class Workspace:
    """What a command's options stand for. Everything that can be wrong with them is found here, before an engine starts.

    Args:
        args: parsed options.
        wrapper: a prompt-level defence around every prompt.

    """

    def __init__(self, args: argparse.Namespace, wrapper: Wrapper | None = None) -> None:
        self.args = args
        self.model = Model(args.model)
        self.policy = RoutePolicy.load(args.policy) if args.policy else None
        if self.policy is not None:
            self.policy.validate(self.model.shape)
        self.wrapper = wrapper or (Wrapper("system", args.system) if getattr(args, "system", "") else NO_WRAPPER)
        self.seeds = seeds_of(args)
        self.records: list[PromptRecord] = read_prompts(args.data, args.limit, categories=args.category)
        self.items = self.render(self.records)
        judge_name = getattr(args, "judge", None) or (LAB if str(args.data).startswith("lab:") else "refusal")
        self.judge: Judge = make_judge(
            judge_name,
            url=getattr(args, "judge_url", None),
            model=getattr(args, "judge_model", None),
            key_env=getattr(args, "judge_key_env", None),
            timeout=getattr(args, "judge_timeout", 60.0),
        )

    def render(self, records: Sequence[PromptRecord], wrapper: Wrapper | None = None) -> list[Item]:
        """Prompts as items; none may be longer than the model's context."""
        items = [self.model.item(record, wrapper or self.wrapper) for record in records]
        limit = self.args.max_model_len or self.model.config.get("max_position_embeddings")
        for item in items:
            needed = len(item.prompt.token_ids) + max(len(item.prompt.target), 1)
            if limit is not None and needed > limit:
                raise RouteError(
                    f"prompt {item.prompt.id}: {len(item.prompt.token_ids)} tokens and a target of {len(item.prompt.target)} "
                    f"do not fit the context of {limit}"
                )
        return items

    def settings(self, command: str, **own: Any) -> dict[str, Any]:
        """What decides the results, for the campaign's settings file."""
        return {
            "command": command,
            "model": self.args.model,
            "model_identity": self.model.identity,
            "fingerprint": self.model.shape.fingerprint,
            "data": self.args.data,
            "prompts": prompts_digest(self.records),
            "num_prompts": len(self.records),
            "policy": self.policy.digest if self.policy else None,
            "system": self.wrapper.system,
            "judge": self.judge.name,
            "dtype": self.args.dtype,
            "seeds": self.seeds,
            **own,
        }

    @contextmanager
    def bench(self, policy: RoutePolicy | None = None, jitter: Mapping[str, Any] | None = None) -> Iterator[Bench]:
        """An engine (or the servers) with what the searches need beside it."""
        args = self.args
        shared = getattr(args, "backend", None)
        if shared is not None:
            yield self._bench(shared)
            return
        engine_args = {}
        for text in args.engine_arg:
            name, equals, value = text.partition("=")
            try:
                engine_args[name] = json.loads(value)
            except ValueError:
                raise RouteError(f"--engine-arg {text!r} is not NAME=JSON") from None
            if not equals:
                raise RouteError(f"--engine-arg {text!r} is not NAME=JSON")
        with open_backend(
            self.model,
            servers=args.server,
            policy=policy or self.policy,
            jitter=jitter,
            max_model_len=args.max_model_len,
            dtype=args.dtype,
            engine_args=engine_args,
        ) as backend:
            yield self._bench(backend)

    def _bench(self, backend: Backend) -> Bench:
        items = {item.prompt.id: item for item in self.items}
        return Bench(
            self.model,
            backend,
            judge_of(self.model, self.judge, items),
            getattr(self.args, "max_new_tokens", 64),
            getattr(self.args, "keep_completions", False),
        )
