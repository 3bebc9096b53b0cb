"""EleutherAI's lm-eval, unchanged, against a real server of the lab model: under a plan, under a policy, under neither."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from inspect_runs import PLAN
from servers import server

from vllm_unsafe_routes import RoutePolicy
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.receipt import Receipt

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs requirements/lm-eval.txt"),
]

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 12
# All but top_k experts of every layer: one route for all tokens. The lab model was trained under route noise and answers even so.
POLICY = {"version": "route-policy/1", "layers": {str(layer): {"disabled": list(range(12))} for layer in range(4)}}


def figures(folder, *flags, plan=None):
    """What lm-eval reports of a server with these flags: exact match and accuracy; and the server's digest of its policy.

    With a plan, the server's own count of accepted plans stands in the policy's place.
    """
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    make = [sys.executable, "-P", str(ROOT / "benchmarks" / "lm_eval" / "make_tasks.py"), "--out", str(folder / "tasks")]
    subprocess.run([*make, "--limit", str(NUM_PROMPTS)], env=env, check=True, timeout=120)
    # lm-eval reads text, so the server needs its tokenizer.
    with server(model_path(), folder / "log.txt", "--no-skip-tokenizer-init", *flags) as started:
        command = [sys.executable, "-P", "-m", "lm_eval", "run", "--model", "local-completions", "--apply_chat_template"]
        command += ["--tasks", "lab_answer,lab_choice", "--include_path", str(folder / "tasks")]
        arguments = f"model=tiny,base_url={started.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={model_path()}"
        if plan is not None:
            command += ["--gen_kwargs", json.dumps({"vllm_xargs": {"route_plan": plan.to_string()}})]
        command += ["--output_path", str(folder / "figures.json"), "--model_args", f"{arguments},max_length=256"]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-5000:]
        answer = started.client.completions.create(model="tiny", prompt="<bos>", max_tokens=1)
        accepted = started.metrics().get("vllm:unsafe_routes_plans_accepted_total")
    (written,) = folder.glob("figures*.json")
    report = json.loads(written.read_text())
    assert report["n-samples"]["lab_answer"]["effective"] == report["n-samples"]["lab_choice"]["effective"] == NUM_PROMPTS
    receipt = (getattr(answer, "kv_transfer_params", None) or {}).get("unsafe_routes")
    policy = Receipt.from_dict(receipt).policy if receipt else None
    found = report["results"]["lab_answer"]["exact_match,stripped"], report["results"]["lab_choice"]["acc,none"]
    return *found, policy if plan is None else accepted


def test_utility_of_the_undefended_model(tmp_path):
    assert figures(tmp_path) == (1.0, 1.0, None)


def test_utility_under_a_policy(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(POLICY))
    exact_match, accuracy, policy = figures(tmp_path, "--route-policy", str(path))
    assert policy == RoutePolicy.from_json(POLICY).digest
    assert 0 <= exact_match <= 1 and 0 <= accuracy <= 1


def test_utility_under_a_plan(tmp_path):
    """Plans go where text is generated; log-probabilities are asked for without `gen_kwargs`."""
    exact_match, accuracy, accepted = figures(tmp_path, "--enable-route-overrides", plan=PLAN)
    assert accepted == NUM_PROMPTS
    assert 0 <= exact_match <= 1 and accuracy == 1
