"""Receipts in the front end: put together from what the engine core sends with each output, and cut to the tokens that count.

vLLM's front end ends a request by itself where it finds a stop string or the client aborts, and hears no more of it from the core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..binding import prompt_digest
from ..receipt import RECEIPT_KEY, Receipt, receipts_document
from .attributes import ANSWER, PARTS, SAMPLES
from .progress import RoutesSet


class _Parts:
    """What the engine core has said of one request so far."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        # (first position, int32 and float32 [num_tokens, num_moe_layers, top_k])
        self._chunks: list[tuple[int, Any, Any]] = []

    def add(self, news: Mapping[str, Any]) -> None:
        """Take what `receipts.py` sent."""
        fields = dict(news)
        for start, *shape, ids, weights in fields.pop("chunks", ()):
            arrays = (np.frombuffer(ids, np.int32), np.frombuffer(weights, np.float32))
            self._chunks.append((start, *(array.reshape(shape) for array in arrays)))
        self._fields |= fields

    def document(self, prompt: Sequence[int] | None, num_prompt: int, num_output: int) -> dict[str, Any]:
        """The receipt's travelling form.

        Args:
            prompt: its token ids; None for embeddings.
            num_prompt: its length.
            num_output: tokens of the output that count.

        """
        if "error" in self._fields:
            return self._fields
        # The last token is never fed back: it has no route.
        fields = self._fields
        num_computed = num_prompt + max(num_output, 1) - 1
        start = fields.get("routes_start", 0)
        ids, weights = self._routes(start, num_computed)
        routes = RoutesSet(*fields.get("routes", (0, 0, 0)))
        scores = fields.get("scores")
        return Receipt(
            plan=fields["plan"],
            policy=fields["policy"],
            routes_set=routes.upto(num_computed),
            cached_tokens=fields["cached_tokens"],
            route_ids=ids,
            route_weights=weights,
            scores=None if scores is None else np.array(scores, np.float32),
            policy_mode=fields["policy_mode"],
            earlier_policies=tuple(fields["earlier_policies"]),
            prompt_tokens=num_prompt,
            prompt_digest=None if prompt is None else prompt_digest(prompt),
            tokens=num_prompt + num_output,
            routes_start=start,
        ).to_dict()

    def _routes(self, first: int, limit: int) -> tuple[Any, Any]:
        """Those of positions `first` to `limit` (exclusive)."""
        if not self._chunks:
            return None, None
        num_tokens = max(0, min(limit, max(start + len(ids) for start, ids, _ in self._chunks)) - first)
        shape = (num_tokens, *self._chunks[0][1].shape[1:])
        all_ids, all_weights = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for position, ids, weights in self._chunks:  # a preempted request computes positions again: the last word counts
            start = position - first
            end = min(start + len(ids), num_tokens)
            if start < end:
                all_ids[start:end], all_weights[start:end] = ids[: end - start], weights[: end - start]
        return all_ids, all_weights


def with_receipt(state: Any, kv_transfer_params: dict[str, Any] | None, has_ended: bool) -> dict[str, Any] | None:
    """What an output of a request carries instead of what the core sent with it: the receipt, once the request has ended.

    Args:
        state: vLLM's `RequestState`.
        kv_transfer_params: of the core's output.
        has_ended: whether this is the request's last output.

    """
    news = kv_transfer_params.get(RECEIPT_KEY) if kv_transfer_params else None
    parts: _Parts | None = state.__dict__.get(PARTS)
    if news is not None:
        if parts is None:
            parts = state.__dict__[PARTS] = _Parts()
        parts.add(news)
    if parts is None or (news is None and not has_ended):
        return kv_transfer_params
    others = {key: value for key, value in (kv_transfer_params or {}).items() if key != RECEIPT_KEY}
    if not has_ended:
        return others or None
    num_output = state.detokenizer.num_output_tokens() if state.detokenizer is not None else 0
    document = parts.document(state.prompt_token_ids, state.prompt_len, num_output)
    num_samples = 1 if state.parent_req is None else state.parent_req.n
    answer, request = getattr(state.queue, ANSWER, (None, 0))
    if answer is not None:
        answer.add(request, state.request_index, num_samples, document)
    if state.parent_req is None:
        return {**others, RECEIPT_KEY: document}
    # Samples of one request end one by one; each output has the receipts so far.
    samples: list[Any] = state.parent_req.__dict__.setdefault(SAMPLES, [None] * num_samples)
    samples[state.request_index] = document
    return {**others, RECEIPT_KEY: receipts_document(samples)}
