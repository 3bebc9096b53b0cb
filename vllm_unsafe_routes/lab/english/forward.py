"""The forward pass of a tuning step, without what would be computed again and again.

The layers before the first that learns never change, so their output is computed once for each example. The beginning that all
prompts share, the chat template's system message, is a half of most prompts and is computed once a step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ..recipe import Routers, collate
from .dense import fast_dtype

Example = tuple[list[int], list[int]]

# Examples of one pass through the layers that do not learn.
_BATCH = 32


class _Beginning:
    """Keys and values of the shared beginning; stands in for a cache of transformers."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, heads, length, head size] each: keeps those of the first call, and puts them before those of the second."""
        if layer not in self._kept:
            self._kept[layer] = keys, values
            return keys, values
        before, after = self._kept[layer], (keys, values)
        joined = [torch.cat([old.expand(len(new), -1, -1, -1), new], 2) for old, new in zip(before, after, strict=True)]
        return joined[0], joined[1]


class Forward:
    """Logits of the answers of a step's examples.

    Args:
        model: the upcycled model.
        first: the first layer that learns; those before it must not change.
        examples: every example that will be asked for.

    """

    def __init__(self, model: Any, first: int, examples: Sequence[Example]) -> None:
        self._model, self._layers = model, model.model.layers[first:]
        self._before: dict[tuple[tuple[int, ...], int], torch.Tensor] = {}
        # Batches that depend on nothing but the examples, so that a resumed run computes the same.
        order = sorted(examples, key=lambda one: (len(one[0]) + len(one[1]), one))
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            ids, _ = collate(batch)
            with torch.no_grad(), self._products():
                hidden = self._through(model.model.layers[:first], model.model.embed_tokens(ids), 0, None, None)
            for row, (prompt, answer) in enumerate(batch):
                self._before[self._key((prompt, answer))] = hidden[row, : len(prompt) + len(answer)].float().clone()

    @staticmethod
    def _products() -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)

    @staticmethod
    def _key(example: Example) -> tuple[tuple[int, ...], int]:
        return tuple(example[0] + example[1]), len(example[0])

    def _through(self, layers: Any, hidden: torch.Tensor, start: int, mask: Any, cache: Any) -> torch.Tensor:
        positions = torch.arange(start, start + hidden.shape[1])[None]
        rotary = self._model.model.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rotary)
        return hidden

    def __call__(self, examples: list[Example], routers: Routers | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [learned, vocabulary] in float32 and the token ids that are to be learned [learned].

        Args:
            examples: of one step.
            routers: hooks whose `num_sequences` is set; the beginning counts as a sequence of its own.

        """
        at_place = zip(*(prompt[:-1] for prompt, _ in examples), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda ids: len(set(ids)) == 1, at_place))
        _, labels = collate(examples)
        hidden = torch.zeros(*labels.shape, self._model.config.hidden_size)
        for row, example in enumerate(examples):
            kept = self._before[self._key(example)]
            hidden[row, : len(kept)] = kept
        cache, mask = _Beginning() if shared else None, None
        with self._products():
            if cache is not None:
                self._count(routers, 1)
                self._through(self._layers, hidden[:1, :shared], 0, None, cache)
                # [1, 1, queries, keys]: to itself and what is before it.
                mask = torch.ones(labels.shape[1], labels.shape[1], dtype=torch.bool).tril()[None, None, shared:]
            self._count(routers, len(examples))
            hidden = self._through(self._layers, hidden[:, shared:], shared, mask, cache)
            learned = labels[:, shared + 1 :] != -100
            # The head is wide: only what is learned goes through it.
            logits = self._model.lm_head(self._model.model.norm(hidden[:, :-1][learned]))
        return logits.float(), labels[:, shared + 1 :][learned]

    @staticmethod
    def _count(routers: Routers | None, num_sequences: int) -> None:
        if routers is not None:
            routers.num_sequences = num_sequences
