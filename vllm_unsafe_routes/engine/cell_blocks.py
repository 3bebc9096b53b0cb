"""Cells in the engine core's process: KV blocks for them, and the call to the workers.

The blocks are vLLM's own, taken from its pool between steps and held from the first call on (docs/decisions/cells.md says why).
They go back when the prefix cache is emptied: blocks in use would forbid that, and whoever empties it has changed weights or the
policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..cells import Cells, CellScores
from ..errors import RouteError
from .attributes import RESERVE

SCORE_METHOD = "unsafe_routes_score_cells"
WORKER_SCORE_METHOD = SCORE_METHOD


class Reserve:
    """KV blocks that no request has.

    Args:
        pool: vLLM's block pool.
        num_blocks: how many to take; None: half of the free ones.

    Attributes:
        generation: of the blocks; counts how often they were taken.

    """

    def __init__(self, pool: Any, num_blocks: int | None) -> None:
        self._pool = pool
        self._num_blocks = num_blocks
        self._blocks: list[Any] = []
        self.generation = 0

    def ids(self) -> np.ndarray:
        """int64 [num_blocks]. Raises `RouteError` if too few are free."""
        if not self._blocks:
            free = self._pool.get_num_free_blocks()
            wanted = free // 2 if self._num_blocks is None else min(self._num_blocks, free)
            if wanted < 3:
                raise RouteError(f"cells cannot be scored: {free} KV blocks are free")
            self._blocks = self._pool.get_new_blocks(wanted)
            self.generation += 1
        return np.array([block.block_id for block in self._blocks], np.int64)

    def give_back(self) -> None:
        """Let requests have the blocks."""
        blocks, self._blocks = self._blocks, []
        self._pool.free_blocks(blocks)


def reserve_of(scheduler: Any, num_blocks: int | None) -> Reserve:
    """The reserve beside a vLLM `Scheduler`."""
    if RESERVE not in scheduler.__dict__:
        scheduler.__dict__[RESERVE] = Reserve(scheduler.kv_cache_manager.block_pool, num_blocks)
    reserve: Reserve = scheduler.__dict__[RESERVE]
    return reserve


def score_cells(core: Any, admission: Any, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Score candidates in an engine core's thread, between two steps.

    Args:
        core: vLLM's `EngineCore`.
        admission: its `RouteAdmission`, or None.
        items: `Cells.to_wire` of each.

    Returns:
        `scores`, float32 bytes for each item, and `work`, tokens through all layers; or `error`, and `refused`: whether the
        candidates are to blame and not the engine.

    """
    if admission is None or not admission.config.allow_overrides:
        return {"error": "route overrides are not enabled in this engine", "refused": True}
    if admission.is_swapping:
        return {"error": "a policy is just being put in force; try again", "refused": True}
    try:
        for item in items:
            cells = Cells.from_wire(item)
            plan = admission.compiler.compile_text(item["plan"])
            plan.check_prompt(cells.prompt)
            cells.check(admission.shape, admission.active.enforced, plan)
    except RouteError as error:
        return {"error": str(error), "refused": True}
    reserve = reserve_of(core.scheduler, admission.config.score_blocks)
    try:
        blocks = reserve.ids()
    except RouteError as error:
        return {"error": str(error), "refused": False}
    args = (blocks.tobytes(), reserve.generation, items)
    # Every rank of a tensor-parallel group computes the same; the first one has the logits.
    said: dict[str, Any] = core.model_executor.collective_rpc(WORKER_SCORE_METHOD, args=args)[0]
    if "error" in said:
        reserve.give_back()
    return {"refused": False, **said}


def call_core(client: Any, method: str, *args: Any) -> Any:
    """Call a method of the engine core over its client, in its thread."""
    if hasattr(client, "call_utility"):
        return client.call_utility(method, *args)
    return getattr(client.engine_core, method)(*args)


class CellsUnavailable(RouteError):
    """This engine cannot score cells; candidates have to go as requests."""


def ask(client: Any, items: Sequence[Cells]) -> list[CellScores]:
    """Score candidates over an engine core's client.

    Raises:
        CellsUnavailable: the engine cannot.
        RouteError: candidates are refused.

    """
    said = call_core(client, SCORE_METHOD, [item.to_wire() for item in items])
    if "error" in said:
        raise (RouteError if said["refused"] else CellsUnavailable)(said["error"])
    return [
        CellScores(
            np.frombuffer(values, "<f4").reshape(item.num_candidates, *item.target.shape),
            item.num_candidates * item.num_tokens,
            work,
        )
        for item, values, work in zip(items, said["scores"], said["work"], strict=True)
    ]
