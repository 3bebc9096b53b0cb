"""From a plan to route-table rows: checked against one model and its policy (`compiled.py` has what comes out).

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections import OrderedDict
from typing import cast

import numpy as np

from .compiled import FLAG_FORCED, NO_ROW, CompiledPlan, RowLayout, expert_bits
from .directive import Directive
from .errors import RouteError
from .layer_rules import Gathered, LayerRules, Place
from .plan import RoutePlan
from .policy import RoutePolicy
from .shape import ModelShape

# Compiled plans are remembered up to this many, and up to so much memory in all.
_REMEMBERED_PLANS = 4096
_REMEMBERED_BYTES = 64 << 20


def _key(text: str | None, delta: tuple[int, ...]) -> bytes:
    """What a plan's string and a delta are remembered by: they may be large, so they themselves are not kept."""
    parts = hashlib.blake2b(struct.pack(f"<{len(delta)}i", *delta), digest_size=32)
    if text is not None:
        parts.update(b"plan:" + text.encode("utf-8", "surrogatepass"))
    return parts.digest()


class _Memory:
    """The most recent results, by `_key`."""

    def __init__(self) -> None:
        self.plans: OrderedDict[bytes, CompiledPlan] = OrderedDict()
        self.num_bytes = 0

    def find(self, key: bytes) -> CompiledPlan | None:
        """A result, which is the most recent one then."""
        found = self.plans.get(key)
        if found is not None:
            self.plans.move_to_end(key)
        return found

    def keep(self, key: bytes, compiled: CompiledPlan) -> CompiledPlan:
        """Keep a result, and forget the oldest ones where there are too many."""
        self.plans[key] = compiled
        self.num_bytes += compiled.num_bytes
        while len(self.plans) > _REMEMBERED_PLANS or self.num_bytes > _REMEMBERED_BYTES:
            self.num_bytes -= self.plans.popitem(last=False)[1].num_bytes
        return compiled


