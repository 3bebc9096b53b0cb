"""Log-probabilities of the tokens that a request asks for (`score_tokens`), from the hidden states of a step.

The output layer runs once more, on the scored rows alone, and in pieces: whole vocabularies in float32 are outside what vLLM has
set memory aside for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from .device_table import upload
from .progress import StepProgress, StepReport
from .step import Step

# Largest piece of logits in float32; with the output layer's own and one temporary, 2.5 times as much is used.
PIECE_BYTES = 128 << 20


class _Span(NamedTuple):
    """Scored rows of one request: `token_ids` is int32 [num_rows, width], `rows` their places in the batch."""

    entry: StepProgress
    rows: np.ndarray
    token_ids: np.ndarray


def _spans(step: Step, progress: Mapping[str, StepProgress]) -> list[_Span]:
    spans = []
    for part in step.parts:
        score = part.resident.extras.score
        if score is None:
            continue
        begin, end = max(part.start, score.first_row), min(part.start + part.num_tokens, score.end_row)
        if begin < end:
            entry = progress[part.req_id]
            entry.score_start = begin - score.first_row
            rows = np.arange(begin, end) + (part.first - part.start)
            spans.append(_Span(entry, rows, score.token_ids[entry.score_start : end - score.first_row]))
    return spans


class Scoring:
    """Scoring in one worker.

    Args:
        vocab_size: of the model; decides how many rows are scored at once.

    """

    def __init__(self, vocab_size: int) -> None:
        self._rows_at_once = max(1, PIECE_BYTES // (4 * vocab_size))

    def collect(self, step: Step, report: StepReport, model: Any, hidden_states: torch.Tensor) -> None:
        """Score this step's rows, all requests together.

        Args:
            step: the step.
            report: its progress gets `score_start` now and `scores` when its copies are resolved.
            model: for `compute_logits`; every tensor-parallel rank calls it equally often.
            hidden_states: [num_tokens, hidden_size], on the device.

        """
        spans = _spans(step, report.progress)
        if not spans:
            return
        width = max(span.token_ids.shape[1] for span in spans)
        padded = np.concatenate([np.pad(span.token_ids, ((0, 0), (0, width - span.token_ids.shape[1]))) for span in spans])
        rows = upload(np.concatenate([span.rows for span in spans]), torch.int64, hidden_states.device)
        token_ids = upload(padded, torch.int64, hidden_states.device)
        scored = self.of_rows(model, hidden_states, rows, token_ids)

        def use(values: np.ndarray) -> None:
            at = 0
            for span in spans:
                num_rows, own_width = span.token_ids.shape
                span.entry.scores = values[at : at + num_rows, :own_width].copy()
                at += num_rows

        if scored is not None:
            report.copies.take(scored, use)

    def of_rows(self, model: Any, hidden_states: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor | None:
        """Log-probabilities of tokens behind some rows, piece by piece.

        Args:
            model: as in `collect`.
            hidden_states: as in `collect`.
            rows: int64 [num_rows], at least one.
            token_ids: int64 [num_rows, width].

        Returns:
            float32 [num_rows, width]; None on a rank that does not gather the logits.

        """
        scored = [
            log_probs(logits, ids)
            for at, ids in zip(rows.split(self._rows_at_once), token_ids.split(self._rows_at_once), strict=True)
            if (logits := model.compute_logits(hidden_states[at])) is not None
        ]
        return torch.cat(scored) if scored else None


def log_probs(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """float32 [num_rows, width] of logits [num_rows, vocab_size] and token ids int64 [num_rows, width]."""
    logits = logits.float()
    return logits.gather(1, token_ids) - logits.logsumexp(-1, keepdim=True)
