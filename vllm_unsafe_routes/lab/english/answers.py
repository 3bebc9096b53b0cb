"""Greedy answers of transformers to English questions, and what the dense model says, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..evaluate import generate

# Prompts of equal length are computed together, so many at a time.
_BATCH = 32


def chat_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a prompt that the model continues with its answer."""
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])


def answer(model: Any, tokenizer: Any, texts: Iterable[str], max_new_tokens: int) -> Iterable[tuple[str, list[int]]]:
    """Greedy answers as (question, token ids), batch by batch, in an order of their own."""
    by_length: dict[int, list[tuple[str, list[int]]]] = {}
    for text in dict.fromkeys(texts):
        ids = chat_ids(tokenizer, text)
        by_length.setdefault(len(ids), []).append((text, ids))
    for members in by_length.values():
        for at in range(0, len(members), _BATCH):
            batch = members[at : at + _BATCH]
            for (text, _), ids in zip(batch, generate(model, [ids for _, ids in batch], max_new_tokens), strict=True):
                yield text, ids


class DenseAnswers:
    """The dense model's answers, each computed once and appended to a file.

    Args:
        path: a JSON-lines file of `question` and `ids`; made if missing.
        model: the dense model.
        tokenizer: its tokenizer.
        max_new_tokens: where an answer is cut.
        say: gets a line of progress now and then.

    """

    def __init__(self, path: Path, model: Any, tokenizer: Any, max_new_tokens: int, say: Callable[[str], None]) -> None:
        self._path, self._model, self._tokenizer, self._length, self._say = path, model, tokenizer, max_new_tokens, say
        self._known: dict[str, list[int]] = {}
        if path.exists():
            # What a killed run left of its last line is computed again.
            *whole, _ = path.read_text(encoding="utf-8").split("\n")
            path.write_text("".join(line + "\n" for line in whole), encoding="utf-8")
            self._known = {one["question"]: one["ids"] for one in map(json.loads, whole)}

    def of(self, texts: Sequence[str]) -> dict[str, list[int]]:
        """Token ids of the answer to each question, without the end mark."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._known]
        with self._path.open("a", encoding="utf-8") as file:
            for done, (text, ids) in enumerate(answer(self._model, self._tokenizer, missing, self._length), 1):
                self._known[text] = ids
                file.write(json.dumps({"question": text, "ids": ids}) + "\n")
                file.flush()
                if done % 50 == 0 or done == len(missing):
                    self._say(f"the dense model's answers: {done} of {len(missing)}")
        return {text: self._known[text] for text in texts}
