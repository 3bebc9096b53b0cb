"""What a request carries for us in `SamplingParams.extra_args` (over HTTP: `vllm_xargs`): one parser for every process.

| key | value | meaning |
|---|---|---|
| `route_plan` | string | `RoutePlan.to_string()` or its JSON form |
| `route_delta` | flat list of integers | more forces: layer, position, top_k experts; and so on |
| `return_routes` | true or false | the receipt holds the routes used |
| `routes_start` | integer | beside `return_routes`: first position whose routes come back; those before it are known already |
| `return_router_logits` | true, or a list of decoder layers | the receipt holds the logits of all experts there |
| `router_logits_start`, `router_logits_end` | integers | beside it: first position whose logits come back, and one past the last |
| `score_tokens` | flat list of integers | first row, width, `width` token ids for every row: the receipt holds their log-probs |
| `usage_label` | string | the request's tokens count under this name in the expert usage as well; changes nothing else |

A delta lets a search send its long common plan as a string that every process has already compiled, and each candidate as a
few integers. Row r of a score is the distribution after prompt token r; the plan's `prompt` ends with the first row, and what
follows it in the prompt counts as `generated`, because a scored target is text that the model would generate.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .directive import LIMIT
from .errors import RouteError
from .wire import PLAN_KEY, RETURN_ROUTES_KEY

DELTA_KEY = "route_delta"
SCORE_KEY = "score_tokens"
ROUTES_START_KEY = "routes_start"
LOGITS_KEY = "return_router_logits"
LOGITS_START_KEY = "router_logits_start"
LOGITS_END_KEY = "router_logits_end"
USAGE_LABEL_KEY = "usage_label"
# Those of `RouteExtras`, and all.
ROUTE_KEYS = (
    PLAN_KEY,
    DELTA_KEY,
    RETURN_ROUTES_KEY,
    ROUTES_START_KEY,
    LOGITS_KEY,
    LOGITS_START_KEY,
    LOGITS_END_KEY,
    SCORE_KEY,
)
KEYS = (*ROUTE_KEYS, USAGE_LABEL_KEY)
_TRUE, _FALSE = (True, 1, "true", "True", "1"), (False, 0, None, "false", "False", "0")


@dataclass(frozen=True, slots=True, eq=False)
class ScoreSpec:
    """Which log-probabilities a request asks for; compared by content, without a hash.

    Attributes:
        first_row: 0-based prompt position after which the first scored token would stand.
        token_ids: int32 [num_rows, width]; row i is scored after prompt position `first_row + i`.

    """

    first_row: int
    token_ids: npt.NDArray[np.int32]

    @classmethod
    def from_flat(cls, values: Sequence[int]) -> ScoreSpec:
        """Read the travelling form. Raises `RouteError` for a wrong length."""
        if len(values) < 3 or values[1] < 1 or (len(values) - 2) % values[1]:
            raise RouteError(
                f"{SCORE_KEY} must be [first row, width, width token ids per row], got {len(values)} values: {list(values[:8])}"
            )
        token_ids = np.array(values[2:], np.int32).reshape(-1, values[1])
        token_ids.setflags(write=False)
        return cls(values[0], token_ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ScoreSpec):
            return NotImplemented
        return self.first_row == other.first_row and np.array_equal(self.token_ids, other.token_ids)

    def to_flat(self) -> list[int]:
        """The travelling form."""
        return [self.first_row, self.token_ids.shape[1], *self.token_ids.ravel().tolist()]

    @property
    def end_row(self) -> int:
        """One past the last scored row."""
        return self.first_row + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class LogitsSpec:
    """Which router logits a request asks for.

    Attributes:
        layers: decoder layer indices, ascending; empty: all MoE layers.
        start: first position whose logits come back.
        end: one past the last; None: to the request's end.

    """

    layers: tuple[int, ...] = ()
    start: int = 0
    end: int | None = None

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any]) -> LogitsSpec | None:
        """Read a request's extra args; None: it asks for none. Raises `RouteError` for a wrong value."""
        asked = extra_args.get(LOGITS_KEY)
        start = _integer(extra_args.get(LOGITS_START_KEY) or 0, LOGITS_START_KEY)
        end = extra_args.get(LOGITS_END_KEY)
        if not isinstance(asked, list | tuple) and asked in _FALSE:
            for key, value in ((LOGITS_START_KEY, start or None), (LOGITS_END_KEY, end)):
                if value is not None:
                    raise RouteError(f"{key} needs {LOGITS_KEY}")
            return None
        if end is not None and (end := _integer(end, LOGITS_END_KEY)) <= start:
            raise RouteError(f"{LOGITS_END_KEY} {end} must be greater than {LOGITS_START_KEY} {start}")
        if not isinstance(asked, list | tuple):
            if asked not in _TRUE:
                raise RouteError(f"{LOGITS_KEY} must be true, false or a list of layers, got {str(asked)[:80]!r}")
            return cls((), start, end)
        layers = _flat_integers(asked, LOGITS_KEY)
        if not layers or len(set(layers)) < len(layers):
            raise RouteError(f"{LOGITS_KEY} must list layers, each once, got {layers[:8]}")
        return cls(tuple(sorted(layers)), start, end)

    def to_extra_args(self) -> dict[str, Any]:
        """The form that travels."""
        args: dict[str, Any] = {LOGITS_KEY: list(self.layers) or True}
        if self.start:
            args[LOGITS_START_KEY] = self.start
        if self.end is not None:
            args[LOGITS_END_KEY] = self.end
        return args

    def within(self, start: int, end: int) -> range:
        """Those of the positions `start` to `end` (exclusive) that are asked for."""
        return range(max(start, self.start), end if self.end is None else min(end, self.end))


