"""A sweep with its route table, and the log-probabilities behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vllm_unsafe_routes.kernels.spec import RouteRows

from ..cells import CANDIDATE, END, LAYER, START
from ..compiled import RowLayout
from ..shape import ModelShape
from .cell_bases import widen
from .device_table import upload
from .layer_range import LayerRange
from .router import LayerBinding, Routing
from .scoring import Scoring
from .sweep import Memory, Sequences, Sweep, ranges


class SweepRunner:
    """Sweeps of one worker; while one runs, the bound routers ask it for their tokens' routes.

    Args:
        layers: the model.
        shape: its MoE layers.
        bindings: these by MoE slot.
        scoring: of the model.

    """

    def __init__(self, layers: LayerRange, shape: ModelShape, bindings: Mapping[int, LayerBinding], scoring: Scoring) -> None:
        self._layers, self._shape, self._bindings, self._scoring = layers, shape, bindings, scoring
        self._layout = RowLayout(shape.num_experts, shape.top_k)
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

    def run(self, memory: Memory, sequences: Sequences, moves: np.ndarray, move_rows: np.ndarray) -> torch.Tensor:
        """Run a sweep.

        Args:
            memory: of the bases.
            sequences: what is computed.
            moves: int64 [num_moves, 4], as `Cells.moves`, with the sequence in the place of the candidate.
            move_rows: int32 [num_moves, ints], what each puts into the route table.

        Returns:
            float32 [num_rows, width], the log-probabilities asked for, one sequence's rows after the other; the largest width.

        """
        device, bases = self._layers.device, sequences.bases
        routes = bases.routes[:, sequences.columns]
        if len(moves):
            sequence, spans = moves[:, CANDIDATE], moves[:, END] - moves[:, START]
            slot = np.array([self._shape.slot_of_layer[layer] for layer in moves[:, LAYER].tolist()])
            columns = ranges(sequences.starts[sequence] + moves[:, START] - sequences.first[sequence], spans)
            # Of two moves at one cell the later is written last.
            routes[np.repeat(slot, spans), columns] = np.repeat(len(bases.contents) + np.arange(len(moves)), spans)
        self._rows = self._table([bases.contents, move_rows])
        self._sweep = Sweep(self._layers, memory, sequences, upload(routes, torch.int32, device))
        try:
            hidden = self._sweep.run()
        finally:
            self._sweep = self._rows = None
        counts = bases.num_rows[sequences.base]
        first_scored = sequences.starts + bases.last_prompt[sequences.base] - sequences.first
        rows = upload(ranges(first_scored, counts), torch.int64, device)
        wanted = upload(bases.targets[ranges(bases.row_start[sequences.base], counts)], torch.int64, device)
        found = self._scoring.of_rows(self._layers.model, hidden, rows, wanted)
        # A rank that does not gather the logits has none, and is not asked for scores.
        return torch.zeros(wanted.shape, device=device) if found is None else found

    def _table(self, contents: Sequence[np.ndarray]) -> RouteRows:
        """The route table of a sweep: the bases' rows, then one row a move."""
        # A table without a row would have nothing to read.
        table = widen([*contents, np.zeros((1, contents[-1].shape[1]), np.int32)])
        parts = [upload(part, torch.from_numpy(part).dtype, self._layers.device) for part in self._layout.columns(table)]
        if len(parts) == len(RouteRows._fields):
            *hard, steered, score_bias = parts
            return RouteRows(*hard, score_bias, steered.unflatten(1, (2, -1)))
        return RouteRows(*parts)
