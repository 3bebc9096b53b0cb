"""Cells in a worker: what `collective_rpc` calls, between two steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..cells import Cells
from ..errors import RouteError
from .attributes import CELLS
from .cell_scores import CellScorer
from .config import route_config
from .layer_range import LayerRange
from .router import controllers
from .scoring import Scoring
from .step import NO_STEP
from .sweep_runner import SweepRunner
from .worker import RouteController, controller_of


def score_worker_cells(worker: Any, reserve: bytes, generation: int, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Score candidates in a vLLM worker.

    Args:
        worker: the worker.
        reserve: int64 bytes, ids of the KV blocks that may be used.
        generation: of these.
        items: `Cells.to_wire` of each; the engine core has checked them.

    Returns:
        `scores`, float32 bytes for each item, and `work`, tokens through all layers; or `error`.

    """
    controller = controller_of(worker)
    try:
        scorer = _scorer_of(worker, controller)
        found = _score(controller, scorer, np.frombuffer(reserve, "<i8"), generation, items)
    except RouteError as error:
        return {"error": str(error)}
    return {"scores": [values.tobytes() for values, _ in found], "work": [work for _, work in found]}


def _scorer_of(worker: Any, controller: RouteController) -> CellScorer:
    """The worker's scorer under the policy in force."""
    runner, vllm_config, compiler = worker.model_runner, worker.vllm_config, controller.policy.compiler
    scorer: CellScorer | None = runner.__dict__.get(CELLS)
    if scorer is None or scorer.compiler is not compiler:
        config = route_config(vllm_config)
        if config is not None and config.jitter is not None:
            raise RouteError("cells cannot be scored with noise on router logits")
        if config is not None and config.seam == "logits":
            raise RouteError("cells cannot be scored with seam 'logits'")
        layers, shape = LayerRange(runner, vllm_config) if scorer is None else scorer.layers, controller.shape
        limits = vllm_config.scheduler_config.max_num_seqs, vllm_config.scheduler_config.max_num_batched_tokens
        sweeps = SweepRunner(layers, shape, controller.bindings, Scoring(vllm_config.model_config.get_vocab_size()))
        scorer = CellScorer(layers, shape, compiler, limits, sweeps)
        setattr(runner, CELLS, scorer)
    return scorer


@torch.inference_mode()
def _score(
    controller: RouteController, scorer: CellScorer, reserve: np.ndarray, generation: int, items: list[dict[str, Any]]
) -> list[tuple[np.ndarray, int]]:
    """Have the bound routers ask the sweeps instead of the controller meanwhile."""
    handle = next(handle for handle, one in controllers.items() if one is controller)
    state = controller.state
    held = state.active, state.covered
    state.active, state.covered = True, ()
    if controller.shared is not None:
        controller.shared.stage(NO_STEP)
    controllers[handle] = scorer.runner
    try:
        return scorer.score(reserve, generation, [Cells.from_wire(item) for item in items])
    finally:
        controllers[handle] = controller
        state.active, state.covered = held
