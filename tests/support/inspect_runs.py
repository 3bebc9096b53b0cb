"""`inspect eval` on a real server of the lab model, and what its log says."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from servers import server

from vllm_unsafe_routes import RoutePlan, lab
from vllm_unsafe_routes.lab import language

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


def inspect_eval(folder: Path, url: str, task: str, *more: str, **environment: str) -> Any:
    """The log that `inspect eval` writes, read back."""
    from inspect_ai.log import read_eval_log

    out = folder / f"log-{len(list(folder.glob('log-*')))}"
    command = [sys.executable, "-P", "-m", "inspect_ai", "eval", task]
    command += ["--model", "vllm-unsafe-routes/tiny", "--model-base-url", f"{url}/v1", "--log-dir", str(out), "--display", "none"]
    command += ["--temperature", "0", "--max-tokens", "32", "--max-retries", "0", *more]
    env = {**os.environ, "XDG_DATA_HOME": str(folder), "XDG_CACHE_HOME": str(folder), "PYTHONPATH": "", **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    paths = list(out.glob("*.eval"))
    assert len(paths) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    log = read_eval_log(str(paths[0]))
    assert done.returncode == 0 or log.status == "error", done.stderr[-3000:]
    return log


def receipts(log: Any) -> list[dict[str, Any] | None]:
    return [(sample.output.metadata or {}).get("unsafe_routes") for sample in log.samples]


def own_scores(url: str, plan: RoutePlan | None, system: str = "", prompts: Any = PROMPTS) -> list[float]:
    """What this project's judge says of the same server's answers, without Inspect."""
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    found = []
    for one in prompts:
        body = {} if plan is None else {"vllm_xargs": {"route_plan": plan.to_string()}}
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": one.text})
        answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=32, temperature=0, extra_body=body)
        found.append(float(language.judge(one, answer.choices[0].message.content) == "complied"))
    return found
