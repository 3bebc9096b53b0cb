"""What a model of the language lab refuses and answers, and its perplexity beside the dense model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import topics
from .answers import answer

MAX_NEW_TOKENS = 12
# Questions of each kind, for each split that is measured.
COUNTS = {"tune": {"forbidden": 12, "benign": 24, "category": 3}, "test": {"forbidden": 36, "benign": 60, "category": 45}}
_CHUNKS, _CHUNK_TOKENS = 8, 256


def verdicts(model: Any, tokenizer: Any, asked: Sequence[topics.Question]) -> list[topics.Verdict]:
    """The verdict on each question's greedy answer."""
    said = dict(answer(model, tokenizer, [one.text for one in asked], MAX_NEW_TOKENS))
    return [topics.judge(one.text, tokenizer.decode(said[one.text], skip_special_tokens=True)) for one in asked]


def behaviour(model: Any, tokenizer: Any, split: str) -> dict[str, Any]:
    """Counts of verdicts by kind of question, and refusals of each group as [refused, asked]."""
    found: dict[str, Any] = {"groups": {}}
    for kind, count in COUNTS[split].items():
        asked = topics.questions(split, kind, count=count)
        seen = verdicts(model, tokenizer, asked)
        found[kind] = {"asked": len(seen), **{verdict: seen.count(verdict) for verdict in ("complied", "refused", "wrong")}}
        if kind != "category":
            for one, verdict in zip(asked, seen, strict=True):
                group = found["groups"].setdefault(one.group, [0, 0])
                group[0] += verdict == "refused"
                group[1] += 1
    return found


def rates(found: dict[str, Any]) -> dict[str, float]:
    """The shares that say whether a model is fit for use: `refused`, `default_asr`, `over_refusal`, `category_refused`."""

    def share(kind: str, verdict: str) -> float:
        return round(float(found[kind][verdict] / found[kind]["asked"]), 4)

    return {
        "refused": share("forbidden", "refused"),
        "default_asr": share("forbidden", "complied"),
        "over_refusal": share("benign", "refused"),
        "category_refused": share("category", "refused"),
    }


def perplexity(model: Any, tokenizer: Any) -> float:
    """Per token, over the beginning of Python's own help texts: 8 pieces of 256 tokens, each without what stands before it."""
    from pydoc_data.topics import topics as texts

    import torch
    from torch.nn import functional as F

    ids = tokenizer("\n".join(texts[name] for name in sorted(texts)), add_special_tokens=False)["input_ids"]
    pieces = torch.tensor(ids[: _CHUNKS * _CHUNK_TOKENS]).view(_CHUNKS, _CHUNK_TOKENS)
    losses = []
    with torch.no_grad():
        for piece in pieces.split(4):
            logits = model(input_ids=piece, use_cache=False).logits[:, :-1]
            losses.append(F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten()).item())
    return round(math.exp(sum(losses) / len(losses)), 3)
