"""One directive of a route plan, checked for everything that is wrong whatever the model is.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import RouteError

Kind = Literal["disable", "allow", "force", "bias", "promote", "demote"]
HARD_KINDS: tuple[Kind, ...] = ("disable", "allow", "force")
# The order is that of the wire format.
KINDS: tuple[Kind, ...] = (*HARD_KINDS, "bias", "promote", "demote")
SPANS = ("prompt", "generated", "all")
# Layers, positions and expert ids are smaller: they travel as int32.
LIMIT = 1 << 31
_MAX_FLOAT = float(np.finfo(np.float32).max)


class Directive(NamedTuple):
    """One wish: at this layer, for these positions, these experts.

    Attributes:
        kind: `disable`, `allow`, `force`, `bias`, `promote` or `demote`.
        layer: 0-based decoder layer index.
        positions: 0-based prompt positions, or one of `prompt`, `generated`, `all`.
        experts: distinct expert ids; for `force` and `bias` in the order of `weights`.
        weights: for `force`, the final routing weights of `experts`, None: by the plan's weight mode; for `bias`, what is added to
            their logits.

    """

    kind: Kind
    layer: int
    positions: tuple[int, ...] | str
    experts: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @classmethod
    def checked(cls, where: str, kind: Any, layer: Any, positions: Any, experts: Any, weights: Any = None) -> Directive:
        """A directive of values that nobody has checked yet.

        Args:
            where: which directive this is, for messages.
            kind: as the attribute, like those that follow; lists become tuples.
            layer: see there.
            positions: see there.
            experts: see there.
            weights: see there.

        Raises:
            RouteError: naming field, value and limit.

        """
        if kind not in KINDS:
            raise RouteError(f"directive kind {kind!r} is not one of {', '.join(KINDS)}")
        # The words of a message are put together only where one is needed: a replay has thousands of directives.
        try:
            layer = _integer(layer, "layer")
        except RouteError as error:
            raise RouteError(f"{where}: {error}") from None
        try:
            return cls(kind, layer, _checked_positions(positions), *_checked_experts(kind, experts, weights))
        except RouteError as error:
            raise RouteError(f"{where} ({kind} at layer {layer}): {error}") from None

    @classmethod
    def of_naturals(cls, kind: Kind, layer: int, positions: tuple[int, ...] | str, experts: tuple[int, ...]) -> Directive | None:
        """`checked` for numbers that are known to be integers of its range, at a fraction of its time; None where it must look."""
        if kind == "bias" or not experts or not positions or len(set(experts)) != len(experts):
            return None
        if len(positions) > 1 and not isinstance(positions, str) and len(set(positions)) != len(positions):
            return None
        return cls(kind, layer, positions, experts)


def _checked_positions(positions: Any) -> tuple[int, ...] | str:
    if isinstance(positions, str):
        if positions not in SPANS:
            raise RouteError(f"positions {positions!r} is not a list or one of {', '.join(SPANS)}")
        return positions
    found = integers(positions, "positions")
    if not found:
        raise RouteError("positions is empty")
    if len(set(found)) != len(found):
        raise RouteError(f"a position is repeated in {list(found)}")
    return found


def _checked_experts(kind: Kind, experts: Any, weights: Any) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    found = integers(experts, "experts")
    if not found:
        raise RouteError("experts is empty")
    if len(set(found)) != len(found):
        repeated = next(expert for expert in found if found.count(expert) > 1)
        raise RouteError(f"expert {repeated} is repeated")
    if kind == "bias":
        return found, numbers(weights, len(found), "values")
    if weights is None:
        return found, None
    if kind != "force":
        raise RouteError("weights are for force only")
    return found, numbers(weights, len(found), "weights")


def integers(values: Any, what: str) -> tuple[int, ...]:
    """A tuple of integers from 0 to 2^31 - 1. Raises `RouteError` naming the first that is none."""
    if type(values) not in (tuple, list) and (isinstance(values, str | bytes) or not isinstance(values, Iterable)):
        raise RouteError(f"{what} must be a list of integers, got {values!r}")
    found = tuple(values)
    for value in found:
        if type(value) is not int or not 0 <= value < LIMIT:
            # Seldom: numpy's integers, or an error. A search makes too many plans to name every value beforehand.
            return tuple(_integer(value, f"{what}[{at}]") for at, value in enumerate(found))
    return found


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RouteError(f"{what} must be an integer, got {value!r}")
    if value < 0 or value >= LIMIT:
        raise RouteError(f"{what} {value} is out of range (0-{LIMIT - 1})")
    return int(value)


def numbers(values: Any, num_experts: int, name: str) -> tuple[float, ...]:
    """A tuple of finite float32 values, one for each expert. Raises `RouteError` for anything else."""
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        raise RouteError(f"{name} must be a list of numbers, got {str(values)[:80]}") from None
    if len(found) != num_experts:
        raise RouteError(f"{len(found)} {name} for {num_experts} experts")
    if not all(abs(number) <= _MAX_FLOAT for number in found):
        raise RouteError(f"{name} must be finite float32 numbers, got {list(found)}")
    return found
