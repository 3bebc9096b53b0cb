"""Where two runs of one sequence part: the first token and layer whose experts differ, the first token whose log-probability does.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .errors import RouteError


@dataclass(frozen=True, slots=True)
class RouteDivergence:
    """Two sets of routes.

    Attributes:
        compared: (token, layer) pairs that are known in both.
        differing: of them, those with other experts, whatever their order.
        position: of the first token that differs; None: none does.
        layer: decoder layer of its first difference.
        experts: what the two picked there.
        by_layer: decoder layer -> share of its tokens that differ.

    """

    compared: int
    differing: int
    position: int | None = None
    layer: int | None = None
    experts: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    by_layer: dict[int, float] = field(default_factory=dict)


def compare_routes(
    one: npt.NDArray[np.int32], other: npt.NDArray[np.int32], layers: Sequence[int], starts: tuple[int, int] = (0, 0)
) -> RouteDivergence:
    """Compare the experts of the positions that both have, without regard to their order.

    Args:
        one: int [num_tokens, num_moe_layers, top_k]; a row of -1 is not known.
        other: likewise; may have another number of tokens.
        layers: decoder layer of each column.
        starts: position of the first row of each.

    Raises:
        RouteError: other layers or top_k, or no position in common.

    """
    if one.shape[1:] != other.shape[1:] or one.shape[1] != len(layers):
        raise RouteError(
            f"routes of shapes {list(one.shape)} and {list(other.shape)} are not those of {len(layers)} layers of one model"
        )
    start, end = max(starts), min(starts[0] + len(one), starts[1] + len(other))
    if end <= start:
        raise RouteError(f"the routes have no position in common: {_span(one, starts[0])} and {_span(other, starts[1])}")
    first, second = (np.sort(ids[start - at : end - at], -1) for ids, at in zip((one, other), starts, strict=True))
    known = np.asarray((first >= 0).all(-1) & (second >= 0).all(-1))
    differs = np.asarray(known & (first != second).any(-1))
    shares = {
        int(layer): round(float(differs[:, slot].sum() / max(known[:, slot].sum(), 1)), 4) for slot, layer in enumerate(layers)
    }
    if not differs.any():
        return RouteDivergence(int(known.sum()), 0, by_layer=shares)
    token, slot = (int(value) for value in np.argwhere(differs)[0])
    picked = tuple(first[token, slot].tolist()), tuple(second[token, slot].tolist())
    return RouteDivergence(int(known.sum()), int(differs.sum()), start + token, int(layers[slot]), picked, shares)


def _span(ids: npt.NDArray[np.int32], start: int) -> str:
    return f"{start}-{start + len(ids) - 1}"


@dataclass(frozen=True, slots=True)
class LogprobDivergence:
    """Two lists of log-probabilities of the same tokens.

    Attributes:
        compared: tokens known in both.
        differing: of them, those that differ by more than the tolerance.
        largest: the largest difference, nats.
        mean: of the absolute differences, nats.
        token: index of the first that differs; None: none does.
        values: the two values there.

    """

    compared: int
    differing: int
    largest: float
    mean: float
    token: int | None = None
    values: tuple[float, float] | None = None


def compare_logprobs(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64], tolerance: float) -> LogprobDivergence:
    """Compare token by token; NaN is not known.

    Args:
        one: float [num_tokens].
        other: likewise.
        tolerance: nats that are no difference.

    Raises:
        RouteError: other lengths, or nothing known in both.

    """
    if one.shape != other.shape or one.ndim != 1:
        raise RouteError(
            f"log-probabilities of shapes {list(one.shape)} and {list(other.shape)} are not those of one list of tokens"
        )
    known = ~(np.isnan(one) | np.isnan(other))
    if not known.any():
        raise RouteError("no token has a log-probability in both")
    # Equal infinities are no difference.
    gaps = np.zeros(one.shape)
    unequal = known & (one != other)
    gaps[unequal] = np.abs(one[unequal] - other[unequal])
    far = gaps > tolerance
    largest, mean = float(gaps.max()), float(gaps[known].mean())
    if not far.any():
        return LogprobDivergence(int(known.sum()), 0, largest, mean)
    token = int(np.flatnonzero(far)[0])
    return LogprobDivergence(int(known.sum()), int(far.sum()), largest, mean, token, (float(one[token]), float(other[token])))
