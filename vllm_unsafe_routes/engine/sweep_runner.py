"""A sweep with its route table, and the log-probabilities behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_unsafe_routes.kernels.spec import RouteRows

from ..cells import CANDIDATE, END, LAYER, START
from ..compiled import FLAG_FORCED, FLAG_NATIVE_WEIGHTS, NO_ROW, RowLayout
from ..shape import ModelShape
from .device_table import upload
from .layer_range import LayerRange
from .router import LayerBinding, Routing
from .scoring import PIECE_BYTES, log_probs
from .sweep import Memory, Sequences, Sweep, ranges


class SweepRunner:
    """Sweeps of one worker; while one runs, the bound routers ask it for their tokens' routes.

    Args:
        layers: the model.
        shape: its MoE layers.
        bindings: these by MoE slot.
        vocab_size: of the model.

    """

    def __init__(self, layers: LayerRange, shape: ModelShape, bindings: Mapping[int, LayerBinding], vocab_size: int) -> None:
        self._layers, self._shape, self._bindings = layers, shape, bindings
        self._layout = RowLayout(shape.num_experts, shape.top_k)
        self._rows_at_once = max(1, PIECE_BYTES // (4 * vocab_size))
        self._sweep: Sweep | None = None
        self._rows: RouteRows | None = None

    def direct(
        self,
        slot: int,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        router_logits: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> None:
        """As `RouteController.direct`, for the tokens of the sweep in hand."""
        assert self._sweep is not None and self._rows is not None
        routing = Routing(topk_weights, topk_ids, router_logits, hidden_states)
        self._bindings[slot].direct(routing, self._sweep.rows_of(slot, len(router_logits)), self._rows)

    def run(self, memory: Memory, sequences: Sequences, moves: np.ndarray, experts: np.ndarray) -> torch.Tensor:
        """Run a sweep.

        Args:
            memory: of the bases.
            sequences: what is computed.
            moves: int64 [num_moves, 4], as `Cells.moves`, with the sequence in the place of the candidate.
            experts: int32 [num_moves, top_k].

        Returns:
            float32 [num_rows, width], the log-probabilities asked for, one sequence's rows after the other; the largest width.

        """
        device, bases, base = self._layers.device, sequences.bases, sequences.base
        lens = sequences.num_tokens - sequences.first
        starts = np.cumsum(lens) - lens
        offsets = np.cumsum([0, *(len(one.routes.contents) for one in bases)])
        every = np.concatenate(
            [np.where(one.routes.rows == NO_ROW, NO_ROW, one.routes.rows + at) for one, at in zip(bases, offsets, strict=False)], 1
        )
        before = np.cumsum([0, *(one.num_tokens for one in bases)])[:-1]
        routes = every[:, ranges(before[base] + sequences.first, lens)]
        if len(moves):
            sequence, spans = moves[:, CANDIDATE], moves[:, END] - moves[:, START]
            slot = np.array([self._shape.slot_of_layer[layer] for layer in moves[:, LAYER].tolist()])
            columns = ranges(starts[sequence] + moves[:, START] - sequences.first[sequence], spans)
            # Of two moves at one cell the later is written last.
            routes[np.repeat(slot, spans), columns] = np.repeat(offsets[-1] + np.arange(len(moves)), spans)
        native = np.array([one.routes.native for one in bases])[base]
        self._rows = self._table([one.routes.contents for one in bases], experts, native[moves[:, CANDIDATE]])
        self._sweep = Sweep(self._layers, memory, sequences, upload(routes, torch.int32, device))
        try:
            hidden = self._sweep.run()
        finally:
            self._sweep = self._rows = None
        targets = [one.cells.target for one in bases]
        counts = np.array([len(target) for target in targets])[base]
        last_prompt = np.array([len(one.cells.prompt) - 1 for one in bases])[base]
        rows = upload(ranges(starts + last_prompt - sequences.first, counts), torch.int64, device)
        width = max(target.shape[1] for target in targets)
        padded = [np.pad(target, ((0, 0), (0, width - target.shape[1]))) for target in targets]
        wanted = upload(np.concatenate([padded[at] for at in base.tolist()]), torch.int64, device)
        return self._log_probs(hidden, rows, wanted)

    def _log_probs(self, hidden: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        pieces = []
        for at, ids in zip(rows.split(self._rows_at_once), wanted.split(self._rows_at_once), strict=True):
            logits = self._layers.model.compute_logits(hidden[at])
            # A rank that does not gather the logits has none, and is not asked for scores.
            pieces.append(torch.zeros(ids.shape, device=rows.device) if logits is None else log_probs(logits, ids))
        return torch.cat(pieces)

    def _table(self, contents: Sequence[np.ndarray], experts: np.ndarray, native: np.ndarray) -> RouteRows:
        """The route table of a sweep: the bases' rows, then one row a move."""
        words, top_k = self._layout.num_words, self._shape.top_k
        mine = np.zeros((len(experts), self._layout.num_ints), np.int32)
        mine[:, 0] = FLAG_FORCED | np.where(native, FLAG_NATIVE_WEIGHTS, 0)
        allowed = np.zeros((len(experts), words), np.uint32)
        for column in experts.T:
            allowed[np.arange(len(experts)), column // 32] |= np.uint32(1) << (column % 32).astype(np.uint32)
        mine[:, 1 : 1 + words] = allowed.view(np.int32)
        mine[:, 1 + words : 1 + words + top_k] = experts
        # A table without a row would have nothing to read.
        ints = np.concatenate([*(one for one in contents if one.size), mine, np.zeros((1, self._layout.num_ints), np.int32)])
        table = upload(ints, torch.int32, self._layers.device)
        flags, allowed_words, ids, weights = table.split([1, words, top_k, top_k], 1)
        return RouteRows(
            flags[:, 0].contiguous(), allowed_words.contiguous(), ids.contiguous(), weights.contiguous().view(torch.float32)
        )
