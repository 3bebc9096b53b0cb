"""Which experts the tokens of some prompts were routed to: what recipes that compare two kinds of prompts start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..extras import RouteExtras
from .backend import Backend, Request, Search


@dataclass(frozen=True, slots=True, eq=False)
class Usage:
    """Expert usage of some prompts.

    Attributes:
        counts: int64 [num_prompts, num_moe_layers, num_experts], tokens of the prompt that were routed to the expert.
        tokens: int64 [num_prompts], tokens of the prompt.

    """

    counts: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]

    def shares(self, chosen: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
        """Share of all tokens that each expert got, float64 [num_moe_layers, num_experts]; of prompts with these indices only."""
        prompts = np.arange(len(self.tokens)) if chosen is None else chosen
        shares: npt.NDArray[np.float64] = self.counts[prompts].sum(0) / self.tokens[prompts].sum()
        return shares


def usage(backend: Backend, prompts: Sequence[Sequence[int]]) -> Search[Usage]:
    """The experts of each prompt's tokens, from its token ids; nothing is generated that counts."""
    responses = yield [Request(prompt, RouteExtras(wants_routes=True)) for prompt in prompts]
    routes = [np.asarray(one.route_ids)[: len(prompt)] for one, prompt in zip(responses, prompts, strict=True)]
    counts = [expert_counts(one, backend.shape.num_experts) for one in routes]
    return Usage(np.array(counts, np.int64), np.array([len(prompt) for prompt in prompts], np.int64))


def expert_counts(routes: npt.NDArray[np.int32], num_experts: int) -> npt.NDArray[np.int64]:
    """Tokens that each expert gets, int64 [layers, num_experts], of routes [tokens, layers, top_k]."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in routes.transpose(1, 0, 2)])
