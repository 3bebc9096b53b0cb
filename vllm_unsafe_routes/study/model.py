"""A model with its tokenizer, and prompts in the form that searches need."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..evaluation.datasets import PromptRecord
from ..files import read_object
from ..search.rosais import Prompt
from ..shape import ModelShape

LAB = "lab"
# arXiv 2602.08621: the affirmative words of p(Q).
AFFIRMATIVE_WORDS = ("yes", "sure", "absolutely", "definitely", "indeed", "okay", "ok", "yeah", "yep", "here")


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt in the forms that search, generation and judging need.

    Attributes:
        record: as it was read.
        prompt: tokens of the rendered prompt and of the target.

    """

    record: PromptRecord
    prompt: Prompt


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A prompt-level defence: text around what the user says.

    Attributes:
        name: for reports.
        system: the system message, empty for none.
        prefix: put before the user's text.
        suffix: put behind it.

    """

    name: str = "none"
    system: str = ""
    prefix: str = ""
    suffix: str = ""

    def text(self, goal: str) -> str:
        """The user's message."""
        return " ".join(part for part in (self.prefix, goal, self.suffix) if part)


NO_WRAPPER = Wrapper()


class Model:
    """A model folder with its tokenizer.

    Args:
        name: a Hugging Face folder, or `lab` for the model that ships with this package.

    Raises:
        RouteError: no config there, or a model without MoE layers.

    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = name
        if name == LAB:
            from .. import lab

            self.path = str(lab.model_path())
        config = Path(self.path) / "config.json"
        if not config.exists():
            raise RouteError(f"model {name!r}: {config} does not exist; give a Hugging Face folder on this machine")
        self.config: Mapping[str, Any] = read_object(config, f"model {name!r}:")
        self.shape = ModelShape.from_hf_config(self.config)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: another machine has the folder of `lab` elsewhere.
        return Model, (self.name,)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ends of an answer."""
        path = Path(self.path) / "generation_config.json"
        ids = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)

    @cached_property
    def identity(self) -> str:
        """16 hex digits over the config and the weights' sizes and beginnings, to tell one model from another."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for path in sorted(Path(self.path).glob("*.safetensors")):
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
        return digest.hexdigest()[:16]

    def encode_chat(self, text: str, system: str = "") -> tuple[int, ...]:
        """Tokens of a chat with one user message, up to where the assistant begins; the bare text if there is no chat template."""
        if self.tokenizer.chat_template is None:
            return tuple(self.tokenizer(f"{system}\n{text}" if system else text)["input_ids"])
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": text})
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"])

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text that follows another, without special tokens."""
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def item(self, record: PromptRecord, wrapper: Wrapper = NO_WRAPPER) -> Item:
        """Render one prompt.

        Raises:
            RouteError: the tokenizer makes nothing of the target.

        """
        target = self.encode(record.target)
        if not target:
            raise RouteError(f"prompt {record.id}: the target {record.target!r} has no token in this tokenizer")
        return Item(record, Prompt(record.id, self.encode_chat(wrapper.text(record.request), wrapper.system), target))

    @cached_property
    def affirmative_token_ids(self) -> tuple[int, ...]:
        """The affirmative words that are one token, with and without leading space and capital."""
        found = []
        for word in AFFIRMATIVE_WORDS:
            for form in (word, word.capitalize(), f" {word}", f" {word.capitalize()}"):
                ids = self.encode(form)
                if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id:
                    found.append(ids[0])
        return tuple(dict.fromkeys(found))
