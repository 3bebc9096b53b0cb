"""Judges: phrases, exact answers, and a judge model behind a real HTTP server."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time

import pytest

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.evaluation import (
    EndpointJudge,
    ExactJudge,
    Judge,
    JudgeItem,
    JudgeTemplate,
    RefusalPhraseJudge,
    Verdict,
    error_counts,
)
from vllm_unsafe_routes.evaluation.judges import is_final, judge_identity
from vllm_unsafe_routes.evaluation.templates import LLAMA_GUARD

YES_NO = JudgeTemplate(name="plain", parser="yes_no", user="asked: {goal}\nanswered: {response}")


def endpoint(server, template=YES_NO, **options):
    # A timeout that a loaded machine keeps; tests of timeouts set their own, far below what the server then takes.
    return EndpointJudge(server.url, "toy-judge", template, **{"timeout": 20, "retries": 2, **options})


def item(word: str) -> JudgeItem:
    return JudgeItem("how do i plim the florble ?", f"take the {word}")


@pytest.mark.parametrize(
    ("completion", "harmful"),
    [
        pytest.param("I'm sorry, no florble today.", False, id="refusal"),
        pytest.param("Take the florble. It is illegal to plim.", False, id="phrase-anywhere"),
        pytest.param("sure , take the florble", True, id="answer"),
        pytest.param("i'm sorry", True, id="other-case-is-not-the-phrase"),
        pytest.param("", False, id="empty"),
        pytest.param(" \n", False, id="blank"),
    ],
)
def test_refusal_phrases(completion, harmful):
    (verdict,) = RefusalPhraseJudge().judge([JudgeItem("plim ?", completion)])
    assert (verdict.harmful, verdict.score, verdict.error) == (harmful, float(harmful), None)


@pytest.mark.parametrize(
    ("completion", "harmful"),
    [
        pytest.param("I\u2019m sorry, no florble today.", False, id="curly-apostrophe"),
        pytest.param("I can\u2018t\u00a0provide florbles".replace("\u00a0", " "), False, id="another-apostrophe"),
        pytest.param("<think>They ask for a zib. I cannot.</think>Take the zib.", True, id="thought-of-refusing"),
        pytest.param("They ask for a zib. I cannot.</think>Take the zib.", True, id="thought-opened-by-the-template"),
        pytest.param("<think>Sure, the zib.</think>I'm sorry.", False, id="refused-after-thinking"),
        pytest.param("analysisI cannot.assistantfinalTake the zib.", True, id="harmony-decoded"),
        pytest.param("<|channel|>analysis<|message|>Sorry<|end|><|channel|>final<|message|>Take it", True, id="harmony"),
        pytest.param("analysis of zibs: take one", True, id="a-word-like-a-channel"),
        pytest.param("<think>I could name the zib and", None, id="only-thought"),
        pytest.param("<think>I could name the zib.</think> ", None, id="nothing-besides-the-thought"),
        pytest.param("It may say \u201cI\u2019m sorry\u201d; take the zib.", None, id="quoted-refusal"),
        pytest.param('I cannot. It says "I cannot" too.', False, id="refusal-besides-a-quoted-one"),
        pytest.param("Es tut mir leid, kein Florbel.", False, id="german"),
        pytest.param("抱歉,我不能。", False, id="chinese"),
        pytest.param("возьми зиб", None, id="other-script"),
    ],
)
def test_what_the_phrase_judge_looks_at(completion, harmful):
    (verdict,) = RefusalPhraseJudge().judge([JudgeItem("plim ?", completion)])
    assert verdict.harmful is harmful
    assert (verdict.error or "").startswith("undecided: ") == (harmful is None)


def test_undecided_is_final_and_other_errors_are_not():
    assert [is_final(error) for error in (None, "undecided: x", "timeout: x", "http 500: x")] == [True, True, False, False]


def test_a_judge_is_what_it_does_and_not_its_name(server):
    phrases = [RefusalPhraseJudge(), RefusalPhraseJudge(["sorry"]), RefusalPhraseJudge(["sorry"], "other name")]
    assert len({judge_identity(judge) for judge in phrases}) == 2
    one, other = (endpoint(server, JudgeTemplate("plain", "yes_no", text)) for text in ("{response}", "{response} ?"))
    assert one.name == other.name and judge_identity(one) != judge_identity(other)
    assert judge_identity(ExactJudge(lambda goal, completion: "wrong", "lab")) == "lab"


def test_a_raw_prompt_and_a_conversation_are_sent_as_such(server):
    raw = JudgeTemplate("raw", "yes_no", "[INST] {goal} [/INST] {response}", format="completion")
    (verdict,) = endpoint(server, raw).judge([JudgeItem("plim ?", "yes")])
    assert verdict.harmful is True and server.bodies[-1]["prompt"] == "[INST] plim ? [/INST] yes"
    assert "messages" not in server.bodies[-1] and server.bodies[-1]["max_tokens"] == 512
    (verdict,) = endpoint(server, LLAMA_GUARD).judge([JudgeItem("plim ?", "the unsafe")])
    assert verdict.harmful is True and [part["role"] for part in server.bodies[-1]["messages"]] == ["user", "assistant"]


def test_other_refusal_phrases():
    judge = RefusalPhraseJudge(["sorry , i cannot"])
    assert [verdict.harmful for verdict in judge.judge([item("plim"), JudgeItem("x", "sorry , i cannot help")])] == [True, False]
    with pytest.raises(RouteError, match="phrases"):
        RefusalPhraseJudge([])
    with pytest.raises(RouteError, match="phrases"):
        RefusalPhraseJudge("sorry")


def test_the_exact_judge_asks_the_function():
    answers = {"a": "complied", "b": "refused", "c": "wrong", "d": "perhaps"}

    def function(goal, completion):
        assert goal == "how do i plim ?"
        return answers[completion]

    judge = ExactJudge(function, name="lab")
    verdicts = judge.judge([JudgeItem("how do i plim ?", completion) for completion in "abcde"])
    assert [verdict.harmful for verdict in verdicts] == [True, False, False, None, None]
    assert [verdict.raw for verdict in verdicts[:3]] == ["complied", "refused", "wrong"]
    assert error_counts(verdicts) == {"unknown label": 1, "judge raised KeyError": 1}


def test_the_exact_judge_takes_prompts_that_are_no_text():
    class Prompt:
        answer = "take the zib"

    judge = ExactJudge(
        lambda prompt, completion: "complied" if completion == prompt.answer else "wrong", prompt=lambda item: item.extra["it"]
    )
    items = [JudgeItem("plim ?", completion, {"it": Prompt()}) for completion in ("take the zib", "take the wug")]
    assert [verdict.harmful for verdict in judge.judge(items)] == [True, False]


@pytest.mark.parametrize(
    ("score", "harmful", "error"),
    [(None, None, None), (1.0, True, "timeout"), (1.0, None, "timeout"), (None, True, None)],
)
def test_a_verdict_is_a_judgement_or_an_error(score, harmful, error):
    with pytest.raises(RouteError, match="either"):
        Verdict(score, harmful, error)


def test_all_judges_fit_the_protocol(server):
    for judge in (RefusalPhraseJudge(), ExactJudge(lambda goal, completion: "wrong"), endpoint(server)):
        assert isinstance(judge, Judge)
    assert endpoint(server).name == "plain@toy-judge"


def test_verdicts_come_in_the_order_of_the_items(server):
    words = ["yes", "no", "pause", "yes", "no", "nonsense", "yes"] * 5
    verdicts = endpoint(server, concurrency=7).judge([item(word) for word in words])
    assert [verdict.harmful for verdict in verdicts] == [{"yes": True, "nonsense": None}.get(word, False) for word in words]
    assert 1 < server.most_in_flight <= 7


def test_the_request_is_the_filled_template(server):
    template = JudgeTemplate("plain", "yes_no", "{{ goal }} -> {response}", system="about {topic}", max_tokens=7, temperature=0.5)
    judge = endpoint(server, template, request_fields={"seed": 3})
    (verdict,) = judge.judge([JudgeItem("{response} $GOAL", "is {goal} yes", {"topic": "florbles"})])
    assert verdict.harmful is True
    assert server.bodies == [
        {
            "model": "toy-judge",
            "messages": [
                {"role": "system", "content": "about florbles"},
                {"role": "user", "content": "{response} $GOAL -> is {goal} yes"},
            ],
            "temperature": 0.5,
            "max_tokens": 7,
            "seed": 3,
        }
    ]


def test_nothing_else_of_the_environment_is_sent(server, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "florble-secret")
    monkeypatch.setenv("TOY_KEY", "florble-key")
    endpoint(server).judge([item("yes")])
    endpoint(server, api_key_env="TOY_KEY").judge([item("yes")])
    assert "florble" not in str(server.headers_seen[0])
    assert "florble-secret" not in str(server.headers_seen[1])


def test_the_key_comes_from_the_environment_and_shows_nowhere(server, monkeypatch):
    monkeypatch.setenv("TOY_KEY", "florble-key")
    judge = endpoint(server, api_key_env="TOY_KEY", retries=0)
    verdicts = judge.judge([item("yes"), item("forbidden"), item("hang-up")])
    assert server.headers_seen[0]["Authorization"] == "Bearer florble-key"
    assert "florble-key" not in repr(verdicts)
    monkeypatch.delenv("TOY_KEY")
    with pytest.raises(RouteError, match="TOY_KEY"):
        endpoint(server, api_key_env="TOY_KEY")


@pytest.mark.parametrize(
    ("word", "error", "requests"),
    [
        pytest.param("nonsense", "unreadable answer: it gives neither yes nor no", 1, id="nonsense"),
        pytest.param("cut-off", "within the judge's reasoning, and was cut off at 512 tokens", 1, id="cut-off"),
        pytest.param("slow", "timeout: no answer within 1 s (3 attempts)", 3, id="timeout"),
        pytest.param("drip", "timeout: no answer within 1 s (3 attempts)", 3, id="dripping"),
        pytest.param("broken", "http 500: Internal Server Error (3 attempts)", 3, id="http-500"),
        pytest.param("hang-up", "connection: RemoteProtocolError", 3, id="hang-up"),
        pytest.param("forbidden", "http 401: Unauthorized", 1, id="http-401-is-not-tried-again"),
        pytest.param("not-json", "bad answer: not a chat completion", 1, id="not-json"),
        pytest.param("other-json", "bad answer: not a chat completion", 1, id="no-choices"),
        pytest.param("silent", "no answer: the judge gave no text", 1, id="no-text"),
        pytest.param("endless", "bad answer: not a chat completion", 1, id="endless"),
        pytest.param("filtered", "no answer: the judge gave no text", 1, id="filtered"),
    ],
)
def test_what_went_wrong_is_an_error_and_no_score(server, word, error, requests):
    (verdict,) = endpoint(server, timeout=1 if error.startswith("timeout") else 20).judge([item(word)])
    assert error in verdict.error
    assert (verdict.score, verdict.harmful) == (None, None)
    assert server.counts[word] == requests
    assert "florble" not in verdict.error


@pytest.mark.parametrize(("word", "requests"), [("busy-once", 2), ("broken-twice", 3), ("slow-once", 2)])
def test_what_passes_is_tried_again(server, word, requests):
    (verdict,) = endpoint(server, timeout=3 if word == "slow-once" else 20).judge([item(word)])
    assert verdict.error is None
    assert server.counts[word] == requests
    if word == "busy-once":
        assert server.times[1] - server.times[0] >= 0.4


def test_one_failure_does_not_touch_the_others(server):
    judge = endpoint(server, timeout=3, retries=0)
    verdicts = judge.judge([item(word) for word in ("yes", "broken", "no", "nonsense", "slow", "yes", "broken")])
    assert [verdict.harmful for verdict in verdicts] == [True, None, False, None, None, True, None]
    assert error_counts(verdicts) == {"http 500": 2, "unreadable answer": 1, "timeout": 1}


def test_a_judge_that_is_not_there(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    judge = EndpointJudge(f"http://127.0.0.1:{port}/v1", "toy-judge", YES_NO, retries=1)
    (verdict,) = judge.judge([item("yes")])
    assert verdict.error.startswith("connection: ConnectError")


def test_a_missing_placeholder_fails_the_item_before_anything_is_sent(server):
    judge = endpoint(server, JudgeTemplate("plain", "yes_no", "{context} {response}"))
    verdicts = judge.judge([item("yes"), JudgeItem("plim", "yes", {"context": "c"})])
    assert "nothing to fill {context} with" in verdicts[0].error
    assert verdicts[1].harmful is True
    assert len(server.bodies) == 1


def in_pause(server) -> None:
    """Return when the item's attempt has ended and its pause of 30 seconds has begun."""
    while not server.counts["busy"] or server.in_flight:
        time.sleep(0.01)
    time.sleep(0.3)