@dataclass(frozen=True, slots=True)
class RouteExtras:
    """Our part of a request.

    Attributes:
        plan: the plan's string, or None.
        delta: further forces, flat; empty if none.
        wants_routes: whether the routes used must come back.
        score: what to score, or None.
        routes_start: first position whose routes must come back.
        logits: which router logits must come back, or None.

    """

    plan: str | None = None
    delta: tuple[int, ...] = ()
    wants_routes: bool = False
    score: ScoreSpec | None = None
    routes_start: int = 0
    logits: LogitsSpec | None = None

    @property
    def has_plan(self) -> bool:
        """Whether the request directs any route."""
        return self.plan is not None or bool(self.delta)

    def prompt_len(self, num_prompt_tokens: int) -> int:
        """Where the plan's `prompt` ends and its `generated` begins."""
        return num_prompt_tokens if self.score is None else self.score.first_row + 1

    def to_extra_args(self) -> dict[str, Any]:
        """The form that travels."""
        args: dict[str, Any] = {}
        if self.plan is not None:
            args[PLAN_KEY] = self.plan
        if self.delta:
            args[DELTA_KEY] = list(self.delta)
        if self.wants_routes:
            args[RETURN_ROUTES_KEY] = True
        if self.routes_start:
            args[ROUTES_START_KEY] = self.routes_start
        if self.logits is not None:
            args |= self.logits.to_extra_args()
        if self.score is not None:
            args[SCORE_KEY] = self.score.to_flat()
        return args

    @classmethod
    def parse(cls, extra_args: Mapping[str, Any] | None) -> RouteExtras | None:
        """Read a request's extra args; None if nothing is asked for there.

        Raises:
            RouteError: a value of a wrong type.

        """
        if not extra_args or not any(key in extra_args for key in ROUTE_KEYS):
            return None
        plan = extra_args.get(PLAN_KEY)
        if plan is not None and not isinstance(plan, str):
            raise RouteError(f"{PLAN_KEY} must be a string (RoutePlan.to_string()), got {type(plan).__name__}")
        wants_routes = extra_args.get(RETURN_ROUTES_KEY, False)
        if isinstance(wants_routes, list) or wants_routes not in _TRUE + _FALSE:
            raise RouteError(f"{RETURN_ROUTES_KEY} must be true or false, got {wants_routes!r}")
        delta = tuple(_flat_integers(extra_args.get(DELTA_KEY), DELTA_KEY))
        score = _flat_integers(extra_args.get(SCORE_KEY), SCORE_KEY)
        start = _integer(extra_args.get(ROUTES_START_KEY) or 0, ROUTES_START_KEY)
        if start and wants_routes not in _TRUE:
            raise RouteError(f"{ROUTES_START_KEY} needs {RETURN_ROUTES_KEY}")
        logits = LogitsSpec.parse(extra_args)
        if plan is None and not delta and not score and wants_routes not in _TRUE and logits is None:
            return None
        return cls(plan, delta, wants_routes in _TRUE, ScoreSpec.from_flat(score) if score else None, start, logits)


def _flat_integers(values: Any, key: str) -> list[int]:
    if values is None:
        return []
    if not isinstance(values, list | tuple):
        raise RouteError(f"{key} must be a flat list of non-negative integers, got {str(values)[:80]}")
    return [_integer(value, f"{key}[{at}]") for at, value in enumerate(values)]


def _integer(value: Any, what: str) -> int:
    found = int(value) if isinstance(value, float) and value.is_integer() else value
    if type(found) is not int or not 0 <= found < LIMIT:
        raise RouteError(f"{what} must be an integer from 0 to {LIMIT - 1}, got {str(value)[:80]}")
    return found
