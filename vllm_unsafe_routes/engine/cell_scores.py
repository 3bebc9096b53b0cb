"""Scores of cells in one worker: bases are computed or moved, then their candidates in sweeps that fit the engine's limits.

The core hands over KV blocks of vLLM's own pool (`cell_blocks.py`); nothing else is shared with requests that are being served.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..cells import CANDIDATE, END, LAYER, START, Cells
from ..compiler import PlanCompiler
from ..errors import RouteError
from ..shape import ModelShape
from .cell_bases import Base, BaseRoutes, Bases
from .device_table import upload
from .layer_range import LayerRange
from .sweep import Memory, Sequences, block_tables, ranges
from .sweep_runner import SweepRunner

# Bases have at most this share of the reserve, and their residual streams at most this many bytes.
_BASES_SHARE = 0.25
_STREAM_BYTES = 1 << 30


class Candidates(NamedTuple):
    """Candidates of several bases that compute something, as arrays over candidates or moves.

    Attributes:
        bases: the bases.
        base: int [num_candidates], index into `bases`.
        number: int [num_candidates], among all candidates of the call.
        first: int [num_candidates], first position that changes.
        layer: int [num_candidates], first layer that changes.
        span_end: int [num_candidates], one past the last position that changes at that layer.
        move_start: int [num_candidates], where a candidate's moves begin.
        moves: int [num_moves, 4], as `Cells.moves`.
        experts: int32 [num_moves, top_k].

    """

    bases: Sequence[Base]
    base: np.ndarray
    number: np.ndarray
    first: np.ndarray
    layer: np.ndarray
    span_end: np.ndarray
    move_start: np.ndarray
    moves: np.ndarray
    experts: np.ndarray

    @classmethod
    def of(cls, items: Sequence[tuple[int, Base, Cells]]) -> Candidates:
        """From the cells of each base; the integer is the number of its first candidate."""
        moves = np.concatenate([cells.moves for _, _, cells in items]).astype(np.int64)
        counts = [len(cells.moves) for _, _, cells in items]
        of_item = np.repeat(np.arange(len(items)), counts)
        number = moves[:, CANDIDATE] + np.array([first for first, _, _ in items])[of_item]
        start = np.flatnonzero(np.diff(number, prepend=-1))
        last_prompt = np.array([len(base.cells.prompt) - 1 for _, base, _ in items])
        layer = np.minimum.reduceat(moves[:, LAYER], start)
        ends = np.where(moves[:, LAYER] == np.repeat(layer, np.diff(start, append=len(moves))), moves[:, END], 0)
        return cls(
            [base for _, base, _ in items],
            of_item[start],
            number[start],
            # All scored rows are computed again, wherever the change begins.
            np.minimum(np.minimum.reduceat(moves[:, START], start), last_prompt[of_item[start]]),
            layer,
            np.maximum.reduceat(ends, start),
            start,
            moves,
            np.concatenate([cells.experts for _, _, cells in items]),
        )


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
            bases, work = self._ready(items[at:])
            if not bases:
                raise RouteError(f"the {len(reserve)} KV blocks for cells do not hold a prompt of {len(items[at].prompt)} tokens")
            found += self._score(items[at : at + len(bases)], bases, work)
            at += len(bases)
        self._generation = generation
        return found

    def _take(self, reserve: np.ndarray) -> None:
        layers, size = self.layers, self.layers.block_size
        per_block = size * layers.num_layers * sum(value[0].nbytes for value in layers.empty_stream(1).values())
        num_blocks = max(1, min(int(_BASES_SHARE * len(reserve)), _STREAM_BYTES // per_block))
        self._bases = Bases(num_blocks, size)
        self._first_own = num_blocks + 1
        self._memory = Memory(reserve, layers.empty_stream(layers.num_layers, num_blocks * size))

    def _ready(self, items: Sequence[Cells]) -> tuple[list[Base], np.ndarray]:
        """The bases of as many items as there is room for, and what each cost in tokens."""
        found: list[Base] = []
        todo: dict[Base, tuple[int, int, int]] = {}
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
                        todo[base] = (self._shape.moe_layers[change[0]], min(change[1], len(cells.prompt) - 1), change[2])
                else:
                    base = self._bases.add(cells, routes, found)
                    if base is None:
                        break
                    todo[base] = (-1, 0, 0)
            found.append(base)
        work = dict.fromkeys(found, 0.0)
        for some in self._pieces(list(todo), [base.num_tokens for base in todo]):
            changes = np.array([todo[base] for base in some])
            for base, cost in zip(some, self._move(some, changes), strict=True):
                work[base] += cost
        return found, np.array([work.pop(base, 0.0) for base in found])

    def _pieces(self, bases: list[Base], sizes: list[int]) -> Iterator[list[Base]]:
        """Bases by as many as a sweep takes."""
        some: list[Base] = []
        tokens = 0
        for base, size in zip(bases, sizes, strict=True):
            if some and (len(some) >= self._limits[0] or tokens + size > self._limits[1]):
                yield some
                some, tokens = [], 0
            some.append(base)
            tokens += size
        if some:
            yield some

    def _move(self, bases: list[Base], changes: np.ndarray) -> np.ndarray:
        """Compute bases from (layer, first position, end of the span) on; returns each one's work in tokens."""
        base = np.arange(len(bases))
        tables = self._tables(bases)
        layer, first, span_end = changes.T
        sequences = Sequences(bases, base, first, layer, span_end, tables, tables, moves_base=True)
        values = self.runner.run(self._memory, sequences, np.zeros((0, 4), np.int64), np.zeros((0, self._shape.top_k), np.int32))
        for one, value in zip(bases, values.split([len(one.cells.target) for one in bases]), strict=True):
            one.log_probs = value[:, : one.cells.target.shape[1]]
        return sequences.work(self.layers.num_layers)

    def _tables(self, bases: Sequence[Base]) -> np.ndarray:
        return block_tables(bases, self.layers.table_width(max(one.num_tokens for one in bases)))

    def _score(self, items: Sequence[Cells], bases: list[Base], work: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """Scores of items whose bases are ready."""
        counts = np.array([cells.num_candidates for cells in items])
        offsets = np.cumsum(counts) - counts
        lens = np.repeat([len(cells.target) for cells in items], counts)
        starts = np.cumsum(lens) - lens
        # A candidate without a move has its base's.
        scores = torch.zeros((int(lens.sum()), max(cells.target.shape[1] for cells in items)), device=self.layers.device)
        at = 0
        for base, count in zip(bases, counts.tolist(), strict=True):
            assert base.log_probs is not None
            rows, width = base.log_probs.shape
            scores[at : at + count * rows, :width] = base.log_probs.repeat(count, 1)
            at += count * rows
        if any(len(cells.moves) for cells in items):
            moved = [
                (int(first), base, cells) for first, base, cells in zip(offsets, bases, items, strict=True) if len(cells.moves)
            ]
            candidates = Candidates.of(moved)
            of_item = np.array([at for at, cells in enumerate(items) if len(cells.moves)])
            for some in self._chunks(candidates):
                sequences, values = self._draw(candidates, some)
                number = candidates.number[some]
                where = upload(ranges(starts[number], lens[number]), torch.int64, scores.device)
                scores[where, : values.shape[1]] = values
                np.add.at(work, of_item[candidates.base[some]], sequences.work(self.layers.num_layers))
        sizes = [cells.num_candidates * len(cells.target) for cells in items]
        parts = np.split(scores.cpu().numpy(), np.cumsum(sizes)[:-1])
        return [(part[:, : cells.target.shape[1]], round(cost)) for part, cells, cost in zip(parts, items, work, strict=True)]

    def _chunks(self, candidates: Candidates) -> Iterator[np.ndarray]:
        """Numbers of candidates that fit one sweep together; those of near layers, so that a sweep has few stages."""
        size = self.layers.block_size
        num_tokens = np.array([base.num_tokens for base in candidates.bases])[candidates.base]
        order = np.lexsort((candidates.first, candidates.layer))
        tokens = np.cumsum((num_tokens - candidates.first)[order])
        blocks = np.cumsum((-(-num_tokens // size) - candidates.first // size)[order])
        room = len(self._memory.reserve) - self._first_own
        at = 0
        while at < len(order):
            before = (int(tokens[at - 1]), int(blocks[at - 1])) if at else (0, 0)
            end = min(
                at + self._limits[0],
                int(np.searchsorted(tokens, before[0] + self._limits[1], "right")),
                int(np.searchsorted(blocks, before[1] + room, "right")),
            )
            if end <= at:
                raise RouteError(f"the {len(self._memory.reserve)} KV blocks for cells do not hold one candidate")
            yield order[at:end]
            at = end

    def _draw(self, candidates: Candidates, some: np.ndarray) -> tuple[Sequences, torch.Tensor]:
        """Run some candidates; their sequences, and float32 log-probabilities of their targets' tokens, one after the other."""
        size = self.layers.block_size
        base, first = candidates.base[some], candidates.first[some]
        tables = self._tables(candidates.bases)[base]
        num_blocks = -(-np.array([one.num_tokens for one in candidates.bases])[base] // size)
        counts = num_blocks - first // size
        own = tables.copy()
        own[np.repeat(np.arange(len(some)), counts), ranges(first // size, counts)] = self._first_own + np.arange(counts.sum())
        sequences = Sequences(candidates.bases, base, first, candidates.layer[some], candidates.span_end[some], own, tables)
        ends = np.append(candidates.move_start[1:], len(candidates.moves))
        counts = (ends - candidates.move_start)[some]
        chosen = ranges(candidates.move_start[some], counts)
        moves = candidates.moves[chosen].copy()
        moves[:, CANDIDATE] = np.repeat(np.arange(len(some)), counts)
        return sequences, self.runner.run(self._memory, sequences, moves, candidates.experts[chosen])
