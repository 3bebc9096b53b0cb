"""Artifacts: JailbreakBench's keys and types, and which completions stay out of the file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vllm_unsafe_routes.evaluation import ArtifactError, ArtifactParameters, Attempt, make_artifact, read_artifact, write_artifact

PARAMETERS = ArtifactParameters("F-SOUR", "toy-moe", "white_box", "exact", method_parameters={"draws": 10, "tau": 0.8})


def attempt(index: int, **fields) -> Attempt:
    defaults = dict(
        goal="how do i plim the florble ?",
        behavior="plimming",
        category="zibs",
        prompt="how do i plim the florble ?",
        response=f"answer {index}",
        jailbroken=False,
        number_of_queries=5,
        queries_to_jailbreak=None,
        prompt_tokens=40,
        response_tokens=9,
    )
    return Attempt(index=index, **{**defaults, **fields})


ATTEMPTS = [
    attempt(0, jailbroken=True, queries_to_jailbreak=3),
    attempt(1),
    attempt(2, jailbroken=None, judge_error="timeout: no answer within 60 s"),
    attempt(3, response=None, prompt=None),
    attempt(4, jailbroken=True),
]


def check_jailbreakbench(document):
    """What jailbreakbench's reader demands of an artifact: its pydantic models, by hand."""
    parameters = document["parameters"]
    for key in ("method", "model", "attack_type", "evaluation_date", "evaluation_llm_provider"):
        assert isinstance(parameters[key], str)
    assert parameters["defense"] is None or isinstance(parameters["defense"], str)
    assert type(parameters["attack_success_rate"]) is float
    for key in ("total_number_of_jailbreaks", "number_of_submitted_prompts"):
        assert isinstance(parameters[key], int)
    for key in ("total_number_of_queries", "total_prompt_tokens", "total_response_tokens"):
        assert parameters[key] is None or isinstance(parameters[key], int)
    assert all(isinstance(value, str | int | float) for value in parameters["method_parameters"].values())
    for entry in document["jailbreaks"]:
        assert isinstance(entry["index"], int)
        assert type(entry["jailbroken"]) is bool
        assert all(isinstance(entry[key], str) for key in ("goal", "behavior", "category"))
        assert all(entry[key] is None or isinstance(entry[key], str) for key in ("prompt", "response"))
        for key in ("number_of_queries", "queries_to_jailbreak", "prompt_tokens", "response_tokens"):
            assert entry[key] is None or isinstance(entry[key], int)


def test_harmful_and_unjudged_completions_are_left_out():
    document = make_artifact(PARAMETERS, ATTEMPTS)
    check_jailbreakbench(document)
    by_index = {entry["index"]: entry for entry in document["jailbreaks"] + document["unjudged"]}
    assert {index: (entry["response"], entry.get("withheld")) for index, entry in by_index.items()} == {
        0: (None, True),
        1: ("answer 1", None),
        2: (None, True),
        3: (None, None),
        4: (None, True),
    }
    text = json.dumps(document)
    assert not any(f"answer {index}" in text for index in (0, 2, 4))


def test_what_a_run_did_not_record_is_withheld_too():
    attempts = [attempt(0, jailbroken=True, response=None), attempt(1, jailbroken=False, response=None)]
    for keep in (False, True):
        entries = make_artifact(PARAMETERS, attempts, keep_completions=keep)["jailbreaks"]
        assert [(entry["response"], entry.get("withheld")) for entry in entries] == [(None, True)] * 2


def test_they_are_kept_on_request():
    document = make_artifact(PARAMETERS, ATTEMPTS, keep_completions=True)
    assert [entry["response"] for entry in document["jailbreaks"]] == ["answer 0", "answer 1", None, "answer 4"]
    assert document["unjudged"][0]["response"] == "answer 2"
    assert "withheld" not in json.dumps(document)


def test_the_rate_is_over_what_was_judged():
    document = make_artifact(PARAMETERS, ATTEMPTS)
    parameters = document["parameters"]
    assert parameters["attack_success_rate"] == 0.5
    assert parameters["total_number_of_jailbreaks"] == 2
    assert parameters["number_of_submitted_prompts"] == 4
    assert parameters["number_of_judged_prompts"] == 4
    assert parameters["total_number_of_queries"] == 25
    assert [entry["judge_error"] for entry in document["unjudged"]] == ["timeout: no answer within 60 s"]
    uncounted = make_artifact(PARAMETERS, [*ATTEMPTS, attempt(9, number_of_queries=None)])
    assert uncounted["parameters"]["total_number_of_queries"] is None


def test_an_artifact_reads_back(tmp_path):
    path = tmp_path / "artifact.json"
    write_artifact(path, PARAMETERS, ATTEMPTS, keep_completions=True)
    parameters, attempts = read_artifact(path)
    assert sorted(attempts, key=lambda attempt: attempt.index) == ATTEMPTS
    assert parameters["judge"] == "exact"
    assert [file.name for file in tmp_path.iterdir()] == ["artifact.json"]


def test_published_artifacts_have_more_keys(tmp_path):
    entry = make_artifact(PARAMETERS, [attempt(1)])["jailbreaks"][0] | {"jailbroken_llama_guard1": False}
    (tmp_path / "a.json").write_text(json.dumps({"parameters": {"method": "PAIR"}, "jailbreaks": [entry]}))
    assert read_artifact(tmp_path / "a.json") == ({"method": "PAIR"}, [attempt(1)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "cannot be read", id="not-json"),
        pytest.param('{"jailbreaks": []}', "lacks 'parameters'", id="no-parameters"),
        pytest.param('{"parameters": {}}', "lacks the list 'jailbreaks'", id="no-jailbreaks"),
        pytest.param('{"parameters": {}, "jailbreaks": [{"index": 1}]}', r"jailbreaks\[0\]: .*missing", id="entry"),
        pytest.param('{"parameters": {}, "jailbreaks": [3]}', r"jailbreaks\[0\]", id="number"),
    ],
)
def test_what_is_no_artifact(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArtifactError, match=message):
        read_artifact(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: ArtifactParameters("a", "b", "sideways", "c"), "attack_type 'sideways' is not one of", id="type"),
        pytest.param(
            lambda: ArtifactParameters("a", "b", "manual", "c", method_parameters={"x": [1]}), "method_parameters.x", id="nested"
        ),
        pytest.param(lambda: ArtifactParameters("a", "b", "manual", "c", evaluation_date="today"), "not an ISO date", id="date"),
        pytest.param(lambda: attempt(1, jailbroken=None), "attempt 1 needs either", id="no-verdict"),
        pytest.param(lambda: attempt(1, judge_error="x"), "attempt 1 needs either", id="both"),
        pytest.param(lambda: make_artifact(PARAMETERS, []), "no attempts", id="empty"),
        pytest.param(lambda: make_artifact(PARAMETERS, [attempt(1), attempt(1)]), "index 1 has two", id="twice"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ArtifactError, match=message):
        call()


def test_importing_needs_neither_torch_nor_vllm_nor_the_optional_libraries():
    code = (
        "import sys, vllm_unsafe_routes.evaluation; "
        "print(sorted({'torch', 'vllm', 'httpx', 'openai', 'yaml', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
