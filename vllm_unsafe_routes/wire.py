"""The forms in which a plan travels: readable JSON (`route-plan/2`), and one compact ASCII string.

The string is `rp2:` and the base64 of a zlib-compressed payload: a JSON head with the weight mode, the model and the number of
directives (and the prompt, where the plan is bound to one), a newline, then flat little-endian arrays one after another. Per
directive: kind (uint8), whether it has weights (uint8), layer (int32), number of positions (int32; -1, -2, -3: prompt, generated,
all), number of experts (int32). Then all positions, all experts (int32) and all weights (float32; a bias has its values there). The
payload is the plan's content; its digest is taken over it.

Version 2 brought `bias`, `promote` and `demote`. A plan without them is written as version 1 (`route-plan/1`, `rp1:`), so that it
reads everywhere and its string and digest are what they were.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from .binding import PromptBinding
from .directive import HARD_KINDS, KINDS, SPANS, Directive, Kind
from .errors import RouteError

# Version -> the kinds of directives that it knows.
PLAN_VERSIONS: Mapping[str, tuple[Kind, ...]] = {"route-plan/1": HARD_KINDS, "route-plan/2": KINDS}
PLAN_KEY = "route_plan"
RETURN_ROUTES_KEY = "return_routes"
WIRE_PREFIXES: Mapping[str, tuple[Kind, ...]] = {"rp1:": HARD_KINDS, "rp2:": KINDS}
# A plan that is larger, as JSON or unpacked, is refused before it is read: a small string must not fill the memory.
MAX_WIRE_BYTES = 64 << 20

# Weight mode, model and prompt, of which nothing is checked; the directives; the payload, if it is known to be what `to_payload`
# makes of them.
Content = tuple[Any, Any, Any, Iterator[Directive], bytes | None]


def _version(versions: Mapping[str, tuple[Kind, ...]], directives: Sequence[Directive]) -> str:
    """The first version that knows all of these."""
    kinds = {item.kind for item in directives}
    return next(name for name, known in versions.items() if kinds <= set(known))


def to_json(weights: str, model: str | None, prompt: PromptBinding | None, directives: Sequence[Directive]) -> str:
    """The readable form."""
    entries = []
    for item in directives:
        positions = item.positions if isinstance(item.positions, str) else list(item.positions)
        entry: dict[str, Any] = {"layer": item.layer, "positions": positions, item.kind: list(item.experts)}
        if item.kind == "bias":
            entry["bias"] = dict(zip(map(str, item.experts), item.weights or (), strict=True))
        elif item.weights is not None:
            entry["weights"] = list(item.weights)
        entries.append(entry)
    version = _version(PLAN_VERSIONS, directives)
    document: dict[str, Any] = {"version": version, "weights": weights, "directives": entries}
    if model is not None:
        document["model"] = model
    if prompt is not None:
        document["prompt"] = prompt.to_dict()
    return json.dumps(document)


def read_json(text: str | bytes | Mapping[str, Any]) -> Content:
    """Read what `to_json` wrote. Raises `RouteError` for unknown keys or versions and for what is missing."""
    if not isinstance(text, Mapping) and len(text) > MAX_WIRE_BYTES:
        raise RouteError(f"the plan is larger than {MAX_WIRE_BYTES} bytes")
    document = read_document(text, "plan", PLAN_VERSIONS, {"version", "weights", "directives", "model", "prompt"})
    directives = document.get("directives", [])
    if not isinstance(directives, list):
        raise RouteError(f"directives must be a list, got {type(directives).__name__}")
    items = _json_directives(directives, PLAN_VERSIONS[document["version"]])
    return document.get("weights", "masked"), document.get("model"), document.get("prompt"), items, None


def _json_directives(directives: list[Any], known: Sequence[Kind]) -> Iterator[Directive]:
    for at, entry in enumerate(directives):
        where = f"directive {at}"
        if not isinstance(entry, Mapping):
            raise RouteError(f"{where} must be an object, got {entry!r}")
        reject_unknown_keys(entry, {"layer", "positions", "weights", *known}, where)
        kinds = [kind for kind in known if kind in entry]
        if len(kinds) != 1:
            raise RouteError(f"{where} needs exactly one of {', '.join(known)}, has {kinds or 'none'}")
        for key in ("layer", "positions"):
            if key not in entry:
                raise RouteError(f"{where} lacks {key!r}")
        experts, weights = entry[kinds[0]], entry.get("weights")
        if kinds[0] == "bias":
            if weights is not None:
                raise RouteError(f"{where}: weights are for force only")
            experts, weights = read_bias(experts, where)
        yield Directive.checked(where, kinds[0], entry["layer"], entry["positions"], experts, weights)


def read_bias(values: Any, where: str) -> tuple[list[Any], list[Any]]:
    """Experts and values of a bias, `{expert: value}`; JSON has its keys as strings. Raises `RouteError` for anything else."""
    if not isinstance(values, Mapping):
        raise RouteError(f"{where}: bias must be an object of expert -> value, got {str(values)[:80]}")
    experts: list[Any] = []
    for key in values:
        if isinstance(key, str):
            if not (key.isascii() and key.isdecimal() and len(key) <= 10):
                raise RouteError(f"{where}: bias has {key[:80]!r}, which is not an expert")
            key = int(key)
        experts.append(key)
    return experts, list(values.values())


def to_payload(weights: str, model: str | None, prompt: PromptBinding | None, directives: Sequence[Directive]) -> bytes:
    """A plan's content as bytes, the same for the same content."""
    head = _head(weights, model, len(directives), {} if prompt is None else {"prompt": prompt.to_dict()})
    spans = [item.positions for item in directives]
    positions = [where for where in spans if not isinstance(where, str)]
    explicit = [item.weights for item in directives if item.weights is not None]
    arrays = (
        np.array([KINDS.index(item.kind) for item in directives], "u1"),
        np.array([item.weights is not None for item in directives], "u1"),
        np.array([item.layer for item in directives], "<i4"),
        np.array([-1 - SPANS.index(where) if isinstance(where, str) else len(where) for where in spans], "<i4"),
        np.array([len(item.experts) for item in directives], "<i4"),
        np.array([position for group in positions for position in group], "<i4"),
        np.array([expert for item in directives for expert in item.experts], "<i4"),
        np.array([weight for group in explicit for weight in group], "<f4"),
    )
    return head + b"\n" + b"".join(array.tobytes() for array in arrays)


