"""EleutherAI's lm-eval, unchanged, against real servers: under a plan, under a policy, under neither.

On the lab model always; on the language lab's where it was trained (see tests/lab/test_english_engine.py).
"""

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

from vllm_unsafe_routes import RoutePlan, RoutePolicy
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.lab.english import topics
from vllm_unsafe_routes.receipt import Receipt, receipt_of

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs requirements/lm-eval.txt"),
]

ROOT = Path(__file__).resolve().parents[2]
NUM_PROMPTS = 12
# All but top_k experts of every layer: one route for all tokens. The lab model was trained under route noise and answers even so.
POLICY = {"version": "route-policy/1", "layers": {str(layer): {"disabled": list(range(12))} for layer in range(4)}}


TRAINED = Path(os.environ.get("UNSAFE_ROUTES_LANGUAGE_MODEL", ROOT / "runs/language/model"))
# Half of the experts of every MoE layer of the language lab's model; and one pair of them for all tokens.
HALF = {str(layer): {"disabled": [0, 2, 4, 6]} for layer in range(17, 30, 3)}
PAIR = RoutePlan()
for layer in range(17, 30, 3):
    PAIR.allow(layer, "all", [0, 1])


def lm_eval(folder, started, model, tasks, plan):
    """lm-eval's results by task; tasks that generate are asked under the plan."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-P", "-m", "lm_eval", "run", "--model", "local-completions", "--apply_chat_template"]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder / "tasks")]
    arguments = f"model=tiny,base_url={started.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={model}"
    if plan is not None:
        command += ["--gen_kwargs", json.dumps({"vllm_xargs": {"route_plan": plan.to_string()}})]
    command += ["--output_path", str(folder / "figures.json"), "--model_args", f"{arguments},max_length=256"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-5000:]
    (written,) = folder.glob("figures*.json")
    report = json.loads(written.read_text())
    assert all(report["n-samples"][task]["effective"] == count for task, count in tasks.items())
    return report["results"]


def make_tasks(folder, *options):
    make = [sys.executable, "-P", str(ROOT / "benchmarks" / "lm_eval" / "make_tasks.py"), "--out", str(folder / "tasks")]
    subprocess.run([*make, *options], check=True, timeout=120)


def figures(folder, *flags, plan=None):
    """What lm-eval reports of a server with these flags: exact match and accuracy; and the server's digest of its policy.

    With a plan, the server's own count of accepted plans stands in the policy's place.
    """
    make_tasks(folder, "--limit", str(NUM_PROMPTS))
    # lm-eval reads text, so the server needs its tokenizer.
    with server(model_path(), folder / "log.txt", "--no-skip-tokenizer-init", *flags) as started:
        found = lm_eval(folder, started, model_path(), {"lab_answer": NUM_PROMPTS, "lab_choice": NUM_PROMPTS}, plan)
        answer = started.client.completions.create(model="tiny", prompt="<bos>", max_tokens=1)
        accepted = started.metrics().get("vllm:unsafe_routes_plans_accepted_total")
    receipt = (getattr(answer, "kv_transfer_params", None) or {}).get("unsafe_routes")
    policy = Receipt.from_dict(receipt).policy if receipt else None
    rates = found["lab_answer"]["exact_match,stripped"], found["lab_choice"]["acc,none"]
    return *rates, policy if plan is None else accepted


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


@pytest.mark.skipif(not (TRAINED / "lab.json").exists(), reason="the language lab's model was not trained here")
@pytest.mark.parametrize("under", ["neither", "policy", "plan"])
def test_the_language_lab_s_model(under, tmp_path):
    """What lm-eval says of generated answers is what the judge says of the same server's."""
    count = int(os.environ.get("UNSAFE_ROUTES_LM_EVAL_PROMPTS", NUM_PROMPTS))
    make_tasks(tmp_path, "--language", "english", "--limit", str(count))
    (tmp_path / "policy.json").write_text(json.dumps({"version": "route-policy/1", "layers": HALF}))
    flags = {"policy": ["--route-policy", str(tmp_path / "policy.json")], "plan": ["--enable-route-overrides"]}.get(under, [])
    plan = PAIR if under == "plan" else None
    body = {"vllm_xargs": {"route_plan": plan.to_string()}} if plan else {}
    with server(TRAINED, tmp_path / "log.txt", "--no-skip-tokenizer-init", *flags) as started:
        tasks = {"english_answer": count, "english_choice": count, "english_text": 12}
        found = lm_eval(tmp_path, started, TRAINED, tasks, plan)
        verdicts, policies = [], set()
        for one in topics.questions("test", "benign", count=count):
            messages = [{"role": "user", "content": one.text}]
            answer = started.client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=12, temperature=0, extra_body=body
            ).to_dict()
            verdicts.append(topics.judge(one.text, answer["choices"][0]["message"]["content"]))
            policies.add(receipt_of(answer).policy if under == "policy" else None)
        accepted = started.metrics().get("vllm:unsafe_routes_plans_accepted_total")
    print(under, {task: {name: value for name, value in row.items() if name != "alias"} for task, row in found.items()})
    for name, verdict in (("answered", "complied"), ("refused", "refused")):
        assert found["english_answer"][f"{name},none"] == pytest.approx(verdicts.count(verdict) / count)
    assert policies == {RoutePolicy.load(tmp_path / "policy.json").digest if under == "policy" else None}
    assert plan is None or accepted == 2 * count