class PlanCompiler:
    """Checks plans against one model and policy and turns them into rows.

    Args:
        shape: the model.
        policy: the engine's policy, or None.
        max_rows: distinct rows that one plan may have: what the route table can hold beside the policy's rows.
        max_cells: entries that one plan's block may have.

    """

    def __init__(
        self, shape: ModelShape, policy: RoutePolicy | None = None, max_rows: int = 1 << 30, max_cells: int = 1 << 62
    ) -> None:
        if policy is not None:
            policy.validate(shape)
        self.shape = shape
        self.policy = policy
        self.max_rows = max_rows
        self.max_cells = max_cells
        self.layout = RowLayout(shape.num_experts, shape.top_k)
        self._all = (1 << shape.num_experts) - 1
        entries = [policy.layers.get(layer) if policy else None for layer in shape.moe_layers]
        self._rules = [
            LayerRules(self.layout)
            if entry is None
            else LayerRules(self.layout, expert_bits(entry.disabled), expert_bits(entry.protected), tuple(entry.bias.items()))
            for entry in entries
        ]
        self._memory = _Memory()
        # An engine core compiles in its input thread and looks results up in its main thread.
        self._lock = threading.RLock()

    def policy_rows(self) -> list[bytes | None]:
        """Per MoE layer the row of a token without a directive; None where the policy changes nothing."""
        native = self.policy is not None and self.policy.weights == "native"
        return [rules.policy_row(native) for rules in self._rules]

    def compile_text(self, text: str | None, delta: tuple[int, ...] = ()) -> CompiledPlan:
        """Compile a plan's string and a delta (see `extras.py`); the most recent results are remembered.

        Raises:
            RouteError: as `compile`, and for a delta that is cut off or forces what the plan forces already.

        """
        with self._lock:
            key = _key(text, delta)
            compiled = self._memory.find(key)
            if compiled is not None:
                return compiled
            if delta:
                return self._memory.keep(key, self._extend(self.compile_text(text), delta))
            return self._memory.keep(key, self.compile(RoutePlan.from_string(text) if text is not None else RoutePlan()))

    def _extend(self, base: CompiledPlan, delta: tuple[int, ...]) -> CompiledPlan:
        """`base` with the forces of `delta` on top."""
        shape, width = self.shape, 2 + self.shape.top_k
        if len(delta) % width:
            raise RouteError(
                f"route_delta has {len(delta)} integers, no multiple of {width}: layer, position, {shape.top_k} experts"
            )
        cells: list[tuple[int, int, bytes]] = []
        seen = set()
        for at in range(0, len(delta), width):
            layer, position, experts = delta[at], delta[at + 1], delta[at + 2 : at + width]
            item = Directive("force", layer, (position,), experts)
            _check_directive(item, shape)
            if len(set(experts)) != len(experts):
                raise RouteError(f"{_where(item)}: an expert is repeated in {list(experts)}")
            slot = shape.slot_of_layer[layer]
            held = base.block[slot, base.column(position, position + 1)]
            cell = Gathered(Place(layer, position), self._all, item)
            if held != NO_ROW:
                flags, allowed = self.layout.read(base.rows[held])
                if flags & FLAG_FORCED:
                    raise RouteError(f"{_where(item)}: two forces for one (layer, position)")
                # The plan's mask already went through the policy; what the policy bans is told apart for the message.
                cell.allowed = allowed | self._rules[slot].banned
            if (layer, position) in seen:
                raise RouteError(f"{_where(item)}: two forces for one (layer, position)")
            seen.add((layer, position))
            content = self._rules[slot].row(cell, base.native)
            assert content is not None
            cells.append((slot, position, content))
        digest = hashlib.sha256((base.digest + repr(delta)).encode()).hexdigest()[:32]
        made = base.with_cells(digest, cells)
        self._check_size(made.num_listed, len(set(made.rows)))
        return made

    def _check_size(self, num_listed: int, num_rows: int) -> None:
        num_layers = len(self.shape.moe_layers)
        num_cells = (num_listed + 2) * num_layers
        if num_cells > self.max_cells:
            raise RouteError(
                f"the plan spans {num_listed} positions x {num_layers} MoE layers = {num_cells} cells, "
                f"more than the route table's {self.max_cells}; start the engine with a larger route_table_cells",
                "table",
            )
        if num_rows > self.max_rows:
            raise RouteError(
                f"the plan has {num_rows} distinct routes, more than the {self.max_rows} that the route table holds; "
                "start the engine with a larger route_table_rows",
                "table",
            )

    def compile(self, plan: RoutePlan) -> CompiledPlan:
        """Check `plan` and turn it into rows.

        Raises:
            RouteError: anything in the plan that the model or the policy does not permit; see `docs/plans.md`.

        """
        shape = self.shape
        if plan.model is not None and plan.model != shape.fingerprint:
            raise RouteError(
                f"the plan is for model {plan.model}, this engine serves {shape.fingerprint} ({shape.model_type})", "model"
            )
        if plan.weights == "native" and not shape.native_weights:
            raise RouteError(
                f"weights 'native' do not exist for model_type {shape.model_type!r}: "
                "its routing function weighs only its own selection"
            )
        by_slot: dict[int, tuple[list[Directive], list[Directive]]] = {}
        num_listed = 0
        for item in plan.directives:
            _check_directive(item, shape)
            spans, listed = by_slot.setdefault(shape.slot_of_layer[item.layer], ([], []))
            if isinstance(item.positions, str):
                spans.append(item)
            else:
                listed.append(item)
                num_listed = max(num_listed, max(item.positions) + 1)
        self._check_size(num_listed, 0)

        native = plan.weights == "native"
        end_of_prompt = plan.prompt.tokens if plan.prompt is not None else num_listed
        row_of: dict[bytes, int] = {}
        block = np.full((len(shape.moe_layers), num_listed + 2), NO_ROW, np.int32)
        end = min(end_of_prompt, num_listed)

        def number(slot: int, cell: Gathered) -> int:
            content = self._rules[slot].row(cell, native)
            return NO_ROW if content is None else row_of.setdefault(content, len(row_of))

        for slot, (spans, listed) in by_slot.items():
            prompt, generated, cells = self._gather(shape.moe_layers[slot], spans, listed, end_of_prompt)
            block[slot, :end] = block[slot, num_listed] = number(slot, prompt)
            block[slot, end:num_listed] = block[slot, num_listed + 1] = number(slot, generated)
            block[slot, list(cells)] = [number(slot, cell) for cell in cells.values()]
        self._check_size(num_listed, len(row_of))
        return CompiledPlan(plan.digest, tuple(row_of), block, native, plan.prompt)

    def _gather(
        self, layer: int, spans: list[Directive], listed: list[Directive], end_of_prompt: int
    ) -> tuple[Gathered, Gathered, dict[int, Gathered]]:
        """What directives ask of a layer's prompt, of its generated tokens, and of the positions that they list."""
        prompt, generated = (Gathered(Place(layer, span), self._all) for span in ("prompt", "generated"))
        for item in spans:
            if item.positions in ("prompt", "all"):
                prompt.add(item)
            if item.positions in ("generated", "all"):
                generated.add(item)
        cells: dict[int, Gathered] = {}
        for item in listed:
            for position in cast(tuple[int, ...], item.positions):
                cell = cells.get(position)
                if cell is None:
                    span = prompt if position < end_of_prompt else generated
                    cell = cells[position] = span.at(Place(layer, position))
                cell.add(item)
        return prompt, generated, cells


def _check_directive(item: Directive, shape: ModelShape) -> None:
    if item.layer not in shape.slot_of_layer:
        raise RouteError(f"layer {item.layer} has no experts; MoE layers are {shape.describe_layers()}")
    if max(item.experts) >= shape.num_experts:
        expert = next(expert for expert in item.experts if expert >= shape.num_experts)
        raise RouteError(
            f"{_where(item)}: expert {expert} is out of range for {shape.num_experts} experts (0-{shape.num_experts - 1})"
        )
    if item.kind == "force" and len(item.experts) != shape.top_k:
        raise RouteError(f"{_where(item)}: {len(item.experts)} forced experts, exactly top_k {shape.top_k} are needed")


def _where(item: Directive) -> str:
    positions = item.positions
    if not isinstance(positions, str) and len(positions) == 1:
        return f"layer {item.layer}, position {positions[0]}"
    return f"layer {item.layer}, positions {positions if isinstance(positions, str) else list(positions[:8])}"
