"""One pass over the layers in which many sequences join, each at the layer at which it first differs from its base.

A sequence that differs from its base at (position t, layer l) and later needs nothing below l, nothing before t, and at layer l
itself only the tokens whose routes are changed: the attention there, and what the layer makes of the other tokens, are the base's.
So it computes the changed tokens at layer l, takes the base's residual stream for the others at l + 1, and goes on from there with
all tokens from t on.

Sequences of many prompts and layers share a sweep. Each has `num_tokens - t` rows in it, in the order of layers: a layer runs on
the first rows, and what joins is put behind them. A base that moves to another plan is a sequence too, and leaves its residual
stream at every layer where its candidates, in the same sweep, find it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from .cell_bases import BaseArrays, starts_of
from .device_table import upload
from .layer_range import Batch, LayerRange, Queries

# The reserve's first block takes K and V that nobody reads.
WASTE_BLOCK = 0


class Memory(NamedTuple):
    """What sweeps read and write beside the model.

    Attributes:
        reserve: int64 [KV cache groups, num_blocks], vLLM's ids of the KV blocks: each has its own in every group.
        streams: the residual streams of all bases: name -> [num_layers, tokens of the bases' blocks, width]; layer a's input is
            entry a - 1, what is behind the last layer the last entry of the first name.

    """

    reserve: np.ndarray
    streams: dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of a sweep, as arrays, in the order of their layers; their rows stand one sequence after the other.

    Attributes:
        bases: the bases that they begin at.
        base: int [num_seqs], number of the base.
        first: int [num_seqs], position t.
        layer: int [num_seqs], layer l; -1: nothing is there yet, all layers compute all tokens.
        span_end: int [num_seqs], one past the last position that layer l computes.
        own_blocks: int [num_seqs, width], KV blocks for the layers behind l, as indices into the reserve; those before `first` are
            the base's.
        moves_base: bool [num_seqs], sequences that are a base itself on its way to another plan.
        lens: int [num_seqs], rows of each.
        starts: int [num_seqs], its first row.
        columns: int [num_rows], which of the bases' tokens a row is.

    """

    bases: BaseArrays
    base: np.ndarray
    first: np.ndarray
    layer: np.ndarray
    span_end: np.ndarray
    own_blocks: np.ndarray
    moves_base: np.ndarray
    lens: np.ndarray = field(init=False)
    starts: np.ndarray = field(init=False)
    columns: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        lens = self.bases.num_tokens[self.base] - self.first
        columns = ranges(self.bases.token_start[self.base] + self.first, lens)
        for name, value in {"lens": lens, "starts": starts_of(lens), "columns": columns}.items():
            object.__setattr__(self, name, value)

    def work(self, num_layers: int) -> np.ndarray:
        """float64 [num_seqs], what each costs, in tokens through all layers."""
        later = self.lens * (num_layers - 1 - self.layer)
        work: np.ndarray = (later + np.maximum(self.span_end - self.first, 0)) / num_layers
        return work


def ranges(starts: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """`starts[0], starts[0] + 1, ...`, `lens[0]` of them, then those of the next."""
    numbers: np.ndarray = np.repeat(starts - starts_of(lens), lens)
    numbers += np.arange(len(numbers))
    return numbers


class _Part(NamedTuple):
    """Who computes what in some layers, on the device: first the tokens that join, then all rows of sequences that have joined.

    Attributes:
        batch: the tokens.
        token_ids: int32 [num_tokens].
        routes: int32 [MoE layers, num_tokens and some padding], their rows in the route table.
        num_joining: tokens of sequences that compute the changed ones only.
        joining: int64 [num_joining], where these are in the bases' residual streams.
        behind: int64, where all rows of these sequences are there.
        changed: int64 [num_joining], numbers of the joining tokens among `behind`.
        moved: of the tokens of moving bases, int64 each: numbers among the tokens, places in the bases' residual streams; None: no
            base moves.

    """

    batch: Batch
    token_ids: torch.Tensor
    routes: torch.Tensor
    num_joining: int
    joining: torch.Tensor
    behind: torch.Tensor
    changed: torch.Tensor
    moved: tuple[torch.Tensor, torch.Tensor] | None


class _Places(NamedTuple):
    """Where the sequences of a sweep and their rows are in the KV cache and in the bases' residual streams, on the host.

    Attributes:
        sequence: int [num_rows], whose row it is.
        positions: int64 [num_rows].
        scored: bool [num_rows], rows whose output is wanted.
        base_tables: int64 [KV cache groups, num_seqs, width], vLLM's ids of the bases' KV blocks.
        own_tables: the same of the sequences' own.
        slots: int64 [KV cache groups, num_rows], where a row's own K and V go.
        in_stream: int64 [num_rows], its token in the bases' residual streams.

    """

    sequence: np.ndarray
    positions: np.ndarray
    scored: np.ndarray
    base_tables: np.ndarray
    own_tables: np.ndarray
    slots: np.ndarray
    in_stream: np.ndarray

    @classmethod
    def of(cls, own: Sequences, reserve: np.ndarray, size: int) -> _Places:
        """Of sequences, with the ids of the reserve's blocks and the tokens of a block."""
        sequence, positions = np.repeat(np.arange(len(own.base)), own.lens), ranges(own.first, own.lens)
        base_blocks = own.bases.blocks[own.base]
        # `take` leaves every group's part contiguous, as the kernels want it.
        base_tables, own_tables = (reserve.take(blocks, 1) for blocks in (base_blocks, own.own_blocks))
        block, offset = np.divmod(positions, size)
        scored = positions >= own.bases.last_prompt[own.base][sequence]
        # The reserve's blocks from the second on are the bases'.
        in_stream = (base_blocks[sequence, block] - 1) * size + offset
        return cls(sequence, positions, scored, base_tables, own_tables, own_tables[:, sequence, block] * size + offset, in_stream)


class Sweep:
    """A sweep.

    Args:
        layers: the model.
        memory: the bases' and the sequences'.
        sequences: what is computed.
        routes: int32 [MoE layers, rows of the sweep], on the device: each row's row in the route table.

    """

    def __init__(self, layers: LayerRange, memory: Memory, sequences: Sequences, routes: torch.Tensor) -> None:
        self._layers, self._memory, self.sequences, self._routes = layers, memory, sequences, routes
        self._places = _Places.of(sequences, memory.reserve, layers.block_size)
        self._in_stream = upload(self._places.in_stream, torch.int64, layers.device)
        # The residual stream of the sequences that have joined, in pieces.
        self._stream: list[dict[str, torch.Tensor]] = []
        self._last: tuple[tuple[int, int], _Part] | None = None
        # int32 [MoE layers, tokens of the batch in hand and some padding], for the bound routers.
        self.row_index = routes

    def run(self) -> torch.Tensor:
        """The output layer's input, [rows of the sweep, width]."""
        own, num_layers = self.sequences, self._layers.num_layers
        size = self._layers.block_size
        shared = (own.first % size > 0) & (own.layer < num_layers - 1) & ~own.moves_base
        if shared.any():
            at = shared.nonzero()[0], own.first[shared] // size
            source, target = (tables[:, *at] for tables in (self._places.base_tables, self._places.own_tables))
            self._layers.copy_blocks(source, target, own.layer[shared] + 1)
        bounds = {*np.maximum(own.layer, 0).tolist(), *(own.layer + 1).tolist(), num_layers}
        if own.moves_base.any():
            bounds |= set(range(max(0, int(own.layer[own.moves_base].min())), num_layers))
        for start, end in itertools.pairwise(sorted(bounds)):
            self._run(start, end)
        return self._joined()[self._layers.keys[0]]

    def rows_of(self, slot: int, num_tokens: int) -> torch.Tensor:
        """int32 [num_tokens], the rows in the route table of the tokens that MoE layer `slot` has in hand."""
        rows, wanted = self.row_index[slot], self._layers.wanted
        # The last layer's experts see fewer tokens than the batch has.
        return rows[:num_tokens] if wanted is None or num_tokens != len(wanted) else rows[wanted]

    def _run(self, start: int, end: int) -> None:
        part = self._part(start)
        self.row_index = part.routes
        if start and part.num_joining:
            self._stream.insert(0, self._of_bases(start, part.joining))
        self._keep(part, end, self._layers.run(start, end, part.batch, part.token_ids, self._joined() if start else {}))

    def _keep(self, part: _Part, end: int, found: Mapping[str, torch.Tensor]) -> None:
        """Take what came out in front of layer `end`, for moving bases and for the layers that follow."""
        if part.moved is not None:
            tokens, slots = part.moved
            for key, value in found.items():
                self._memory.streams[key][end - 1].index_copy_(0, slots, value.index_select(0, tokens))
        self._stream = [{key: value[part.num_joining :] for key, value in found.items()}]
        if part.num_joining:
            behind = self._of_bases(end, part.behind)
            for key, value in found.items():
                behind[key].index_copy_(0, part.changed, value[: part.num_joining])
            self._stream.append(behind)

    def _joined(self) -> dict[str, torch.Tensor]:
        """The pieces of the residual stream as one."""
        pieces = self._stream
        return pieces[0] if len(pieces) == 1 else {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def _of_bases(self, layer: int, slots: torch.Tensor) -> dict[str, torch.Tensor]:
        """A copy of the bases' residual stream at a layer's input."""
        keys = self._layers.keys[: 1 if layer == self._layers.num_layers else None]
        return {key: self._memory.streams[key][layer - 1].index_select(0, slots) for key in keys}

    def _part(self, start: int) -> _Part:
        """At layer `start`: sequences that begin there compute the changed tokens only, those that began before all their rows."""
        own, places, size, device = self.sequences, self._places, self._layers.block_size, self._layers.device
        num_whole, num_begun = np.searchsorted(own.layer, (start, start + 1)).tolist()
        if self._last is not None and self._last[0] == (num_whole, num_begun):
            return self._last[1]
        spans = (own.span_end - own.first)[num_whole:num_begun]
        by_span = np.argsort(spans, kind="stable")
        spans, joins = spans[by_span], num_whole + by_span
        order, lens = np.append(joins, np.arange(num_whole)), np.append(spans, own.lens[:num_whole])
        first, end = (int(own.lens[:count].sum()) for count in (num_whole, num_begun))
        rows = np.append(ranges(own.starts[joins], spans), np.arange(first))
        num_joining, positions = len(rows) - first, places.positions[rows]
        table, slots = places.own_tables.take(order, 1), places.slots.take(rows, 1)
        # Those that join read the base's K and V, and nobody reads theirs.
        table[:, : len(joins)] = places.base_tables.take(joins, 1)
        slots[:, :num_joining] = self._memory.reserve[:, WASTE_BLOCK, None] * size + positions[:num_joining] % size
        queries = Queries(lens, own.first[order] + lens, table, positions, slots, places.scored[rows])
        # Every layer's row begins as aligned as the whole: Triton compiles one variant.
        padded = upload(np.pad(rows, (0, -len(rows) % 16)), torch.int64, device)
        routes, where = self._routes.gather(1, padded.expand(len(self._routes), -1)), padded[: len(rows)]
        moved = None
        if own.moves_base.any():
            tokens = upload(np.flatnonzero(own.moves_base[places.sequence[rows]]), torch.int64, device)
            moved = tokens, self._in_stream.index_select(0, where.index_select(0, tokens))
        part = _Part(
            self._layers.batch(queries),
            upload(own.bases.token_ids[own.columns[rows]], torch.int32, device),
            routes,
            num_joining,
            self._in_stream.index_select(0, where[:num_joining]),
            self._in_stream[first:end],
            where[:num_joining] - first,
            moved,
        )
        self._last = (num_whole, num_begun), part
        return part
