"""Judges by name, and in the form that searches call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import RouteError
from ..evaluation.judges import EndpointJudge, ExactJudge, Judge, JudgeItem, RefusalPhraseJudge, Verdict
from ..search.rosais import Prompt
from .model import LAB, Item, Model
from .settings import JudgeSettings


def lab_judge() -> ExactJudge:
    """The exact judge of the lab language; it knows every prompt of the language by its text."""
    from ..lab import language

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


def make_judge(name: str, settings: JudgeSettings) -> Judge:
    """A judge by name: `lab`, `refusal`, or a template file for a judge model behind an OpenAI-compatible endpoint.

    Args:
        name: the judge's.
        settings: the endpoint.

    Raises:
        RouteError: an unknown name, a template without an endpoint, an environment variable that is not set.

    """
    if name == LAB:
        return lab_judge()
    if name == "refusal":
        return RefusalPhraseJudge()
    if not Path(name).exists():
        raise RouteError(f"judge {name!r} is not lab, refusal or an existing template file")
    if settings.url is None or settings.model is None:
        raise RouteError(f"judge template {name} needs --judge-url and --judge-model")
    from ..evaluation.templates import load_template

    return EndpointJudge(settings.url, settings.model, load_template(name), api_key_env=settings.key_env, timeout=settings.timeout)


def judge_of(model: Model, judge: Judge, items: Mapping[str, Item]) -> Callable[[Prompt, tuple[int, ...]], Verdict]:
    """The judge in the form that searches call: (prompt, generated token ids) -> `Verdict`."""

    def verdict(prompt: Prompt, token_ids: tuple[int, ...]) -> Verdict:
        item = items[prompt.id]
        return judge.judge([JudgeItem(item.record.goal, model.decode(token_ids), item.record.extra)])[0]

    return verdict
