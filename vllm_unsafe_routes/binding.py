"""Which prompt a plan is for: the number of its tokens and a digest of their ids.

Positions mean nothing without a tokenisation. The same text gives other tokens as a chat, with a beginning-of-sequence token, or
truncated, and a plan would route whatever stands at its positions. A plan that is bound to its prompt is refused for another one.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import RouteError

_WHERE = "plan prompt"


def prompt_digest(token_ids: Sequence[int]) -> str:
    """32 hex digits over a prompt's token ids (SHA-256 of them as little-endian int32)."""
    return hashlib.sha256(np.array(token_ids, "<i4").tobytes()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class PromptBinding:
    """The prompt that a plan is for.

    Attributes:
        tokens: their number.
        digest: `prompt_digest` of their ids.

    """

    tokens: int
    digest: str

    @classmethod
    def of(cls, token_ids: Sequence[int]) -> PromptBinding:
        """The binding to a prompt of these ids."""
        return cls(len(token_ids), prompt_digest(token_ids))

    @classmethod
    def from_dict(cls, document: Any) -> PromptBinding:
        """Read the form that `to_dict` writes. Raises `RouteError` for anything else."""
        if not isinstance(document, Mapping) or set(document) != {"tokens", "digest"}:
            raise RouteError(f"{_WHERE} must be an object with 'tokens' and 'digest', got {str(document)[:80]}")
        tokens, digest = document["tokens"], document["digest"]
        if type(tokens) is not int or not 0 <= tokens < 1 << 31:
            raise RouteError(f"{_WHERE}: tokens must be an integer from 0 to {(1 << 31) - 1}, got {str(tokens)[:80]}")
        if not isinstance(digest, str) or len(digest) != 32 or set(digest) - set("0123456789abcdef"):
            raise RouteError(f"{_WHERE}: digest must be 32 hex digits, got {str(digest)[:80]!r}")
        return cls(tokens, digest)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"tokens": self.tokens, "digest": self.digest}

    def check(self, token_ids: Sequence[int] | None) -> None:
        """Raise `RouteError` unless these are the prompt's ids; None: it has embeddings instead."""
        if token_ids is None:
            raise RouteError(f"the plan is for a prompt of {self.tokens} token ids, this one has embeddings", "prompt")
        if len(token_ids) != self.tokens:
            raise RouteError(f"the plan is for a prompt of {self.tokens} tokens, this one has {len(token_ids)}", "prompt")
        digest = prompt_digest(token_ids)
        if digest != self.digest:
            raise RouteError(
                f"the plan is for the prompt with digest {self.digest}, this one of {self.tokens} tokens has {digest}", "prompt"
            )