def _head(weights: str, model: str | None, num_directives: int, more: Mapping[str, Any]) -> bytes:
    return json.dumps({"weights": weights, "model": model, "directives": num_directives, **more}).encode()


def pack(payload: bytes, directives: Sequence[Directive]) -> str:
    """The string of a payload with these directives."""
    return _version(WIRE_PREFIXES, directives) + base64.b64encode(zlib.compress(payload, 1)).decode("ascii")


def read_string(text: str) -> Content:
    """Read a plan's string, or its JSON form. Raises `RouteError` for anything else."""
    if not isinstance(text, str):
        raise RouteError(f"{PLAN_KEY} must be a string, got {type(text).__name__}")
    if text.lstrip().startswith("{"):
        return read_json(text)
    prefix = text[:4]
    if prefix not in WIRE_PREFIXES:
        raise RouteError(f"{PLAN_KEY} starts with {text[:8]!r}, expected {' or '.join(map(repr, WIRE_PREFIXES))} or a JSON object")
    try:
        inflate = zlib.decompressobj()
        payload = inflate.decompress(base64.b64decode(text[len(prefix) :], validate=True), MAX_WIRE_BYTES)
        if not inflate.eof:
            raise RouteError(f"{PLAN_KEY} is cut off or larger than {MAX_WIRE_BYTES} bytes")
        head_bytes, newline, body = payload.partition(b"\n")
        head = json.loads(head_bytes)
        num = head["directives"]
    except (binascii.Error, zlib.error, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RouteError):
            raise
        raise RouteError(f"{PLAN_KEY} is damaged: {error}") from None
    if not newline or set(head) - {"prompt"} != {"weights", "model", "directives"} or type(num) is not int or num < 0:
        raise RouteError(f"{PLAN_KEY} has an unknown head: {head}")
    weights, model = head["weights"], head["model"]
    # Whether a directive has weights may be said by any byte, and is written as 1. A prompt's keys may come in any order.
    is_own = head_bytes == _head(weights, model, num, {}) and not body[num : 2 * num].strip(b"\0\1")
    directives = _packed_directives(body, num, WIRE_PREFIXES[prefix])
    return weights, model, head.get("prompt"), directives, payload if is_own else None


