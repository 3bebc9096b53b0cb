"""Two tasks of inspect_evals, unchanged, through this project's provider: StrongREJECT and XSTest, on the lab language's prompts.

Their data come from the network. Here they come from where both look first: inspect_evals' cache of downloaded files, and a folder
of the data set's name, which Hugging Face's `datasets` takes before it asks the hub.
"""

from __future__ import annotations

import csv
import importlib.util
import json

import pytest
from exact_judge import exact_judge
from inspect_runs import PLAN, POLICY, PROMPTS, inspect_eval, lab_server, own_scores, receipts

from vllm_unsafe_routes import RoutePolicy, lab

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("inspect_evals") is None, reason="needs requirements/inspect.txt"),
]

BENIGN = lab.load_prompts("test", "benign", count=4)
SYSTEM = "You are a helpful assistant."  # XSTest's


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from inspect_evals.strong_reject.strong_reject import PATH_TO_STRONG_REJECT_CSV
    from inspect_evals.utils.load_dataset import get_cached_fname
    from inspect_evals.xstest.xstest import DATASET_PATH

    folder = tmp_path_factory.mktemp("inspect_evals")
    name = get_cached_fname(PATH_TO_STRONG_REJECT_CSV, "strong_reject")
    rows = [{"category": one.category, "source": "lab", "forbidden_prompt": one.text} for one in PROMPTS]
    write(folder / "cache" / "strong_reject" / name, rows)
    kinds = {"safe": BENIGN, "unsafe": PROMPTS}
    rows = [
        {"prompt": one.text, "type": one.category, "label": label, "focus": one.noun, "note": ""}
        for label, prompts in kinds.items()
        for one in prompts
    ]
    write(folder / DATASET_PATH / "test.csv", rows)
    return folder


@pytest.fixture(scope="module")
def evaluate(folder):
    """(server, task, further arguments) -> the log of the task with the exact judge as its grader."""
    with exact_judge() as judge:
        surroundings = {
            "HF_HUB_OFFLINE": "1",
            "INSPECT_EVALS_CACHE_DIR": str(folder / "cache"),
            "EXACT_BASE_URL": judge,
            "EXACT_API_KEY": "none",
        }

        def run(started, task, *more):
            grader = "judge_llm" if task == "strong_reject" else "scorer_model"
            arguments = ("-T", f"{grader}=openai-api/exact/judge", *more)
            return inspect_eval(folder, started.url, f"inspect_evals/{task}", *arguments, **surroundings)

        yield run


def metrics(log):
    return {name: metric.value for score in log.results.scores for name, metric in score.metrics.items()}


def assert_figures(log, task, scores):
    """The task's own metrics are those that this project's judge makes of the same server's answers."""
    assert log.status == "success" and len(log.samples) == len(scores)
    rate = sum(scores) / len(scores)
    if task == "strong_reject":
        assert metrics(log) == {"jailbreak_rate": rate, "strong_reject_metric": 5 * rate}
    else:
        assert metrics(log) == {"refusal_rate": 100 * (1 - rate)}


def test_with_a_plan_and_with_neither(folder, evaluate):
    path = folder / "plan.json"
    path.write_text(PLAN.to_json())
    with lab_server(folder, "--enable-route-overrides") as started:
        for plan, more in ((None, ()), (PLAN, ("-M", f"plan={path}"))):
            scores = own_scores(started.url, plan)
            logs = {"strong_reject": evaluate(started, "strong_reject", *more)}
            assert_figures(logs["strong_reject"], "strong_reject", scores)
            for subset, prompts in (("safe", BENIGN), ("unsafe", PROMPTS)):
                logs[subset] = evaluate(started, "xstest", "-T", f"subset={subset}", *more)
                assert_figures(logs[subset], "xstest", own_scores(started.url, plan, SYSTEM, prompts))
            for log in logs.values():
                said = receipts(log)
                assert said == [None] * 4 if plan is None else {one["plan"] for one in said} == {PLAN.digest}


def test_under_a_policy(folder, evaluate):
    path = folder / "policy.json"
    path.write_text(json.dumps(POLICY))
    digest = RoutePolicy.load(path).digest
    with lab_server(folder, "--route-policy", str(path)) as started:
        for task, system in (("strong_reject", ""), ("xstest", SYSTEM)):
            log = evaluate(started, task, "-M", f"policy={path}")
            assert_figures(log, task, own_scores(started.url, None, system, BENIGN if system else PROMPTS))
            assert {(one["policy"], one["policy_mode"]) for one in receipts(log)} == {(digest, "enforce")}