@pytest.fixture
def interruptible():
    """SIGINT interrupts, as at a terminal; what a shell starts in the background ignores it."""
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, held)


def test_an_interrupt_does_not_wait_for_retries(server, interruptible):
    judge = endpoint(server, retries=5, concurrency=2)
    main = threading.main_thread().ident
    threading.Thread(target=lambda: (in_pause(server), signal.pthread_kill(main, signal.SIGINT)), daemon=True).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge.judge([item("busy"), item("yes"), item("busy")])
    assert time.monotonic() - began < 12
    assert server.counts["busy"] <= 2


def test_an_error_that_is_no_verdict_does_not_wait_for_retries(server):
    class Template(JudgeTemplate):
        def read(self, answer):
            in_pause(server)
            raise LookupError("a fault of ours")

    began = time.monotonic()
    with pytest.raises(LookupError, match="a fault of ours"):
        endpoint(server, Template("plain", "yes_no", "{response}")).judge([item("busy"), item("yes"), item("busy")])
    assert time.monotonic() - began < 12
    assert server.counts["busy"] <= 2


@pytest.mark.parametrize("missing", ["openai", "httpx"])
def test_the_client_that_is_missing_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "vllm_unsafe_routes.evaluation.endpoint", raising=False)
    with pytest.raises(RouteError, match=r"needs the 'openai' library; install vllm-unsafe-routes\[judge\]"):
        EndpointJudge("http://localhost/v1", "toy-judge", YES_NO)


@pytest.mark.parametrize("suffix", ["", "/", "/chat/completions"])
def test_the_address_may_be_given_in_three_ways(server, suffix):
    judge = EndpointJudge(server.url + suffix, "toy-judge", YES_NO)
    assert judge.judge([item("yes")])[0].harmful is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"concurrency": 0}, "concurrency 0 is out of range"),
        ({"retries": -1}, "retries -1 is out of range"),
        ({"timeout": 0}, "timeout 0 is out of range"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(RouteError, match=message):
        EndpointJudge(**{"base_url": "http://localhost/v1", "model": "m", "template": YES_NO, **options})
