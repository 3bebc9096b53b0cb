"""The prompts whose cells are scored: what the worker keeps of each prompt's base plan, and where.

Of every token of a base the residual stream at each layer's input stays on the device, its K and V in KV blocks of its own, and
the log-probabilities of its target. A candidate begins there instead of at the first token and the first layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

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
        num_tokens: of these.

    """

    cells: Cells
    blocks: np.ndarray
    routes: BaseRoutes
    log_probs: torch.Tensor | None = None
    token_ids: np.ndarray = field(init=False)
    num_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = self.cells.token_ids
        self.num_tokens = len(self.token_ids)


class BaseArrays(NamedTuple):
    """The bases of one call, as arrays; what belongs to tokens or to rows of the target stands one base after the other.

    Attributes:
        numbers: each base's number.
        num_tokens: int [num_bases].
        last_prompt: int [num_bases], the position of the last token of the prompt: the first that is scored.
        num_rows: int [num_bases], rows of the target.
        blocks: int64 [num_bases, width], KV blocks as indices into the reserve.
        token_start: int [num_bases], where a base's tokens begin.
        token_ids: int32 [tokens].
        routes: int32 [MoE layers, tokens], index into `contents`, -1 where nothing is directed.
        contents: int32 [rows of a route table, ints], as of `BaseRoutes`.
        row_start: int [num_bases], where a base's rows of the target begin.
        targets: int32 [rows, width], the tokens whose log-probabilities are asked for.

    """

    numbers: dict[Base, int]
    num_tokens: np.ndarray
    last_prompt: np.ndarray
    num_rows: np.ndarray
    blocks: np.ndarray
    token_start: np.ndarray
    token_ids: np.ndarray
    routes: np.ndarray
    contents: np.ndarray
    row_start: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, bases: Sequence[Base], width: int) -> BaseArrays:
        """From bases, of which some may be the same, with block tables of a width."""
        numbers = {base: number for number, base in enumerate(dict.fromkeys(bases))}
        num_tokens = np.array([one.num_tokens for one in numbers])
        num_rows = np.array([len(one.cells.target) for one in numbers])
        blocks = np.zeros((len(numbers), width), np.int64)
        for row, one in zip(blocks, numbers, strict=True):
            row[: len(one.blocks)] = one.blocks
        contents = [one.routes.contents for one in numbers]
        first_row = np.repeat(starts_of([len(content) for content in contents]), num_tokens)
        routes = np.concatenate([one.routes.rows for one in numbers], 1)
        return cls(
            numbers=numbers,
            num_tokens=num_tokens,
            last_prompt=num_tokens - num_rows,
            num_rows=num_rows,
            blocks=blocks,
            token_start=starts_of(num_tokens),
            token_ids=np.concatenate([one.token_ids for one in numbers]),
            routes=np.where(routes == NO_ROW, NO_ROW, routes + first_row).astype(np.int32),
            contents=widen(contents),
            row_start=starts_of(num_rows),
            targets=widen([one.cells.target for one in numbers]),
        )


def starts_of(lens: Sequence[int] | np.ndarray) -> np.ndarray:
    """int [num], where each of some pieces begins that stand one behind the other."""
    starts: np.ndarray = np.cumsum(lens) - lens
    return starts


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
