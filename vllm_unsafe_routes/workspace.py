"""What a campaign works on: a model, its tokenizer, prompts, a judge and a place to run requests, from names on a command line.

This module imports neither torch nor vLLM before an engine is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import RouteError
from .evaluation.datasets import PromptRecord, load_prompts
from .evaluation.judges import EndpointJudge, ExactJudge, Judge, JudgeItem, RefusalPhraseJudge, Verdict
from .policy import RoutePolicy
from .search.backend import Backend
from .search.rosais import Prompt
from .shape import ModelShape

LAB = "lab"
# arXiv 2602.08621: the affirmative words of p(Q).
AFFIRMATIVE_WORDS = ("yes", "sure", "absolutely", "definitely", "indeed", "okay", "ok", "yeah", "yep", "here")
_LAB_SOURCE = re.compile(r"lab:(?P<split>\w+)(:(?P<kind>\w+))?")


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
            from . import lab

            self.path = str(lab.model_path())
        config = Path(self.path) / "config.json"
        try:
            self.config: Mapping[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RouteError(f"model {name!r}: {config} does not exist; give a Hugging Face folder on this machine") from None
        except (OSError, ValueError) as error:
            raise RouteError(f"model {name!r}: {config} cannot be read: {error}") from None
        self.shape = ModelShape.from_hf_config(self.config.get("text_config", self.config))

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
        return Item(record, Prompt(record.id, self.encode_chat(wrapper.text(record.goal), wrapper.system), target))

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


def read_prompts(
    source: str, limit: int | None = None, seed: int = 0, categories: Sequence[str] | None = None
) -> list[PromptRecord]:
    """Prompts of a source: what `evaluation.load_prompts` takes, or `lab:SPLIT[:KIND]` for the lab language.

    Raises:
        RouteError: an unknown source, split or kind, or bad data.

    """
    found = _LAB_SOURCE.fullmatch(source)
    if found is None:
        return load_prompts(source, limit=limit, seed=seed, categories=categories)
    from . import lab

    kind = found["kind"] or "forbidden"
    try:
        prompts = lab.load_prompts(found["split"], kind, seed=seed, count=limit or 32)
    except ValueError as error:
        raise RouteError(f"{source}: {error}") from None
    return [
        PromptRecord(f"{kind}-{at}", prompt.text, prompt.target, prompt.category)
        for at, prompt in enumerate(prompts)
        if categories is None or prompt.category in categories
    ]


def lab_judge() -> ExactJudge:
    """The exact judge of the lab language; it knows every prompt of the language by its text."""
    from .lab import language

    prompts = [
        language.make_prompt(noun, verb, template, adjective, split)
        for split in language.SPLITS
        for kind in language.KINDS
        for noun, verb in language.pairs(split, kind)
        for template in language.templates(split, kind)
        for adjective in ("", *language.ADJECTIVES)
    ]
    known = {prompt.text: prompt for prompt in prompts}
    return ExactJudge(lambda goal, completion: language.judge(known[goal], completion), "lab-exact")


def make_judge(
    name: str, *, url: str | None = None, model: str | None = None, key_env: str | None = None, timeout: float = 60.0
) -> Judge:
    """A judge by name: `lab`, `refusal`, or a template file for a judge model behind an OpenAI-compatible endpoint.

    Args:
        name: the judge's.
        url: the endpoint, up to and including `/v1`.
        model: the judge model's name there.
        key_env: environment variable with the endpoint's key; None: it needs none.
        timeout: seconds for one try at the endpoint.

    Raises:
        RouteError: an unknown name, a template without an endpoint, an environment variable that is not set.

    """
    if name == LAB:
        return lab_judge()
    if name == "refusal":
        return RefusalPhraseJudge()
    if not Path(name).exists():
        raise RouteError(f"judge {name!r} is not lab, refusal or an existing template file")
    if url is None or model is None:
        raise RouteError(f"judge template {name} needs --judge-url and --judge-model")
    from .evaluation.templates import load_template

    return EndpointJudge(url, model, load_template(name), api_key_env=key_env, timeout=timeout)


def judge_of(model: Model, judge: Judge, items: Mapping[str, Item]) -> Any:
    """The judge in the form that searches call: (prompt, generated token ids) -> `Verdict`."""

    def verdict(prompt: Prompt, token_ids: tuple[int, ...]) -> Verdict:
        item = items[prompt.id]
        return judge.judge([JudgeItem(item.record.goal, model.decode(token_ids), item.record.extra)])[0]

    return verdict


@contextmanager
def open_backend(
    model: Model,
    *,
    servers: Sequence[str] = (),
    policy: RoutePolicy | None = None,
    jitter: Mapping[str, Any] | None = None,
    max_model_len: int | None = None,
    dtype: str = "auto",
    engine_args: Mapping[str, Any] | None = None,
) -> Iterator[Backend]:
    """An engine in this process, or the given servers, as a backend; ended with the context."""
    if servers:
        from .search.http import HttpBackend

        http = HttpBackend(servers, model.path, policy)
        try:
            yield http
        finally:
            http.close()
        return
    from .engine.launch import launch, shutdown

    try:
        llm = launch(
            model.path,
            policy=None if policy is None else policy.to_dict(),
            jitter=jitter,
            max_model_len=max_model_len,
            dtype=dtype,
            engine_args=engine_args,
        )
    except RouteError:
        raise
    except Exception as error:
        # vLLM raises whatever its configuration, loading and processes raise.
        raise RouteError(f"the engine for {model.name} did not start: {type(error).__name__}: {error}") from error
    try:
        from .engine.backend import EngineBackend

        yield EngineBackend(llm)
    finally:
        shutdown(llm)
