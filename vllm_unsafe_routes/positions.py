"""Positions as people mean them: from the prompt's end, ranges, generated steps, turns of a chat, text.

A plan's own positions are numbers in one tokenised prompt. What is meant is turned into them here, once it is known which prompt
it is: for a plan that is bound to its prompt (`RoutePlan.for_prompt`), which another prompt then refuses.

    chat = Chat(tokenizer, messages)
    plan = RoutePlan().for_prompt(chat.token_ids)
    plan.disable(3, chat.where(role="user", turn=-1), [4, 5])
    plan.force(2, [-1], experts)                     # the prompt's last token
    plan.disable(2, ("prompt", -8, None), [7])       # its last eight
    plan.allow(4, ("generated", 0, 16), experts)     # the first sixteen generated tokens

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .binding import PromptBinding
from .errors import RouteError

RANGES = ("prompt", "generated")
# A span's name, numbers, or (what it is a range of, start, end).
Positions = str | Sequence[int] | tuple[str, int, int | None]


def resolve(positions: Any, prompt: PromptBinding | None) -> Any:
    """Positions as a directive has them: 0-based numbers; what is no range and not negative is handed back as it is.

    Args:
        positions: a span's name, integers, negative ones from the prompt's end, or ("prompt" or "generated", start, end), the end
            exclusive and None for the prompt's own.
        prompt: what the plan is bound to; None: nothing, and only a plan's own positions are known.

    Raises:
        RouteError: a plan that is not bound, a range that is empty or outside the prompt.

    """
    if isinstance(positions, str | bytes) or not isinstance(positions, Iterable):
        return positions
    found = tuple(positions)
    if found and found[0] in RANGES and isinstance(found[0], str):
        return _range(found, _bound(prompt, found))
    if not any(isinstance(value, int | np.integer) and value < 0 for value in found):
        return found
    tokens = _bound(prompt, found).tokens
    for value in found:
        if isinstance(value, int | np.integer) and value < -tokens:
            raise RouteError(f"position {value} is out of range for a prompt of {tokens} tokens (-{tokens} to {tokens - 1})")
    return tuple(int(value) + tokens if value < 0 else value for value in found)


def _bound(prompt: PromptBinding | None, meant: Any) -> PromptBinding:
    if prompt is None:
        raise RouteError(
            f"positions {str(meant)[:80]} are of a prompt that the plan does not know; bind it: RoutePlan.for_prompt(ids)"
        )
    return prompt


def _range(found: tuple[Any, ...], prompt: PromptBinding) -> tuple[int, ...]:
    kind, *ends = found
    numbers = [end for end in ends if end is not None]
    if len(ends) != 2 or ends[0] is None or not all(isinstance(end, int) and not isinstance(end, bool) for end in numbers):
        raise RouteError(f"positions {found!r} are not ({kind!r}, start, end) with two integers")
    start, end = ends
    if kind == "generated":
        if end is None or not 0 <= start < end:
            raise RouteError(f"positions {found!r}: generated steps count from 0, and need an end behind their start")
        return tuple(range(prompt.tokens + start, prompt.tokens + end))
    first, last = (value + prompt.tokens if value < 0 else value for value in (start, prompt.tokens if end is None else end))
    if not 0 <= first < last <= prompt.tokens:
        raise RouteError(f"positions {found!r} are empty or outside a prompt of {prompt.tokens} tokens")
    return tuple(range(first, last))


class Chat:
    """A chat as its model sees it, and where its parts are.

    Args:
        tokenizer: of transformers, a fast one with a chat template.
        messages: with `role` and `content`, a string.
        options: further arguments of the chat template, such as `tools` or `enable_thinking`.

    Attributes:
        token_ids: the prompt, up to where the assistant begins.

    Raises:
        RouteError: a tokenizer that does not say where its tokens are in the text, or a message without text.

    """

    def __init__(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RouteError("the tokenizer does not say where its tokens are in the text; it must be a fast one")
        for at, message in enumerate(messages):
            if not isinstance(message.get("content"), str):
                raise RouteError(f"message {at} has no text: its content is {type(message.get('content')).__name__}")
        self._messages = [dict(message) for message in messages]
        settings: dict[str, Any] = {"add_generation_prompt": True, **options}
        self._render = partial(tokenizer.apply_chat_template, tokenize=False, **settings)
        self._text = str(self._render(self._messages))
        encoded = tokenizer(self._text, add_special_tokens=False, return_offsets_mapping=True)
        self.token_ids: tuple[int, ...] = tuple(encoded["input_ids"])
        self._offsets = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]

    def where(self, role: str | None = None, turn: int = -1) -> list[int]:
        """Positions of one message's text, without the template's marks around it.

        Args:
            role: of the message; None: any.
            turn: which of the messages of that role, from 0 on, or from the end.

        Raises:
            RouteError: no such message, or a template that changes its text.

        """
        chosen = [at for at, message in enumerate(self._messages) if role in (None, message["role"])]
        if not -len(chosen) <= turn < len(chosen):
            raise RouteError(f"turn {turn} is out of range for {len(chosen)} messages" + (f" of role {role!r}" if role else ""))
        start, end = self._spans()[chosen[turn]]
        return self._positions(start, end)

    def find(self, text: str, occurrence: int = 0) -> list[int]:
        """Positions of a text in the whole prompt; `occurrence` counts from 0, or from the end."""
        starts = [at for at in range(len(self._text)) if self._text.startswith(text, at)] if text else []
        if not -len(starts) <= occurrence < len(starts):
            raise RouteError(f"the prompt has {text[:80]!r} {len(starts)} times; there is no occurrence {occurrence}")
        return self._positions(starts[occurrence], starts[occurrence] + len(text))

    def _positions(self, start: int, end: int) -> list[int]:
        """Tokens that have a part of the characters `start` to `end` (exclusive)."""
        return [at for at, (first, last) in enumerate(self._offsets) if first < end and last > start]

    def _spans(self) -> list[tuple[int, int]]:
        """Characters of each message's text: what is left between the template's own pieces."""
        marks = [f"zq{at}qz" for at in range(len(self._messages))]
        rest: str = self._render([{**message, "content": mark} for message, mark in zip(self._messages, marks, strict=True)])
        pieces = []
        for mark in marks:
            piece, found, rest = rest.partition(mark)
            if not found:
                raise RouteError("the chat template leaves a message out; say its text with find()")
            pieces.append(piece)
        for change in (str, str.strip):
            at, spans = 0, []
            for piece, message in zip(pieces, self._messages, strict=True):
                start = at + len(piece)
                at = start + len(change(message["content"]))
                spans.append((start, at))
            contents = [change(message["content"]) for message in self._messages]
            if "".join(part for pair in zip(pieces, contents, strict=True) for part in pair) + rest == self._text:
                return spans
        raise RouteError("the chat template changes a message's text; say it with find()")
