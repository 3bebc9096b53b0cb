"""Judges by name, and in the form that searches call.

A name is `lab`, `topic`, `refusal`, `llama-guard` or a template file, with what a judge needs of its own behind it, such as
`strongreject.txt,threshold=published,system=grader.txt,model=my-judge`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..evaluation.judges import EndpointJudge, ExactJudge, Judge, JudgeItem, RefusalPhraseJudge, Verdict, judge_identity
from ..evaluation.templates import LLAMA_GUARD, PUBLISHED, JudgeTemplate, TemplateError, load_template, read_prompt
from ..search.rosais import Prompt
from .model import LAB, Item, Model
from .settings import JudgeSettings

# What may stand behind a judge's name; the last three replace the options of the same names.
KEYS = ("name", "parser", "threshold", "system", "harmful_answer", "format", "max_tokens", "url", "model", "key_env")
_ENDPOINT = ("url", "model", "key_env")

Ask = Callable[[Prompt, tuple[int, ...]], Verdict]


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


def topic_judge() -> ExactJudge:
    """The exact judge of the language lab: refused, or answered on the topic that was asked about."""
    from ..lab.english import topics

    return ExactJudge(topics.judge, "topic-exact")


# Judges that need nothing of the user's.
_PLAIN: dict[str, Callable[[], Judge]] = {LAB: lab_judge, "topic": topic_judge, "refusal": RefusalPhraseJudge}


def make_judge(name: str, settings: JudgeSettings) -> Judge:
    """A judge by name; see the module.

    Args:
        name: the judge's.
        settings: the endpoint.

    Raises:
        RouteError: an unknown name or key, a template without an endpoint, an environment variable that is not set.

    """
    kind, *parts = re.split(rf",(?=(?:{'|'.join(KEYS)})=)", name)
    own: dict[str, Any] = dict(part.split("=", 1) for part in parts)
    if kind in _PLAIN:
        if own:
            raise RouteError(f"judge {name!r}: {kind} takes no {', '.join(own)}")
        return _PLAIN[kind]()
    if kind != LLAMA_GUARD.name and not Path(kind.partition("#")[0]).exists():
        raise RouteError(f"judge {name!r} is not {', '.join(_PLAIN)}, {LLAMA_GUARD.name} or an existing template file")
    endpoint = replace(settings, **{key: own.pop(key) for key in _ENDPOINT if key in own})
    if endpoint.url is None or endpoint.model is None:
        raise RouteError(f"judge template {kind} needs --judge-url and --judge-model")
    template = _template(kind, own)
    return EndpointJudge(endpoint.url, endpoint.model, template, api_key_env=endpoint.key_env, timeout=settings.timeout)


def _template(kind: str, own: Mapping[str, Any]) -> JudgeTemplate:
    fields = dict(own)
    if "system" in fields:
        fields["system"] = read_prompt(fields["system"])
    if "threshold" in fields and fields["threshold"] != PUBLISHED:
        fields["threshold"] = _number(fields["threshold"], "threshold")
    if kind != LLAMA_GUARD.name:
        return load_template(kind, **fields)
    if set(fields) - {"name"}:
        raise TemplateError(f"judge {kind} takes no {', '.join(fields)}")
    return replace(LLAMA_GUARD, **fields)


def _number(text: str, what: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RouteError(f"a judge's {what} must be a number or {PUBLISHED!r}, got {text!r}") from None


@dataclass(frozen=True, slots=True)
class Panel:
    """The judges of a study.

    Attributes:
        first: whose verdict is the result.
        more: whose verdicts are reported beside it.
        stop: whose verdict ends a search; None: the first's.

    """

    first: Judge
    more: tuple[Judge, ...] = ()
    stop: Judge | None = None

    def __post_init__(self) -> None:
        names = [judge.name for judge in (self.first, *self.more)]
        if len(set(names)) < len(names) or (self.stop is not None and self.stop.name in names):
            raise RouteError(f"two judges have one name among {', '.join(names)}; put ,name=... behind one of them")

    @classmethod
    def of(cls, settings: JudgeSettings, default: str) -> Panel:
        """The judges that settings name; `default` where they name none."""
        more = tuple(make_judge(name, settings) for name in settings.more)
        stop = None if settings.stop is None else make_judge(settings.stop, settings)
        return cls(make_judge(settings.name or default, settings), more, stop)

    def settings(self) -> dict[str, Any]:
        """What a run's settings say of them: names, and what tells each from others of its name.

        A judge that is known by its name alone, such as the lab's, adds nothing to it.
        """
        document: dict[str, Any] = {"judge": self.first.name}
        if self.more or self.stop is not None or judge_identity(self.first) != self.first.name:
            roles = [("first", self.first), *(("more", judge) for judge in self.more)]
            roles += [] if self.stop is None else [("stop", self.stop)]
            document["judges"] = [{"name": judge.name, "role": role, **_described(judge)} for role, judge in roles]
        return document

    def on(self, model: Model, items: Mapping[str, Item]) -> dict[str, Any]:
        """The fields of a `Bench` that judge these prompts' answers."""
        ask = partial(judge_of, model, items=items)
        others = {judge.name: ask(judge) for judge in self.more}
        if self.stop is not None:
            others[self.stop.name] = ask(self.stop)
        return {"judge": ask(self.first), "others": others, "stop": None if self.stop is None else self.stop.name}


def _described(judge: Judge) -> dict[str, Any]:
    """What decides a judge's verdicts."""
    template = getattr(judge, "template", None)
    found: dict[str, Any] = {"identity": judge_identity(judge)}
    if isinstance(template, JudgeTemplate):
        found |= {"parser": template.parser, "threshold": template.decides_from}
    return found


def judge_of(model: Model, judge: Judge, items: Mapping[str, Item]) -> Ask:
    """The judge in the form that searches call: (prompt, generated token ids) -> `Verdict`."""

    def verdict(prompt: Prompt, token_ids: tuple[int, ...]) -> Verdict:
        item = items[prompt.id]
        return judge.judge([JudgeItem(item.record.goal, model.decode(token_ids), item.record.extra)])[0]

    return verdict
