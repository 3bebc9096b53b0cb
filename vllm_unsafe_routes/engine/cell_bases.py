"""The prompts whose cells are scored: what the worker keeps of each prompt's base plan, and where.

Of every token of a base the residual stream at each layer's input stays on the device, its K and V in KV blocks of its own, and
the log-probabilities of its target. A candidate begins there instead of at the first token and the first layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..cells import Cells
from ..compiled import NO_ROW
from ..compiler import PlanCompiler

Key = tuple[bytes, int, bytes, str | None]


@dataclass(frozen=True, slots=True, eq=False)
class BaseRoutes:
    """A base plan under the policy, as rows of a route table.

    Attributes:
        contents: int32 [num_rows, ints of the longest], `RowLayout` in 4-byte units.
        rows: int32 [MoE layers, num_tokens], index into `contents`, -1 where nothing is directed.
        native: whether moves keep the weights of the router's own scores.

    """

    contents: np.ndarray
    rows: np.ndarray
    native: bool

    @classmethod
    def of(cls, cells: Cells, compiler: PlanCompiler) -> BaseRoutes:
        """Give every token of the prompt and its target the plan's row, or the policy's."""
        plan, policy = compiler.compile_text(cells.plan), compiler.policy_rows()
        held = [content for content in policy if content is not None]
        policy_row = np.full(len(policy), NO_ROW, np.int32)
        policy_row[[slot for slot, content in enumerate(policy) if content is not None]] = np.arange(len(held))
        prompt_len = len(cells.prompt)
        block = plan.block[:, plan.columns(cells.num_tokens, prompt_len)]
        rows = np.where(block == NO_ROW, policy_row[:, None], block + len(held)).astype(np.int32)
        return cls(compiler.layout.table([*held, *plan.rows]), rows, plan.native)

    def first_difference(self, other: BaseRoutes) -> tuple[int, int, int] | None:
        """MoE slot, position and one past the last position at that slot, from which on routes may differ; None: they are equal."""
        ints = max(self.contents.shape[1], other.contents.shape[1])
        differs = (self._by_token(ints) != other._by_token(ints)).any(2)
        if not differs.any():
            return None
        slot = int(differs.any(1).argmax())
        return slot, int(differs.any(0).argmax()), int(differs[slot].nonzero()[0][-1]) + 1

    def _by_token(self, ints: int) -> np.ndarray:
        # One row more, which -1 finds: no row is all zeros.
        content: np.ndarray = widen([self.contents, np.zeros((1, ints), np.int32)])[self.rows]
        return content


def widen(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Tables of rows as one, int32 [all rows, ints of the longest], zeros behind shorter ones."""
    found = np.zeros((sum(map(len, tables)), max(table.shape[1] for table in tables)), np.int32)
    at = 0
    for table in tables:
        found[at : at + len(table), : table.shape[1]] = table
        at += len(table)
    return found


@dataclass(slots=True, eq=False)
class Base:
    """One prompt with its target under one plan.

    Attributes:
        cells: the prompt and the target.
        blocks: int64 [num_blocks], its KV blocks as indices into the reserve.
        routes: its plan.
        log_probs: float32 [num_rows, width], of the target, on the device; None until it is computed.
        token_ids: int32 [num_tokens], what the model reads.

    """

    cells: Cells
    blocks: np.ndarray
    routes: BaseRoutes
    log_probs: torch.Tensor | None = None
    token_ids: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = self.cells.token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens that the model reads."""
        return len(self.token_ids)


class Bases:
    """The bases of one worker; those that were not used for longest make room.

    Args:
        num_blocks: KV blocks for all of them: the reserve's from the second on.
        block_size: tokens of a block.

    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._free = list(range(num_blocks, 0, -1))
        self._held: OrderedDict[Key, Base] = OrderedDict()

    def find(self, cells: Cells) -> Base | None:
        """The base that `cells` ask for, where it is here as it is."""
        key = _key(cells)
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def take_over(self, cells: Cells, routes: BaseRoutes, used: Collection[Base]) -> tuple[Base, BaseRoutes] | None:
        """The same prompt and target under another plan, and what that plan was; it is the base of `cells` from now on."""
        wanted = _key(cells)
        for key, base in reversed(self._held.items()):
            if key[:3] == wanted[:3] and base not in used and base.log_probs is not None:
                before, base.routes = base.routes, routes
                self._held[wanted] = self._held.pop(key)
                return base, before
        return None

    def add(self, cells: Cells, routes: BaseRoutes, used: Collection[Base]) -> Base | None:
        """Room for a new base; None: the ones in use leave too little."""
        needed = -(-cells.num_tokens // self._block_size)
        for key, base in list(self._held.items()):
            if len(self._free) >= needed:
                break
            if base not in used:
                self._free += self._held.pop(key).blocks.tolist()
        if len(self._free) < needed:
            return None
        base = self._held[_key(cells)] = Base(cells, np.array([self._free.pop() for _ in range(needed)]), routes)
        return base


def _key(cells: Cells) -> Key:
    return cells.prompt.tobytes(), cells.target.shape[1], cells.target.tobytes(), cells.plan
