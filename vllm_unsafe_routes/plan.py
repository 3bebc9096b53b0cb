"""Route plans: what one request asks of the routers.

How a plan flows, file by file, in the order in which a step happens:

1. `plan.py` (here): the user writes directives; `to_string()` makes the one string that travels with the request (`wire.py`).
2. `engine/frontend.py`: the plan is decoded and checked against the model's shape, the policy and the prompt, before the
   request is scheduled. A bad plan fails its own request alone.
3. `compiler.py`: the plan becomes route-table rows (contents, not ids) and a small block of row indices.
4. `engine/cache.py`: the directives of a KV block become part of the block's prefix-cache key.
5. `engine/scheduler.py`: admits a request once the route table has room for its rows.
6. `engine/device_table.py`, `engine/row_index.py`: the rows get places in the device-resident table, and before each forward
   pass every (MoE layer, token) gets the index of its row, or -1.
7. `engine/router.py`: each router lets the model's own gating run, then has `kernels/route_topk.py` rewrite the tokens that
   have a row.
8. `engine/progress.py`, `engine/receipts.py`: what was set is counted and comes back as the request's receipt.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import routed_experts, wire
from .binding import PromptBinding
from .directive import Directive, Kind
from .errors import RouteError
from .positions import Positions, resolve
from .shape import ModelShape

WEIGHT_MODES = ("masked", "native")


class RoutePlan:
    """Directives for one request.

    A plan grows by its methods, each of which returns the plan itself; nothing else about it can be changed. It has no hash: use
    its `digest` as a key.

    Args:
        weights: `"masked"` (default, the paper's): excluded experts' logits are -inf before the scoring function, so their
            mass goes to the selected ones. `"native"`: the selection obeys the directives, the weights are those that the
            router's own scores give the selected experts, renormalised only if the model renormalises.
        model: fingerprint of the model that the plan was made for (`ModelShape.fingerprint`); another model refuses it.

    Raises:
        RouteError: here and in the methods, for anything that is wrong whatever the model is.

    Example:
        >>> plan = RoutePlan().force(layer=3, positions=[5], experts=[1, 7, 9, 12])
        >>> plan.disable(layer=2, positions="all", experts=[4, 5]).digest == RoutePlan.from_string(plan.to_string()).digest
        True

    """

    __slots__ = ("_digest", "_directives", "_model", "_prompt", "_string", "_weights")

    def __init__(self, weights: str = "masked", model: str | None = None) -> None:
        if weights not in WEIGHT_MODES:
            raise RouteError(f"weights {weights!r} is not one of {', '.join(WEIGHT_MODES)}")
        if model is not None and not isinstance(model, str):
            raise RouteError(f"model must be a fingerprint string or null, got {model!r}")
        self._weights = weights
        self._model = model
        self._prompt: PromptBinding | None = None
        self._directives: list[Directive] = []
        # Of the directives so far; None: not asked for since the last one.
        self._string: str | None = None
        self._digest: str | None = None

    @property
    def weights(self) -> str:
        """The weight mode, `"masked"` or `"native"`."""
        return self._weights

    @property
    def model(self) -> str | None:
        """Fingerprint of the model that the plan was made for; None: any model."""
        return self._model

    @property
    def prompt(self) -> PromptBinding | None:
        """The prompt that the plan is for; None: any prompt that is long enough."""
        return self._prompt

    @property
    def directives(self) -> tuple[Directive, ...]:
        """The directives in the order in which they were added."""
        return tuple(self._directives)

    def disable(self, layer: int, positions: Positions, experts: Sequence[int]) -> RoutePlan:
        """These experts cannot be selected."""
        return self._add("disable", layer, positions, experts)

    def allow(self, layer: int, positions: Positions, experts: Sequence[int]) -> RoutePlan:
        """All other experts are disabled."""
        return self._add("allow", layer, positions, experts)

    def force(self, layer: int, positions: Positions, experts: Sequence[int], weights: Sequence[float] | None = None) -> RoutePlan:
        """Exactly these experts (as many as the model's top_k) are selected; with `weights`, with just these weights."""
        return self._add("force", layer, positions, experts, weights)

    def bias(self, layer: int, positions: Positions, values: Mapping[int, float]) -> RoutePlan:
        """These values are added to the experts' logits before they are scored; `native` weights do not feel it."""
        return self._add("bias", layer, positions, *wire.read_bias(values, f"directive {len(self._directives)}"))

    def promote(self, layer: int, positions: Positions, experts: Sequence[int]) -> RoutePlan:
        """These experts, fewer than the model's top_k, are selected; the rest compete by score for what is left."""
        return self._add("promote", layer, positions, experts)

    def demote(self, layer: int, positions: Positions, experts: Sequence[int]) -> RoutePlan:
        """These experts are selected only if nothing else is left."""
        return self._add("demote", layer, positions, experts)

    def _add(self, kind: Kind, layer: Any, positions: Any, experts: Any, weights: Any = None) -> RoutePlan:
        where = f"directive {len(self._directives)}"
        positions = resolve(positions, self._prompt)
        self._directives.append(Directive.checked(where, kind, layer, positions, experts, weights))
        self._string = self._digest = None
        return self

    def for_prompt(self, token_ids: Sequence[int]) -> RoutePlan:
        """A copy that is bound to the prompt of these ids: with any other one it is refused."""
        made = self.copy()
        made._prompt = PromptBinding.of(token_ids)
        made._string = made._digest = None
        return made

    def copy(self) -> RoutePlan:
        """A plan with the same content that grows by itself."""
        made = RoutePlan(self._weights, self._model)
        made._prompt = self._prompt
        made._directives = list(self._directives)
        made._string, made._digest = self._string, self._digest
        return made

    __copy__ = copy

    @classmethod
    def from_routes(
        cls, ids: Any, weights: Any = None, *, layers: Sequence[int], first_position: int = 0, model: str | None = None
    ) -> RoutePlan:
        """A plan that replays captured routes, one force per (layer, token).

        Args:
            ids: integer array [num_tokens, num_moe_layers, top_k] as `return_routes` gives it; a row of -1 is left out.
            weights: float array of the same shape: replayed exactly; None: the plan's `masked` weights.
            layers: decoder layer index of each column, `ModelShape.moe_layers`.
            first_position: position of the first row.
            model: fingerprint of the model that the routes come from.

        """
        return _force_rows(cls(model=model), ids, weights, layers, first_position)

    @classmethod
    def from_routed_experts(
        cls,
        value: Any,
        shape: ModelShape,
        form: str = "vllm",
        *,
        num_tokens: int | None = None,
        first_position: int = 0,
        weights: str = "native",
    ) -> RoutePlan:
        """A plan that replays another program's routes; see `routed_experts.py` for the forms and for what is refused.

        Args:
            value: as the program gives it.
            shape: the model's.
            form: `vllm`, `sglang`, `dynamo`, `prime-rl`, `tunix` or `tensorrt-llm`.
            num_tokens: how many leading tokens are valid, where there is padding.
            first_position: position of the first row, where the form does not say it.
            weights: "native": those that the router's own scores give the experts, as where they were recorded; or "masked".

        """
        ids, start = routed_experts.read(value, shape, form, num_tokens=num_tokens, start=first_position)
        return _force_rows(cls(weights, shape.fingerprint), ids, None, shape.moe_layers, start)

    @property
    def digest(self) -> str:
        """32 hex digits over the plan's content; the receipt carries it."""
        if self._digest is None:
            self._digest = _digest_of(self._payload())
        return self._digest

    def to_string(self) -> str:
        """One compact ASCII string (`wire.py`)."""
        if self._string is None:
            self._string = wire.pack(self._payload(), self._directives)
        return self._string

    def _payload(self) -> bytes:
        return wire.to_payload(self._weights, self._model, self._prompt, self._directives)

    def to_json(self) -> str:
        """The readable form, versioned `route-plan/2`, or `/1` where that says it."""
        return wire.to_json(self._weights, self._model, self._prompt, self._directives)

    @classmethod
    def from_string(cls, text: str) -> RoutePlan:
        """Read what `to_string` wrote, or the JSON form. Raises `RouteError` for anything else."""
        return cls._of(wire.read_string(text))

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any]) -> RoutePlan:
        """Read the form that `to_json` writes; unknown keys and versions are refused."""
        return cls._of(wire.read_json(text))

    @classmethod
    def _of(cls, content: wire.Content) -> RoutePlan:
        weights, model, prompt, directives, payload = content
        plan = cls(weights, model)
        plan._prompt = None if prompt is None else PromptBinding.from_dict(prompt)
        plan._directives = list(directives)
        if payload is not None:
            plan._digest = _digest_of(payload)
        return plan

    def extra_args(self, return_routes: bool = False) -> dict[str, Any]:
        """What `SamplingParams(extra_args=...)` takes."""
        return {wire.PLAN_KEY: self.to_string()} | ({wire.RETURN_ROUTES_KEY: True} if return_routes else {})

    def __len__(self) -> int:
        return len(self._directives)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutePlan) and self.digest == other.digest

    __hash__ = None  # type: ignore[assignment]  # what grows must not be a key

    def __repr__(self) -> str:
        return f"RoutePlan({len(self)} directives, weights={self.weights!r}, digest={self.digest})"


def _digest_of(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:32]


def _force_rows(plan: RoutePlan, ids: Any, weights: Any, layers: Sequence[int], first_position: int) -> RoutePlan:
    """One force for each (layer, token) of [num_tokens, num_moe_layers, top_k]; rows of -1 are left out. Returns the plan."""
    ids = np.asarray(ids)
    if ids.ndim != 3 or ids.shape[1] != len(layers):
        raise RouteError(f"routes have shape {list(ids.shape)}, expected [num_tokens, {len(layers)}, top_k]")
    if weights is not None:
        weights = np.asarray(weights, dtype=np.float32)
        if weights.shape != ids.shape:
            raise RouteError(f"weights have shape {list(weights.shape)}, the routes {list(ids.shape)}")
    for slot, layer in enumerate(layers):
        for token in np.flatnonzero((ids[:, slot] >= 0).all(axis=-1)).tolist():
            plan.force(
                int(layer),
                [first_position + token],
                ids[token, slot].tolist(),
                None if weights is None else weights[token, slot].tolist(),
            )
    return plan
