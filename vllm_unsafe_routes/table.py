"""Who holds which row of the route table: content-addressed ids with reference counts, and room in the arena of blocks.

The scheduler and every worker run the same bookkeeping: the scheduler to admit a request only once there is room for it, the
workers to know where to write. Only the workers have the memory itself.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .compiled import CompiledPlan


class RowStore:
    """Ids for row contents. The same content has the same id as long as somebody holds it.

    Args:
        capacity: number of ids, 0 to capacity - 1.

    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._id_of: dict[bytes, int] = {}
        self._holders: dict[bytes, int] = {}
        self._free = list(range(capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._id_of)

    def num_missing(self, contents: Iterable[bytes]) -> int:
        """How many of these distinct contents have no id yet."""
        return sum(content not in self._id_of for content in contents)

    def acquire(self, contents: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Hold every content once more.

        Returns:
            The ids, and the indices into `contents` of those that are new, whose memory must be written.

        """
        ids, new = [], []
        for at, content in enumerate(contents):
            row = self._id_of.get(content)
            if row is None:
                assert self._free, "the route table is full: its admission check was not asked"
                row = self._id_of[content] = self._free.pop()
                self._holders[content] = 0
                new.append(at)
            self._holders[content] += 1
            ids.append(row)
        return ids, new

    def release(self, contents: Sequence[bytes]) -> None:
        """Let go of what `acquire` held."""
        for content in contents:
            self._holders[content] -= 1
            if not self._holders[content]:
                del self._holders[content]
                self._free.append(self._id_of.pop(content))


class Ledger:
    """Room in the route table: rows, arena cells and request slots.

    Args:
        max_rows: rows of the table.
        max_cells: int32 entries of the arena that holds the plans' blocks.
        max_slots: requests with a plan that may be in the engine at one time.

    """

    def __init__(self, max_rows: int, max_cells: int, max_slots: int) -> None:
        self.rows = RowStore(max_rows)
        self.max_cells = max_cells
        self.max_slots = max_slots
        self._held: dict[str, CompiledPlan] = {}
        self.num_cells = 0

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._held

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def admits(self, plan: CompiledPlan) -> bool:
        """Whether there is room for one more request with this plan."""
        return (
            len(self._held) < self.max_slots
            and self.num_cells + plan.block.size <= self.max_cells
            and len(self.rows) + self.rows.num_missing(plan.rows) <= self.rows.capacity
        )

    def add(self, req_id: str, plan: CompiledPlan) -> None:
        """Book room for a request."""
        self.rows.acquire(plan.rows)
        self._held[req_id] = plan
        self.num_cells += plan.block.size

    def remove(self, req_id: str) -> None:
        """Give the room back; unknown ids are fine."""
        plan = self._held.pop(req_id, None)
        if plan is not None:
            self.rows.release(plan.rows)
            self.num_cells -= plan.block.size


class Arena:
    """First-fit places for blocks in one flat array of int32 entries.

    Args:
        capacity: number of entries.

    Attributes:
        num_placed: blocks that were placed so far: as long as it stands, a block that is here is what it was.

    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_placed = 0
        self._places: dict[str, tuple[int, int]] = {}

    def place(self, req_id: str, size: int) -> tuple[int, list[tuple[str, int, int]]]:
        """Find room for `size` entries.

        Returns:
            The base, and the blocks that had to move to make room as (req_id, new base, size); they move to smaller
            bases in this order. Empty in all but fragmented cases.

        """
        moved: list[tuple[str, int, int]] = []
        self.num_placed += 1
        base = self._first_gap(size)
        if base is None:
            end = 0
            for name, (old, length) in sorted(self._places.items(), key=lambda entry: entry[1]):
                if old != end:
                    self._places[name] = (end, length)
                    moved.append((name, end, length))
                end += length
            assert end + size <= self.capacity, "the arena is full: its admission check was not asked"
            base = end
        self._places[req_id] = (base, size)
        return base, moved

    def free(self, req_id: str) -> None:
        """Give a block's room back."""
        del self._places[req_id]

    def _first_gap(self, size: int) -> int | None:
        end = 0
        for base, length in sorted(self._places.values()):
            if base - end >= size:
                return end
            end = base + length
        return end if self.capacity - end >= size else None
