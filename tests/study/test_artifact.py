"""An F-SOUR run as an attack artifact: the data set's index, queries that were needed, what decides the results."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_unsafe_routes.evaluation.datasets import PromptRecord
from vllm_unsafe_routes.search.fsour import FsourSettings
from vllm_unsafe_routes.study import artifact
from vllm_unsafe_routes.study.records import Fsour, Record, Work, read
from vllm_unsafe_routes.study.settings import FsourStudy, JudgeSettings

FOLDER = Path(__file__).parent / "folders" / "fsour-paper"
JUDGES = {"judge": "strict@m", "judges": [{"name": "strict@m", "role": "first", "identity": "aa@m", "threshold": 1.0}]}
WORK = Work(
    attack="fsour-paper",
    results=3,
    requests=9,
    candidates=8,
    tokens=90,
    computed_tokens=50,
    seconds=2.0,
    device="a processor, 2 threads",
    versions={"vllm": "0.32.0"},
)


def prompts():
    """The run's prompts, as rows 0, 3 and 5 of a file."""
    ids = dict.fromkeys(record.prompt for record in read(FOLDER, Fsour))
    return [PromptRecord(name, f"goal of {name}", "sure", row=row) for name, row in zip(ids, (0, 3, 5), strict=True)]


def test_an_artifact_of_a_run(tmp_path):
    study = FsourStudy(
        model="lab",
        data="x.csv",
        out=FOLDER,
        seeds=(0,),
        search=FsourSettings(num_draws=2),
        judging=JudgeSettings(max_new_tokens=32),
    )
    records = [*read(FOLDER, Record), WORK]
    artifact.write(tmp_path / "a.json", study, records, prompts(), JUDGES)
    document = json.loads((tmp_path / "a.json").read_text())
    entries = {entry["index"]: entry for entry in document["jailbreaks"]}
    assert sorted(entries) == [0, 3, 5]
    by_prompt = {record.prompt: record for record in records if isinstance(record, Fsour)}
    for prompt in prompts():
        found, entry = by_prompt[prompt.id], entries[prompt.row]
        # The plain answer; for each attempt the target's score and the answer; the draws up to the one that was kept.
        assert entry["number_of_queries"] == 1 + 2 * found.attempts + found.needed < found.candidates
        assert entry["queries_to_jailbreak"] == (entry["number_of_queries"] if found.success else None)
        assert entry["prompt_tokens"] < found.tokens
        assert entry.get("withheld", False) == (found.completion is None)
    parameters = document["parameters"]["method_parameters"]
    expected = {"strategy": "paper", "num_draws": 2, "tau": 0.8, "seed": 0, "max_new_tokens": 32, "plain_answer_first": True}
    assert expected.items() <= parameters.items()
    assert parameters["judges.strict@m.identity"] == "aa@m" and parameters["judges.strict@m.threshold"] == 1.0
    assert parameters["device"] == "a processor, 2 threads" and parameters["versions.vllm"] == "0.32.0"
    assert not any(name.startswith("adaptive") for name in parameters)


def test_without_a_plain_answer_there_is_one_query_less():
    records, known = list(read(FOLDER, Fsour)), {prompt.id: prompt for prompt in prompts()}
    with_it, without = (artifact.attempts_of(records, 0, known, plain) for plain in (True, False))
    assert [one.number_of_queries - other.number_of_queries for one, other in zip(with_it, without, strict=True)] == [1, 1, 1]
