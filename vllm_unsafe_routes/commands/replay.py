"""`unsafe-routes replay`: where two runs of one sequence part."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..divergence import compare_logprobs, compare_routes
from ..errors import RouteError
from ..receipt import CARRIER, RECEIPT_KEY, Receipt
from ..routed_experts import FORMS, read
from ..shape import ModelShape
from ..study.model import Model

DIVERGENT = 2


def add(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "replay",
        help="compare two sets of routes or log-probabilities: the first divergent (token, layer)",
        description="Compares what two programs, or two runs, did on the same tokens: a rollout and its replay, an engine and a "
        "trainer. Names the first token and layer whose experts differ, and the first token whose log-probability does. Exit "
        "status 0: they agree; 2: they do not.",
        epilog="Example: unsafe-routes replay rollout.json replay.json --model lab --tolerance 1e-3",
    )
    for name, text in (("one", "the first file"), ("other", "the second")):
        parser.add_argument(
            name,
            type=Path,
            help=f"{text}: a receipt, an answer of vLLM's or SGLang's server (.json), routes in another program's form (.json), or "
            "an array of routes or of log-probabilities (.npy)",
        )
    parser.add_argument("--model", required=True, help="a Hugging Face folder, of which only the config is read, or 'lab'")
    parser.add_argument(
        "--form",
        choices=FORMS,
        action="append",
        help="whose routes they are; twice for one of each (default: by what a file holds)",
    )
    parser.add_argument(
        "--num-tokens",
        type=int,
        action="append",
        help="leading tokens that are valid, where routes are padded; twice for one of each",
    )
    parser.add_argument("--tolerance", type=float, default=1e-3, help="nats that are no difference (default: 1e-3)")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Recording:
    """What a file holds of a run.

    Attributes:
        routes: int32 [num_tokens, num_moe_layers, top_k]; None: none.
        start: position of its first row.
        logprobs: float64 [num_tokens] in nats; None: none.

    """

    routes: npt.NDArray[np.int32] | None = None
    start: int = 0
    logprobs: npt.NDArray[np.float64] | None = None


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    shape = Model(args.model).shape
    forms, lengths = _each(args.form, "--form"), _each(args.num_tokens, "--num-tokens")
    one, other = (
        load(path, shape, form, num_tokens) for path, form, num_tokens in zip((args.one, args.other), forms, lengths, strict=True)
    )
    differs = False
    if one.routes is not None and other.routes is not None:
        differs |= _say_routes(one, other, shape)
    if one.logprobs is not None and other.logprobs is not None:
        differs |= _say_logprobs(one.logprobs, other.logprobs, args.tolerance)
    elif one.routes is None or other.routes is None:
        raise RouteError(f"{args.one} and {args.other} have neither routes nor log-probabilities in common")
    return DIVERGENT if differs else 0


def _each(values: list[Any] | None, option: str) -> tuple[Any, Any]:
    if values is None:
        return None, None
    if len(values) > 2:
        raise RouteError(f"{option} is given {len(values)} times, for two files")
    return values[0], values[-1]


def _say_routes(one: Recording, other: Recording, shape: ModelShape) -> bool:
    assert one.routes is not None and other.routes is not None
    found = compare_routes(one.routes, other.routes, shape.moe_layers, (one.start, other.start))
    print(f"routes            {found.compared - found.differing} of {found.compared} (token, layer) alike")
    if found.position is None:
        return False
    assert found.experts is not None
    print(f"first divergence  token {found.position}, layer {found.layer}: {list(found.experts[0])} and {list(found.experts[1])}")
    worst = sorted(found.by_layer.items(), key=lambda entry: -entry[1])[:5]
    print("most by layer     " + ", ".join(f"{layer}: {share:.1%}" for layer, share in worst if share))
    return True


def _say_logprobs(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], tolerance: float) -> bool:
    found = compare_logprobs(one, other, tolerance)
    print(f"log-probabilities {found.compared - found.differing} of {found.compared} within {tolerance:g} nats")
    print(f"difference        mean {found.mean:.2e}, largest {found.largest:.2e}")
    if found.token is None:
        return False
    assert found.values is not None
    print(f"first divergence  token {found.token}: {found.values[0]:.6f} and {found.values[1]:.6f}")
    return True


def load(path: Path, shape: ModelShape, form: str | None = None, num_tokens: int | None = None) -> Recording:
    """What a file holds.

    Args:
        path: the file.
        shape: the model's.
        form: whose routes they are; None: by what the file holds.
        num_tokens: leading tokens that are valid.

    Raises:
        RouteError: a file that cannot be read, or holds neither.

    """
    try:
        value = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RouteError(f"{path} cannot be read: {error}") from None
    try:
        return _recording(value, shape, form, num_tokens)
    except RouteError as error:
        raise RouteError(f"{path}: {error}") from None


def _recording(value: Any, shape: ModelShape, form: str | None, num_tokens: int | None) -> Recording:
    def routes(found: Any, default: str, **more: Any) -> Recording:
        ids, start = read(found, shape, form or default, num_tokens=num_tokens)
        return Recording(ids, start, **more)

    if isinstance(value, list):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        return Recording(logprobs=value.astype(np.float64)) if value.ndim == 1 else routes(value, "tensorrt-llm")
    if isinstance(value, str):
        return routes(value, "vllm")
    if not isinstance(value, dict):
        raise RouteError(f"expected an object, a list or a string, got {type(value).__name__}")
    if "data" in value:
        return routes(value, "dynamo")
    logprobs = _logprobs(value)
    carrier = value.get(CARRIER)
    receipt = carrier.get(RECEIPT_KEY) if isinstance(carrier, dict) else value if "routes_set" in value else None
    if receipt is not None:
        found = Receipt.from_dict(receipt)
        scores = None if found.scores is None else found.scores[:, 0].astype(np.float64)
        return Recording(found.route_ids, found.routes_start, logprobs if logprobs is not None else scores)
    choice = (value.get("choices") or [{}])[0]
    if choice.get("routed_experts") is not None:
        return routes(choice["routed_experts"], "vllm", logprobs=logprobs)
    meta = value.get("meta_info") or {}
    if meta.get("routed_experts") is not None:
        return routes(meta["routed_experts"], "sglang", logprobs=logprobs)
    if logprobs is not None:
        return Recording(logprobs=logprobs)
    raise RouteError("there are neither routes nor log-probabilities")


def _logprobs(document: dict[str, Any]) -> npt.NDArray[np.float64] | None:
    """The log-probabilities of an OpenAI-compatible answer, completion or chat; None: it has none."""
    found = ((document.get("choices") or [{}])[0].get("logprobs")) or {}
    if found.get("token_logprobs"):
        return np.array([np.nan if value is None else value for value in found["token_logprobs"]], np.float64)
    if found.get("content"):
        return np.array([entry["logprob"] for entry in found["content"]], np.float64)
    return None
