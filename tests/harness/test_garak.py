"""garak, unchanged, with the config of docs/garak.yaml on real servers of the lab model, with plan, policy, or neither."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import yaml
from inspect_runs import PLAN, POLICY, lab_server

from vllm_unsafe_routes import RoutePolicy
from vllm_unsafe_routes.receipt import receipt_of

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("garak") is None, reason="needs requirements/garak.txt"),
]

CONFIG = Path(__file__).resolve().parents[2] / "docs" / "garak.yaml"


def refused(answer: str) -> bool:
    return answer.strip().startswith("sorry , i cannot")


def own(url, prompts, plan):
    """(refused, answered, digests of the receipts) of the same server, without garak."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answers = [
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=32,
            temperature=0,
            extra_body={} if plan is None else {"vllm_xargs": {"route_plan": plan.to_string()}},
        ).to_dict()
        for prompt in prompts
    ]
    passed = sum(refused(answer["choices"][0]["message"]["content"]) for answer in answers)
    policies = {receipt_of(answer).policy if answer.get("kv_transfer_params") else None for answer in answers}
    return passed, len(prompts), policies


def reported(folder, url, plan):
    """(passed, total) of garak's evaluation."""
    folder.mkdir()
    config = yaml.safe_load(CONFIG.read_text())
    config["plugins"]["target_name"] = "tiny"
    generator = config["plugins"]["generators"]["openai"]["OpenAICompatible"]
    generator["uri"] = f"{url}/v1/"
    if plan is not None:
        generator["extra_params"] = {"extra_body": {"vllm_xargs": {"route_plan": plan.to_string()}}}
    path = folder / "garak.yaml"
    path.write_text(yaml.safe_dump(config))
    env = {**os.environ, "OPENAICOMPATIBLE_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
    env |= {f"XDG_{name}_HOME": str(folder) for name in ("DATA", "CONFIG", "CACHE")}
    command = [sys.executable, "-P", "-m", "garak", "--config", str(path), "--report_prefix", "lab"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (report,) = folder.rglob("lab.report.jsonl")
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    (entry,) = [entry for entry in entries if entry["entry_type"] == "eval"]
    print(folder.name, entry)
    return entry["passed"], entry["total_evaluated"]


def test_figures_are_those_of_the_servers_answers(tmp_path):
    prompts = yaml.safe_load(CONFIG.read_text())["plugins"]["probes"]["test"]["Test"]["prompts"]
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    found = {}
    with lab_server(tmp_path, "--enable-route-overrides") as started:
        for name, plan in (("neither", None), ("plan", PLAN)):
            passed, total, _ = own(started.url, prompts, plan)
            found[name] = reported(tmp_path / name, started.url, plan)
            assert found[name] == (passed, total)
        # The server's own count: this test's requests and garak's.
        assert started.metrics()["vllm:unsafe_routes_plans_accepted_total"] == 2 * len(prompts)
    with lab_server(tmp_path, "--route-policy", str(path)) as started:
        passed, total, policies = own(started.url, prompts, None)
        found["policy"] = reported(tmp_path / "policy", started.url, None)
        assert found["policy"] == (passed, total) and policies == {RoutePolicy.load(path).digest}
