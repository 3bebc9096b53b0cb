"""What a search asks the workers to score in one call: many candidates for the routes of a few cells, as arrays.

A cell is a (position, layer). A **candidate** changes some cells of a prompt's base plan; each change is a **move**: these experts,
at this layer, for a span of positions. A search that draws ten routes for one cell asks for ten candidates of one move each; a mask
is a move over the whole prompt, and so is a set of bans.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .compiled import FLAG_NATIVE_WEIGHTS, NO_ROW, CompiledPlan, RowLayout
from .errors import RouteError
from .extras import RouteExtras, ScoreSpec
from .plan import RoutePlan
from .policy import RoutePolicy
from .shape import ModelShape

CANDIDATE, LAYER, START, END = range(4)
# Layer, first position, one past the last position, experts.
Move = tuple[int, int, int, Sequence[int]]
# A candidate that changes more cells than these is sent as a whole plan.
_LONGEST_DELTA = 4


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Candidates of one prompt.

    Attributes:
        prompt: int32 [prompt tokens].
        target: int32 [num_rows, width], tokens whose log-probabilities are asked for: row r after r more tokens than the prompt. A
            target that follows the prompt has width 1; candidates for the next token are one row.
        plan: the base plan's string, or None; it says whether weights are masked or native, for the moves too.
        num_candidates: candidates; one without a move is the base itself.
        moves: int32 [num_moves, 4]: candidate, layer, first position, one past the last position; in the order of candidates. Of
            two moves of one candidate at the same cell the later holds, and a move holds where the base forces something else. A
            move is for positions of the prompt, or for all tokens that the model reads: a mask.
        experts: int32 [num_moves, top_k], the experts of each move.
        chooses: whether tokens choose their top_k among the experts of a move, which may be more then. The base may only disable
            others.

    """

    prompt: npt.NDArray[np.int32]
    target: npt.NDArray[np.int32]
    plan: str | None
    num_candidates: int
    moves: npt.NDArray[np.int32]
    experts: npt.NDArray[np.int32]
    chooses: bool = False

    @classmethod
    def of(
        cls,
        prompt: Sequence[int],
        target: Sequence[int],
        plan: str | None,
        candidates: Sequence[Sequence[Move]],
        chooses: bool = False,
    ) -> Cells:
        """For a target that follows the prompt, from the moves of each candidate. Raises `RouteError` if one is empty."""
        if not len(prompt) or not len(target):
            raise RouteError("a score needs at least one prompt token and one target token")
        moves = [(at, *move[:3]) for at, one in enumerate(candidates) for move in one]
        experts = [move[3] for one in candidates for move in one]
        return cls(
            np.array(prompt, np.int32),
            np.array(target, np.int32)[:, None],
            plan,
            len(candidates),
            np.array(moves, np.int32).reshape(-1, 4),
            np.array(experts, np.int32) if experts else np.zeros((0, 1), np.int32),
            chooses,
        )

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """int32 [num_tokens], what the model reads: the prompt and all of the target but its last token."""
        return np.concatenate([self.prompt, self.target[:-1, 0]])

    @property
    def num_tokens(self) -> int:
        """Of `token_ids`."""
        return len(self.prompt) + len(self.target) - 1

    def to_wire(self) -> dict[str, Any]:
        """Plain values and bytes."""
        arrays = {name: getattr(self, name).astype("<i4").tobytes() for name in ("prompt", "target", "moves", "experts")}
        more = {"plan": self.plan, "num_candidates": self.num_candidates, "chooses": self.chooses}
        return {**arrays, **more, "width": self.target.shape[1], "num_experts": self.experts.shape[1]}

    @classmethod
    def from_wire(cls, document: Mapping[str, Any]) -> Cells:
        """The opposite of `to_wire`."""

        def array(name: str) -> npt.NDArray[np.int32]:
            return np.frombuffer(document[name], "<i4")

        moves, experts = array("moves").reshape(-1, 4), array("experts").reshape(-1, document["num_experts"])
        target = array("target").reshape(-1, document["width"])
        return cls(
            array("prompt"), target, document["plan"], int(document["num_candidates"]), moves, experts, bool(document["chooses"])
        )

    def extras(self) -> list[RouteExtras]:
        """Each candidate as a request of its own, for an engine that cannot score cells: what travels beside `token_ids`."""
        spec = ScoreSpec(len(self.prompt) - 1, self.target)
        plan = RoutePlan() if self.plan is None else RoutePlan.from_string(self.plan)
        forced = {
            (item.layer, position)
            for item in plan.directives
            if item.kind == "force" and not isinstance(item.positions, str)
            for position in item.positions
        }
        found = []
        ends = np.searchsorted(self.moves[:, CANDIDATE], np.arange(self.num_candidates + 1))
        for start, end in itertools.pairwise(ends.tolist()):
            cells: dict[tuple[int, int], tuple[int, ...]] = {}
            masks: dict[int, tuple[int, ...]] = {}
            for (_, layer, first, last), experts in zip(
                self.moves[start:end].tolist(), map(tuple, self.experts[start:end].tolist()), strict=True
            ):
                if (first, last) == (0, self.num_tokens):
                    masks[layer] = experts
                else:
                    cells.update(((layer, position), experts) for position in range(first, last))
            if masks or self.chooses or len(cells) > _LONGEST_DELTA or not forced.isdisjoint(cells):
                found.append(RouteExtras(_with_moves(plan, cells, masks, "allow" if self.chooses else "force"), score=spec))
            else:
                delta = tuple(value for cell, experts in cells.items() for value in (*cell, *experts))
                found.append(RouteExtras(self.plan, delta, score=spec))
        return found

    def check(self, shape: ModelShape, policy: RoutePolicy | None, plan: CompiledPlan) -> None:
        """Refuse what the model, the policy or the base plan does not permit, all candidates at once.

        Raises:
            RouteError: names the first bad move.

        """
        if not len(self.prompt) or not len(self.target):
            raise RouteError("a score needs at least one prompt token and one target token")
        moves, experts = self.moves, self.experts
        if len(moves) != len(experts):
            raise RouteError(f"{len(moves)} moves with {len(experts)} sets of experts")
        if len(moves) and not shape.top_k <= experts.shape[1] <= (shape.num_experts if self.chooses else shape.top_k):
            raise RouteError(f"moves of {experts.shape[1]} experts, top_k {shape.top_k} are needed")
        layers = moves[:, LAYER]
        self._refuse((moves[:, CANDIDATE] < 0) | (moves[:, CANDIDATE] >= self.num_candidates), "the candidate is out of range")
        self._refuse(moves[1:, CANDIDATE] < moves[:-1, CANDIDATE], "moves must stand in the order of candidates", 1)
        self._refuse((layers[:, None] != np.array(shape.moe_layers)).all(1), f"MoE layers are {shape.describe_layers()}")
        inside = (moves[:, START] >= 0) & (moves[:, START] < moves[:, END]) & (moves[:, END] <= len(self.prompt))
        everywhere = (moves[:, START] == 0) & (moves[:, END] == self.num_tokens)
        self._refuse(~(inside | everywhere), f"the prompt has {len(self.prompt)} tokens")
        self._refuse(((experts < 0) | (experts >= shape.num_experts)).any(1), f"there are {shape.num_experts} experts")
        chosen = np.zeros((len(moves), shape.num_experts), bool)
        chosen[np.arange(len(moves))[:, None], experts] = True
        self._refuse(chosen.sum(1) < experts.shape[1], "an expert is repeated")
        if policy is not None and policy.layers:
            banned = np.zeros((shape.num_hidden_layers, shape.num_experts), bool)
            protected = np.zeros_like(banned)
            for layer, entry in policy.layers.items():
                banned[layer, list(entry.disabled)] = True
                protected[layer, list(entry.protected)] = True
            self._refuse((chosen & banned[layers]).any(1), "an expert is disabled by the engine's policy")
            self._refuse((protected[layers] & ~chosen).any(1), "an expert that the engine's policy protects is left out")
        if self.chooses:
            if policy is not None and policy.has_bias:
                raise RouteError("moves whose tokens choose among experts know no policy's bias")
            self._refuse((chosen & _disabled(plan, shape)[layers]).any(1), "an expert is disabled by the base plan")

    def _refuse(self, bad: Any, why: str, first: int = 0) -> None:
        if bad.any():
            at = first + int(bad.argmax())
            candidate, layer, start, end = self.moves[at].tolist()
            where = f"move {at} (candidate {candidate}, layer {layer}, positions {start}-{end - 1})"
            raise RouteError(f"{where}, experts {self.experts[at].tolist()}: {why}")


