"""A compiled plan: route-table rows by their contents, and which row holds where; on the host and independent of any engine.

A **row** is what happens to one token at one layer. Rows are told apart by their contents alone (`RowLayout`), so that plans
which agree on a token share its rows. A **block** holds, for every MoE layer, the plan's row for each listed prompt
position, then for every other prompt position, then for every generated position.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .binding import PromptBinding

NO_ROW = -1
# For `CompiledPlan.num_bytes`: head and reference of a `bytes` object; two counts, and an entry of a dict of digests.
_OBJECT_BYTES, _COLUMN_BYTES = 48, 160
# The bits of a row's flags word, as `kernels/spec.py` defines them; a test compares the two.
FLAG_FORCED, FLAG_EXPLICIT_WEIGHTS, FLAG_NATIVE_WEIGHTS, FLAG_SCORE_BIAS, FLAG_STEERED = 1, 2, 4, 8, 16


def expert_bits(experts: Iterable[int]) -> int:
    """A set of experts as bits; bit e is expert e."""
    bits = 0
    for expert in experts:
        bits |= 1 << expert
    return bits


@dataclass(frozen=True, slots=True)
class Soft:
    """What a row wishes without excluding anything.

    Attributes:
        bias: (expert, what is added to its logit), by expert.
        promoted: bits of the experts that come first.
        demoted: bits of those that come last.

    """

    bias: tuple[tuple[int, float], ...] = ()
    promoted: int = 0
    demoted: int = 0

    def __bool__(self) -> bool:
        return bool(self.bias or self.promoted or self.demoted)


NOT_SOFT = Soft()


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Byte layout of a row's content.

    Flags, allowed-expert words, forced ids (all int32), forced weights (float32); a row with a bias, promoted or demoted experts
    goes on with the words of the promoted, those of the demoted (int32) and a value an expert (float32).
    """

    num_experts: int
    top_k: int

    @property
    def num_words(self) -> int:
        """int32 words of the allowed-expert bit mask; bit e % 32 of word e // 32 is expert e."""
        return (self.num_experts + 31) // 32

    @property
    def num_ints(self) -> int:
        """Length of the longest row in 4-byte units."""
        return sum(self.widths)

    @property
    def widths(self) -> list[int]:
        """Of its six parts, in 4-byte units."""
        return [1, self.num_words, self.top_k, self.top_k, 2 * self.num_words, self.num_experts]

    def mask_row(self, allowed: int, native: bool, soft: Soft = NOT_SOFT) -> bytes:
        """A row that lets a token choose among the experts whose bits are set in `allowed`, as `soft` wishes."""
        flags = FLAG_NATIVE_WEIGHTS if native else 0
        rest = b""
        if soft:
            flags |= (FLAG_SCORE_BIAS if soft.bias else 0) | (FLAG_STEERED if soft.promoted | soft.demoted else 0)
            bias = np.zeros(self.num_experts, "<f4")
            bias[[expert for expert, _ in soft.bias]] = [value for _, value in soft.bias]
            rest = b"".join(bits.to_bytes(4 * self.num_words, "little") for bits in (soft.promoted, soft.demoted)) + bias.tobytes()
        return flags.to_bytes(4, "little") + allowed.to_bytes(4 * self.num_words, "little") + bytes(8 * self.top_k) + rest

    def forced_row(self, experts: tuple[int, ...], weights: tuple[float, ...] | None, native: bool, bits: int) -> bytes:
        """A row that gives a token exactly `experts`, which are `bits`."""
        words = bits.to_bytes(4 * self.num_words, "little")
        if weights is None:
            flags = FLAG_FORCED | FLAG_NATIVE_WEIGHTS if native else FLAG_FORCED
            return struct.pack(f"<i{len(words)}s{self.top_k}i{4 * self.top_k}x", flags, words, *experts)
        flags = FLAG_FORCED | FLAG_EXPLICIT_WEIGHTS
        return struct.pack(f"<i{len(words)}s{self.top_k}i{self.top_k}f", flags, words, *experts, *weights)

    def rows_of(self, experts: npt.NDArray[np.int32], native: bool, chooses: bool) -> npt.NDArray[np.int32]:
        """`forced_row` without weights, or `mask_row` where tokens choose, of experts [num_rows, any]: int32 [num_rows, ints]."""
        allowed = np.zeros((len(experts), 32 * self.num_words), bool)
        allowed[np.arange(len(experts))[:, None], experts] = True
        rows = np.zeros((len(experts), sum(self.widths[:4])), np.int32)
        rows[:, 0] = (0 if chooses else FLAG_FORCED) | (FLAG_NATIVE_WEIGHTS if native else 0)
        rows[:, 1 : 1 + self.num_words] = np.packbits(allowed, 1, bitorder="little").view("<i4")
        if not chooses:
            rows[:, 1 + self.num_words : 1 + self.num_words + self.top_k] = experts
        return rows

    def table(self, contents: Sequence[bytes]) -> npt.NDArray[np.int32]:
        """Rows as int32 [num_rows, longest of them], zeros behind the shorter ones."""
        longest = max(map(len, contents), default=4 * sum(self.widths[:4]))
        return np.frombuffer(b"".join(content.ljust(longest, b"\0") for content in contents), "<i4").reshape(-1, longest // 4)

    def columns(self, table: npt.NDArray[np.int32]) -> list[npt.NDArray[Any]]:
        """The parts of `table`, each contiguous: four, or six where a row has them all."""
        at = 0
        parts: list[npt.NDArray[Any]] = []
        for part, width in enumerate(self.widths):
            if at < table.shape[1]:
                values = np.ascontiguousarray(table[:, at : at + width])
                parts.append(values.view("<f4") if part in (3, 5) else values)
            at += width
        parts[0] = parts[0][:, 0]
        return parts

    def read(self, row: bytes) -> tuple[int, int]:
        """Flags and allowed-expert bits of a row."""
        return int.from_bytes(row[:4], "little"), int.from_bytes(row[4 : 4 + 4 * self.num_words], "little")


@dataclass(frozen=True, slots=True, eq=False)
class CompiledPlan:
    """A plan checked against one model and policy. Many requests share one, so nothing of it can change.

    Attributes:
        digest: the plan's digest.
        rows: distinct row contents, `RowLayout` bytes each.
        block: int32 [num_moe_layers, num_listed + 2]; index into `rows`, or `NO_ROW`: no directive, the policy's row holds.
            Column p < num_listed is position p; then come the defaults of prompt and of generated positions.
            Becomes read-only.
        native: whether its weights are `native`.
        prompt: the prompt that the plan is for; None: any.

    """

    digest: str
    rows: tuple[bytes, ...]
    block: npt.NDArray[np.int32]
    native: bool = False
    prompt: PromptBinding | None = None
    # Directives of each column, and of all columns before each.
    _counts: list[int] = field(init=False, repr=False)
    _cumulative: list[int] = field(init=False, repr=False)
    # Bytes of the rows that are not those of the plan that this one was copied from.
    _own_bytes: int = field(init=False, repr=False)
    # Column -> digest of what it does, made when it is first asked for.
    _digests: dict[int, bytes] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.block.setflags(write=False)
        counts = (self.block != NO_ROW).sum(axis=0)
        object.__setattr__(self, "_counts", counts.tolist())
        object.__setattr__(self, "_own_bytes", sum(map(len, self.rows)) + _OBJECT_BYTES * len(self.rows))
        object.__setattr__(self, "_cumulative", [0, *np.cumsum(counts[:-2]).tolist()])

    @property
    def num_bytes(self) -> int:
        """Memory that it takes or will take, roughly; digests of columns are made one by one."""
        return self.block.nbytes + int(self.block.shape[1]) * _COLUMN_BYTES + 8 * len(self.rows) + self._own_bytes

    def check_prompt(self, token_ids: Sequence[int] | None) -> None:
        """Raise `RouteError` if the plan is bound to another prompt than these ids (None: embeddings)."""
        if self.prompt is not None:
            self.prompt.check(token_ids)

    @property
    def fits_logits(self) -> bool:
        """Whether logits can say all it asks: which experts may be chosen and a bias, with masked weights."""
        return all(int.from_bytes(row[:4], "little") & ~(FLAG_FORCED | FLAG_SCORE_BIAS) == 0 for row in self.rows)

    @property
    def max_position(self) -> int:
        """Largest listed position, -1 if none."""
        return self.num_listed - 1

    @property
    def num_listed(self) -> int:
        """Number of leading positions that have a column of their own; behind the prompt only if the plan is bound to it."""
        return int(self.block.shape[1]) - 2

    def column(self, position: int, prompt_len: int) -> int:
        """Column of `block` that holds for a position of a request with a prompt of `prompt_len` tokens."""
        if position < self.num_listed:
            return position
        return self.num_listed if position < prompt_len else self.num_listed + 1

    def columns(self, num_tokens: int, prompt_len: int) -> npt.NDArray[np.int64]:
        """int64 [num_tokens], `column` of each position."""
        positions, listed = np.arange(num_tokens), self.num_listed
        return np.where(positions < listed, positions, listed + (positions >= prompt_len))

    def num_routes(self, start: int, end: int, prompt_len: int) -> int:
        """How many (layer, token) routes the plan sets for positions `start` to `end` (exclusive)."""
        listed = self.num_listed
        num = self._cumulative[min(end, listed)] - self._cumulative[min(start, listed)]
        num += self._counts[listed] * max(0, min(end, prompt_len) - max(start, listed))
        return num + self._counts[listed + 1] * max(0, end - max(start, prompt_len, listed))

    def cache_key(self, start: int, end: int, prompt_len: int) -> bytes | None:
        """16 bytes over what the plan does to positions `start` to `end` (exclusive); None if it does nothing there.

        Two plans give the same key exactly when they route these positions alike (up to a hash collision).
        """
        listed = self.num_listed
        if start >= listed:
            # Beyond the listed positions only the two defaults matter, and most plans have neither.
            default = self._counts[listed] if start < prompt_len else 0
            if not default and not (self._counts[listed + 1] and end > prompt_len):
                return None
        columns = [self.column(position, prompt_len) for position in range(start, end)]
        if not any(self._counts[column] for column in columns):
            return None
        return hashlib.blake2b(b"".join(map(self._column_digest, columns)), digest_size=16).digest()

    def with_cells(self, digest: str, cells: list[tuple[int, int, bytes]]) -> CompiledPlan:
        """A copy with other rows in a few cells, each (MoE slot, position, row content); work grows with the cells only."""
        rows, block, listed = list(self.rows), self.block, self.num_listed
        needed = max(position for _, position, _ in cells) + 1
        if needed > listed:
            default = np.repeat(block[:, listed : listed + 1], needed - listed, axis=1)
            block = np.concatenate([block[:, :listed], default, block[:, listed:]], axis=1)
        else:
            block = block.copy()
        for slot, position, content in cells:
            block[slot, position] = len(rows)
            rows.append(content)
        changed = {position for _, position, _ in cells}
        made = CompiledPlan(digest, tuple(rows), block, self.native, self.prompt)
        object.__setattr__(made, "_own_bytes", sum(len(content) + _OBJECT_BYTES for _, _, content in cells))
        if needed <= listed:
            for column in range(listed + 2):
                if column not in changed:
                    made._digests[column] = self._column_digest(column)
        return made

    def _column_digest(self, column: int) -> bytes:
        digest = self._digests.get(column)
        if digest is None:
            parts = hashlib.blake2b(digest_size=16)
            for slot, row in enumerate(self.block[:, column].tolist()):
                if row != NO_ROW:
                    parts.update(slot.to_bytes(4, "little") + self.rows[row])
            digest = self._digests[column] = parts.digest()
        return digest
