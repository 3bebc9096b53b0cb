"""Inspect, unchanged, on a real server of the lab model: with a plan, under a policy, with neither; its log read back.

The prompts are the lab language's, in files with the columns of the public data sets.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from inspect_runs import PLAN, POLICY, PROMPTS, inspect_eval, lab_server, own_scores, receipts, write_files

from vllm_unsafe_routes import RoutePolicy
from vllm_unsafe_routes.errors import RouteError

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="needs the extra inspect"),
]


def run(folder: Path, url: str, task: str, data: Path, *more: str):
    return inspect_eval(folder, url, f"vllm_unsafe_routes/{task}", "-T", f"data={data}", "-T", "judge=lab", *more)


def scores(log) -> dict[str, float]:
    return {str(sample.id): sample.scores["answered"].value for sample in log.samples}


def test_three_tasks_with_a_plan_and_without(tmp_path):
    files = write_files(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(PLAN.to_json())
    with lab_server(tmp_path, "--enable-route-overrides") as started:
        plain, planned = own_scores(started.url, None), own_scores(started.url, PLAN)
        for task in ("jailbreakbench", "harmbench"):
            log = run(tmp_path, started.url, task, files[task])
            assert log.status == "success" and list(scores(log).values()) == plain
            assert receipts(log) == [None] * len(PROMPTS)
        log = run(tmp_path, started.url, "advbench", files["advbench"], "-M", f"plan={plan}")
        assert log.status == "success" and list(scores(log).values()) == planned
        assert {receipt["plan"] for receipt in receipts(log)} == {PLAN.digest}
        assert all(receipt["routes_set"] > 0 for receipt in receipts(log))
        assert {metric.value for name, metric in log.results.scores[0].metrics.items() if name == "mean"} == {
            sum(planned) / len(planned)
        }
        # What is asked for and not there is an error, not a figure.
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(POLICY))
        log = run(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={path}")
        assert log.status == "error" and "without a receipt" in log.error.message


def test_under_a_policy(tmp_path):
    files = write_files(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    digest = RoutePolicy.load(path).digest
    with lab_server(tmp_path, "--route-policy", str(path)) as started:
        log = run(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={path}")
        assert log.status == "success"
        assert {(receipt["policy"], receipt["policy_mode"]) for receipt in receipts(log)} == {(digest, "enforce")}
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**POLICY, "layers": {"0": {"disabled": [4]}}}))
        log = run(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={other}")
        assert log.status == "error" and "was to be enforced" in log.error.message


def test_a_file_of_another_data_set_is_refused(tmp_path):
    from vllm_unsafe_routes.harness.registry import harmbench

    with pytest.raises(RouteError, match="no column 'functionalcategory': it is not harmbench's file"):
        harmbench(data=str(write_files(tmp_path)["advbench"]))