def _disabled(plan: CompiledPlan, shape: ModelShape) -> npt.NDArray[np.bool_]:
    """bool [decoder layers, num_experts], what a plan disables anywhere. Raises `RouteError` if it does anything else."""
    layout = RowLayout(shape.num_experts, shape.top_k)
    rows = [layout.read(row) for row in plan.rows]
    if any(flags & ~FLAG_NATIVE_WEIGHTS for flags, _ in rows):
        raise RouteError("moves whose tokens choose among experts need a base plan that only disables others")
    found = np.zeros((shape.num_hidden_layers, shape.num_experts), bool)
    for layer, columns in zip(shape.moe_layers, plan.block, strict=True):
        for row in set(columns.tolist()) - {NO_ROW}:
            found[layer] |= [not rows[row][1] >> expert & 1 for expert in range(shape.num_experts)]
    return found


def _with_moves(
    plan: RoutePlan, cells: Mapping[tuple[int, int], tuple[int, ...]], masks: Mapping[int, tuple[int, ...]], kind: str
) -> str:
    """A plan's string with directives at (layer, position) in the place of its forces there, and at layers for all tokens."""
    made = RoutePlan(weights=plan.weights)
    for item in plan.directives:
        if item.kind == "bias":
            made.bias(item.layer, item.positions, dict(zip(item.experts, item.weights or (), strict=True)))
            continue
        if item.kind != "force":
            getattr(made, item.kind)(item.layer, item.positions, item.experts)
            continue
        if isinstance(item.positions, str):
            made.force(item.layer, item.positions, item.experts, item.weights)
            continue
        kept = [position for position in item.positions if (item.layer, position) not in cells]
        if kept:
            made.force(item.layer, kept, item.experts, item.weights)
    grouped: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for (layer, position), experts in sorted(cells.items()):
        grouped.setdefault((layer, experts), []).append(position)
    for (layer, experts), positions in grouped.items():
        getattr(made, kind)(layer, positions, experts)
    for layer, experts in masks.items():
        getattr(made, kind)(layer, "all", experts)
    return made.to_string()


@dataclass(frozen=True, slots=True, eq=False)
class CellScores:
    """What comes back.

    Attributes:
        log_probs: float32 [num_candidates, num_rows, width], of the tokens asked for, in nats.
        tokens: tokens of all candidates, as if each was computed alone.
        computed_tokens: the work that was done, in tokens through all layers.

    """

    log_probs: npt.NDArray[np.float32]
    tokens: int
    computed_tokens: int

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """float64 [num_candidates], joint log-probability of the target, in nats."""
        values: npt.NDArray[np.float64] = self.log_probs[:, :, 0].sum(axis=1, dtype=np.float64)
        return values
