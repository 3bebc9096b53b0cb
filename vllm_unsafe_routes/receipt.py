"""What comes back with a request: which plan ran, under which policy, and how much of the plan was set.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from . import routed_experts
from .errors import RouteError
from .shape import ModelShape

# vLLM carries this dict from the engine to offline outputs and HTTP responses; our entry sits beside a connector's own.
CARRIER = "kv_transfer_params"
RECEIPT_KEY = "unsafe_routes"


@dataclass(frozen=True, slots=True, eq=False)
class RouterLogits:
    """What the model's routers computed, before noise, policy or plan.

    Attributes:
        values: float32 [num_tokens, num_layers, num_experts]; NaN where a token was not computed.
        layers: decoder layer indices of the second axis, ascending.
        start: position of the first row.

    """

    values: npt.NDArray[np.float32]
    layers: tuple[int, ...]
    start: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RouterLogits) and _same_fields(self, other)

    def to_dict(self) -> dict[str, Any]:
        """The form that travels, the array as in `Receipt.to_dict`."""
        values = self.values.astype("<f4")
        return {"start": self.start, "layers": list(self.layers), "shape": list(values.shape), "values": _pack(values)}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RouterLogits:
        """Read what `to_dict` wrote."""
        values = _unpack(document["values"], "<f4", document["shape"])
        return cls(values, tuple(document["layers"]), document["start"])


@dataclass(frozen=True, slots=True, eq=False)
class Receipt:
    """Proof of what ran. Two are equal if all they say is equal, arrays by content (NaN equals NaN); they have no hash.

    Attributes:
        plan: the plan's digest; None for a request without one.
        policy: the digest of the policy that was active when the request finished, or None.
        policy_mode: "enforce" or "observe"; None without a policy.
        earlier_policies: where the policy was replaced meanwhile, the digests (None: no policy) under which the first output
            tokens were sampled. Their routes were computed again under `policy`.
        routes_set: (layer, token) routes that the plan set while this request was computed. Tokens whose KV came from the
            prefix cache were routed alike when they were computed, and are not counted again.
        cached_tokens: leading positions whose KV this request did not compute.
        route_ids: int32 [num_tokens, num_moe_layers, top_k], experts used, where `return_routes` was asked for; else None.
        route_weights: float32, same shape, the weights used.
        scores: float32 [num_rows, width], log-probabilities of the tokens in `score_tokens` (`extras.py`); else None.
        prompt_tokens: tokens of the prompt; None in receipts of older releases, as the next two.
        prompt_digest: `prompt_digest` of the prompt's token ids; None for embeddings.
        tokens: tokens of the prompt and of the output that was delivered. The last one is never fed back: it has no route.
        routes_start: position of the first row of `route_ids`.
        monitor: what the served probe says of the prompt: `score`, `flagged`, `tokens` (those that were computed and so scored)
            and `probe`, its digest; None without one.
        logits: router logits with their layers and positions, where `return_router_logits` was asked for; else None.

    """

    plan: str | None
    policy: str | None
    routes_set: int
    cached_tokens: int
    route_ids: npt.NDArray[np.int32] | None = None
    route_weights: npt.NDArray[np.float32] | None = None
    scores: npt.NDArray[np.float32] | None = None
    policy_mode: str | None = None
    earlier_policies: tuple[str | None, ...] = ()
    prompt_tokens: int | None = None
    prompt_digest: str | None = None
    tokens: int | None = None
    routes_start: int = 0
    logits: RouterLogits | None = None
    monitor: Mapping[str, Any] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Receipt) and _same_fields(self, other)

    @property
    def router_logits(self) -> npt.NDArray[np.float32] | None:
        """float32 [num_tokens, chosen layers, num_experts]; None where nobody asked. `logits` says which layers and positions."""
        return None if self.logits is None else self.logits.values

    def routed_experts(self, shape: ModelShape, form: str = "vllm", start: int | None = None) -> Any:
        """The routes as other programs write them; see `routed_experts.py` for the forms.

        Args:
            shape: the model's.
            form: `vllm`, `sglang`, `dynamo`, `prime-rl`, `tunix` or `tensorrt-llm`.
            start: first position; None: the first of `route_ids`.

        Raises:
            RouteError: no routes were asked for, a start that is none, or what the form cannot say.

        """
        if self.route_ids is None:
            raise RouteError("the receipt has no routes: send return_routes with the request")
        first = self.routes_start
        begin = first if start is None else start
        if not first <= begin <= first + len(self.route_ids):
            raise RouteError(f"start {begin} is out of range ({first}-{first + len(self.route_ids)})")
        return routed_experts.write(self.route_ids[begin - first :], shape, form, begin)

    def to_dict(self) -> dict[str, Any]:
        """The form that travels: plain values, arrays as base64 of zlib-compressed little-endian bytes."""
        document: dict[str, Any] = {
            "plan": self.plan,
            "policy": self.policy,
            "policy_mode": self.policy_mode,
            "routes_set": self.routes_set,
            "cached_tokens": self.cached_tokens,
            "prompt_tokens": self.prompt_tokens,
            "prompt_digest": self.prompt_digest,
            "tokens": self.tokens,
        }
        if self.earlier_policies:
            document["earlier_policies"] = list(self.earlier_policies)
        if self.route_ids is not None and self.route_weights is not None:
            document["routes"] = {
                "start": self.routes_start,
                "shape": list(self.route_ids.shape),
                "ids": _pack(self.route_ids.astype("<i4")),
                "weights": _pack(self.route_weights.astype("<f4")),
            }
        if self.monitor is not None:
            document["monitor"] = dict(self.monitor)
        if self.logits is not None:
            document["router_logits"] = self.logits.to_dict()
        if self.scores is not None:
            document["scores"] = self.scores.tolist()
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Receipt:
        """Read what `to_dict` wrote. Raises `RouteError` for the note of a request that a swapped-in policy ended."""
        if "error" in document:
            raise RouteError(f"this request has no receipt: {document['error']}")
        ids, weights, start = None, None, 0
        routes = document.get("routes")
        if routes is not None:
            start = routes.get("start", 0)
            ids = _unpack(routes["ids"], "<i4", routes["shape"])
            weights = _unpack(routes["weights"], "<f4", routes["shape"])
        logits = document.get("router_logits")
        scores = document.get("scores")
        if scores is not None:
            scores = np.array(scores, np.float32)
            # As the other two are, which are views of bytes.
            scores.setflags(write=False)
        return cls(
            plan=document["plan"],
            policy=document["policy"],
            routes_set=document["routes_set"],
            cached_tokens=document["cached_tokens"],
            route_ids=ids,
            route_weights=weights,
            scores=scores,
            policy_mode=document.get("policy_mode"),
            earlier_policies=tuple(document.get("earlier_policies", ())),
            prompt_tokens=document.get("prompt_tokens"),
            prompt_digest=document.get("prompt_digest"),
            tokens=document.get("tokens"),
            routes_start=start,
            logits=None if logits is None else RouterLogits.from_dict(logits),
            monitor=document.get("monitor"),
        )


def _same_fields(one: Any, other: Any) -> bool:
    return all(_same(getattr(one, item.name), getattr(other, item.name)) for item in fields(one))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return bool(type(one) is type(other) and one == other)


def _pack(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 1)).decode("ascii")


def _unpack(text: str, dtype: str, shape: Sequence[int]) -> npt.NDArray[Any]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


def receipts_document(documents: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """What an answer of several choices carries: the first receipt without its arrays, and `receipts`, one for each choice.

    Args:
        documents: `Receipt.to_dict` by choice; None for one that has not ended.

    """
    first = next(document for document in documents if document is not None)
    arrays = ("routes", "router_logits", "scores")
    return {key: value for key, value in first.items() if key not in arrays} | {"receipts": list(documents)}


def receipt_of(output: Any) -> Receipt:
    """The receipt of a finished request, or of the first of its choices that has one.

    Args:
        output: vLLM's `RequestOutput`, or an answer as the `openai` client or JSON gives it: a completion, a chat completion, or
            the last chunk of a choice where they are streamed.

    Raises:
        RouteError: the output carries none.

    """
    return receipts_of(output)[0]


def receipts_of(output: Any) -> list[Receipt]:
    """The receipts of all choices: of every prompt of a request, and of each of its `n` samples. Else as `receipt_of`."""
    carrier = output.get(CARRIER) if isinstance(output, Mapping) else getattr(output, CARRIER, None)
    if not isinstance(carrier, Mapping) or RECEIPT_KEY not in carrier:
        raise RouteError(
            "this output has no receipt: neither a plan, return_routes nor a policy asked for one, it is no last output, "
            "or the engine has no plugin"
        )
    document: Mapping[str, Any] = carrier[RECEIPT_KEY]
    return [Receipt.from_dict(one) for one in document.get("receipts", [document]) if one is not None]
