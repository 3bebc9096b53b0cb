"""Positions as people mean them become numbers of one tokenised prompt."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from vllm_unsafe_routes import RouteError, RoutePlan, lab
from vllm_unsafe_routes.binding import PromptBinding
from vllm_unsafe_routes.positions import Chat, resolve

PROMPT = list(range(100, 120))


def bound():
    return RoutePlan().for_prompt(PROMPT)


@pytest.mark.parametrize(
    ("meant", "expected"),
    [
        pytest.param([-1], (19,), id="last"),
        pytest.param([0, -20, 3, -2][1:], (0, 3, 18), id="mixed"),
        pytest.param(range(4, 7), (4, 5, 6), id="range"),
        pytest.param(("prompt", 2, 5), (2, 3, 4), id="prompt-range"),
        pytest.param(("prompt", -3, None), (17, 18, 19), id="to-the-end"),
        pytest.param(("prompt", -5, -3), (15, 16), id="from-the-end"),
        pytest.param(("generated", 0, 3), (20, 21, 22), id="generated"),
        pytest.param(("generated", 4, 6), (24, 25), id="later-steps"),
        pytest.param("all", "all", id="span"),
    ],
)
def test_what_is_meant(meant, expected):
    assert resolve(meant, PromptBinding.of(PROMPT)) == expected
    (directive,) = bound().disable(3, meant, [1]).directives
    assert directive.positions == expected


@pytest.mark.parametrize(
    ("meant", "message"),
    [
        pytest.param([-21], r"position -21 is out of range for a prompt of 20 tokens \(-20 to 19\)", id="before"),
        pytest.param(("prompt", 5, 5), "are empty or outside a prompt of 20 tokens", id="empty"),
        pytest.param(("prompt", 5, 21), "are empty or outside a prompt of 20 tokens", id="past"),
        pytest.param(("prompt", 5), "with two integers", id="one-end"),
        pytest.param(("prompt", None, 3), "with two integers", id="no-start"),
        pytest.param(("generated", 0, 2.5), "with two integers", id="half"),
        pytest.param(("generated", 2, None), "need an end behind their start", id="open"),
        pytest.param(("generated", -2, 3), "generated steps count from 0", id="negative-step"),
    ],
)
def test_what_is_no_position_is_named(meant, message):
    with pytest.raises(RouteError, match=message):
        bound().disable(3, meant, [1])


@pytest.mark.parametrize("meant", [[-1], ("prompt", 0, 2), ("generated", 0, 2)], ids=str)
def test_only_a_bound_plan_knows_its_prompt(meant):
    with pytest.raises(RouteError, match=r"of a prompt that the plan does not know; bind it: RoutePlan.for_prompt\(ids\)"):
        RoutePlan().disable(3, meant, [1])


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(lab.model_path()))


MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "explain the way to fix kettle ."},
    {"role": "assistant", "content": "sure , explain"},
    {"role": "user", "content": "fix the kettle"},
]


def words(tokenizer, chat, positions):
    return tokenizer.decode([chat.token_ids[at] for at in positions])


def test_turns_of_a_chat(tokenizer):
    chat = Chat(tokenizer, MESSAGES)
    assert list(chat.token_ids) == tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    expected = {
        ("user", -1): "fix the kettle",
        ("user", 0): "explain the way to fix kettle .",
        ("assistant", 0): "sure , explain",
        (None, -1): "fix the kettle",
        (None, 2): "sure , explain",
    }
    for (role, turn), text in expected.items():
        assert words(tokenizer, chat, chat.where(role, turn)) == text
    with pytest.raises(RouteError, match="turn 2 is out of range for 2 messages of role 'user'"):
        chat.where("user", 2)
    with pytest.raises(RouteError, match="turn -1 is out of range for 0 messages of role 'tool'"):
        chat.where("tool")


def test_text_in_a_chat(tokenizer):
    chat = Chat(tokenizer, MESSAGES)
    first, last = chat.find("explain"), chat.find("explain", -1)
    assert words(tokenizer, chat, first) == words(tokenizer, chat, last) == "explain" and first < last
    assert words(tokenizer, chat, chat.find("fix kettle")) == "fix kettle"
    with pytest.raises(RouteError, match="the prompt has 'explain' 2 times; there is no occurrence 2"):
        chat.find("explain", 2)
    with pytest.raises(RouteError, match="the prompt has '' 0 times"):
        chat.find("")


TRIMMED = "{% for m in messages %}<|user|> {{ m['content'] | trim }} {% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("template", "content", "found"),
    [
        pytest.param(TRIMMED, "  fix kettle ", "fix kettle", id="trimmed"),
        pytest.param(TRIMMED.replace("trim", "upper"), "fix kettle", None, id="changed"),
        pytest.param("<|user|> <|assistant|>", "fix kettle", None, id="left-out"),
        # A word that is also in the template's own marks.
        pytest.param(TRIMMED.replace("<|user|>", "<|user|> fix"), "fix", "fix", id="a-word-of-the-template"),
    ],
)
def test_templates_that_change_what_they_are_given(template, content, found):
    tokenizer = AutoTokenizer.from_pretrained(str(lab.model_path()))
    tokenizer.chat_template = template
    chat = Chat(tokenizer, [{"role": "user", "content": content}])
    if found is None:
        with pytest.raises(RouteError, match=r"find\(\)"):
            chat.where()
    else:
        positions = chat.where()
        assert words(tokenizer, chat, positions) == found
        assert positions == chat.find(found, -1)


def test_what_is_no_chat_is_named(tokenizer):
    with pytest.raises(RouteError, match="it must be a fast one"):
        Chat(object(), MESSAGES)
    with pytest.raises(RouteError, match="message 0 has no text: its content is list"):
        Chat(tokenizer, [{"role": "user", "content": [{"type": "image"}]}])
