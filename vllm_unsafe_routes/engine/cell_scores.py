"""Scores of cells in one worker: bases are computed or moved, and their candidates, in sweeps that fit the engine's limits.

A base that moves does so in the sweep of its first candidates, where these find all that they need of it.

The core hands over KV blocks of vLLM's own pool (`cell_blocks.py`); nothing else is shared with requests that are being served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..cells import CANDIDATE, END, LAYER, START, Cells
from ..compiled import RowLayout
from ..compiler import PlanCompiler
from ..errors import RouteError
from ..shape import ModelShape
from .cell_bases import Base, BaseArrays, BaseRoutes, Bases, starts_of
from .device_table import upload
from .layer_range import LayerRange
from .sweep import Memory, Sequences, ranges
from .sweep_runner import SweepRunner

# Bases have at most this share of the reserve, and their residual streams at most this many bytes.
_BASES_SHARE = 0.25
_STREAM_BYTES = 1 << 30

# What must be computed of a base: the first layer that changes (-1: all of it), the first position, and one past the last position
# that changes at that layer.
Changes = dict[Base, tuple[int, int, int]]


class Candidates(NamedTuple):
    """Candidates of several bases that compute something, as arrays over candidates or moves.

    Attributes:
        bases: the bases of the call.
        base: int [num_candidates], number of the base.
        number: int [num_candidates], among all candidates of the call.
        changes: int [num_candidates, 3], as `Changes`.
        move_start: int [num_candidates], where a candidate's moves begin.
        moves: int [num_moves, 4], as `Cells.moves`.
        rows: int32 [num_moves, ints], the row of the route table of each move.

    """

    bases: BaseArrays
    base: np.ndarray
    number: np.ndarray
    changes: np.ndarray
    move_start: np.ndarray
    moves: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, bases: BaseArrays, items: Sequence[tuple[int, Base, Cells]], layout: RowLayout) -> Candidates:
        """From the cells of each base; the integer is the number of its first candidate."""
        if not items:
            none = np.zeros(0, np.int64)
            return cls(bases, none, none, np.zeros((0, 3), np.int64), none, np.zeros((0, 4), np.int64), layout.table([]))
        moves = np.concatenate([cells.moves for _, _, cells in items]).astype(np.int64)
        counts = [len(cells.moves) for _, _, cells in items]
        number = moves[:, CANDIDATE] + np.repeat([first for first, _, _ in items], counts)
        start = np.flatnonzero(np.diff(number, prepend=-1))
        base = np.repeat([bases.numbers[base] for _, base, _ in items], counts)[start]
        layer = np.minimum.reduceat(moves[:, LAYER], start)
        ends = np.where(moves[:, LAYER] == np.repeat(layer, np.diff(start, append=len(moves))), moves[:, END], 0)
        # All scored rows are computed again, wherever the change begins.
        first = np.minimum(np.minimum.reduceat(moves[:, START], start), bases.last_prompt[base])
        changes = np.stack([layer, first, np.maximum.reduceat(ends, start)], 1)
        rows = np.concatenate([layout.rows_of(cells.experts, base.routes.native, cells.chooses) for _, base, cells in items])
        return cls(bases, base, number[start], changes, start, moves, rows)

    @property
    def first(self) -> np.ndarray:
        """int [num_candidates], first position that changes."""
        first: np.ndarray = self.changes[:, 1]
        return first

    @property
    def num_tokens(self) -> np.ndarray:
        """int [num_candidates], tokens of each, shared ones included."""
        num_tokens: np.ndarray = self.bases.num_tokens[self.base]
        return num_tokens


class CellScorer:
    """Scoring of cells in one worker.

    Args:
        layers: the model.
        shape: its MoE layers.
        compiler: compiles base plans under the policy in force.
        limits: most sequences and most tokens of a sweep.
        runner: of its sweeps.

    Attributes:
        layers: see there.
        compiler: see there.
        runner: see there.

    """

    def __init__(
        self, layers: LayerRange, shape: ModelShape, compiler: PlanCompiler, limits: tuple[int, int], runner: SweepRunner
    ) -> None:
        self.layers, self._shape, self.compiler, self._limits, self.runner = layers, shape, compiler, limits, runner
        self._generation = -1

    def score(self, reserve: np.ndarray, generation: int, items: Sequence[Cells]) -> list[tuple[np.ndarray, int]]:
        """Score all candidates of all items.

        Args:
            reserve: int64 [num_blocks], the KV blocks that may be used.
            generation: of the reserve; while it stays the same, so does what is in the blocks.
            items: the candidates.

        Returns:
            For each item float32 [num_candidates * num_rows, width] and the work in tokens through all layers.

        Raises:
            RouteError: the reserve is too small for an item.

        """
        if generation != self._generation:
            self._take(reserve)
        # Whatever ends this call early leaves bases half computed: the next call begins anew.
        self._generation = -1
        found: list[tuple[np.ndarray, int]] = []
        at = 0
        while at < len(items):
            bases, changes = self._ready(items[at:])
            if not bases:
                raise RouteError(f"the {len(reserve)} KV blocks for cells do not hold a prompt of {len(items[at].prompt)} tokens")
            found += self._score(items[at : at + len(bases)], bases, changes)
            at += len(bases)
        self._generation = generation
        return found

    def _take(self, reserve: np.ndarray) -> None:
        layers, size = self.layers, self.layers.block_size
        per_block = size * layers.num_layers * sum(value[0].nbytes for value in layers.empty_stream(1).values())
        # What is one block here is one in every group of KV caches.
        reserve = reserve[: len(reserve) // layers.num_groups * layers.num_groups].reshape(layers.num_groups, -1)
        num_blocks = max(1, min(int(_BASES_SHARE * reserve.shape[1]), _STREAM_BYTES // per_block))
        self._bases = Bases(num_blocks, size)
        self._first_own = num_blocks + 1
        self._memory = Memory(reserve, layers.empty_stream(layers.num_layers, num_blocks * size))

    def _ready(self, items: Sequence[Cells]) -> tuple[list[Base], Changes]:
        """The bases of as many items as there is room for, and what must be computed of them."""
        found: list[Base] = []
        changes: Changes = {}
        for cells in items:
            base = self._bases.find(cells)
            if base is None:
                routes = BaseRoutes.of(cells, self.compiler)
                taken = self._bases.take_over(cells, routes, found)
                if taken is not None:
                    base, before = taken
                    change = before.first_difference(routes)
                    if change is not None:
                        # All scored rows are computed again, wherever the change begins.
                        changes[base] = (self._shape.moe_layers[change[0]], min(change[1], len(cells.prompt) - 1), change[2])
                else:
                    base = self._bases.add(cells, routes, found)
                    if base is None:
                        break
                    changes[base] = (-1, 0, 0)
            found.append(base)
        return found, changes

    def _score(self, items: Sequence[Cells], bases: list[Base], changes: Changes) -> list[tuple[np.ndarray, int]]:
        """Scores of items whose bases have room, `changes` of these first."""
        counts = np.array([cells.num_candidates for cells in items])
        offsets = starts_of(counts)
        lens = np.repeat([len(cells.target) for cells in items], counts)
        starts = starts_of(lens)
        scores = torch.zeros((int(lens.sum()), max(cells.target.shape[1] for cells in items)), device=self.layers.device)
        moved = [(int(at), base, cells) for at, base, cells in zip(offsets, bases, items, strict=True) if len(cells.moves)]
        arrays = BaseArrays.of(bases, self.layers.table_width(max(base.num_tokens for base in bases)))
        candidates = Candidates.of(arrays, moved, self.compiler.layout)
        together = self._together(candidates, changes)
        work = np.zeros(len(arrays.numbers))
        nobody = np.zeros(0, np.int64)
        for alone in _pieces([base for base in changes if base not in together], self._limits):
            self._run(candidates, nobody, {base: changes[base] for base in alone}, work)
        for some, moving in self._chunks(candidates, together):
            values = self._run(candidates, some, moving, work)
            where = upload(ranges(starts[candidates.number[some]], lens[candidates.number[some]]), torch.int64, scores.device)
            scores[where, : values.shape[1]] = values
        # A candidate without a move has its base's.
        same = np.ones(counts.sum(), bool)
        same[candidates.number] = False
        unmoved = np.flatnonzero(same)
        of_item = np.repeat(np.arange(len(bases)), counts)[unmoved]
        for at in np.unique(of_item).tolist():
            base, same = bases[at], unmoved[of_item == at]
            assert base.log_probs is not None
            where = upload(ranges(starts[same], lens[same]), torch.int64, scores.device)
            scores[where, : base.log_probs.shape[1]] = base.log_probs.repeat(len(same), 1)
        sizes = [cells.num_candidates * len(cells.target) for cells in items]
        parts = np.split(scores.cpu().numpy(), np.cumsum(sizes)[:-1])
        # Of two items of one base the first has its work.
        costs = dict(zip(arrays.numbers, np.rint(work).astype(int).tolist(), strict=True))
        found = zip(parts, items, bases, strict=True)
        return [(part[:, : cells.target.shape[1]], costs.pop(base, 0)) for part, cells, base in found]

    def _together(self, candidates: Candidates, changes: Changes) -> Changes:
        """Bases that may move in the sweep of their own candidates.

        A candidate has a copy of the KV block in which it begins, made before the sweep: nothing in it before its own position may
        change meanwhile.
        """
        last = self.layers.num_layers - 1
        found: Changes = {}
        for base, (layer, first, end) in changes.items():
            begins = candidates.first[candidates.base == candidates.bases.numbers[base]]
            if len(begins) and (layer == last or not ((begins > first) & (begins % self.layers.block_size > 0)).any()):
                found[base] = layer, first, end
        tokens = sum(base.num_tokens - first for base, (_, first, _) in found.items())
        return found if len(found) < self._limits[0] and tokens < self._limits[1] else {}

    def _chunks(self, candidates: Candidates, together: Changes) -> Iterator[tuple[np.ndarray, Changes]]:
        """Numbers of candidates that fit one sweep together, and the bases that move in it: all in the first.

        Candidates of near layers come together, so that a sweep has few stages.
        """
        size = self.layers.block_size
        num_tokens = candidates.num_tokens
        order = np.lexsort((candidates.first, candidates.changes[:, 0]))
        tokens = np.cumsum((num_tokens - candidates.first)[order])
        blocks = np.cumsum((-(-num_tokens // size) - candidates.first // size)[order])
        room = self._memory.reserve.shape[1] - self._first_own
        at, moving = 0, together
        while at < len(order):
            taken = sum(base.num_tokens - first for base, (_, first, _) in moving.items())
            before = (int(tokens[at - 1]), int(blocks[at - 1])) if at else (0, 0)
            end = min(
                at + self._limits[0] - len(moving),
                int(np.searchsorted(tokens, before[0] + self._limits[1] - taken, "right")),
                int(np.searchsorted(blocks, before[1] + room, "right")),
            )
            if end <= at and not moving:
                raise RouteError(f"the {self._memory.reserve.size} KV blocks for cells do not hold one candidate")
            yield order[at:end], moving
            at, moving = max(at, end), {}

    def _run(self, candidates: Candidates, some: np.ndarray, moving: Changes, work: np.ndarray) -> torch.Tensor:
        """Move bases and run some candidates in one sweep.

        Returns:
            float32, log-probabilities of the candidates' targets' tokens, one candidate after the other.

        """
        size, num_moving, bases = self.layers.block_size, len(moving), candidates.bases
        base = np.array([*(bases.numbers[one] for one in moving), *candidates.base[some].tolist()])
        changes = np.array([*moving.values(), *candidates.changes[some].tolist()]).reshape(-1, 3)
        layer, first, span_end = changes.T
        counts = -(-bases.num_tokens[base] // size) - first // size
        counts[:num_moving] = 0
        own = bases.blocks[base]
        own[np.repeat(np.arange(len(base)), counts), ranges(first // size, counts)] = self._first_own + np.arange(counts.sum())
        moves_base = np.arange(len(base)) < num_moving
        order = np.argsort(layer, kind="stable")
        place = np.argsort(order, kind="stable")
        sequences = Sequences(bases, *(values[order] for values in (base, first, layer, span_end, own, moves_base)))
        counts = np.diff(candidates.move_start, append=len(candidates.moves))[some]
        chosen = ranges(candidates.move_start[some], counts)
        moves = candidates.moves[chosen]
        moves[:, CANDIDATE] = np.repeat(place[num_moving:], counts)
        values = self.runner.run(self._memory, sequences, moves, candidates.rows[chosen])
        np.add.at(work, sequences.base, sequences.work(self.layers.num_layers))
        if not moving:
            return values
        counts = bases.num_rows[sequences.base]
        for one, start in zip(moving, starts_of(counts)[place[:num_moving]].tolist(), strict=True):
            one.log_probs = values[start : start + len(one.cells.target), : one.cells.target.shape[1]].clone()
        return values[upload(np.flatnonzero(np.repeat(~sequences.moves_base, counts)), torch.int64, values.device)]


def _pieces(bases: list[Base], limits: tuple[int, int]) -> Iterator[list[Base]]:
    """Bases by as many as a sweep takes."""
    some: list[Base] = []
    for base in bases:
        if some and (len(some) >= limits[0] or sum(one.num_tokens for one in (*some, base)) > limits[1]):
            yield some
            some = []
        some.append(base)
    if some:
        yield some
