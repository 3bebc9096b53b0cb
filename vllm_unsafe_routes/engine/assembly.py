"""Receipts in the front end: put together from what the engine core sends with each output, and cut to the tokens that count.

vLLM's front end ends a request by itself where it finds a stop string or the client aborts, and hears no more of it from the core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..binding import prompt_digest
from ..receipt import RECEIPT_KEY, Receipt, RouterLogits, receipts_document
from .attributes import ANSWER, PARTS, SAMPLES
from .progress import RoutesSet


class _Rows:
    """Arrays with a row for each position, which come in pieces. Positions may be computed again: the last word counts.

    Args:
        fills: for each array, what stands where no piece says anything; it has the array's dtype.

    """

    def __init__(self, *fills: Any) -> None:
        self._fills = fills
        self._end = 0
        # First position, one past the last, arrays [num_tokens, ...].
        self._pieces: list[tuple[int, int, list[Any]]] = []

    def add(self, start: int, shape: Sequence[int], *arrays: bytes) -> None:
        """Take a piece, and forget those that it says anew."""
        end = start + shape[0]
        if start < self._end:
            self._pieces = [piece for piece in self._pieces if piece[0] < start or piece[1] > end]
        values = [np.frombuffer(array, fill.dtype).reshape(shape) for array, fill in zip(arrays, self._fills, strict=True)]
        self._pieces.append((start, end, values))
        self._end = max(self._end, end)

    def cut(self, first: int, limit: int) -> list[Any] | None:
        """Those of positions `first` to `limit` (exclusive); None if no piece came."""
        if not self._pieces:
            return None
        num_tokens = max(0, min(limit, self._end) - first)
        whole = [np.full((num_tokens, *self._pieces[0][2][at].shape[1:]), fill) for at, fill in enumerate(self._fills)]
        for start, end, values in self._pieces:
            place, stop = start - first, min(end - first, num_tokens)
            for to, array in zip(whole, values, strict=True):
                to[place:stop] = array[: max(0, stop - place)]
        return whole


class _Parts:
    """What the engine core has said of one request so far."""

    def __init__(self) -> None:
        self._fields: dict[str, Any] = {}
        # Both [num_tokens, num_moe_layers, top_k]; [num_tokens, chosen layers, num_experts].
        self._routes = _Rows(np.int32(-1), np.float32(0))
        self._logits = _Rows(np.float32(np.nan))

    def add(self, news: Mapping[str, Any]) -> None:
        """Take what `receipts.py` sent."""
        fields = dict(news)
        for start, *shape, ids, weights in fields.pop("chunks", ()):
            self._routes.add(start, shape, ids, weights)
        for start, *shape, values in fields.pop("logits", ()):
            self._logits.add(start, shape, values)
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
        ids, weights = self._routes.cut(start, num_computed) or (None, None)
        layers, logits_start = fields.get("logits_of", ((), 0))
        logits = self._logits.cut(logits_start, num_computed)
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
            monitor=fields.get("monitor"),
            logits=None if logits is None else RouterLogits(logits[0], tuple(layers), logits_start),
        ).to_dict()


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