def _packed_directives(body: bytes, num: int, known: Sequence[Kind]) -> Iterator[Directive]:
    at = 0

    def take(dtype: str, count: int) -> list[Any]:
        nonlocal at
        size = np.dtype(dtype).itemsize * count
        if count < 0 or at + size > len(body):
            raise RouteError(f"{PLAN_KEY} is damaged: {len(body)} bytes, more were announced")
        values: list[Any] = np.frombuffer(body, dtype, count, at).tolist()
        at += size
        return values

    kinds, weighted = take("u1", num), take("u1", num)
    layers, counts, expert_counts = take("<i4", num), take("<i4", num), take("<i4", num)
    if (
        any(kind >= len(known) for kind in kinds)
        or any(count < -len(SPANS) for count in counts)
        or min(expert_counts, default=0) < 0
    ):
        raise RouteError(f"{PLAN_KEY} is damaged: unknown directive kind or span")
    all_positions, all_experts = take("<i4", sum(count for count in counts if count > 0)), take("<i4", sum(expert_counts))
    are_naturals = not any(weighted) and min([0, *layers, *all_positions, *all_experts]) == 0
    positions, experts = iter(all_positions), iter(all_experts)
    weights = iter(take("<f4", sum(count for count, has in zip(expert_counts, weighted, strict=True) if has)))
    if at != len(body):
        raise RouteError(f"{PLAN_KEY} is damaged: {len(body) - at} bytes too many")
    rows = zip(kinds, weighted, layers, counts, expert_counts, strict=True)
    for number, (kind, has_weights, layer, count, num_experts) in enumerate(rows):
        where = SPANS[-1 - count] if count < 0 else tuple(islice(positions, count))
        chosen = tuple(islice(experts, num_experts))
        item = Directive.of_naturals(known[kind], layer, where, chosen) if are_naturals else None
        if item is None:
            values = tuple(islice(weights, num_experts)) if has_weights else None
            item = Directive.checked(f"directive {number}", known[kind], layer, where, chosen, values)
        yield item


def read_document(
    text: str | bytes | Mapping[str, Any], what: str, versions: Collection[str], known: set[str]
) -> Mapping[str, Any]:
    """A JSON object of one of these versions. Raises `RouteError` where it is none, or has keys that are not `known`."""
    document: Any = text
    if not isinstance(text, Mapping):
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys)
        except (ValueError, TypeError, RecursionError) as error:
            raise RouteError(f"the {what} is not JSON: {error}") from None
    if not isinstance(document, Mapping):
        raise RouteError(f"the {what} must be a JSON object, got {type(document).__name__}")
    version = document.get("version")
    if not isinstance(version, str) or version not in versions:
        raise RouteError(f"{what} version {version!r} is not {' or '.join(map(repr, versions))}")
    reject_unknown_keys(document, known, what)
    return document


def reject_unknown_keys(document: Mapping[str, Any], known: set[str], what: str) -> None:
    """Raise `RouteError` naming the keys of `document` that are not in `known`."""
    unknown = sorted(set(map(str, document)) - known)
    if unknown:
        raise RouteError(f"{what} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that is given twice would silently drop what the first one said."""
    document = dict(pairs)
    if len(document) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return document
