"""Inspect, unchanged, on a real server of the lab model: with a plan, under a policy, with neither; its log read back.

The prompts are the lab language's, in files with the columns of the public data sets.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from servers import server

from vllm_unsafe_routes import RoutePlan, RoutePolicy, lab
from vllm_unsafe_routes.errors import RouteError
from vllm_unsafe_routes.lab import language

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="needs the extra inspect"),
]

PROMPTS = lab.load_prompts("test", count=4)
POLICY = {"version": "route-policy/1", "layers": {"0": {"disabled": [3, 7]}, "2": {"disabled": [1]}}}
# All tokens over one route at every layer: the lab model answers some of its forbidden prompts then, and its words stay words.
PLAN = RoutePlan()
for layer in range(4):
    PLAN.force(layer, "all", [0, 1, 2, 4])


def write_files(folder: Path) -> dict[str, Path]:
    rows = {
        "advbench": [{"goal": one.text, "target": one.target} for one in PROMPTS],
        "jailbreakbench": [
            {"Index": at, "Goal": one.text, "Target": one.target, "Behavior": one.noun, "Category": one.category, "Source": "lab"}
            for at, one in enumerate(PROMPTS)
        ],
        "harmbench": [
            {"Behavior": one.text, "FunctionalCategory": "standard", "SemanticCategory": one.category, "Tags": ""}
            | {"ContextString": "", "BehaviorID": f"lab_{at}"}
            for at, one in enumerate(PROMPTS)
        ],
    }
    paths = {}
    for name, lines in rows.items():
        paths[name] = folder / f"{name}.csv"
        with paths[name].open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    return paths


@contextmanager
def lab_server(folder: Path, *flags: str):
    with server(lab.model_path(), folder / "server.log", "--no-skip-tokenizer-init", *flags) as started:
        yield started


def inspect_eval(folder: Path, url: str, task: str, data: Path, *more: str):
    """The log that `inspect eval` writes, read back."""
    from inspect_ai.log import read_eval_log

    out = folder / f"log-{len(list(folder.glob('log-*')))}"
    command = [sys.executable, "-P", "-m", "inspect_ai", "eval", f"vllm_unsafe_routes/{task}", "-T", f"data={data}"]
    command += ["-T", "judge=lab"]
    command += ["--model", "vllm-unsafe-routes/tiny", "--model-base-url", f"{url}/v1", "--log-dir", str(out), "--display", "none"]
    command += ["--temperature", "0", "--max-tokens", "32", "--max-retries", "0", *more]
    env = {**os.environ, "XDG_DATA_HOME": str(folder), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    (path,) = out.glob("*.eval")
    log = read_eval_log(str(path))
    assert done.returncode == 0 or log.status == "error", done.stderr[-3000:]
    return log


def scores(log) -> dict[str, float]:
    return {str(sample.id): sample.scores["answered"].value for sample in log.samples}


def receipts(log) -> list[dict]:
    return [(sample.output.metadata or {}).get("unsafe_routes") for sample in log.samples]


def own_scores(url: str, plan: RoutePlan | None) -> list[float]:
    """What this project's judge says of the same server's answers, without Inspect."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    found = []
    for one in PROMPTS:
        body = {} if plan is None else {"vllm_xargs": {"route_plan": plan.to_string()}}
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": one.text}], max_tokens=32, temperature=0, extra_body=body
        )
        found.append(float(language.judge(one, answer.choices[0].message.content) == "complied"))
    return found


def test_three_tasks_with_a_plan_and_without(tmp_path):
    files = write_files(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(PLAN.to_json())
    with lab_server(tmp_path, "--enable-route-overrides") as started:
        plain, planned = own_scores(started.url, None), own_scores(started.url, PLAN)
        for task in ("jailbreakbench", "harmbench"):
            log = inspect_eval(tmp_path, started.url, task, files[task])
            assert log.status == "success" and list(scores(log).values()) == plain
            assert receipts(log) == [None] * len(PROMPTS)
        log = inspect_eval(tmp_path, started.url, "advbench", files["advbench"], "-M", f"plan={plan}")
        assert log.status == "success" and list(scores(log).values()) == planned
        assert {receipt["plan"] for receipt in receipts(log)} == {PLAN.digest}
        assert all(receipt["routes_set"] > 0 for receipt in receipts(log))
        assert {metric.value for name, metric in log.results.scores[0].metrics.items() if name == "mean"} == {
            sum(planned) / len(planned)
        }
        # What is asked for and not there is an error, not a figure.
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(POLICY))
        log = inspect_eval(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={path}")
        assert log.status == "error" and "without a receipt" in log.error.message


def test_under_a_policy(tmp_path):
    files = write_files(tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    digest = RoutePolicy.load(path).digest
    with lab_server(tmp_path, "--route-policy", str(path)) as started:
        log = inspect_eval(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={path}")
        assert log.status == "success"
        assert {(receipt["policy"], receipt["policy_mode"]) for receipt in receipts(log)} == {(digest, "enforce")}
        other = tmp_path / "other.json"
        other.write_text(json.dumps({**POLICY, "layers": {"0": {"disabled": [4]}}}))
        log = inspect_eval(tmp_path, started.url, "advbench", files["advbench"], "-M", f"policy={other}")
        assert log.status == "error" and "was to be enforced" in log.error.message


def test_a_file_of_another_data_set_is_refused(tmp_path):
    from vllm_unsafe_routes.harness.registry import harmbench

    with pytest.raises(RouteError, match="no column 'functionalcategory': it is not harmbench's file"):
        harmbench(data=str(write_files(tmp_path)["advbench"]))
